"""The look-up of a Memory Layer: implementations against the reference, addresses and weights against formulas."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import dispatch
from kernels.memory_layer import MemoryLookupQuery, gather, hash_codes, hash_weights, memory_lookup
from kernels.memory_layer.hashing import Weighting
from kernels.memory_layer.spec import check_memory_lookup, lookup_case

CPU = torch.device("cpu")
WEIGHTINGS: tuple[Weighting, ...] = ("l1_prob", "prob")


def pieces(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("chunk", [gather.CHUNK, 600])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_gather_equals_reference(dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "CHUNK", chunk)
    query = MemoryLookupQuery("cpu", dtype)
    assert check_memory_lookup(dispatch.op("memory_layer").impls["gather"], query, CPU) is None


def test_triton_equals_reference(repo_root: Path) -> None:
    """In a process of its own: Triton looks at TRITON_INTERPRET when it is imported."""
    pytest.importorskip("triton")
    code = (
        "import torch\nfrom kernels import dispatch\nfrom kernels.memory_layer import MemoryLookupQuery\n"
        "from kernels.memory_layer.spec import check_memory_lookup\n"
        "impl = dispatch.op('memory_layer').impls['triton']\n"
        "for dtype in (torch.float32, torch.float16):\n"
        "    query = MemoryLookupQuery('cpu', dtype)\n    assert impl.supports(query) is True\n"
        "    print(check_memory_lookup(impl, query, torch.device('cpu')))\n"
    )
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(repo_root)}
    done = subprocess.run([sys.executable, "-c", code], cwd=repo_root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["None", "None"]


def test_equals_torchs_embedding_bag() -> None:
    tables, codes, weights, _ = lookup_case(torch.float64, CPU, (11, 5, 8, 13))
    flat = codes + 8 * torch.arange(5)
    wanted = F.embedding_bag(flat, tables.flatten(0, 1), mode="sum", per_sample_weights=weights)
    torch.testing.assert_close(memory_lookup(tables, codes, weights), wanted)


def test_leading_dimensions_and_none() -> None:
    tables, codes, weights, _ = lookup_case(torch.float32, CPU, (12, 3, 4, 5))
    whole = memory_lookup(tables, codes, weights)
    torch.testing.assert_close(memory_lookup(tables, codes.view(2, 6, 3), weights.view(2, 6, 3)), whole.view(2, 6, 5))
    assert memory_lookup(tables, codes[:0], weights[:0]).shape == (0, 5)


def test_gradcheck() -> None:
    tables, codes, weights, _ = lookup_case(torch.float64, CPU, (6, 3, 4, 5))
    inputs = (tables.requires_grad_(), weights.requires_grad_())
    assert torch.autograd.gradcheck(lambda t, w: memory_lookup(t, codes, w), inputs)


def test_only_addressed_rows_get_a_gradient() -> None:
    tables, codes, weights, grad = lookup_case(torch.float32, CPU, (3, 4, 16, 5))
    tables.requires_grad_()
    memory_lookup(tables, codes, weights).backward(grad)
    seen = torch.zeros(4, 16, dtype=torch.bool)
    seen[torch.arange(4), codes] = True
    assert tables.grad is not None
    assert torch.equal(tables.grad.abs().sum(-1) > 0, seen)


def test_torch_checks_the_operator() -> None:
    tables, codes, weights, _ = lookup_case(torch.float64, CPU, (4, 3, 4, 5))
    inputs = (tables.requires_grad_(), codes, weights.requires_grad_())
    torch.library.opcheck(torch.ops.manyformer.memory_lookup.default, inputs)


@pytest.mark.parametrize("n_bits", [1, 3, 8])
def test_codes_of_signs(n_bits: int) -> None:
    ones = torch.ones(n_bits)
    assert int(hash_codes(ones)) == 2**n_bits - 1
    assert int(hash_codes(-ones)) == 0
    assert int(hash_codes(0 * ones)) == 2**n_bits - 1, "zero counts as positive"
    first = -ones.clone()
    first[0] = 2.0
    assert int(hash_codes(first)) == 2 ** (n_bits - 1), "the first element is the most significant bit"


@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("n_bits", [1, 3, 8])
def test_prob_is_the_softmax_over_all_sign_vectors(n_bits: int, temperature: float) -> None:
    z = pieces(20, n_bits)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=n_bits)), dtype=torch.float64)
    softmax = (z @ signs.T / temperature).softmax(-1)
    codes = hash_codes(z)
    assert torch.equal(softmax.argmax(-1), codes)
    wanted = softmax.gather(-1, codes[:, None])[:, 0]
    torch.testing.assert_close(hash_weights(z, "prob", temperature), wanted, rtol=0, atol=1e-12)


def test_l1_prob_is_released_formula() -> None:
    z = pieces(20, 8)
    wanted = z.abs().sum(-1) * (1 / (1 + torch.exp(-2 * z.abs()))).prod(-1)
    torch.testing.assert_close(hash_weights(z, "l1_prob"), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_slope_of_the_weights(weighting: Weighting) -> None:
    z = pieces(9, 6).requires_grad_()
    p = hash_weights(z, weighting)
    (found,) = torch.autograd.grad(p.sum(), z)
    away = torch.sigmoid(-2 * z.abs())
    if weighting == "prob":
        wanted = 2 * p[:, None] * z.sign() * away
    else:
        product, total = hash_weights(z, "prob")[:, None], z.abs().sum(-1, keepdim=True)
        wanted = z.sign() * product * (1 + 2 * total * away)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_are_even_and_continuous_at_zero(weighting: Weighting) -> None:
    z = pieces(9, 6)
    flipped = z.clone()
    flipped[:, 2] *= -1
    assert torch.equal(hash_weights(z, weighting), hash_weights(flipped, weighting))
    for tiny in (1e-12, -1e-12):
        near = z.clone()
        near[:, 2] = tiny
        at = z.clone()
        at[:, 2] = 0.0
        torch.testing.assert_close(hash_weights(near, weighting), hash_weights(at, weighting), rtol=0, atol=1e-10)


def test_weights_do_not_underflow_in_half_precision() -> None:
    z = torch.full((1, 16), 1e-3, dtype=torch.float16)
    assert abs(float(hash_weights(z, "prob")) / 2.0**-16 - 1) < 0.1


def test_choice() -> None:
    assert dispatch.resolve("memory_layer", MemoryLookupQuery("cpu", torch.float32)).name == "gather"
    triton = dispatch.op("memory_layer").impls["triton"]
    assert "any order" in triton.supports(MemoryLookupQuery("cuda", torch.float32, deterministic=True))
    assert "fp64" in triton.supports(MemoryLookupQuery("cuda", torch.float64))
