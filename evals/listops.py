"""usage: python -m evals.listops [--shapes LxH ...] [--steps N] [--seeds N] [--max-length N] [--max-depth N]

Deep against wide (Wide Attention, Brown et al. 2022): decoders with the same number of heads in all, layers times heads
per layer, trained from scratch with one recipe on ListOps, whose answer is the last token's. Reports accuracy, weights
of the blocks, and the time of a forward pass for one sequence.

ListOps: nested lists of digits under MIN, MAX, MED (whole part of the median) and SM (sum mod 10); a node above the
greatest depth is an operator with probability 1/4. A sequence is scored by the last position, which sees all of it; in
the paper an encoder reads it, and for a single layer that is the same.

--shapes (6x4 3x8 1x24): layers x heads of width 16, at d_model 128 and feed-forward width 256. --steps (1500) of 32
sequences, --seeds (1), --min-length (16) and --max-length (100) tokens, --max-depth (4), --max-args (5), --lr (1e-3),
--samples (20000). A task that should need layers: --max-depth 10 --min-length 50 --max-length 200. Ten minutes on one
CPU core; --steps 200 shows that it works. Prints a table and a last line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import statistics
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evals.command import run_command
from llm.core.errors import UserError
from llm.core.init import initialise
from llm.core.seq import SeqInfo
from llm.models.config import ModelConfig
from llm.models.zoo.wide import aspect, count_matrices

OPERATORS = ("MIN", "MAX", "MED", "SM")
CLOSE, PAD = 14, 15
"""Tokens: digits 0 to 9, the four operators 10 to 13, the closing bracket, padding."""
VOCAB = 16
BATCH = 32


def expression(rng: random.Random, max_depth: int, max_args: int, depth: int = 1) -> tuple[list[int], int]:
    """(tokens, value) of a random list."""
    if depth >= max_depth or rng.random() >= 0.25:
        digit = rng.randrange(10)
        return [digit], digit
    return listed(rng, max_depth, max_args, depth)


def listed(rng: random.Random, max_depth: int, max_args: int, depth: int) -> tuple[list[int], int]:
    """(tokens, value) of an operator with its arguments."""
    operator = rng.randrange(len(OPERATORS))
    parts = [expression(rng, max_depth, max_args, depth + 1) for _ in range(rng.randint(2, max_args))]
    tokens = [10 + operator, *(token for part, _ in parts for token in part), CLOSE]
    return tokens, apply(OPERATORS[operator], [value for _, value in parts])


def apply(operator: str, values: list[int]) -> int:
    """The value of an operator."""
    if operator == "SM":
        return sum(values) % 10
    if operator == "MED":
        return int(statistics.median(values))
    return min(values) if operator == "MIN" else max(values)


def samples(
    n: int, seed: int, *, max_depth: int, max_args: int, min_length: int, max_length: int
) -> list[tuple[list[int], int]]:
    """Distinct lists of at least one operator, min_length to max_length tokens long, with their values."""
    rng = random.Random(seed)
    found: dict[tuple[int, ...], int] = {}
    for _ in range(200 * n):
        tokens, value = listed(rng, max_depth, max_args, 1)
        if min_length <= len(tokens) <= max_length:
            found.setdefault(tuple(tokens), value)
        if len(found) == n:
            return [(list(key), value) for key, value in found.items()]
    raise UserError(f"{len(found)} different lists of {min_length} to {max_length} tokens came up; {n} are needed")


def batch_of(rows: list[tuple[list[int], int]]) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens [B, T] padded on the right, index of the last token [B], value [B])."""
    longest = max(len(tokens) for tokens, _ in rows)
    tokens = torch.full((len(rows), longest), PAD)
    for row, (ids, _) in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
    return tokens, torch.tensor([len(ids) - 1 for ids, _ in rows]), torch.tensor([value for _, value in rows])


def answer(model: Any, tokens: Tensor, last: Tensor) -> Tensor:
    """Logits [B, 10] of the value, from the last position of each row."""
    hidden = model(tokens, SeqInfo.contiguous(*tokens.shape)).hidden
    return model.head(hidden[torch.arange(len(last)), last])[:, :10]


def shape(text: str) -> tuple[int, int]:
    """ "6x4" -> (6, 4)."""
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"--shapes {text}: give layers x heads, such as 6x4")
    return int(parts[0]), int(parts[1])


def build(n_layers: int, n_heads: int, max_length: int) -> ModelConfig:
    """A decoder of that shape."""
    section = aspect(n_layers, n_heads, 128, 16, 256)
    return ModelConfig.model_validate({**section, "vocab_size": VOCAB, "max_seq_len": max_length})


def train(config: ModelConfig, rows: list[tuple[list[int], int]], steps: int, lr: float, seed: int) -> Any:
    """A model trained on random batches; AdamW, 5% of warm-up, then a cosine to zero."""
    model = config.build("cpu")
    initialise(model, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    warmup = max(1, steps // 20)
    rng = random.Random(seed)
    for step in range(steps):
        factor = min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        tokens, last, values = batch_of(rng.sample(rows, BATCH))
        loss = F.cross_entropy(answer(model, tokens, last), values)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.inference_mode()
def accuracy(model: Any, rows: list[tuple[list[int], int]]) -> float:
    """Share of right answers."""
    rows = sorted(rows, key=lambda row: len(row[0]))
    right = 0
    for start in range(0, len(rows), 128):
        tokens, last, values = batch_of(rows[start : start + 128])
        right += int((answer(model, tokens, last).argmax(-1) == values).sum())
    return right / len(rows)


@torch.inference_mode()
def latency(model: Any, length: int, repeats: int = 50) -> float:
    """Seconds of a forward pass of one sequence, the least of some: others may use the machine."""
    tokens, last = torch.zeros(1, length, dtype=torch.int64), torch.tensor([length - 1])
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        answer(model, tokens, last)
        times.append(time.perf_counter() - began)
    return min(times)


def main(argv: list[str]) -> int:
    """Train and compare all shapes."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--shapes", nargs="+", default=["6x4", "3x8", "1x24"])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--min-length", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=100)
    parser.add_argument("--max-depth", type=int, default=4)
    parser.add_argument("--max-args", type=int, default=5)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--samples", type=int, default=20_000)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    shapes = [shape(text) for text in given.shapes]
    rows = samples(
        given.samples + 2000, 0, max_depth=given.max_depth, max_args=given.max_args, min_length=given.min_length,
        max_length=given.max_length,
    )  # fmt: skip
    held_out, rows = rows[:2000], rows[2000:]
    counts = [sum(value == digit for _, value in held_out) for digit in range(10)]
    likeliest = max(counts) / len(held_out)
    mean = statistics.mean(len(tokens) for tokens, _ in rows)
    print(
        f"{len(rows):,} lists, {mean:.0f} tokens on average; the likeliest answer is right {likeliest:.3f} of the time"
    )
    print(f"{'layers x heads':<16} {'block weights':>14} {'accuracy':>9} {'by seed':<24} {'latency':>9}")
    found: dict[str, Any] = {}
    for text, (n_layers, n_heads) in zip(given.shapes, shapes):
        config = build(n_layers, n_heads, given.max_length)
        models = [train(config, rows, given.steps, given.lr, seed) for seed in range(given.seeds)]
        scores = [accuracy(model, held_out) for model in models]
        seconds = latency(models[0], given.max_length)
        weights = count_matrices(config)["both"]
        found[text] = {"weights": weights, "accuracy": scores, "latency": seconds}
        by_seed = ", ".join(f"{score:.3f}" for score in scores)
        shown = f"{text:<16} {weights:14,} {statistics.mean(scores):9.3f} {by_seed:<24} {1000 * seconds:6.2f} ms"
        print(shown, flush=True)
    result = {"tool": "listops", "likeliest": likeliest, "shapes": found, "steps": given.steps, "seeds": given.seeds}
    result |= {
        "min_length": given.min_length,
        "max_length": given.max_length,
        "max_depth": given.max_depth,
        "lr": given.lr,
    }
    print(json.dumps(result | {"torch": torch.__version__, "machine": platform.machine()}))
    return 0


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        sys.exit(0)
    run_command(main, "listops")
