"""Speed and state of a candidate with its start values: training throughput by length, decoding by context."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from evals.compare.config import MeasureConfig
from llm.core.init import initialise
from llm.core.seq import SeqInfo
from llm.models.config import ModelConfig

PREFILL = 256


def timed(call: Callable[[], Any], seconds: float) -> float:
    """Median seconds of a call, repeated for about `seconds` and at least three times, the first left out."""
    call()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < 200):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure(config: ModelConfig, settings: MeasureConfig, device: str = "cpu") -> dict[str, Any]:
    """{"tokens_per_second": {length: value}, "decode_seconds": {context: value}, "state_bytes": {context: value}}.

    Lengths beyond the model's max_seq_len are allowed to its position encoding: a learned table is not measured there.
    """
    torch.set_num_threads(settings.num_threads)
    longest = max([1, *settings.lengths, *settings.contexts]) + 1
    model: Any = config.replace(max_seq_len=max(config.max_seq_len, longest)).build(device)
    initialise(model, 0)
    vocab_size = config.required_vocab_size()
    rng = torch.Generator().manual_seed(0)

    def tokens(rows: int, length: int) -> torch.Tensor:
        return torch.randint(0, vocab_size, (rows, length), generator=rng).to(device)

    found: dict[str, Any] = {"tokens_per_second": {}, "decode_seconds": {}, "state_bytes": {}}
    model.train()
    for length in settings.lengths:
        rows = max(1, settings.batch_tokens // length)
        batch = tokens(rows, length + 1)

        def train_step(batch: torch.Tensor = batch, length: int = length, rows: int = rows) -> None:
            model.zero_grad(set_to_none=True)
            output = model(batch[:, :-1], SeqInfo.contiguous(rows, length, device=device))
            model.cross_entropy(output.hidden.flatten(0, 1), batch[:, 1:].flatten()).total.backward()

        found["tokens_per_second"][length] = rows * length / timed(train_step, settings.seconds)
    model.zero_grad(set_to_none=True)
    model.eval()
    with torch.no_grad():
        for context in settings.contexts:
            state = model.new_state(1, context + 1, n_tentative=1, dtype=torch.float32, device=device)
            for start in range(0, context, PREFILL):
                part = min(PREFILL, context - start)
                model(tokens(1, part), SeqInfo.contiguous(1, part, start=start, device=device), state=state)
            one = tokens(1, 1)

            def step(state: Any = state, context: int = context, one: torch.Tensor = one) -> None:
                state.begin(1)
                output = model(one, SeqInfo.contiguous(1, 1, start=context, device=device), state=state)
                model.head(output.hidden)
                state.abort()

            found["decode_seconds"][context] = timed(step, settings.seconds)
            bare = model.new_state(1, context, dtype=torch.float32, device=device)
            found["state_bytes"][context] = bare.nbytes()
    return found
