"""RMT, RMT-R and ARMT: segments against plain references, delta rule, truncated gradients, curriculum, streaming."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llm.core.errors import UserError
from llm.core.init import initialise
from llm.core.progress import Progress, before_step
from llm.core.seq import SeqInfo
from llm.core.state import SegmentState
from llm.data.config import DataConfig
from llm.models.config import ModelConfig
from llm.models.wrappers.armt import EPS, ARMTConfig, AssociativeMemory, delta_write, dpfp, recall
from llm.models.wrappers.rmt import RMTConfig
from llm.train.live_memory import LiveMemory
from llm.train.setup import check_packing
from tests.contracts.checks.decoding import Decoding
from tests.contracts.checks.harness import D_MODEL, assert_same, fill, n_parameters, random, tiny_model
from tests.contracts.checks.wrappers import as_mixer

ATTENTION = {"type": "attention", "n_heads": 2}
RMT = {"type": "rmt", "n_memory": 2, "segment": 5}
RETRIEVAL = {**RMT, "retrieval": True}
ARMT = {"type": "armt", "n_memory": 2, "segment": 5, "d_memory": 4}


def _config(*wrappers: dict[str, Any], **changes: Any) -> ModelConfig:
    return tiny_model(ATTENTION, "swiglu", wrappers=list(wrappers), **changes)


def _model(*wrappers: dict[str, Any], **changes: Any) -> Any:
    return fill(_config(*wrappers, **changes).build("cpu"))


def _run(model: Any, x: Tensor, carry: Any = None) -> Any:
    return model(x, SeqInfo.contiguous(*x.shape[:2]), carry=carry)


def _segments(x: Tensor, n: int = 5) -> list[Tensor]:
    return list(x.split(n, dim=1))


def test_without_memory_segments_are_independent() -> None:
    x = random(2, 13, D_MODEL)
    bare = _model()
    expected = torch.cat([_run(bare, part).hidden for part in _segments(x)], dim=1)
    assert_same(_run(_model({**RMT, "n_memory": 0}), x).hidden, expected, "independent segments")


def test_memory_goes_from_segment_to_segment() -> None:
    """The published recurrence, written down once more around the bare decoder."""
    model, bare = _model(RMT), _model()
    x = random(2, 13, D_MODEL)
    memory = model.memory.expand(2, -1, -1)
    expected = []
    for part in _segments(x):
        hidden = _run(bare, torch.cat([memory, part, memory], dim=1)).hidden
        expected.append(hidden[:, 2 : 2 + part.shape[1]])
        memory = hidden[:, -2:]
    assert_same(_run(model, x).hidden, torch.cat(expected, dim=1), "outputs")
    assert_same(_run(model, x[:, :5]).hidden, expected[0], "one segment")
    carry = _run(model, x[:, :5], model.start_carry(2)).carry
    hidden = _run(bare, torch.cat([model.memory.expand(2, -1, -1), x[:, :5], model.memory.expand(2, -1, -1)], 1)).hidden
    assert_same(carry.carried["memory"], hidden[:, -2:], "the memory after a segment")


def test_retrieval_attends_to_all_past_memories() -> None:
    model, bare = _model(RETRIEVAL), _model()
    x = random(2, 18, D_MODEL)
    past = [model.memory.expand(2, -1, -1)]
    expected = []
    for part in _segments(x):
        stored = torch.cat(past, dim=1)
        q, k, v = past[-1] @ model.q.weight.T, stored @ model.k.weight.T, stored @ model.v.weight.T
        read = torch.softmax(q @ k.transpose(1, 2) / D_MODEL**0.5, dim=-1) @ v @ model.out.weight.T
        hidden = _run(bare, torch.cat([past[-1], read, part, past[-1]], dim=1)).hidden
        expected.append(hidden[:, 4 : 4 + part.shape[1]])
        past.append(hidden[:, -2:])
    assert_same(_run(model, x).hidden, torch.cat(expected, dim=1), "outputs")


def test_associative_memory_goes_from_segment_to_segment() -> None:
    """The published recurrence, token by token and matrix by matrix, around the layers of the bare decoder."""
    model, bare = _model(ARMT), _model()
    x = random(2, 13, D_MODEL)
    expected = torch.zeros_like(x)

    def phi(y: Tensor) -> Tensor:
        both = torch.cat([y.clamp(min=0), (-y).clamp(min=0)])
        return torch.cat([torch.stack([both[i] * both[(i - j) % 8] for i in range(8)]) for j in (1, 2, 3)])

    with torch.no_grad():
        for row in range(2):
            a = [torch.zeros(24, D_MODEL).double() for _ in range(2)]
            z = [torch.zeros(24).double() for _ in range(2)]
            for number, part in enumerate(_segments(x[row : row + 1])):
                y = torch.cat([part, model.memory[None]], dim=1)
                seq = SeqInfo.contiguous(1, y.shape[1])
                y = bare.enter(y, seq)
                for layer in range(2):
                    own = model.memories[layer]
                    if number:
                        queries = [phi(token @ own.q.weight.T) for token in y[0]]
                        y = y + torch.stack([q @ a[layer] / (q @ z[layer] + EPS) for q in queries])
                    y = bare.run(y, seq, layers=range(layer, layer + 1))
                    old_a, old_z = a[layer].clone(), z[layer].clone()
                    for m in y[0, -2:]:
                        k, v = phi(m @ own.k.weight.T), m @ own.v.weight.T
                        beta = torch.sigmoid(m @ own.beta.weight[0] + own.beta.bias[0])
                        held = k @ old_z
                        gamma = 1 - (held + EPS) / (k @ k + EPS) if number else torch.tensor(1.0)
                        recalled = old_a.T @ k / (held + EPS) if number else 0.0
                        a[layer] += beta * torch.outer(k, v - recalled)
                        z[layer] += gamma.clamp(0, 1) * k
                expected[row, 5 * number : 5 * number + part.shape[1]] = bare.final_norm(y)[0, :-2]
    assert_same(_run(model, x).hidden, expected, "outputs")


def test_an_associative_memory_without_values_changes_nothing() -> None:
    model: Any = _config(ARMT).build("cpu")
    bare = _config().build("cpu")
    initialise(model, 0)
    initialise(bare, 0)
    x = random(2, 13, D_MODEL, dtype=torch.float32)
    tail = model.memory.expand(2, -1, -1)
    parts = _segments(x)
    with torch.no_grad():
        expected = [_run(bare, torch.cat([part, tail], dim=1)).hidden[:, :5] for part in parts[:-1]]
        expected.append(_run(bare, parts[-1]).hidden)
        carry = _run(model, x[:, :10], model.start_carry(2)).carry
        assert torch.equal(_run(model, x).hidden, torch.cat(expected, dim=1))
    assert all(not bool(carry.carried[f"a{layer}"].any()) for layer in range(2))
    assert all(bool(carry.carried[f"z{layer}"].any()) for layer in range(2))


def test_dpfp() -> None:
    x = random(7, 64)
    phi = dpfp(x, 3)
    assert phi.shape == (7, 384) and bool((phi >= 0).all())
    torch.testing.assert_close(dpfp(3.0 * x, 3), 9.0 * phi)
    assert bool((phi.sum(dim=-1) > 0).all())


def _write_all(keys: Tensor, values: Tensor, *, correction: bool = True) -> tuple[Tensor, Tensor]:
    """(A, z) after writing one pair after another with full strength."""
    a, z = torch.zeros(1, keys.shape[-1], values.shape[-1]).double(), torch.zeros(1, keys.shape[-1]).double()
    for number in range(len(keys)):
        key, value = keys[None, number : number + 1], values[None, number : number + 1]
        beta = torch.ones(1, 1, 1).double()
        a, z = delta_write(key, value, beta, a, z, number == 0, correction=correction)
    return a, z


def test_a_value_is_written_over() -> None:
    key, values = dpfp(random(1, 32), 3), random(5, 8, seed=1)
    keys = key.expand(5, -1)
    a, z = _write_all(keys, values)
    assert float((recall(key[None], a, z)[0, 0] - values[-1]).abs().max()) < 1e-5
    a, z = _write_all(keys, values, correction=False)
    assert float((recall(key[None], a, z)[0, 0] - values[-1]).abs().max()) > 0.5


def test_the_correction_is_none_for_new_keys_and_all_for_old_ones() -> None:
    keys = torch.zeros(3, 6).double()
    keys[0, 0], keys[1, 1], keys[2, 0] = 2.0, 3.0, 2.0
    values = random(3, 4)
    _, z = _write_all(keys[:1], values[:1])
    torch.testing.assert_close(z[0], keys[0])
    _, z = _write_all(keys[:2], values[:2])
    torch.testing.assert_close(z[0], keys[0] + keys[1], atol=1e-4, rtol=0)
    _, z = _write_all(keys, values)
    torch.testing.assert_close(z[0], keys[0] + keys[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("wrapper", [RMT, RETRIEVAL, ARMT], ids=["rmt", "retrieval", "armt"])
@pytest.mark.parametrize("k", [None, 1, 2, 3])
def test_truncated_gradients(wrapper: dict[str, Any], k: int | None) -> None:
    """The last segment's loss reaches the inputs of the last k segments and of no other."""
    model = _model({**wrapper, "bptt_segments": k})
    x = random(2, 23, D_MODEL).requires_grad_()
    hidden = _run(model, x).hidden
    (grad,) = torch.autograd.grad(hidden[:, 20:].square().sum(), x)
    reached = [float(part.abs().max()) for part in _segments(grad)]
    assert len(reached) == 5
    for segment, size in enumerate(reached):
        assert (size > 0) == (k is None or segment >= 5 - k), (segment, reached)
    whole = _model(wrapper)
    assert torch.equal(hidden, _run(whole, x).hidden), "truncation changes no output"


@pytest.mark.parametrize("wrapper", [RMT, RETRIEVAL, ARMT], ids=["rmt", "retrieval", "armt"])
def test_checkpointed_segments_have_the_same_gradients(wrapper: dict[str, Any]) -> None:
    x = random(2, 13, D_MODEL)
    found = []
    for checkpointed in (False, True):
        model = _model({**wrapper, "checkpoint_segments": checkpointed})
        given = x.clone().requires_grad_()
        loss = _run(model, given).hidden.square().sum()
        loss.backward()
        found.append({"x": given.grad} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        assert_same(found[1][name], grad, name)


@pytest.mark.parametrize("wrapper", [RMT, RETRIEVAL, ARMT], ids=["rmt", "retrieval", "armt"])
def test_segment_by_segment_is_as_all_at_once(wrapper: dict[str, Any]) -> None:
    model = _model(wrapper)
    x = random(3, 20, D_MODEL)
    whole = _run(model, x).hidden
    carry = model.start_carry(3)
    parts = []
    for part in (x[:, :5], x[:, 5:15], x[:, 15:]):
        output = _run(model, part, carry)
        parts.append(output.hidden)
        carry = output.carry
    assert_same(torch.cat(parts, dim=1), whole, "in three calls")
    state = model.new_state(3, 25, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        for start in range(0, 20, 2):
            model(x[:, start : start + 2], SeqInfo.contiguous(3, 2, start=start), state=state)
        model(x[:, :1], SeqInfo.contiguous(3, 1, start=20), state=state)
    for name, held in state.lanes[0].carried.items():
        assert_same(held, carry.carried[name], f"{name} in the decode state")
    assert_same(_run(model, x[1:2]).hidden, whole[1:2], "a row alone")
    assert_same(_run(model, x).hidden, whole, "the same call again")


def test_a_carry_asks_for_whole_segments() -> None:
    model = _model(RMT)
    with pytest.raises(UserError, match="must consist of whole segments of 5"):
        _run(model, random(2, 13, D_MODEL), model.start_carry(2))


def test_curriculum_limits_how_many_segments_depend_on_one_another() -> None:
    model = _model({**RMT, "curriculum": [1, 2, 4]})
    x = random(2, 20, D_MODEL)
    whole = _run(model, x).hidden
    windows = {n: torch.cat([_run(model, part).hidden for part in x.split(5 * n, dim=1)], dim=1) for n in (1, 2, 4)}
    assert_same(windows[4], whole, "the whole")
    for step, n in ((0, 1), (3, 1), (4, 2), (7, 2), (8, 4), (11, 4)):
        before_step(model, Progress(step, 12, 0))
        assert_same(_run(model, x).hidden, windows[n], f"step {step}")
    before_step(model, Progress(0, 12, 0))
    assert_same(_run(model.eval(), x).hidden, whole, "in evaluation")


def test_a_curriculum_may_draw_the_number_of_segments() -> None:
    model = _model({**ARMT, "curriculum": [2, 6], "sample_segments": True})

    def drawn(seed: int) -> list[int]:
        found = []
        for step in range(60):
            before_step(model, Progress(step, 60, seed))
            found.append(model.n_training_segments)
        return found

    assert drawn(0) == drawn(0) != drawn(1)
    assert set(drawn(0)[:30]) == {1, 2} and set(drawn(0)[30:]) == {1, 2, 3, 4, 5, 6}


def test_alignment() -> None:
    left, right, center = (_model({**RMT, "align": align}) for align in ("left", "right", "center"))
    assert left.edges(13) == [0, 5, 10, 13]
    assert right.edges(13) == [0, 3, 8, 13]
    assert center.edges(11) == [0, 4, 8, 11]
    assert left.edges(5) == right.edges(5) == center.edges(5) == [0, 5]
    assert left.edges(10) == right.edges(10) == center.edges(10) == [0, 5, 10]
    x = random(2, 13, D_MODEL)
    carry = _run(_model({**RMT, "segment": 3}), x[:, :3], right.start_carry(2)).carry
    assert_same(_run(right, x).hidden[:, 3:], _run(left, x[:, 3:], carry).hidden, "after a short first segment")
    with pytest.raises(UserError, match="set align: left in model.wrappers"):
        right.new_state(1, 8, dtype=torch.float32, device="cpu")


def test_packed_documents_are_refused_by_name_of_the_setting() -> None:
    model = _model(ARMT)
    with pytest.raises(UserError, match="armt cannot keep documents .* set data.packing=pad, or data.isolate=false"):
        model(random(1, 8, D_MODEL), SeqInfo.from_lengths([[3, 5]], 8))
    for fields in ({"packing": "pad"}, {"isolate": False}):
        check_packing(model, DataConfig(path="unused", **fields))
    for packing in ("concat", "best_fit"):
        with pytest.raises(UserError, match=f"data.packing is '{packing}'; set data.packing=pad"):
            check_packing(model, DataConfig(path="unused", packing=packing))
    check_packing(_model(), DataConfig(path="unused"))


@pytest.mark.parametrize("wrapper", [RMT, RETRIEVAL, ARMT], ids=["rmt", "retrieval", "armt"])
def test_drafts_may_cross_any_number_of_segment_ends(wrapper: dict[str, Any]) -> None:
    model = as_mixer(_model({**wrapper, "segment": 3}))
    for accepted in ([8, 0, 1], [2, 3, 4], [5, 7, 8], [0, 0, 0]):
        decoding = Decoding(model, 3, n_tentative=8, label=f"{accepted} of 8")
        decoding.feed([3, 2, 1])
        decoding.begin(8)
        decoding.feed([1, 1, 1])
        decoding.feed([6, 6, 6])
        decoding.reorder([2, 0, 1])
        decoding.feed([1, 1, 1])
        decoding.commit(accepted)
        decoding.feed([1, 1, 1])
        decoding.begin(2)
        decoding.feed([2, 2, 2])
        decoding.abort()
        decoding.feed([4, 1, 7])


def test_room_is_what_is_left_of_the_segment() -> None:
    decoding = Decoding(as_mixer(_model(RMT)), 2, n_tentative=4)
    state = decoding.state
    assert isinstance(state, SegmentState)
    assert state.room().tolist() == [5, 5]
    decoding.feed([3, 5])
    assert state.room().tolist() == [2, 0]
    decoding.begin(2)
    decoding.feed([2, 1])
    assert state.room().tolist() == [0, 4]
    assert len(state.lanes) == 2
    decoding.commit([1, 0])
    assert state.room().tolist() == [1, 0]
    assert len(state.lanes) == 1


@pytest.mark.parametrize("wrapper", [RMT, ARMT], ids=["rmt", "armt"])
def test_streaming_takes_constant_memory(wrapper: dict[str, Any]) -> None:
    model = _model(wrapper).eval()

    def peak(n_tokens: int) -> tuple[int, int]:
        state = model.new_state(1, n_tokens, dtype=torch.float64, device="cpu")
        with torch.no_grad(), LiveMemory() as memory:
            for start in range(0, n_tokens, 5):
                model(torch.zeros(1, 5, D_MODEL).double(), SeqInfo.contiguous(1, 5, start=start), state=state)
        memory.close()
        return state.nbytes(), memory.peak

    assert peak(50) == peak(200)


def _gpt2(*wrappers: dict[str, Any]) -> ModelConfig:
    return ModelConfig.model_validate({"variant": "gpt2-124m", "wrappers": list(wrappers)})


def test_added_parameters_of_gpt2() -> None:
    bare = n_parameters(_gpt2().build("meta"))
    assert bare == 124_439_808
    rmt = _gpt2({"type": "rmt", "n_memory": 16, "segment": 512})
    assert n_parameters(rmt.build("meta")) - bare == 16 * 768
    armt = _gpt2({"type": "armt", "n_memory": 10, "segment": 512, "d_memory": 64})
    model: Any = armt.build("meta")
    assert all(isinstance(m, AssociativeMemory) and n_parameters(m) == 688_897 for m in model.memories)
    assert n_parameters(model) - bare == 8_266_764 + 7_680
    state = armt.cost(100_000, "decode", 4).total.state_bytes_per_seq
    inner = _gpt2().cost(522, "decode", 4).total.state_bytes_per_seq
    assert (state - inner) // 4 == 12 * 384 * 769 == 3_543_552


def test_memory_around_a_loop() -> None:
    """Wrappers nest; the losses of a loop's iterates go through the segments."""
    loop = {"type": "loop", "n_loops": 3, "loss_window": 2}
    model, bare = _model(loop, RMT), _model(loop)
    x = random(2, 8, D_MODEL)
    output = _run(model, x)
    assert output.weight == 0.5 and len(output.extra) == 1
    memory = model.memory.expand(2, -1, -1)
    first = _run(bare, torch.cat([memory, x[:, :5], memory], dim=1))
    second = _run(bare, torch.cat([first.hidden[:, -2:], x[:, 5:]], dim=1))
    hidden = [
        torch.cat([a[:, 2:7], b[:, 2:]], dim=1)
        for a, b in zip((first.hidden, first.extra[0][0]), (second.hidden, second.extra[0][0]))
    ]
    assert_same(output.hidden, hidden[0], "hidden states")
    assert_same(output.extra[0][0], hidden[1], "an earlier iterate")
    decoding = Decoding(as_mixer(model.eval()), 2, label="nested")
    decoding.feed([4, 9])
    decoding.feed([3, 3])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RMTConfig(n_memory=0, retrieval=True), "set n_memory to at least 1"),
        (lambda: RMTConfig(n_memory=1, sample_segments=True), "such as curriculum"),
        (lambda: ARMTConfig(n_memory=1, curriculum=[0]), "each at least 1"),
        (lambda: _model({**RMT, "segment": 61}, position={"type": "learned"}), "more than model.max_seq_len 64"),
        (lambda: _model({"type": "loop", "n_loops": 2}, ARMT), "list armt first in model.wrappers"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
