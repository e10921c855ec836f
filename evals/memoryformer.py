"""MemoryFormer against a dense block of the same width, as byte-level language models on Python's own library.

Dense: attention and an MLP of four times the width. Memory: q, k and v are memory layers of 8 bits, no output
projection, and the feed-forward part is two memory layers, at three times the dense learning rate (as published) unless
the row says otherwise. The same batches for every model of a seed.

Prints parameters, multiply-adds per token outside of attention, held-out nats per byte; a last line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch

from evals.byte_lm import Recipe, fit, library, score
from llm.models.config import ModelConfig
from llm.train.config import ParamGroupConfig

ROWWISE = [ParamGroupConfig(match=["*.tables"], optimizer="rowwise_adamw")]
ADAMW = [ParamGroupConfig(match=["*.tables"], weight_decay=0.0)]

VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {"dense": True, "rate": 1.0},
    "dense at three times the rate": {"dense": True},
    "memory, 8 bits": {},
    "memory at the dense rate": {"rate": 1.0},
    "memory, 4 bits": {"n_bits": 4},
    "memory, no middle norm": {"norm": None},
    "memory, the paper's weights": {"weighting": "prob"},
    "memory, tables not decayed": {"groups": ADAMW},
    "memory, row-wise AdamW": {"groups": ROWWISE},
}


def model(args: argparse.Namespace, settings: dict[str, Any]) -> ModelConfig:
    """The decoder of a variant."""
    mixer: dict[str, Any] = {"type": "attention", "n_heads": args.heads}
    channel: dict[str, Any] = {"type": "mlp", "d_hidden": 4 * args.d_model}
    linear: dict[str, Any] = {}
    if not settings.get("dense"):
        mixer |= {"qkv_bias": True, "out_proj": False}
        shared = {"n_bits": settings.get("n_bits", 8), "weighting": settings.get("weighting", "l1_prob")}
        norm = {"norm": settings["norm"]} if "norm" in settings else {}
        channel = {"type": "memory_ffn", **shared, **norm}
        linear = {"mixer.*": {"type": "memory_layer", **shared}}
    return ModelConfig.model_validate(
        {
            "vocab_size": 256,
            "d_model": args.d_model,
            "max_seq_len": args.seq_len,
            "layers": [{"pattern": [{"mixer": mixer, "channel": channel}], "repeat": args.layers}],
            "linear": linear,
            "position": {"type": "rope", "fraction": 0.25},
            "head": {"tied": False},
        }
    )


def run(variant: str, seed: int, args: argparse.Namespace, corpus: Any) -> dict[str, float]:
    """Figures of one model."""
    settings = VARIANTS[variant]
    config = model(args, settings)
    rate = args.lr * settings.get("rate", 3.0)
    recipe = Recipe(args.steps, args.batch, args.seq_len, rate, warmup=max(1, args.steps // 20))
    fitted = fit(config, corpus, recipe, seed, groups=settings.get("groups"))
    cost = config.cost(args.seq_len)
    return {
        "params": cost.total.params,
        "multiply_adds": (cost.blocks.flops_per_token - cost.blocks.attention_flops) / 2,
        "held_out": float(score(fitted.model, corpus, args.seq_len).mean()),
        "ms_per_step": 1000 * fitted.seconds / args.steps,
    }


def main() -> None:
    """Train all variants and print the table."""
    parser = argparse.ArgumentParser("python -m evals.memoryformer", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for name, default in (
        ("steps", 400), ("seeds", 1), ("d-model", 128), ("layers", 2), ("heads", 4), ("seq-len", 128), ("batch", 8),
        ("threads", 2),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=1e-3, help="of the dense model")
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    corpus = library()
    print("| model | parameters | multiply-adds of projections | held-out nats per byte | ms per step |")
    print("|---|---:|---:|---:|---:|", flush=True)
    results: dict[str, list[dict[str, float]]] = {}
    for variant in args.only:
        rows = results[variant] = [run(variant, seed, args, corpus) for seed in range(args.seeds)]
        held = [row["held_out"] for row in rows]
        spread = f" ± {statistics.stdev(held):.4f}" if len(held) > 1 else ""
        speed = statistics.fmean(row["ms_per_step"] for row in rows)
        counts = f"{rows[0]['params']:,.0f} | {rows[0]['multiply_adds']:,.0f}"
        print(f"| {variant} | {counts} | {statistics.fmean(held):.4f}{spread} | {speed:.0f} |", flush=True)
    print(json.dumps({"settings": vars(args), "torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    main()
