"""What a preparation prints at its end."""

from __future__ import annotations

from typing import Any


def summary(manifest: dict[str, Any], out: str, seconds: float) -> str:
    """A few lines: documents, tokens and bytes of each split, the tokenizer, the rejects, the speed."""
    tokenizer = manifest["tokenizer"]
    lines = [
        f"prepared {out}: tokenizer {tokenizer['kind']}, {tokenizer['vocab_size']:,} tokens, {tokenizer['hash'][:12]}"
    ]
    total = 0
    for split, entry in manifest["splits"].items():
        if not entry["documents"]:
            continue
        total += entry["bytes"]
        ratio = entry["bytes"] / max(1, entry["tokens"])
        lines.append(
            f"  {split:<5} {entry['documents']:>12,} documents {entry['tokens']:>16,} tokens "
            f"{entry['bytes']:>16,} bytes ({ratio:.2f} bytes per token)"
        )
    if manifest["rejects"]:
        lines.append(f"  {manifest['rejects']:,} records rejected: see {out}/rejects.jsonl")
    lines.append(f"  {seconds:.1f} s, {total / 1e6 / max(seconds, 1e-9):.1f} MB/s")
    return "\n".join(lines)
