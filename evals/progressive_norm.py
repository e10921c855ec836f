"""Progressive re-parameterised batch norm (SLAB) against RMSNorm and against batch norm from scratch, as small
byte-level language models on Python's own library: the same batches for every variant of a seed.

Prints held-out nats per byte at the end, as inference computes them (running statistics), the same in the middle of
training, the training loss of the last tenth, and for models that can be merged: the largest change of a logit by
merging and the time of a decoded byte before and after. A last line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

from evals.byte_lm import Corpus, Recipe, decoder, fit, library, score
from llm.blocks.progressive_norm import PRepBN
from llm.core.seq import SeqInfo
from llm.models.merge_norms import merge_norms

RMS = {"type": "rms_norm", "eps": 1e-6}
VARIANTS: dict[str, dict[str, Any]] = {
    "RMSNorm": RMS,
    "BN from scratch": {"type": "prep_bn", "start": 0.0, "eta": False, "start_weight": 1.0},
    "RepBN from scratch": {"type": "prep_bn", "start": 0.0, "start_weight": 1.0},
    "PRepBN": {"type": "prep_bn"},
    "PRepBN, frozen at the end": {"type": "prep_bn", "freeze_share": 0.1},
    "PRepBN, weight 1": {"type": "prep_bn", "start_weight": 1.0, "freeze_share": 0.1},
    "PRepBN, weight 1, eta 1": {"type": "prep_bn", "start_weight": 1.0, "start_eta": 1.0, "freeze_share": 0.1},
}


def norm_of(variant: str, steps: int) -> dict[str, Any]:
    """The norm's config; shares of the run become steps."""
    norm = dict(VARIANTS[variant])
    share = norm.pop("freeze_share", 0.0)
    return norm | ({"freeze_steps": round(share * steps)} if share else {})


@torch.no_grad()
def decode_ms(model: Any, n_bytes: int = 32) -> float:
    """Milliseconds of a decoded byte at batch 1, the best of three runs."""
    found = []
    for _ in range(3):
        state = model.new_state(1, n_bytes, dtype=torch.float32, device="cpu")
        started = time.perf_counter()
        for t in range(n_bytes):
            model.head(model(torch.tensor([[t]]), SeqInfo.contiguous(1, 1, start=t), state=state).hidden)
        found.append((time.perf_counter() - started) / n_bytes)
    return 1000 * min(found)


@torch.no_grad()
def merged(model: Any, corpus: Corpus) -> dict[str, float]:
    """What merging changes."""
    rows = corpus.held[:512].long().view(4, 128)
    seq = SeqInfo.contiguous(4, 128)
    before = model.head(model(rows, seq).hidden)
    merge_norms(model)
    after = model.head(model(rows, seq).hidden)
    change = float((after - before).abs().max() / before.abs().max())
    return {"merging_changes": change, "ms_after": decode_ms(model)}


def run(variant: str, seed: int, args: argparse.Namespace, corpus: Corpus) -> dict[str, float]:
    """Figures of one model."""
    config = decoder(
        {"type": "attention", "n_heads": args.heads}, d_model=args.d_model, n_layers=args.layers,
        max_seq_len=args.seq_len, norm=norm_of(variant, args.steps), head={"tied": False},
    )  # fmt: skip
    recipe = Recipe(args.steps, args.batch, args.seq_len, args.lr, warmup=max(1, args.steps // 10))
    middle: list[float] = []
    fitted = fit(
        config, corpus, recipe, seed,
        on_step=lambda step, model: middle.append(float(score(model, corpus, args.seq_len, 8192).mean()))
        if step == args.steps // 2
        else None,
    )  # fmt: skip
    tail = fitted.losses[-max(1, args.steps // 10) :]
    row = {
        "held_out": float(score(fitted.model, corpus, args.seq_len).mean()),
        "middle": middle[0],
        "train": statistics.fmean(tail),
        "params": sum(p.numel() for p in fitted.model.parameters()),
    }
    row["ms_before"] = decode_ms(fitted.model)
    if any(isinstance(module, PRepBN) for module in fitted.model.modules()):
        row |= merged(fitted.model, corpus)
    return row


def main() -> None:
    """Train all variants and print the table."""
    parser = argparse.ArgumentParser("python -m evals.progressive_norm", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for name, default in (("steps", 200), ("seeds", 2), ("d-model", 64), ("layers", 4), ("heads", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    corpus = library()
    keys = ("held_out", "middle", "train", "merging_changes", "ms_before", "ms_after")
    print("| variant | parameters | held out | held out, middle | last tenth | merging | ms a byte | merged |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    results: dict[str, list[dict[str, float]]] = {}
    for variant in args.only:
        rows = results[variant] = [run(variant, seed, args, corpus) for seed in range(args.seeds)]
        cells = [f"{rows[0]['params']:,.0f}"]
        for key in keys:
            values = [row[key] for row in rows if key in row]
            form = ".1e" if key == "merging_changes" else ".2f" if key.startswith("ms") else ".4f"
            cells.append(format(statistics.fmean(values), form) if values else "")
        print(f"| {variant} | {' | '.join(cells)} |", flush=True)
    print(json.dumps({"settings": vars(args), "torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    main()
