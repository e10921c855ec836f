"""Banded attention by blocks against every score held: values, log-sum-exps and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.banded_attention import banded_attention, banded_attention_reference, merge


def inputs(n: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    shapes = ((2, n, 3, 8), (2, n, 3, 8), (2, n, 3, 5))
    return [torch.randn(s, generator=rng, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def segments_of(n: int) -> torch.Tensor:
    return torch.stack([torch.arange(n) // 7, (torch.arange(n) > n // 2).long()])


@pytest.mark.parametrize("n", [1, 4, 5, 6, 23, 40])
@pytest.mark.parametrize("window", [1, 5, 8, 64])
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"self_score": -1e4}, {"slopes": [0.5, 0.1, 0.0]}])
@pytest.mark.parametrize("segmented", [False, True])
def test_equals_the_reference(n: int, window: int, options: dict[str, Any], segmented: bool) -> None:
    leaves = inputs(n)
    segments = segments_of(n) if segmented else None
    outcomes = []
    if options.get("slopes"):
        where = {"slopes": torch.tensor([options["slopes"]]).double(), "positions": (7 * torch.arange(n) % 50)[None]}
        options = {**where, "positions": where["positions"].expand(2, n)}
    for run in (banded_attention, banded_attention_reference):
        o, lse = run(*leaves, window, segments, **options)
        weights = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape)
        visible = lse > -1e3
        loss = (o * weights).sum() + torch.where(visible, lse, 0.0).sum()
        outcomes.append([o, lse, *torch.autograd.grad(loss, leaves)])
    for found, wanted in zip(*outcomes):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def test_low_precision_and_non_contiguous_inputs() -> None:
    q, k, v = (x.detach().bfloat16().transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(40))
    o, lse = banded_attention(q, k, v, 8)
    assert o.dtype == torch.bfloat16 and lse.dtype == torch.float32
    wanted, _ = banded_attention_reference(q.double(), k.double(), v.double(), 8)
    torch.testing.assert_close(o.double(), wanted, rtol=0.02, atol=0.03)


def test_merge_of_disjoint_sets_is_attention_over_their_union() -> None:
    q, k, v = (x.detach() for x in inputs(20))
    scores = torch.einsum("bihd,bjhd->bhij", q, k)
    parts = []
    for chosen in (slice(0, 6), slice(6, 20)):
        s = scores[..., chosen]
        parts.append((torch.einsum("bhij,bjhv->bihv", s.softmax(-1), v[:, chosen]), s.logsumexp(-1).transpose(1, 2)))
    o, lse = merge(parts)
    torch.testing.assert_close(o, torch.einsum("bhij,bjhv->bihv", scores.softmax(-1), v))
    torch.testing.assert_close(lse, scores.logsumexp(-1).transpose(1, 2))
