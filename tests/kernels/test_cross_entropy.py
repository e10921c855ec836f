"""Cross-entropy by chunks against float64, memory held, and the plain per-token path."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels import dispatch
from kernels.cross_entropy import CrossEntropyForm, CrossEntropyQuery, linear_cross_entropy, token_losses
from kernels.cross_entropy.spec import check_cross_entropy

FORMS = {
    "plain": CrossEntropyForm(),
    "chunk": CrossEntropyForm(chunk=7),
    "one": CrossEntropyForm(chunk=1),
    "z_loss": CrossEntropyForm(z_loss=0.1, chunk=5),
    "softcap": CrossEntropyForm(softcap=3.0, chunk=5),
    "all": CrossEntropyForm(softcap=3.0, z_loss=0.1, chunk=4, ignore_index=-1),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FORMS)
def test_chunked_equals_reference(kind: str, dtype: torch.dtype, bias: bool) -> None:
    query = CrossEntropyQuery("cpu", dtype, FORMS[kind], bias)
    assert check_cross_entropy(dispatch.op("cross_entropy").impls["chunked"], query, torch.device("cpu")) is None


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = torch.randn(19, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(29, 8, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 29, (19,))
    labels[3] = labels[11] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_equals_torch(backend: str) -> None:
    hidden, weight, labels = inputs()
    found = linear_cross_entropy(hidden, weight, labels, CrossEntropyForm(chunk=6), backend=backend)
    logits = hidden @ weight.T
    wanted = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(found.nll, wanted.detach())
    torch.testing.assert_close(found.lse, logits.logsumexp(-1).where(labels != -100, 0.0).detach())
    for a, b in zip(
        torch.autograd.grad(found.total * 0.3, (hidden, weight)),
        torch.autograd.grad(wanted.sum() * 0.3, (hidden, weight)),
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_gradcheck_with_token_weights(backend: str) -> None:
    hidden, weight, labels = inputs()
    bias = torch.randn(29, dtype=torch.float64, requires_grad=True)
    token_weights = torch.rand(19, dtype=torch.float64)
    form = CrossEntropyForm(chunk=6, z_loss=0.2, softcap=4.0)

    def total(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(h, w, labels, form, bias=b, token_weights=token_weights, backend=backend).total

    assert torch.autograd.gradcheck(total, (hidden, weight, bias))


def test_frozen_inputs_and_no_grad() -> None:
    hidden, weight, labels = inputs(torch.float32)
    (only,) = torch.autograd.grad(linear_cross_entropy(hidden, weight.detach(), labels).total, hidden)
    both = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels).total, (hidden, weight))
    torch.testing.assert_close(only, both[0])
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, labels).total.requires_grad


def test_all_ignored_is_zero_and_finite() -> None:
    hidden, weight, labels = inputs(torch.float32)
    found = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), CrossEntropyForm(z_loss=0.1))
    assert found.total.item() == 0.0
    for grad in torch.autograd.grad(found.total, (hidden, weight)):
        assert not grad.any()


def test_autocast_uses_its_dtype_and_keeps_fp32_gradients() -> None:
    hidden, weight, labels = inputs(torch.float32)
    exact = linear_cross_entropy(hidden, weight, labels)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(hidden, weight, labels)
    assert found.total.dtype == torch.float32 and found.total != exact.total
    torch.testing.assert_close(found.total, exact.total, rtol=2e-2, atol=0)
    assert torch.autograd.grad(found.total, weight)[0].dtype == torch.float32


def test_large_logits_stay_finite() -> None:
    hidden, weight, labels = inputs(torch.float32)
    found = linear_cross_entropy(hidden * 1e4, weight, labels, CrossEntropyForm(chunk=3))
    assert torch.isfinite(found.total) and all(
        torch.isfinite(g).all() for g in torch.autograd.grad(found.total, (hidden, weight))
    )


def test_only_a_chunk_of_logits_is_held() -> None:
    """The largest tensor made with a V dimension has `chunk` rows."""
    from torch.utils._python_dispatch import TorchDispatchMode

    rows: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == 97:
                rows.append(out.shape[0])
            return out

    hidden, weight = torch.randn(64, 8, requires_grad=True), torch.randn(97, 8, requires_grad=True)
    with Watch():
        linear_cross_entropy(hidden, weight, torch.randint(0, 97, (64,)), CrossEntropyForm(chunk=16)).total.backward()
    assert max(row for row in rows if row != 8) == 16  # 8: the weight transposed


def test_token_losses_are_differentiable() -> None:
    hidden, weight, labels = inputs()
    nll, lse = token_losses(hidden @ weight.T, labels)
    grads = torch.autograd.grad((nll * torch.arange(19)).sum() + lse.sum(), hidden)
    assert torch.isfinite(grads[0]).all() and not grads[0][3].any() and grads[0][4].any()
