"""Legendre memory units, measured: `forms` compares the forms of the memory, `delay` trains language models to repeat
what they read a given number of tokens ago, `digits` classifies permuted digits pixel by pixel.

Each prints a table and a last line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.blocks.legendre import chunked, convolved, recurrent, spectrum, system_tables
from llm.core.errors import UserError
from llm.core.init import initialise
from llm.core.seq import SeqInfo
from llm.models.classifier import SequenceClassifierConfig
from llm.models.config import ModelConfig


def forms(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Largest difference of each form in fp32 from the recurrence in fp64, and milliseconds forward and backward."""
    print("| order | window | tokens | channels | form | largest difference | ms |")
    print("|---:|---:|---:|---:|---|---:|---:|", flush=True)
    results = []
    for order, window, length, channels in ((256, 128, 128, 1), (16, 256, 1024, 32), (32, 1024, 1024, 16)):
        exact = system_tables(order, (float(window),), 16, 8, False)
        low = {name: table.float() for name, table in exact.items()}
        response = spectrum(length, exact).to(torch.complex64)
        u = torch.randn(1, length, 1, channels, generator=torch.Generator().manual_seed(0)).relu()
        wanted = recurrent(u.double(), exact)
        ways: dict[str, Any] = {
            "steps": lambda u, low=low: recurrent(u, low),
            "chunks": lambda u, low=low: chunked(u, low),
            "FFT": lambda u, response=response: convolved(u, response),
        }
        for name, way in ways.items():
            inputs = u.clone().requires_grad_()
            times = []
            for _ in range(3):
                started = time.process_time()
                found = way(inputs)
                found.sum().backward()
                times.append(time.process_time() - started)
            error = float((found.detach() - wanted).abs().max())
            row = {"order": order, "window": window, "tokens": length, "channels": channels, "form": name,
                   "error": error, "ms": 1000 * min(times)}  # fmt: skip
            results.append(row)
            print(
                f"| {order} | {window} | {length} | {channels} | {name} | {error:.1e} | {row['ms']:.1f} |", flush=True
            )
    return results


DELAY_MIXERS: dict[str, dict[str, Any]] = {
    "lmu": {"type": "lmu"},
    "lmu, unit": {"type": "lmu", "unit": True},
    "none": {},
}


def delay(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Share of tokens that a small decoder repeats from `delay` tokens ago, for delays within the window and beyond."""
    print("| mixer | window | delay | accuracy | chance | loss |")
    print("|---|---:|---:|---:|---:|---:|", flush=True)
    results = []
    for name, fields in DELAY_MIXERS.items():
        for steps_back in args.delays:
            row = {"mixer": name, "window": args.window, "delay": steps_back} | _delay_run(fields, steps_back, args)
            results.append(row)
            print(
                f"| {name} | {args.window} | {steps_back} | {row['accuracy']:.3f} | {1 / args.vocab:.3f} "
                f"| {row['loss']:.3f} |",
                flush=True,
            )
    return results


def _delay_run(fields: dict[str, Any], steps_back: int, args: argparse.Namespace) -> dict[str, float]:
    memory = {"n_channels": args.channels, "order": args.order, "windows": [args.window]}
    block: dict[str, Any] = {"channel": {"type": "swiglu", "d_hidden": 2 * args.d_model}}
    if fields:
        block["mixer"] = fields | memory
    config = ModelConfig.model_validate(
        {
            "vocab_size": args.vocab,
            "d_model": args.d_model,
            "max_seq_len": args.length,
            "layers": [{"pattern": [block]}],
            "position": "none",
            "init": {"std": None},
        }
    )
    model: Any = config.build("cpu")
    initialise(model, args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    rng = torch.Generator().manual_seed(args.seed)
    losses, hits = [], []
    for step in range(args.steps):
        rows = torch.randint(args.vocab, (args.batch, args.length), generator=rng)
        logits = model.head(model(rows, SeqInfo.contiguous(*rows.shape)).hidden)[:, steps_back:].flatten(0, 1)
        targets = rows[:, : args.length - steps_back].flatten()
        loss = F.cross_entropy(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 20, 4 * (args.steps - step) / args.steps)
        optimizer.step()
        losses.append(loss.item())
        hits.append(float((logits.argmax(-1) == targets).float().mean()))
    last = max(1, args.steps // 20)
    return {"accuracy": statistics.fmean(hits[-last:]), "loss": statistics.fmean(losses[-last:])}


def digits(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Accuracy on scikit-learn's 8x8 digits read pixel by pixel in a fixed random order, and after part of them."""
    x, y = _digits(args.seed)
    n_train = 1297
    print("| model | parameters | accuracy by seed | after 16, 32, 48, 64 pixels | seconds |")
    print("|---|---:|---|---|---:|", flush=True)
    results = []
    makers = {"LMU, last frame": partial(_lmu, "last"), "LMU, mean of frames": partial(_lmu, "mean"), "LSTM": _LSTM}
    for name, make in makers.items():
        rows = []
        for seed in range(args.seeds):
            model: Any = make(seed)  # type: ignore[operator]
            seconds = _train_digits(model, x[:n_train], y[:n_train], args, seed)
            model.eval()
            with torch.no_grad():
                right = model.prefix_logits(x[n_train:]).argmax(-1) == y[n_train:, None]
            accuracy = right.float().mean(0)[15::16].tolist()
            n_params = sum(p.numel() for p in model.parameters())
            rows.append({"model": name, "params": n_params, "seed": seed, "accuracy": accuracy, "seconds": seconds})
        results += rows
        by_seed = ", ".join(f"{100 * row['accuracy'][-1]:.1f}" for row in rows)
        prefix = ", ".join(f"{100 * statistics.fmean(column):.1f}" for column in zip(*(r["accuracy"] for r in rows)))
        seconds = statistics.fmean(row["seconds"] for row in rows)
        print(f"| {name} | {rows[0]['params']:,} | {by_seed} | {prefix} | {seconds:.0f} |", flush=True)
    return results


def _digits(seed: int) -> tuple[Tensor, Tensor]:
    """(pixels [1797, 64, 1] in one random order for all, labels), images shuffled."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("scikit-learn is not installed; pip install 'manyformer[vision]'") from None
    data = load_digits()
    rng = torch.Generator().manual_seed(seed)
    pixels = torch.tensor(data.data, dtype=torch.float32)[:, torch.randperm(64, generator=rng), None] / 16
    order = torch.randperm(len(pixels), generator=rng)
    return pixels[order], torch.tensor(data.target)[order]


def _lmu(pool: str, seed: int) -> nn.Module:
    cell = {"d_input": 1, "n_classes": 10, "d_model": 64, "order": 32, "window": 64.0, "n_blocks": 0, "stem": None}
    config = SequenceClassifierConfig.model_validate(cell | {"pool": pool})
    model = config.build("cpu")
    initialise(model, seed)
    return model


class _LSTM(nn.Module):
    """24 units, as many parameters as the LMU has."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.lstm = nn.LSTM(1, 24, batch_first=True)
        self.head = nn.Linear(24, 10)

    def prefix_logits(self, x: Tensor) -> Tensor:
        """[B, N, 10]."""
        return self.head(self.lstm(x)[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def _train_digits(model: nn.Module, x: Tensor, y: Tensor, args: argparse.Namespace, seed: int) -> float:
    started = time.process_time()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    rng = torch.Generator().manual_seed(seed)
    for _ in range(args.epochs):
        for rows in torch.randperm(len(x), generator=rng).split(50):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return time.process_time() - started


def main(argv: list[str] | None = None) -> None:
    """Run one of the three."""
    parser = argparse.ArgumentParser(
        "python -m evals.lmu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("forms", help=forms.__doc__)
    sub = commands.add_parser("delay", help=delay.__doc__)
    sub.add_argument("--delays", type=int, nargs="+", default=[4, 16, 28, 32, 36, 48], help="tokens back")
    for name, default in (("window", 32), ("order", 32), ("channels", 16), ("vocab", 16), ("d-model", 64),
                          ("length", 96), ("batch", 16), ("steps", 200), ("seed", 0)):  # fmt: skip
        sub.add_argument(f"--{name}", type=int, default=default)
    sub.add_argument("--lr", type=float, default=1e-2)
    sub = commands.add_parser("digits", help=digits.__doc__)
    for name, default in (("epochs", 40), ("seeds", 3), ("seed", 0)):
        sub.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        results = {"forms": forms, "delay": delay, "digits": digits}[args.command](args)
    except UserError as error:
        sys.exit(str(error))
    print(json.dumps({"settings": vars(args), "torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    main()
