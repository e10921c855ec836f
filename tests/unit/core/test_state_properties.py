"""Random sequences of operations on every kind of state equal a fresh run over the accepted tokens only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm.blocks.mixers.reformer import LSHState
from llm.core.state import (
    CompositeState,
    ConvState,
    DecodeState,
    EmptyState,
    KVState,
    PagePool,
    Pages,
    RecurrentState,
    WindowState,
)

N_TENTATIVE, WINDOW, N_SINKS, WIDTH = 4, 3, 2, 3
OPEN = {"dtype": torch.float64, "device": "cpu"}
Rows = list[list[float]]


class Kind:
    """How to make a state, write tokens into it, and tell whether what it gives back is right."""

    def make(self, batch: int, n_tentative: int, capacity: int) -> DecodeState:
        raise NotImplementedError

    def write(self, state: Any, x: Tensor, counts: Tensor | None, rows: Rows) -> None:
        """Write x [B, T] and check against rows, the tokens of each row including the real ones of x."""
        raise NotImplementedError


def _kept(counts: Tensor | None, row: int, length: int) -> int:
    return length if counts is None else int(counts[row])


class Attention(Kind):
    def __init__(self, *, window: int | None = None, n_sinks: int = 0) -> None:
        self.window, self.n_sinks = window, n_sinks

    def make(self, batch: int, n_tentative: int, capacity: int) -> DecodeState:
        if self.window is None:
            return KVState(batch, capacity, 1, 1, 2, **OPEN)
        return WindowState(batch, self.window, 1, 1, 2, n_sinks=self.n_sinks, n_tentative=n_tentative, **OPEN)

    def write(self, state: Any, x: Tensor, counts: Tensor | None, rows: Rows) -> None:
        k = x[:, :, None, None]
        keys, values, positions = state.append(k, torch.cat([k, -k], dim=-1), counts)
        assert keys.shape[1] == values.shape[1] == positions.shape[1]
        assert torch.equal(values[..., 0, :], torch.cat([keys[..., 0, :], -keys[..., 0, :]], dim=-1))
        for row, tokens in enumerate(rows):
            new = _kept(counts, row, x.shape[1])
            for query in range(len(tokens) - new, len(tokens)):
                seen = {}
                for position, key in zip(positions[row].tolist(), keys[row, :, 0, 0].tolist()):
                    if 0 <= position <= query and self._visible(query, position):
                        assert position not in seen, "a position is given twice"
                        seen[position] = key
                assert seen == {p: tokens[p] for p in range(query + 1) if self._visible(query, p)}

    def _visible(self, query: int, position: int) -> bool:
        return self.window is None or query - position < self.window or position < self.n_sinks


class Paged(Attention):
    """Small pages of one pool, in which what earlier states left is still to be found."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = Pages(4)

    def make(self, batch: int, n_tentative: int, capacity: int) -> DecodeState:
        return self.pages.of(super().make(batch, n_tentative, capacity))


class Hashed(Attention):
    """Keys with the buckets in which they fell: the key itself and its double."""

    def make(self, batch: int, n_tentative: int, capacity: int) -> DecodeState:
        return LSHState(batch, capacity, 1, 1, 2, **OPEN)

    def write(self, state: Any, x: Tensor, counts: Tensor | None, rows: Rows) -> None:
        k = x[:, :, None, None]
        keys, _, buckets, positions = state.append_hashed(k, k, torch.cat([k, 2 * k], dim=-1), counts)
        assert keys.shape[1] == buckets.shape[1] == positions.shape[1]
        for row, tokens in enumerate(rows):
            assert keys[row, : len(tokens), 0, 0].tolist() == tokens
            assert buckets[row, : len(tokens), 0].tolist() == [[token, 2 * token] for token in tokens]


class Convolution(Kind):
    def make(self, batch: int, n_tentative: int, capacity: int) -> DecodeState:
        return ConvState(batch, WIDTH, 1, n_tentative=n_tentative, **OPEN)

    def write(self, state: Any, x: Tensor, counts: Tensor | None, rows: Rows) -> None:
        history = state.append(x[..., None], counts)[..., 0]
        assert history.shape == (len(rows), WIDTH - 1 + x.shape[1])
        for row, tokens in enumerate(rows):
            new = _kept(counts, row, x.shape[1])
            padded = [0.0] * (WIDTH - 1) + tokens
            assert history[row, : WIDTH - 1 + new].tolist() == padded[len(padded) - new - WIDTH + 1 :]


class Recurrence(Kind):
    """s = a s + x and m = max(m, x), with a = 0.5."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy

    @staticmethod
    def update(tensors: dict[str, Tensor], factors: dict[str, Tensor], counts: Tensor) -> dict[str, Tensor]:
        s, m, x = tensors["s"], tensors["m"], factors["x"]
        for t in range(x.shape[1]):
            real = (t < counts)[:, None]
            s = torch.where(real, 0.5 * s + x[:, t], s)
            m = torch.where(real, torch.maximum(m, x[:, t]), m)
        return {"s": s, "m": m}

    def make(self, batch: int, n_tentative: int, capacity: int) -> DecodeState:
        shapes = {"s": (1,), "m": (1,)}
        return RecurrentState(
            batch, shapes, n_tentative=n_tentative, policy=self.policy, factors={"x": (1,)}, update=self.update, **OPEN
        )

    def write(self, state: Any, x: Tensor, counts: Tensor | None, rows: Rows) -> None:
        real = torch.full((len(rows),), x.shape[1]) if counts is None else counts
        before = state.read()
        upto = [
            self.update(before, {"x": x[..., None]}, torch.minimum(real, torch.tensor(t + 1)))
            for t in range(x.shape[1])
        ]
        each = {name: torch.stack([step[name] for step in upto], dim=1) for name in before}
        state.write(upto[-1], real, each=each, factors={"x": x[..., None]})
        after = state.read()
        for row, tokens in enumerate(rows):
            s = m = 0.0
            for token in tokens:
                s, m = 0.5 * s + token, max(m, token)
            assert after["s"][row].item() == pytest.approx(s, abs=1e-9)
            assert after["m"][row].item() == m


class Empty(Kind):
    def make(self, batch: int, n_tentative: int, capacity: int) -> DecodeState:
        return EmptyState(batch)

    def write(self, state: Any, x: Tensor, counts: Tensor | None, rows: Rows) -> None:
        state.advance(torch.full((len(rows),), x.shape[1]) if counts is None else counts)


KINDS: dict[str, Kind] = {
    "kv": Attention(),
    "kv_paged": Paged(),
    "kv_with_buckets": Hashed(),
    "window": Attention(window=WINDOW),
    "window_of_one": Attention(window=1),
    "window_with_sinks": Attention(window=WINDOW, n_sinks=N_SINKS),
    "convolution": Convolution(),
    "recurrence_copies": Recurrence("copies"),
    "recurrence_replay": Recurrence("replay"),
    "empty": Empty(),
}


class Composite(Kind):
    """All of the above, nested."""

    parts = dict(KINDS)

    def make(self, batch: int, n_tentative: int, capacity: int) -> DecodeState:
        made = {key: part.make(batch, n_tentative, capacity) for key, part in self.parts.items()}
        empty = made.pop("empty")
        return CompositeState({"0": CompositeState(made), "1": empty})

    def write(self, state: Any, x: Tensor, counts: Tensor | None, rows: Rows) -> None:
        for key, part in self.parts.items():
            part.write(state["1"] if key == "empty" else state["0"][key], x, counts, rows)


KINDS["composite"] = Composite()
CAPACITY = 200


def _draw_counts(data: st.DataObject, batch: int, limits: list[int]) -> tuple[int, Tensor | None]:
    """(T, counts): either all rows take T tokens, or each its own number of at most its limit."""
    shared = min(limits)
    if shared >= 1 and data.draw(st.booleans(), label="even"):
        return data.draw(st.integers(1, shared), label="length"), None
    counts = [data.draw(st.integers(0, limit), label="count") for limit in limits]
    padding = data.draw(st.integers(0, 2), label="padding")
    return max(1, max(counts) + padding), torch.tensor(counts)


def _run(kind: Kind, data: st.DataObject) -> None:
    batch = data.draw(st.integers(1, 3), label="batch")
    made = (N_TENTATIVE, CAPACITY)
    state = kind.make(batch, *made)
    committed: Rows = [[] for _ in range(batch)]
    tentative: Rows | None = None
    budget = 0
    fresh = iter(range(1, 10_000))
    for _ in range(data.draw(st.integers(4, 16), label="steps")):
        choices = ["append", "append", "append", "reorder"]
        if tentative is None:
            choices += ["begin", "begin", "restore", "adopt"]
        elif any(tentative):
            choices += ["commit", "commit", "abort"]
        op = data.draw(st.sampled_from(choices), label="op")
        if op == "append":
            limits = [7] * len(committed) if tentative is None else [budget - len(row) for row in tentative]
            length, counts = _draw_counts(data, len(committed), limits)
            x = torch.tensor([[next(fresh) for _ in range(length)] for _ in committed], dtype=torch.float64)
            target = committed if tentative is None else tentative
            for row in range(len(committed)):
                target[row] = target[row] + x[row, : _kept(counts, row, length)].tolist()
            everything = [a + b for a, b in zip(committed, tentative or [[]] * len(committed))]
            kind.write(state, x, counts, everything)
        elif op == "begin":
            budget = data.draw(st.sampled_from([N_TENTATIVE, 2, 1]), label="n")
            state.begin(budget)
            tentative = [[] for _ in committed]
        elif op in ("commit", "abort"):
            assert tentative is not None
            keep = [data.draw(st.integers(0, len(row)), label="k") if op == "commit" else 0 for row in tentative]
            state.commit(torch.tensor(keep)) if op == "commit" else state.abort()
            committed = [row + new[:k] for row, new, k in zip(committed, tentative, keep)]
            tentative = None
        elif op == "reorder":
            n_rows = data.draw(st.integers(1, 4), label="rows")
            index = [data.draw(st.integers(0, len(committed) - 1), label="row") for _ in range(n_rows)]
            state.reorder(torch.tensor(index))
            committed = [committed[i] for i in index]
            tentative = None if tentative is None else [tentative[i] for i in index]
        elif op == "adopt":
            other = kind.make(len(committed), *made)
            length, counts = _draw_counts(data, len(committed), [7] * len(committed))
            x = torch.tensor([[next(fresh) for _ in range(length)] for _ in committed], dtype=torch.float64)
            theirs = [x[row, : _kept(counts, row, length)].tolist() for row in range(len(committed))]
            kind.write(other, x, counts, theirs)
            rows = [data.draw(st.booleans(), label="adopted") for _ in committed]
            state.adopt(torch.tensor(rows), other)
            committed = [new if taken else old for old, new, taken in zip(committed, theirs, rows)]
        else:
            stored = state.export()
            made = (N_TENTATIVE + 2, CAPACITY + 9)
            other = kind.make(data.draw(st.integers(1, 3), label="other batch"), *made)
            other.restore(stored)
            state = other
        ends = [len(a) + len(b) for a, b in zip(committed, tentative or [[]] * len(committed))]
        assert state.end().tolist() == ends
        assert state.length.tolist() == [len(row) for row in committed]
        assert state.batch == len(committed)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("n_examples", [pytest.param(60, id="few"), pytest.param(1000, marks=pytest.mark.slow)])
def test_any_sequence_of_operations(name: str, n_examples: int) -> None:
    @settings(max_examples=25 if name == "composite" and n_examples == 60 else n_examples, deadline=None)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        _run(KINDS[name], data)

    check()


Rollback = Callable[[DecodeState, Tensor], None]


def _breaks(kind: Kind) -> None:
    @settings(max_examples=400, phases=[Phase.generate])
    @given(st.data())
    def check(data: st.DataObject) -> None:
        _run(kind, data)

    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("name", ["convolution", "recurrence_copies", "recurrence_replay"])
def test_a_state_that_keeps_a_rejected_token_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = ConvState if name == "convolution" else RecurrentState
    right: Rollback = owner._rollback

    def wrong(self: Any, accepted: Tensor) -> None:
        right(self, torch.minimum(accepted + 1, self.written))

    monkeypatch.setattr(owner, "_rollback", wrong)
    _breaks(KINDS[name])


def test_a_ring_without_room_for_tentative_tokens_is_caught() -> None:
    class TooSmall(Attention):
        def make(self, batch: int, n_tentative: int, capacity: int) -> DecodeState:
            state = super().make(batch, 0, capacity)
            state.max_tentative = n_tentative
            return state

    _breaks(TooSmall(window=WINDOW, n_sinks=1))


def test_a_page_that_is_written_by_one_of_two_holders_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PagePool, "copy", lambda self, page: page)
    _breaks(Paged())
