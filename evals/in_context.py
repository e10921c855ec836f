"""usage: python -m evals.in_context [--models standard looped algoformer] [--steps 2500] [--d 4] [--points 16]

Do loops with shared weights learn in their context as well as as many layers of their own?

Decoders of GPT-2's kind learn regression in context (evals/synthetic: x1 y1 x2 y2 ..., y = w . Phi(x) with w new in
each sequence and Phi a fixed random network); squared errors are relative to the mean square of y, by the number of
pairs seen. Besides, the looped ones make more and fewer loops than they were trained with, beside as many steps of two
solvers on the true Phi(x). Prints two tables and last a line of JSON.

models:
  standard         --layers layers
  looped           one layer, applied --loops times, which reads its last output plus the embeddings
  algoformer       a layer before, a looped one and a layer after
  algoformer-last  the same with a loss on the last iterate alone, instead of the last --window

The published setting is --d 20 --points 40 --d-model 256 --heads 8 --representation 20 --loops 20 --window 15
--layers 12 --batch 64 --lr 1e-4 --steps 500000, for a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import numpy as np
import torch

from evals.synthetic.base import squared_error
from evals.synthetic.regression import Regression
from evals.synthetic.run import conditions
from evals.synthetic.train import TrainSettings, VectorModel, evaluate, fit
from llm.models.config import ModelConfig

LOOPED = ("looped", "algoformer", "algoformer-last")


def model_config(args: argparse.Namespace, name: str, task: Regression) -> ModelConfig:
    """A decoder of GPT-2's kind with its loop."""
    block = {
        "mixer": {"type": "attention", "n_heads": args.heads, "bias": True},
        "channel": {"type": "mlp", "bias": True},
    }
    loop = {"type": "loop", "n_loop": 1, "n_loops": args.loops, "inject": args.inject, "loss_window": args.window}
    n_layers, wrappers = {
        "standard": (args.layers, []),
        "looped": (1, [loop]),
        "algoformer": (3, [{**loop, "n_pre": 1}]),
        "algoformer-last": (3, [{**loop, "n_pre": 1, "loss_window": 1}]),
    }[name]
    return ModelConfig.model_validate(
        {
            "vocab_size": 2,
            "d_model": args.d_model,
            "max_seq_len": task.n_positions,
            "layers": [{"pattern": [block], "repeat": n_layers}],
            "position": "learned",
            "norm": "layer_norm",
            "init": {"std": None},
            "wrappers": wrappers,
        }
    )


def loop_counts(args: argparse.Namespace) -> list[int]:
    """Numbers of loops that are tried."""
    return sorted({1, 2, args.loops // 2, args.loops, 2 * args.loops, 4 * args.loops} - {0})


def train(args: argparse.Namespace, name: str, task: Regression) -> dict[str, Any]:
    """One row: error by pairs seen, and for a loop the error by number of loops."""
    config = model_config(args, name, task)
    settings = TrainSettings(
        steps=args.steps, batch=args.batch, lr=args.lr, warmup=args.warmup, weight_decay=0.0,
        eval_every=max(1, args.steps // 5), eval_examples=args.examples, device=args.device,
    )  # fmt: skip
    fitted = fit(task, config, settings, args.seed, label=name)
    model = fitted.model
    assert isinstance(model, VectorModel)
    by_loops = {}
    if name in LOOPED:
        device = next(model.parameters()).device
        for n_loops in loop_counts(args):
            with model.decoder.loops(n_loops):  # type: ignore[operator]
                scores = evaluate(model, task, settings, args.seed, device)
            by_loops[str(n_loops)] = scores["by_group"][str(args.points - 1)]
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "error": fitted.scores["error"],
        "by_pairs": fitted.scores["by_group"],
        "by_loops": by_loops,
        "cpu_seconds": round(fitted.cpu_seconds, 1),
    }


def gradient_descent(x: np.ndarray, y: np.ndarray, steps: int) -> np.ndarray:
    """Weights [B, F] after steps from 0 on the mean squared error of x [B, N, F] to y [B, N], each of 1 / curvature."""
    hessian = x.transpose(0, 2, 1) @ x
    rate = 1.0 / np.linalg.eigvalsh(hessian)[:, -1:]
    w = np.zeros(x.shape[::2])
    for _ in range(steps):
        residual = (x @ w[..., None])[..., 0] - y
        w = w - rate * (x.transpose(0, 2, 1) @ residual[..., None])[..., 0]
    return w


def newton_inverse(s: np.ndarray, steps: int) -> np.ndarray:
    """Newton's iteration X <- X (2 I - S X) for the inverses of matrices S [B, F, F]."""
    scale = np.abs(s).sum(axis=1).max(axis=1) * np.abs(s).sum(axis=2).max(axis=1)
    x = s.transpose(0, 2, 1) / scale[:, None, None]
    for _ in range(steps):
        x = x @ (2 * np.eye(s.shape[-1]) - s @ x)
    return x


def solvers(task: Regression, inputs: np.ndarray, steps: list[int]) -> dict[str, dict[str, float]]:
    """Relative squared error on the last pair from the earlier ones, by solver and number of steps."""
    x, y = task.features(inputs[:, 0::2].astype(np.float64)), inputs[:, 1::2, 0].astype(np.float64)
    known, answers, query, wanted = x[:, :-1], y[:, :-1], x[:, -1], y[:, -1]
    moments = known.transpose(0, 2, 1) @ known
    right = (known.transpose(0, 2, 1) @ answers[..., None])[..., 0]
    found: dict[str, dict[str, float]] = {"gradient descent": {}, "Newton": {}}
    for n in steps:
        weights = {
            "gradient descent": gradient_descent(known, answers, n),
            "Newton": (newton_inverse(moments, n) @ right[..., None])[..., 0],
        }
        for name, w in weights.items():
            error = np.square((w * query).sum(axis=1) - wanted).mean() / np.square(y).mean()
            found[name][str(n)] = float(error)
    return found


def table(record: dict[str, Any]) -> str:
    """The record for people."""
    shown, rows = record["shown"], record["rows"]
    lines = [["model", "parameters", *(f"{n} pairs" for n in shown), "all", "cpu s"]]
    for row in rows:
        errors = [f"{row['by_pairs'][str(n)]:.3f}" for n in shown]
        lines.append(
            [row["model"], f"{row['parameters']:,}", *errors, f"{row['error']:.3f}", f"{row['cpu_seconds']:.0f}"]
        )
    for name, found in record["oracles"].items():
        lines.append([name, "", *(f"{found['by_group'][str(n)]:.3f}" for n in shown), f"{found['error']:.3f}", ""])
    text = ["relative squared error after so many pairs", *_aligned(lines)]
    loops = sorted({int(n) for row in rows for n in row["by_loops"]})
    if loops:
        lines = [["model", *(f"{n} loops" for n in loops)]]
        for row in rows:
            if row["by_loops"]:
                lines.append([row["model"], *(f"{row['by_loops'][str(n)]:.3f}" for n in loops)])
        for name, errors_by_steps in record["solvers"].items():
            lines.append([f"{name}, as many steps", *(f"{errors_by_steps[str(n)]:.3f}" for n in loops)])
        last, n_loops = record["settings"]["points"] - 1, record["settings"]["loops"]
        text += ["", f"after {last} pairs, by the number of loops (trained with {n_loops})", *_aligned(lines)]
    return "\n".join(text)


def _aligned(lines: list[list[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return ["  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines]


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m evals.in_context", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=["standard", *LOOPED], default=["standard", *LOOPED[:2]])
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=float, default=0.05, help="share of the steps")
    parser.add_argument("--d", type=int, default=4, help="width of x")
    parser.add_argument("--points", type=int, default=16, help="pairs of a sequence")
    parser.add_argument("--representation", type=int, default=8, help="width of Phi; 0: Phi(x) = x")
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--d-model", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=3, help="layers of the standard model")
    parser.add_argument("--loops", type=int, default=6)
    parser.add_argument("--window", type=int, default=5, help="last iterates that bear a loss")
    parser.add_argument("--inject", choices=["none", "add", "mul"], default="add")
    parser.add_argument("--examples", type=int, default=1024, help="held-out sequences")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="cpu")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parse(argv)
    torch.set_num_threads(1)
    task = Regression(d=args.d, n_points=args.points, noise=args.noise, d_representation=args.representation or None)
    held = task.examples(args.seed, "valid", 0, args.examples)
    last = args.points - 1
    record: dict[str, Any] = {
        "tool": "in_context",
        "settings": vars(args),
        "shown": sorted({n for n in (1, last // 4, last // 2, 3 * last // 4, last) if n}),
        "rows": [train(args, name, task) for name in args.models],
        "solvers": solvers(task, held.inputs, loop_counts(args)),
        "oracles": {name: squared_error(found, held) for name, found in task.oracles(held.inputs).items()},
        "conditions": conditions(1),
    }
    print(table(record))
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
