"""Streaming: the token source, what is compared, and that a wrong state is noticed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from evals import streaming
from evals.streaming import StreamingConfig, stream_tokens, table


def config(**changes: Any) -> StreamingConfig:
    mixer = {"type": "retention", "n_heads": 2}
    model = {"vocab_size": 32, "d_model": 32, "layers": [{"pattern": [{"mixer": mixer, "channel": "swiglu"}]}]}
    given: dict[str, Any] = {"name": "tiny", "model": model, "tokens": 600, "chunk": 48, "other_chunk": 40, "checks": 3}
    return StreamingConfig.model_validate(given | changes)


def test_tokens_do_not_depend_on_the_cut() -> None:
    whole = stream_tokens(3, 4000, 300, 50)
    assert torch.equal(torch.cat([stream_tokens(3, 4000, 99, 50), stream_tokens(3, 4099, 201, 50)], dim=1), whole)
    assert not torch.equal(stream_tokens(4, 4000, 300, 50), whole)
    assert int(whole.min()) >= 0 and int(whole.max()) < 50


def test_all_cuts_agree() -> None:
    record = streaming.run(config(memory_tolerance=10.0))
    assert record["ok"], record
    assert [row["position"] for row in record["checks"]] == [200, 400, 600]
    assert 0 < record["largest_difference"] < 1e-4
    assert record["state_bytes"] == record["state_bytes_at_end"] > 0
    assert table(record).count("\n") == 6


def test_a_state_that_forgets_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    read = streaming.Reader.read

    def forgetful(self: Any, length: int) -> None:
        if length == 40:
            self.state.restore(self.model.new_state(1, 64, dtype=torch.float32, device="cpu").export())
        read(self, length)

    monkeypatch.setattr(streaming.Reader, "read", forgetful)
    record = streaming.run(config(memory_tolerance=10.0))
    assert not record["ok"] and record["largest_difference"] > 1e-3


def test_growing_memory_is_not_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[bytearray] = []
    read = streaming.Reader.read

    def hoarding(self: Any, length: int) -> None:
        held.append(bytearray(4_000_000))
        read(self, length)

    monkeypatch.setattr(streaming.Reader, "read", hoarding)
    record = streaming.run(config())
    assert record["memory_growth"] > 0.02 and not record["ok"]


def test_too_short_a_stream_is_refused() -> None:
    with pytest.raises(ValueError, match="at least four chunks"):
        config(tokens=100)
