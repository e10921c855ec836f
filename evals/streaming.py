"""usage: python -m evals.streaming CONFIG.yaml [key=value ...]

Stream tokens through a model in constant memory, and show that the outputs do not depend on how the stream is cut.

One sequence is read in chunks with a decode state (`chunk` tokens each), and once more in other chunks (`other_chunk`),
by two states that take turns. At `checks` points, evenly spread, the hidden states of the last token of both are
compared, and so is one of a further reading: the state of the first is copied to a third, which takes the tokens before
the point one by one. Resident memory is sampled after each chunk, but for the first `warm_up` ones, in which libraries
take what they keep for themselves.

The tokens are random, a pure function of (seed, position); the model has its start values, made from `seed`.
Prints a table and a last line of JSON; exit code 1 when a difference is above `tolerance`, memory grew by more than
`memory_tolerance`, or the model left the finite numbers.

  python -m evals.streaming configs/streaming/retention.yaml tokens=100k
"""

from __future__ import annotations

import json
import platform
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import psutil
import torch
from pydantic import Field, model_validator
from torch import Tensor

from evals.command import run_command
from llm.config.base import Config, Count
from llm.config.load import config_hash, load_config
from llm.core.errors import UserError
from llm.core.init import initialise
from llm.core.seq import SeqInfo
from llm.models.config import ModelConfig

BLOCK = 4096
STEPS_BEFORE_CHECK = 16


class StreamingConfig(Config):
    """What is streamed. Lengths are in tokens; a point of comparison lies at a common end of both kinds of chunks.

    tolerance: largest allowed difference of hidden states, relative to their largest value. memory_tolerance: by how
    much the peak of resident memory in the second half may exceed that of the first, relative. warm_up: chunks at the
    start, after which memory is looked at; at most an eighth of the stream. precision: fp64 tells
    rounding, which some memories amplify, from a mistake.
    """

    name: str
    model: ModelConfig
    tokens: Count = Field(1_000_000, ge=1)
    chunk: int = Field(512, ge=1)
    other_chunk: int = Field(384, ge=1)
    checks: int = Field(8, ge=1)
    warm_up: int = Field(16, ge=0)
    seed: int = 0
    num_threads: int = Field(1, ge=1)
    tolerance: float = Field(1e-3, gt=0)
    memory_tolerance: float = Field(0.02, gt=0)
    precision: Literal["fp32", "fp64"] = "fp32"

    @model_validator(mode="after")
    def _room(self) -> StreamingConfig:
        shortest = min(self.chunk, self.other_chunk)
        if self.tokens < 4 * max(self.chunk, self.other_chunk) or shortest <= STEPS_BEFORE_CHECK:
            raise UserError(
                f"tokens {self.tokens} in chunks of {self.chunk} and {self.other_chunk}: give at least four chunks, "
                f"each longer than {STEPS_BEFORE_CHECK} tokens"
            )
        return self

    @property
    def looked_at_from(self) -> int:
        """Token behind which memory is sampled."""
        return min(self.warm_up * self.chunk, self.tokens // 8)


def stream_tokens(seed: int, start: int, length: int, vocab_size: int) -> Tensor:
    """[1, length] int64 token ids at positions start .. start + length, whatever the cut."""
    parts = []
    for block in range(start // BLOCK, (start + length - 1) // BLOCK + 1):
        rng = torch.Generator().manual_seed(seed * 1_000_003 + block)
        parts.append(torch.randint(0, vocab_size, (BLOCK,), generator=rng))
    offset = start % BLOCK
    return torch.cat(parts)[offset : offset + length][None]


@dataclass
class Reader:
    """A model with a state that has read `position` tokens; hidden [D]: that of the last one."""

    model: Any
    config: StreamingConfig
    state: Any
    position: int = 0
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))

    @torch.no_grad()
    def read(self, length: int) -> None:
        """Read `length` more tokens in one call."""
        vocab_size = self.model.config.required_vocab_size()
        tokens = stream_tokens(self.config.seed, self.position, length, vocab_size)
        seq = SeqInfo.contiguous(1, length, start=self.position)
        self.hidden = self.model(tokens, seq, state=self.state).hidden[0, -1]
        self.position += length

    def read_to(self, end: int, chunk: int, samples: list[tuple[int, int]] | None = None) -> None:
        """Read up to position `end` in chunks; samples takes (position, bytes of resident memory)."""
        process = psutil.Process()
        while self.position < end:
            self.read(min(chunk, end - self.position))
            if samples is not None and self.position > self.config.looked_at_from:
                samples.append((self.position, process.memory_info().rss))


class NotFinite(Exception):
    """The model left the finite numbers."""


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))


def run(config: StreamingConfig) -> dict[str, Any]:
    """Stream, and say what was seen."""
    torch.set_num_threads(config.num_threads)
    model = config.model.build("cpu")
    initialise(model, config.seed)
    dtype = {"fp32": torch.float32, "fp64": torch.float64}[config.precision]
    model.to(dtype).eval()

    def reader() -> Reader:
        capacity = config.tokens + config.chunk
        return Reader(model, config, model.new_state(1, capacity, dtype=dtype, device="cpu"))

    first, second = reader(), reader()
    state_bytes = first.state.nbytes()
    samples: list[tuple[int, int]] = []
    rows = []
    seconds = 0.0
    for check in range(1, config.checks + 1):
        end = config.tokens * check // config.checks
        started = time.perf_counter()
        first.read_to(end - STEPS_BEFORE_CHECK, config.chunk, samples)
        seconds += time.perf_counter() - started
        third = reader()
        third.state.restore(first.state.export())
        third.position = first.position
        started = time.perf_counter()
        first.read_to(end, config.chunk, samples)
        seconds += time.perf_counter() - started
        third.read_to(end, 1)
        second.read_to(end, config.other_chunk, samples)
        rows.append(
            {
                "position": end,
                "other_chunks": _difference(second.hidden, first.hidden),
                "single_steps": _difference(third.hidden, first.hidden),
            }
        )
        if not bool(torch.isfinite(first.hidden).all()):
            raise NotFinite(f"{config.name}: not finite at token {end:,}")
        print(f"{config.name}: {end:,} tokens, {end / seconds:,.0f} tokens/s", file=sys.stderr)
    half = config.tokens // 2
    peaks = [max(rss for at, rss in samples if (at > half) == late) for late in (False, True)]
    growth = peaks[1] / peaks[0] - 1
    worst = max(max(row["other_chunks"], row["single_steps"]) for row in rows)
    return {
        "tool": "streaming",
        "name": config.name,
        "parameters": config.model.cost(1024).total.params,
        "tokens": config.tokens,
        "precision": config.precision,
        "chunk": config.chunk,
        "other_chunk": config.other_chunk,
        "tokens_per_second": config.tokens / seconds,
        "state_bytes": state_bytes,
        "state_bytes_at_end": first.state.nbytes(),
        "peak_memory_first_half": peaks[0],
        "peak_memory_second_half": peaks[1],
        "memory_growth": growth,
        "largest_difference": worst,
        "checks": rows,
        "ok": worst <= config.tolerance and growth <= config.memory_tolerance,
        "num_threads": config.num_threads,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "config": config_hash(config),
    }


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown table."""
    lines = [
        f"{record['name']}: {record['parameters']:,} parameters, {record['tokens']:,} tokens at "
        f"{record['tokens_per_second']:,.0f} tokens/s, state {record['state_bytes']:,} bytes, peak memory "
        f"{record['peak_memory_first_half'] / 2**20:,.1f} MiB in the first half and "
        f"{record['peak_memory_second_half'] / 2**20:,.1f} MiB in the second ({record['memory_growth']:+.2%})",
        "",
        f"| after tokens | chunks of {record['chunk']} against {record['other_chunk']} | against single steps |",
        "|---:|---:|---:|",
    ]
    lines += [f"| {r['position']:,} | {r['other_chunks']:.1e} | {r['single_steps']:.1e} |" for r in record["checks"]]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Run the command."""
    if not argv or {"-h", "--help"} & set(argv):
        print(str(__doc__).strip())
        return 0 if argv else 2
    try:
        record = run(load_config(StreamingConfig, argv))
    except NotFinite as fault:
        print(fault)
        return 1
    print(table(record))
    print(json.dumps(record))
    return 0 if record["ok"] else 1


if __name__ == "__main__":
    run_command(main, "streaming")
