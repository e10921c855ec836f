"""Activator's gating unit in small byte-level language models on Python's own library: without any mixing of tokens, as
its published code has it, with the unit along time, and beside attention; the same batches for every arm of a seed.

Prints held-out nats per byte and a last line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch

from evals.byte_lm import Recipe, fit, library, score
from llm.models.config import ModelConfig


def arms(d_model: int, heads: int) -> dict[str, list[dict[str, Any]]]:
    """Name -> blocks of a layer."""
    unit = {"type": "activator", "d_hidden": 2 * d_model}
    feed_forward = {"type": "mlp", "d_hidden": 2 * d_model, "bias": True}
    attention = {"type": "attention", "n_heads": heads}
    gated = {"type": "swiglu", "d_hidden": 2 * d_model, "bias": True}
    return {
        "no mixing, unit only": [{"channel": unit}],
        "no mixing, unit and feed-forward (published block)": [{"channel": unit}, {"channel": feed_forward}],
        "unit along time, and unit": [{"mixer": "glu_token_mixing", "channel": unit}],
        "attention and unit": [{"mixer": attention, "channel": unit}],
        "attention and SwiGLU of the same width": [{"mixer": attention, "channel": gated}],
    }


def main() -> None:
    """Train all arms and print the table."""
    parser = argparse.ArgumentParser("python -m evals.activator", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for name, default in (("steps", 150), ("seeds", 2), ("d-model", 64), ("layers", 2), ("heads", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=list(arms(1, 1)), default=list(arms(1, 1)))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    corpus = library()
    recipe = Recipe(args.steps, args.batch, args.seq_len, args.lr, warmup=max(1, args.steps // 10))
    print("| blocks | parameters | held-out nats per byte | ms a step |\n|---|---:|---:|---:|", flush=True)
    results: dict[str, list[dict[str, float]]] = {}
    for name in args.only:
        pattern = arms(args.d_model, args.heads)[name]
        config = ModelConfig.model_validate(
            {
                "vocab_size": 256, "d_model": args.d_model, "max_seq_len": args.seq_len, "norm": "layer_norm",
                "layers": [{"pattern": pattern, "repeat": args.layers}],
            }
        )  # fmt: skip
        for seed in range(args.seeds):
            fitted = fit(config, corpus, recipe, seed)
            results.setdefault(name, []).append(
                {
                    "held_out": float(score(fitted.model, corpus, args.seq_len).mean()),
                    "params": sum(p.numel() for p in fitted.model.parameters()),
                    "ms": 1000 * fitted.seconds / args.steps,
                }
            )
        mean = {key: statistics.fmean(row[key] for row in results[name]) for key in ("held_out", "params", "ms")}
        print(f"| {name} | {mean['params']:,.0f} | {mean['held_out']:.4f} | {mean['ms']:.0f} |", flush=True)
    print(json.dumps({"settings": vars(args), "torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    main()
