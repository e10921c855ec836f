"""Rotary attention against complex-vector attention (learned phase slopes and offsets), as small byte-level language
models on Python's own library: the same batches for every variant of a seed.

Prints held-out nats per byte at the trained length and at four times that, the mean over the first tenth of training,
and how far slopes have moved; a last line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch

from evals.byte_lm import Recipe, decoder, fit, library, score

VARIANTS: dict[str, dict[str, Any]] = {
    "rotary": {"type": "attention"},
    "slope 1 per head": {"type": "complexformer"},
    "slope drawn per head": {"type": "complexformer", "slope_init": "normal"},
    "slope 1 per layer": {"type": "complexformer", "adapt": "layer"},
}


def moved(model: Any) -> float:
    """Root mean square of slope - 1."""
    slopes = [p.detach().flatten() for name, p in model.named_parameters() if name.endswith("phase.slope")]
    return float((torch.cat(slopes) - 1).square().mean().sqrt()) if slopes else 0.0


def run(variant: str, seed: int, args: argparse.Namespace, corpus: Any) -> dict[str, float]:
    """Figures of one model."""
    mixer = VARIANTS[variant] | {"n_heads": args.heads}
    config = decoder(mixer, d_model=args.d_model, n_layers=args.layers, max_seq_len=4 * args.seq_len)
    recipe = Recipe(args.steps, args.batch, args.seq_len, args.lr, warmup=max(1, args.steps // 10))
    fitted = fit(config, corpus, recipe, seed)
    longer = score(fitted.model, corpus, 4 * args.seq_len)
    return {
        "held_out": float(score(fitted.model, corpus, args.seq_len).mean()),
        "longer": float(longer.mean()),
        "start": statistics.fmean(fitted.losses[: max(1, args.steps // 10)]),
        "moved": moved(fitted.model),
        "ms_per_step": 1000 * fitted.seconds / args.steps,
        "params": sum(p.numel() for p in fitted.model.parameters()),
    }


def main() -> None:
    """Train all variants and print the table."""
    parser = argparse.ArgumentParser("python -m evals.complexformer", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for name, default in (("steps", 200), ("seeds", 3), ("d-model", 64), ("layers", 2), ("heads", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    corpus = library()
    print(f"| variant | parameters | nats per byte | at 4 x {args.seq_len} | first tenth | slope - 1 | ms per step |")
    print("|---|---:|---:|---:|---:|---:|---:|", flush=True)
    results: dict[str, list[dict[str, float]]] = {}
    for variant in args.only:
        rows = results[variant] = [run(variant, seed, args, corpus) for seed in range(args.seeds)]
        cells = [f"{rows[0]['params']:,.0f}"]
        for key, digits in (("held_out", 4), ("longer", 4), ("start", 4), ("moved", 3), ("ms_per_step", 0)):
            values = [row[key] for row in rows]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 and key == "held_out" else ""
            cells.append(f"{statistics.fmean(values):.{digits}f}{spread}")
        print(f"| {variant} | {' | '.join(cells)} |", flush=True)
    print(json.dumps({"settings": vars(args), "torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    main()
