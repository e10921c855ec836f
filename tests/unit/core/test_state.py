"""Decode states: memory, capacity, misuse and what is refused on restore."""

from __future__ import annotations

import pytest
import torch

from llm.core.errors import UserError
from llm.core.seq import SeqInfo
from llm.core.state import (
    CompositeState,
    ConvState,
    DecodeState,
    EmptyState,
    KVState,
    RecurrentState,
    WindowState,
    choose_policy,
    valid_counts,
)

OPEN = {"dtype": torch.float32, "device": "cpu"}


def _window(n_tentative: int = 2) -> WindowState:
    return WindowState(1, 4, 2, 8, n_sinks=1, n_tentative=n_tentative, **OPEN)


def _recurrent(policy: str = "copies", n_tentative: int = 2) -> RecurrentState:
    return RecurrentState(
        1,
        {"s": (4, 4)},
        n_tentative=n_tentative,
        policy=policy,  # type: ignore[arg-type]
        factors={"k": (4,)},
        update=lambda tensors, factors, counts: tensors,
        **OPEN,
    )


def test_memory_does_not_grow_with_tokens() -> None:
    window, conv, recurrent = _window(), ConvState(1, 4, 8, n_tentative=2, **OPEN), _recurrent()
    sizes = []
    for turn in range(50):
        for state in (window, conv, recurrent):
            if turn % 3 == 0:
                state.begin(2)
        n = 2 if turn % 3 == 0 else 37
        window.append(torch.randn(1, n, 2, 8), torch.randn(1, n, 2, 8))
        conv.append(torch.randn(1, n, 8))
        recurrent.write({"s": torch.randn(1, 4, 4)}, torch.tensor([n]), each={"s": torch.randn(1, n, 4, 4)})
        for state in (window, conv, recurrent):
            if turn % 3 == 0:
                state.commit(torch.tensor([1]))
        sizes.append((window.nbytes(), conv.nbytes(), recurrent.nbytes()))
    assert set(sizes) == {(2 * 7 * 16 * 4, 5 * 8 * 4, 3 * 16 * 4)}
    assert window.length.item() > 1000


def test_bytes_by_policy() -> None:
    assert _recurrent("copies", 0).nbytes() == _recurrent("replay", 0).nbytes() == 64
    assert _recurrent("copies", 5).nbytes() == 64 * 6
    assert _recurrent("replay", 5).nbytes() == 64 * 2 + 5 * 16
    assert choose_policy({"s": (4, 4)}, {"k": (4,)}, 1) == "copies"
    assert choose_policy({"s": (4, 4)}, {"k": (4,)}, 5) == "replay"
    assert choose_policy({"h": (8,)}, {"u": (8,)}, 5) == "copies"


def test_padding_may_reach_beyond_the_capacity() -> None:
    state = KVState(2, 5, 1, 1, **OPEN)
    k = torch.arange(10.0).view(2, 5, 1, 1)
    state.append(k, k, torch.tensor([2, 4]))
    keys, _, positions = state.append(100 + k[:, :3], k[:, :3], torch.tensor([3, 1]))
    assert keys.shape[1] == 5 and positions[0].tolist() == [0, 1, 2, 3, 4]
    assert keys[0, :, 0, 0].tolist() == [0, 1, 100, 101, 102]
    assert keys[1, :, 0, 0].tolist() == [5, 6, 7, 8, 105]
    with pytest.raises(AssertionError, match="6 tokens in a state made for 5"):
        state.append(k[:, :1], k[:, :1])


def test_rejected_tokens_do_not_use_up_the_capacity() -> None:
    state = KVState(1, 6, 1, 1, **OPEN)
    for _ in range(5):
        state.begin(2)
        keys, _, _ = state.append(torch.ones(1, 2, 1, 1), torch.ones(1, 2, 1, 1))
        state.commit(torch.tensor([1]))
    assert state.length.item() == 5 and keys.shape[1] == 6


@pytest.mark.parametrize("n_tokens", [1, 4, 9])
def test_kv_export_holds_no_rejected_tokens_nor_padding(n_tokens: int) -> None:
    state = KVState(2, 16, 1, 1, **OPEN)
    x = torch.full((2, n_tokens, 1, 1), 7.0)
    state.append(x, x, torch.tensor([n_tokens, 0]))
    state.begin(3)
    state.append(x[:, :1] + 1, x[:, :1] + 1)
    state.abort()
    exported = state.export()
    assert exported["k"].shape == (2, n_tokens, 1, 1)
    assert exported["k"][0].unique().tolist() == [7.0] and exported["k"][1].unique().tolist() == [0.0]


def test_exports_are_contiguous_and_share_no_memory() -> None:
    composite = CompositeState(
        {"a": KVState(1, 8, 2, 4, **OPEN), "b": _window(), "c": ConvState(1, 4, 8, n_tentative=3, **OPEN)}
    )
    x = torch.randn(1, 3, 2, 4)
    composite["a"].append(x, x)  # type: ignore[attr-defined]
    composite["b"].append(torch.randn(1, 3, 2, 8), torch.randn(1, 3, 2, 8))  # type: ignore[attr-defined]
    composite["c"].append(torch.randn(1, 3, 8))  # type: ignore[attr-defined]
    exported = composite.export()
    assert set(exported) == {"a/length", "a/k", "a/v", "b/length", "b/k", "b/v", "c/length", "c/x"}
    assert all(tensor.is_contiguous() for tensor in exported.values())
    assert len({tensor.untyped_storage().data_ptr() for tensor in exported.values()}) == len(exported)


@pytest.mark.parametrize(
    ("stored", "into", "message"),
    [
        (KVState(1, 8, 2, 4, **OPEN), KVState(1, 8, 1, 4, **OPEN), "it comes from another model"),
        (_window(), WindowState(1, 5, 2, 8, n_sinks=1, **OPEN), "it comes from another model"),
        (ConvState(1, 4, 8, **OPEN), _window(), "has no 'k' .it has: length, x."),
        (EmptyState(1), CompositeState({"layer": EmptyState(1)}), "has no 'length'"),
    ],
)
def test_a_state_of_another_model_is_refused(stored: DecodeState, into: DecodeState, message: str) -> None:
    with pytest.raises(UserError, match=message):
        into.restore(stored.export())


def test_a_stored_state_that_is_too_long_is_refused() -> None:
    state = KVState(1, 8, 1, 1, **OPEN)
    state.append(torch.ones(1, 8, 1, 1), torch.ones(1, 8, 1, 1))
    with pytest.raises(UserError, match="holds 8 tokens, this one has room for 7"):
        KVState(1, 7, 1, 1, **OPEN).restore(state.export())


def test_misuse_is_caught() -> None:
    state = _window(n_tentative=2)
    with pytest.raises(AssertionError, match="no transaction is open"):
        state.commit(torch.tensor([0]))
    with pytest.raises(AssertionError, match="a transaction of 3 tokens in a state made for 2"):
        state.begin(3)
    state.begin(1)
    with pytest.raises(AssertionError, match="open already"):
        state.begin(1)
    with pytest.raises(AssertionError, match="commit or abort before"):
        state.export()
    state.append(torch.randn(1, 1, 2, 8), torch.randn(1, 1, 2, 8))
    with pytest.raises(AssertionError, match=r"commit of \[2\] where \[1\] were written"):
        state.commit(torch.tensor([2]))
    with pytest.raises(AssertionError, match=r"\[2\] tokens written in a transaction of 1"):
        state.append(torch.randn(1, 1, 2, 8), torch.randn(1, 1, 2, 8))
    recurrent = _recurrent()
    recurrent.begin(1)
    with pytest.raises(AssertionError, match="the state after each token"):
        recurrent.write({"s": torch.zeros(1, 4, 4)}, torch.tensor([1]))


def test_a_composite_takes_the_smallest_limit() -> None:
    assert CompositeState({"a": KVState(1, 8, 1, 1, **OPEN), "b": _window(3), "c": _window(2)}).max_tentative == 2
    assert CompositeState({"a": EmptyState(1)}).max_tentative is None


def test_valid_counts() -> None:
    seq = SeqInfo.contiguous(2, 3)
    assert valid_counts(seq) is None
    ragged = SeqInfo(seq.positions, valid=torch.tensor([[True, True, False], [False] * 3]))
    counts = valid_counts(ragged)
    assert counts is not None and counts.tolist() == [2, 0]
