"""Linear attention: chunks against the token loop, and the token loop against sums written out."""

from __future__ import annotations

import pytest
import torch

from kernels import dispatch
from kernels.linear_attention import LinearAttentionQuery, linear_attention
from kernels.linear_attention.chunked import CHUNKED
from kernels.linear_attention.reference import REFERENCE
from kernels.linear_attention.spec import check_linear_attention, outcome, sample_inputs

CPU = torch.device("cpu")
OPTIONAL = ("log_decay", "starts", "state", "valid")


@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_chunks_equal_reference(dtype: torch.dtype, decay: bool) -> None:
    assert check_linear_attention(CHUNKED, LinearAttentionQuery("cpu", dtype, decay), CPU) is None


@pytest.mark.parametrize("given", [OPTIONAL, (), *((name,) for name in OPTIONAL), ("log_decay", "valid")], ids="+".join)
@pytest.mark.parametrize("length", [1, 2, 37, 64])
def test_any_chunk_size(length: int, given: tuple[str, ...]) -> None:
    """1, odd, a divisor, and larger than T; with packing, ragged rows and a state, each alone and all together."""
    inputs = sample_inputs(CPU, torch.float64, length=length)
    inputs |= {name: None for name in OPTIONAL if name not in given}
    wanted = outcome(REFERENCE, inputs, torch.float64)
    for chunk in (1, 7, 16, 100):
        found = outcome(CHUNKED, inputs, torch.float64, chunk=chunk)
        assert set(found) == set(wanted)
        for name, value in found.items():
            torch.testing.assert_close(value, wanted[name], atol=1e-10, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("decay", ["constant", "none"])
def test_groups_and_constant_decays(groups: int, decay: str) -> None:
    for ragged in (True, False):
        inputs = sample_inputs(CPU, torch.float64, groups=groups, length=32)
        inputs["log_decay"] = torch.log(torch.tensor([0.9, 0.5, 0.99, 1.0]).double()) if decay == "constant" else None
        if not ragged:
            inputs |= {"valid": None, "starts": None}
        wanted = outcome(REFERENCE, inputs, torch.float64)
        for chunk in (8, 5):
            for name, value in outcome(CHUNKED, inputs, torch.float64, chunk=chunk).items():
                torch.testing.assert_close(value, wanted[name], atol=1e-10, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_reference_is_the_sum_over_earlier_tokens() -> None:
    inputs = sample_inputs(CPU, torch.float64, groups=4, length=9)
    q, k, v, logs = (inputs[name] for name in ("q", "k", "v", "log_decay"))
    assert q is not None and k is not None and v is not None and logs is not None
    y, _ = REFERENCE.run(q, k, v, logs)
    for t in range(9):
        wanted = sum(
            (q[:, t] * k[:, s]).sum(-1, keepdim=True) * logs[:, s + 1 : t + 1].sum(1).exp()[..., None] * v[:, s]
            for s in range(t + 1)
        )
        torch.testing.assert_close(y[:, t], wanted)


def test_no_decay_is_causal_attention_without_softmax() -> None:
    q, k, v = (torch.randn(2, 21, 3, 4, dtype=torch.float64) for _ in range(3))
    scores = torch.einsum("bthd,bshd->bhts", q, k).tril()
    y, _ = linear_attention(q, k, v, chunk=8)
    torch.testing.assert_close(y, torch.einsum("bhts,bshd->bthd", scores, v))


@pytest.mark.parametrize("log_decay", [-float("inf"), -50.0])
def test_a_shut_gate_forgets(log_decay: float) -> None:
    q, k, v = (torch.randn(1, 40, 1, 4, dtype=torch.float64) for _ in range(3))
    logs = torch.full((1, 40, 1), -0.1, dtype=torch.float64)
    logs[:, ::3] = log_decay
    wanted, _ = REFERENCE.run(q, k, v, logs)
    found, state = linear_attention(q, k, v, logs, chunk=16)
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=0)
    assert bool(torch.isfinite(state).all())


def test_long_decay_stays_exact_in_fp32() -> None:
    """Sums of log decays over a chunk are large where every token nearly forgets all before it."""
    q, k, v = (torch.randn(1, 128, 2, 8) for _ in range(3))
    logs = -20 * torch.rand(1, 128, 2)
    wanted, _ = REFERENCE.run(q.double(), k.double(), v.double(), logs.double())
    found, _ = linear_attention(q, k, v, logs)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 2e-4


def test_parts_joined_by_the_state_equal_the_whole() -> None:
    inputs = sample_inputs(CPU, torch.float64, length=50)
    q, k, v, logs = (inputs[name] for name in ("q", "k", "v", "log_decay"))
    assert q is not None and k is not None and v is not None
    whole, end = linear_attention(q, k, v, logs, chunk=16)
    state, parts = None, []
    for part in torch.arange(50).split([20, 1, 1, 17, 11]):
        y, state = linear_attention(q[:, part], k[:, part], v[:, part], logs[:, part], state=state, chunk=16)  # type: ignore[index]
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(state, end, atol=1e-12, rtol=1e-12)


def test_compiles_whole() -> None:
    inputs = sample_inputs(CPU, torch.float32)
    compiled = torch.compile(linear_attention, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(**inputs, chunk=8), linear_attention(**inputs, chunk=8)):
        torch.testing.assert_close(a, b)


def test_choice() -> None:
    query = LinearAttentionQuery("cpu", torch.float32, True)
    assert dispatch.resolve("linear_attention", query).name == "chunked"
    assert dispatch.resolve("linear_attention", query, policy="reference").name == "reference"
