"""usage: python -m evals.remember [--models rmt armt] [--stages 2 3 4 6] [--test 4 8 16 32 64] [--steps 300] [--seed 0]

Do recurrent memories keep a fact over segments that do not matter, also over many more than they were trained on?

Small decoders with a memory from segment to segment learn the task `remember` (evals/synthetic): key-value pairs (one,
by default) in the first segments, filler, and the question at the end. Training goes through stages of so many segments
(--stages), each up to --steps steps, ended early at an accuracy of 0.99. Then the same weights are put to as many
segments as --test says. Prints a table, a line per model, and last a line of JSON.

models:
  rmt     memory tokens (Recurrent Memory Transformer)
  rmt-r   the same with retrieval from all past memories
  armt    an associative memory in each layer (Associative RMT)
  none    no memory: what can be guessed
  whole   no segments: attention to everything
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch

from evals.synthetic.remember import Remember
from evals.synthetic.run import conditions
from evals.synthetic.train import Fitted, TrainSettings, build, evaluate, fit
from llm.models.config import ModelConfig

SEGMENT = 8


def wrapper(name: str, n_memory: int, d_memory: int) -> list[dict[str, Any]]:
    """What stands around the decoder of a model."""
    memory = {"segment": SEGMENT, "n_memory": n_memory}
    return {
        "rmt": [{"type": "rmt", **memory}],
        "rmt-r": [{"type": "rmt", "retrieval": True, **memory}],
        "armt": [{"type": "armt", "d_memory": d_memory, **memory}],
        "none": [{"type": "rmt", "segment": SEGMENT, "n_memory": 0}],
        "whole": [],
    }[name]


def model_config(args: argparse.Namespace, name: str, task: Remember, n_segments: int) -> ModelConfig:
    """The decoder with its wrapper, with room for so many segments."""
    block = {"mixer": {"type": "attention", "n_heads": 4}, "channel": {"type": "mlp", "bias": True}}
    return ModelConfig.model_validate(
        {
            "vocab_size": task.n_ids,
            "d_model": args.d_model,
            "max_seq_len": n_segments * SEGMENT,
            "layers": [{"pattern": [block], "repeat": args.layers}],
            "init": {"std": None},
            "wrappers": wrapper(name, args.memory, args.d_memory),
        }
    )


def train(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """One row: a model taken through all stages, then put to all numbers of segments."""
    longest = max([*args.stages, *args.test])
    task = Remember(length=args.stages[0] * SEGMENT, segment=SEGMENT, n_pairs=args.pairs)
    config = model_config(args, name, task, longest)
    settings = TrainSettings(
        steps=args.steps, batch=args.batch, lr=args.lr, stop_at=0.99, eval_every=25, eval_examples=args.examples,
        weight_decay=0.01, device="cpu",
    )  # fmt: skip
    model = build(config, task, args.seed, torch.device("cpu"))
    began = time.process_time()
    stages: list[Fitted] = []
    for number, n_segments in enumerate(args.stages):
        stage = task.longer(n_segments * SEGMENT)
        label = f"{name}, {n_segments} segments,"
        stages.append(fit(stage, config, settings, args.seed + 1000 * number, label=label, model=model))
    seconds = time.process_time() - began
    found = {
        n: evaluate(model, task.longer(n * SEGMENT), settings, args.seed, torch.device("cpu"))["accuracy"]
        for n in args.test
    }
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "state_bytes": config.cost(longest * SEGMENT, "decode", 4).total.state_bytes_per_seq,
        "stages": {str(n): stage.scores["accuracy"] for n, stage in zip(args.stages, stages, strict=True)},
        "steps": [stage.steps for stage in stages],
        "test": {str(n): value for n, value in found.items()},
        "cpu_seconds": round(seconds, 1),
    }


def table(record: dict[str, Any]) -> str:
    """The record for people."""
    trained, tested = record["stages"], record["test"]
    head = ["model", "parameters", "state bytes", "steps", *(f"at {n}" for n in trained)]
    lines = [head + [f"then {n}" for n in tested] + ["cpu s"]]
    for row in record["rows"]:
        cells = [row["model"], f"{row['parameters']:,}", f"{row['state_bytes']:,}", "+".join(map(str, row["steps"]))]
        cells += [f"{row['stages'][str(n)]:.3f}" for n in trained] + [f"{row['test'][str(n)]:.3f}" for n in tested]
        lines.append([*cells, f"{row['cpu_seconds']:.0f}"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    note = (
        f"accuracy after {record['pairs']} pair(s) and filler, segments of {SEGMENT}: at the end of each stage of "
        f"training, then with the last weights; chance {record['chance']:.4f}"
    )
    return "\n".join([note, *("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines)])


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m evals.remember", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ("rmt", "rmt-r", "armt", "none", "whole")
    parser.add_argument("--models", nargs="+", choices=names, default=["rmt", "armt"])
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 3, 4, 6], help="segments of each stage")
    parser.add_argument("--test", nargs="+", type=int, default=[6, 12, 24, 48, 96], help="segments to be tried after")
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300, help="most steps of a stage")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--d-model", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--memory", type=int, default=4, help="memory tokens")
    parser.add_argument("--d-memory", type=int, default=16, help="width of the associative memory's keys")
    parser.add_argument("--examples", type=int, default=256, help="held-out examples")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    shortest = min([*args.stages, *args.test])
    if shortest <= args.pairs:
        parser.error(f"{args.pairs} pairs need at least {args.pairs + 1} segments; --stages and --test have {shortest}")
    return args


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parse(argv)
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "tool": "remember",
        "settings": vars(args),
        "pairs": args.pairs,
        "stages": args.stages,
        "test": args.test,
        "chance": Remember().chance(),
        "rows": [train(args, name) for name in args.models],
        "conditions": conditions(1),
    }
    print(table(record))
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
