"""usage: python -m evals.mixer_speed [MIXER ...] [--seq-len N ...] [--d-model D] [--baseline MIXER] ...

Speed and memory of token mixers alone, at equal width, beside softmax attention:

  train      tokens/s of forward and backward over one batch, and how often the baseline's at the same length
  peak       most memory held by activations and gradients in that pass, MiB
  decode     milliseconds of one step after that many tokens of prompt
  state      decode state of one sequence, KiB

A MIXER is a registered name, a name with fields in braces, as in 'retention{n_heads: 4, chunk: 128}', or `all`. Fields
that are not given have their defaults, but n_heads, where there is one, is d_model / 64; what else has no default is
taken from the mixer's tiny config.

Prints a table and a last line of JSON. Times are the best of several rounds; on a CPU with one thread they are the
process's own CPU time, so that what else the machine does hardly matters.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from torch import Tensor

import llm.models.config  # noqa: F401  (registers every block)
from llm.blocks.base import MIXERS, MixerConfig, TokenMixer
from llm.core.errors import UserError
from llm.core.init import initialise
from llm.core.seq import SeqInfo
from llm.models.config import ModelConfig
from llm.train.callbacks.environment import versions
from llm.train.hardware import device_name
from llm.train.live_memory import LiveMemory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
D_HEAD = 64


def mixer_config(text: str, d_model: int) -> MixerConfig:
    """The config that a word of the command line means."""
    name, brace, fields = text.partition("{")
    given = yaml.safe_load(brace + fields) if brace else {}
    entry = MIXERS.entry(name.strip())
    known = entry.config.model_fields
    if "n_heads" in known:
        given = {"n_heads": max(1, d_model // D_HEAD)} | given
    tiny = entry.tiny().to_dict()
    required = {field: tiny[field] for field, info in known.items() if info.is_required() and field not in given}
    try:
        return entry.config.model_validate({**required, **given})
    except ValidationError as error:
        raise UserError(f"{text}: {error.errors()[0]['msg']}") from None


class Measured:
    """One mixer of a given width on a device."""

    def __init__(
        self, config: MixerConfig, d_model: int, longest: int, device: str, dtype: torch.dtype, compiled: bool
    ):
        model = ModelConfig.model_validate(
            {"vocab_size": 2, "d_model": d_model, "max_seq_len": longest, "layers": [{"pattern": [{"mixer": config}]}]}
        )
        self.ctx = model.context(0)
        self.config = config
        self.device, self.dtype, self.d_model = device, dtype, d_model
        self.mixer: TokenMixer = config.build(self.ctx)
        initialise(self.mixer, 0)
        self.mixer.to(device)
        self.call: Callable[[Tensor, SeqInfo], Tensor] = torch.compile(self.mixer) if compiled else self.mixer

    def autocast(self) -> Any:
        """bf16 as in training: weights in fp32, products in bf16."""
        return torch.autocast(self.device, self.dtype) if self.dtype != torch.float32 else nullcontext()

    def batch(self, batch: int, length: int, start: int = 0) -> tuple[Tensor, SeqInfo]:
        """Random inputs and their description, prepared."""
        generator = torch.Generator().manual_seed(start)
        x = torch.randn(batch, length, self.d_model, generator=generator).to(self.device)
        seq = SeqInfo.contiguous(batch, length, start=start, device=self.device)
        return x, seq

    def train_pass(self, x: Tensor, seq: SeqInfo, upstream: Tensor) -> None:
        """Forward and backward, gradients of the input and of every parameter."""
        fresh = SeqInfo(seq.positions)
        with self.autocast():
            self.mixer.prepare(fresh, x.dtype)
            y = self.call(x, fresh)
        y.backward(upstream.to(y.dtype))
        x.grad = None
        self.mixer.zero_grad(set_to_none=True)

    def train(self, batch: int, length: int, seconds: float) -> tuple[float, float]:
        """(seconds of a pass, MiB held at most)."""
        x, seq = self.batch(batch, length)
        x.requires_grad_()
        upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(self.device)

        def run() -> None:
            self.train_pass(x, seq, upstream)

        run()
        best = self._best(run, seconds)
        with LiveMemory() as memory:
            memory.reset_peak()
            if self.call is self.mixer:
                run()
        return best, memory.peak / 2**20

    @torch.no_grad()
    def decode(self, batch: int, length: int, seconds: float) -> tuple[float, float]:
        """(seconds of a step after `length` tokens, KiB of state per sequence)."""
        n_steps = 10
        x, seq = self.batch(batch, length)
        with self.autocast():
            state = self.mixer.new_state(
                batch, length + 101 * n_steps, n_tentative=0, dtype=self.dtype, device=self.device
            )
            self.mixer.prepare(seq, x.dtype)
            self.mixer.prefill(x, seq, state)
            cost = self.config.cost(self.ctx.dims(self.dtype.itemsize), length, "decode")

            def run() -> None:
                for _ in range(n_steps):
                    step = SeqInfo.contiguous(batch, 1, start=state.end(), device=self.device)
                    self.mixer.prepare(step, x.dtype)
                    self.mixer.step(x[:, :1], step, state)

            run()
            best = self._best(run, seconds, at_most=100)
        return best / n_steps, cost.state_bytes_per_seq / 1024

    def _best(self, run: Callable[[], None], seconds: float, at_most: int = 10_000) -> float:
        """Seconds of the fastest call, over at least three and about `seconds`."""
        clock = time.process_time if self.device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
        times: list[float] = []
        while len(times) < 3 or (sum(times) < seconds and len(times) < at_most):
            self._wait()
            started = clock()
            run()
            self._wait()
            times.append(clock() - started)
        return min(times)

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def measure(text: str, config: MixerConfig, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One record per length; a mixer that cannot be built this wide gives one with `error`."""
    longest = max(arguments.seq_len)
    try:
        measured = Measured(
            config, arguments.d_model, longest, arguments.device, DTYPES[arguments.dtype], arguments.compile
        )
    except UserError as error:
        return [{"mixer": text, "error": str(error)}]
    records = []
    for length in arguments.seq_len:
        cost = config.cost(measured.ctx.dims(measured.dtype.itemsize), length, "train")
        seconds, peak = measured.train(arguments.batch, length, arguments.seconds)
        step, state = measured.decode(arguments.batch, length, arguments.seconds / 4)
        records.append(
            {
                "mixer": text,
                "seq_len": length,
                "params": cost.params,
                "flops_per_token": cost.flops_per_token,
                "train_tokens_per_s": arguments.batch * length / seconds,
                "train_peak_mib": peak if not arguments.compile else None,
                "decode_ms": 1e3 * step,
                "state_kib": state,
            }
        )
    return records


def row(record: dict[str, Any], baseline: dict[int, float]) -> str:
    """A line of the table; sets the record's ratio to the baseline."""
    if "error" in record:
        return f"{record['mixer']:<28} {record['error']}"
    base = baseline.get(record["seq_len"])
    record["train_ratio"] = None if base is None else record["train_tokens_per_s"] / base
    ratio = "" if base is None else f"{record['train_ratio']:.2f}x"
    peak = "" if record["train_peak_mib"] is None else f"{record['train_peak_mib']:.1f}"
    return (
        f"{record['mixer']:<28} {record['seq_len']:>7} {record['params']:>10,} {record['flops_per_token'] / 1e6:>9.2f}"
        f" {record['train_tokens_per_s']:>11,.0f} {ratio:>7} {peak:>9} {record['decode_ms']:>9.3f}"
        f" {record['state_kib']:>10,.1f}"
    )


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mixers", nargs="*", default=["all"], metavar="MIXER")
    parser.add_argument("--seq-len", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--baseline", default="attention", help="the mixer that ratios refer to")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--compile", action="store_true", help="compile the forward pass (memory is not measured then)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="time spent on each figure, about")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    names = MIXERS.names() if arguments.mixers == ["all"] else arguments.mixers
    names = [arguments.baseline, *(name for name in names if name != arguments.baseline)]
    try:
        configs = {name: mixer_config(name, arguments.d_model) for name in names}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{'mixer':<28} {'tokens':>7} {'params':>10} {'MFLOP/tok':>9} {'train tok/s':>11} {'':>7} {'peak MiB':>9}"
        f" {'decode ms':>9} {'state KiB':>10}"
    )
    records: list[dict[str, Any]] = []
    baseline: dict[int, float] = {}
    for name, config in configs.items():
        for record in measure(name, config, arguments):
            if name == arguments.baseline and "error" not in record:
                baseline[record["seq_len"]] = record["train_tokens_per_s"]
            print(row(record, baseline), flush=True)
            records.append(record)
    conditions = {
        "device": device_name(arguments.device),
        "threads": arguments.threads,
        "dtype": arguments.dtype,
        "compile": arguments.compile,
        "d_model": arguments.d_model,
        "batch": arguments.batch,
        "baseline": arguments.baseline,
        "versions": versions(),
    }
    print(json.dumps({"conditions": conditions, "results": records}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
