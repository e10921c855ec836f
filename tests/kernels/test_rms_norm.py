"""RMSNorm implementations against the reference."""

from __future__ import annotations

import pytest
import torch

from kernels import dispatch
from kernels.rms_norm import RMSNormQuery, rms_norm
from kernels.rms_norm.spec import check_rms_norm


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["torch", "cpu"])
def test_equals_reference(name: str, dtype: torch.dtype, affine: bool) -> None:
    impl = dispatch.op("rms_norm").impls[name]
    query = RMSNormQuery("cpu", dtype, affine)
    if impl.supports(query) is not True:
        assert dtype == torch.bfloat16 and name == "cpu"
        return
    assert check_rms_norm(impl, query, torch.device("cpu")) is None


@pytest.mark.parametrize("affine", [True, False])
def test_gradcheck(affine: bool) -> None:
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True) if affine else None
    impl = dispatch.op("rms_norm").impls["cpu"]
    assert torch.autograd.gradcheck(
        lambda *inputs: impl.run(inputs[0], inputs[1] if affine else None, 1e-5), (x, weight) if affine else (x,)
    )


def test_keeps_dtype_with_fp32_weight() -> None:
    assert rms_norm(torch.randn(2, 8, dtype=torch.bfloat16), torch.ones(8), 1e-5).dtype == torch.bfloat16


def test_zero_rows_are_finite() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    rms_norm(x, torch.ones(8), 1e-5).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


def test_choice() -> None:
    assert dispatch.resolve("rms_norm", RMSNormQuery("cpu", torch.float32, True)).name == "cpu"
    assert dispatch.resolve("rms_norm", RMSNormQuery("cuda", torch.bfloat16, True)).name == "torch"
