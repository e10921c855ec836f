"""Growth of a small TokenFormer by parameter tokens, as byte-level language models on Python's own library.

A model of n tokens is trained for `steps`; then, each for `more` steps with a new warm-up and cosine,
  continued   the same model, not grown
  zero keys   grown to twice the tokens, keys of zero and the stored scale kept: outputs unchanged at growth
  random      grown as the released code does: random keys, scale by the new number of tokens
and, from scratch for `steps`, a model of twice the tokens. Beside them the first model with a softmax over its tokens,
with and without the factor n.

Prints held-out nats per byte before and after each training, and a last line of JSON.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from torch import Tensor

from evals.byte_lm import Corpus, Recipe, fit, library, score
from llm.checkpoint.hf.build import build_model
from llm.models.config import ModelConfig
from llm.models.growth import grow_tensors, grown_config
from llm.train.strategies.common import named_tensors


def tokenformer(args: argparse.Namespace, **settings: Any) -> ModelConfig:
    """A decoder whose projections all are Pattention, with parameter-free norms in its blocks."""
    n = args.n_tokens
    block = {
        "mixer": {"type": "attention", "n_heads": args.heads},
        "channel": {"type": "token_ffn", "n_tokens": 4 * n, **settings},
    }
    fields: dict[str, Any] = {
        "vocab_size": 256,
        "d_model": args.d_model,
        "max_seq_len": args.seq_len,
        "layers": [{"pattern": [block], "repeat": args.layers}],
        "linear": {"mixer.*": {"type": "pattention", "n_tokens": n, **settings}},
        "position": {"type": "rope", "fraction": 0.25},
        "norm": {"type": "layer_norm", "affine": False, "bias": False},
        "final_norm": "layer_norm",
    }
    return ModelConfig.model_validate(fields)


class Table:
    """Rows as they come, and all of them for the JSON line."""

    def __init__(self, args: argparse.Namespace, corpus: Corpus) -> None:
        self.args, self.corpus = args, corpus
        self.rows: dict[str, dict[str, Any]] = {}
        print("| model | parameters | steps | held out before | held out after | ms per step |")
        print("|---|---:|---:|---:|---:|---:|", flush=True)

    def held_out(self, config: ModelConfig, tensors: dict[str, Tensor]) -> float:
        """Nats per held-out byte."""
        return float(score(build_model(config, tensors), self.corpus, self.args.seq_len).mean())

    def train(
        self, name: str, config: ModelConfig, steps: int, seed: int, start: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Train a model and print its row; returns its parameters and buffers."""
        args = self.args
        recipe = Recipe(steps, args.batch, args.seq_len, args.lr, warmup=max(1, steps // 20))
        before = None if start is None else self.held_out(config, start)
        fitted = fit(config, self.corpus, recipe, seed, start=start)
        after = float(score(fitted.model, self.corpus, args.seq_len).mean())
        params = config.cost().total.params
        speed = 1000 * fitted.seconds / steps
        self.rows[name] = {"params": params, "steps": steps, "before": before, "after": after, "ms_per_step": speed}
        shown = "" if before is None else f"{before:.6f}"
        print(f"| {name} | {params:,} | {steps} | {shown} | {after:.4f} | {speed:.0f} |", flush=True)
        return {key: tensor.clone() for key, tensor in named_tensors(fitted.model).items()}


def main() -> None:
    """Train all models and print the table."""
    parser = argparse.ArgumentParser("python -m evals.tokenformer_growth", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for name, default in (
        ("steps", 600), ("more", 300), ("d-model", 128), ("n-tokens", 96), ("layers", 4), ("heads", 4),
        ("seq-len", 128), ("batch", 8), ("seed", 0), ("threads", 2),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--no-softmax", action="store_true", help="leave out the two models with a softmax")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    corpus = library()
    table = Table(args, corpus)

    small = tokenformer(args)
    large = grown_config(small, 2 * args.n_tokens)
    base = table.train("n tokens", small, args.steps, args.seed)
    base_loss = table.held_out(small, base)
    kept = grow_tensors(large, base, seed=args.seed)
    changed = grow_tensors(large, base, tau="sqrt_n", new_keys="random", seed=args.seed)
    table.train("continued", small, args.more, args.seed + 1, base)
    table.train("grown, zero keys, scale kept", large, args.more, args.seed + 1, kept)
    table.train("grown, random, scale by n", large, args.more, args.seed + 1, changed)
    table.train("2n tokens from scratch", large, args.steps, args.seed)
    if not args.no_softmax:
        table.train("n tokens, softmax times n", tokenformer(args, normalization="softmax"), args.steps, args.seed)
        plain = tokenformer(args, normalization="softmax", tau2=1)
        table.train("n tokens, softmax alone", plain, args.steps, args.seed)

    rows = table.rows
    zero, random = rows["grown, zero keys, scale kept"], rows["grown, random, scale by n"]
    facts = {
        "change_at_growth_zero_keys": zero["before"] - base_loss,
        "jump_at_growth_random": random["before"] - base_loss,
        "gain_over_continued": rows["continued"]["after"] - zero["after"],
        "grown_minus_scratch": zero["after"] - rows["2n tokens from scratch"]["after"],
        "share_of_the_steps": args.more / args.steps,
    }
    for name, value in facts.items():
        print(f"{name}: {value:.3g}")
    print(json.dumps({"settings": vars(args), "torch": torch.__version__, "results": rows, "facts": facts}))


if __name__ == "__main__":
    main()
