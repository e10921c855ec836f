"""The delta rule: chunks against the token loop, the loop against matrices written out and against transformers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels import dispatch
from kernels.delta_rule import DeltaRuleQuery, delta_rule
from kernels.delta_rule.chunked import CHUNKED
from kernels.delta_rule.reference import REFERENCE
from kernels.delta_rule.spec import check_delta_rule, sample_inputs
from kernels.linear_attention import linear_attention
from kernels.linear_attention.spec import outcome

CPU = torch.device("cpu")
OPTIONAL = ("log_decay", "starts", "state", "valid")


@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_chunks_equal_reference(dtype: torch.dtype, decay: bool) -> None:
    assert check_delta_rule(CHUNKED, DeltaRuleQuery("cpu", dtype, decay), CPU) is None


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
def test_groups_and_constant_decays(groups: int) -> None:
    inputs = sample_inputs(CPU, torch.float64, groups=groups, length=32)
    inputs["log_decay"] = torch.log(torch.tensor([0.9, 0.5, 0.99, 1.0]).double())
    wanted = outcome(REFERENCE, inputs, torch.float64)
    for chunk in (8, 5):
        for name, value in outcome(CHUNKED, inputs, torch.float64, chunk=chunk).items():
            torch.testing.assert_close(value, wanted[name], atol=1e-10, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_reference_multiplies_the_decayed_state_by_householder_like_matrices() -> None:
    """S_t = d (I - beta k k^T) S + beta k v^T; with the gradient at the undecayed state it would be another model."""
    inputs = sample_inputs(CPU, torch.float64, groups=4, length=6)
    q, k, v, beta, logs = (inputs[name] for name in ("q", "k", "v", "beta", "log_decay"))
    assert q is not None and k is not None and v is not None and beta is not None and logs is not None
    y, end = REFERENCE.run(q, k, v, beta, logs)
    for row in range(2):
        for head in range(4):
            s = torch.zeros(5, 3, dtype=torch.float64)
            for t in range(6):
                key, step, decay = k[row, t, head], beta[row, t, head], logs[row, t, head].exp()
                turn = torch.eye(5) - step * torch.outer(key, key)
                s = decay * turn @ s + step * torch.outer(key, v[row, t, head])
                torch.testing.assert_close(y[row, t, head], q[row, t, head] @ s)
            torch.testing.assert_close(end[row, head], s)


def test_orthogonal_keys_make_it_linear_attention() -> None:
    k = torch.eye(16, dtype=torch.float64)[None, :, None].expand(1, 16, 2, 16)
    q, v = (torch.randn(1, 16, 2, 16, dtype=torch.float64) for _ in range(2))
    found, _ = delta_rule(q, k, v, torch.ones(1, 16, 2, dtype=torch.float64), chunk=8)
    torch.testing.assert_close(found, linear_attention(q, k, v)[0])


def test_a_step_of_one_overwrites_what_a_key_held() -> None:
    keys = F.normalize(torch.randn(1, 3, 1, 8, dtype=torch.float64), dim=-1)
    keys = torch.linalg.qr(keys[0, :, 0].T)[0].T[None, :, None]
    k = keys.repeat(1, 4, 1, 1)
    v = torch.randn(1, 12, 1, 5, dtype=torch.float64)
    y, _ = delta_rule(k, k, v, torch.ones(1, 12, 1, dtype=torch.float64), chunk=5)
    torch.testing.assert_close(y, v)


def test_equal_keys_are_no_danger() -> None:
    """The system's powers grow like binomials there; substitution stays exact."""
    k = F.normalize(torch.ones(1, 256, 1, 16) + 0.01 * torch.randn(1, 256, 1, 16), dim=-1)
    q, v = torch.randn(1, 256, 1, 16), torch.randn(1, 256, 1, 16)
    beta = 1.9 * torch.ones(1, 256, 1)
    found, state = delta_rule(q, k, v, beta)
    wanted, _ = REFERENCE.run(q.double(), k.double(), v.double(), beta.double())
    assert bool(torch.isfinite(state).all())
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_parts_joined_by_the_state_equal_the_whole() -> None:
    inputs = sample_inputs(CPU, torch.float64, length=50)
    names = ("q", "k", "v", "beta", "log_decay")
    tensors = [tensor for name in names if (tensor := inputs[name]) is not None]
    whole, end = delta_rule(*tensors, chunk=16)
    state, parts = None, []
    for part in torch.arange(50).split([20, 1, 1, 17, 11]):
        y, state = delta_rule(*(tensor[:, part] for tensor in tensors), state=state, chunk=16)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(state, end, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("decay", [True, False])
def test_equals_transformers(decay: bool) -> None:
    """The gated delta rule of Qwen3-Next, which scales queries by K^-0.5."""
    theirs = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    inputs = sample_inputs(CPU, torch.float32, length=150)
    q, k, v, beta, logs, state = (inputs[n] for n in ("q", "k", "v", "beta", "log_decay", "state"))
    assert q is not None and k is not None and v is not None and beta is not None and logs is not None
    logs = logs if decay else torch.zeros_like(logs)
    ours, end = delta_rule(q * q.shape[-1] ** -0.5, k, v, beta, logs if decay else None, state=state)
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        rule = getattr(theirs, name)
        y, final = rule(q, k, v, g=logs, beta=beta, initial_state=state, output_final_state=True)
        torch.testing.assert_close(ours, y, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(end, final, atol=1e-5, rtol=1e-5)


def test_compiles_whole() -> None:
    inputs = sample_inputs(CPU, torch.float32)
    compiled = torch.compile(delta_rule, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(**inputs, chunk=8), delta_rule(**inputs, chunk=8)):
        torch.testing.assert_close(a, b)


def test_choice() -> None:
    query = DeltaRuleQuery("cpu", torch.float32, True)
    assert dispatch.resolve("delta_rule", query).name == "chunked"
    assert dispatch.resolve("delta_rule", query, policy="reference").name == "reference"
