"""Muon against torch's own and against its definition; state that exists from the start."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from llm.train.optim.build import build_optimizer
from llm.train.optim.muon import Muon, lr_scale, orthogonalise
from tests.distributed.steps import tiny_model, tiny_run


def settings(**changes: object) -> dict[str, object]:
    return {
        "lr": 0.02,
        "weight_decay": 0.1,
        "momentum": 0.9,
        "nesterov": True,
        "ns_steps": 5,
        "ns_dtype": torch.bfloat16,
    } | changes


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (16, 16)])
def test_equals_torchs_muon(shape: tuple[int, int], nesterov: bool) -> None:
    torch.manual_seed(0)
    first = nn.Parameter(torch.randn(shape))
    second = nn.Parameter(first.detach().clone())
    ours = Muon([first], **settings(nesterov=nesterov))  # type: ignore[arg-type]
    theirs = torch.optim.Muon(
        [second], lr=0.02, weight_decay=0.1, momentum=0.9, nesterov=nesterov, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        first.grad = torch.randn(shape)
        second.grad = first.grad.clone()
        ours.step()
        theirs.step()
    assert torch.equal(ours.state[first]["momentum_buffer"], theirs.state[second]["momentum_buffer"])
    # Both iterate in bf16.
    torch.testing.assert_close(first, second, rtol=0, atol=3 * 0.02 * lr_scale(*shape) * 0.01)


def test_a_stack_is_as_many_matrices() -> None:
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(3, 8, 12))
    single = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    grads = torch.randn(3, 8, 12)
    stack.grad = grads.clone()
    for param, grad in zip(single, grads):
        param.grad = grad.clone()
    Muon([stack], **settings()).step()  # type: ignore[arg-type]
    Muon(single, **settings()).step()  # type: ignore[arg-type]
    assert torch.equal(stack, torch.stack(list(single)))


def test_orthogonalise_flattens_the_singular_values() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 40, 30)
    values = torch.linalg.svdvals(orthogonalise(x, dtype=torch.float32))
    assert values.min() > 0.6 and values.max() < 1.3
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    cosine = torch.nn.functional.cosine_similarity(
        orthogonalise(x, dtype=torch.float32).flatten(1), (left @ right).flatten(1)
    )
    assert cosine.min() > 0.95


def test_bf16_iteration_is_near_the_fp32_one() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 32, 48)
    exact, rough = orthogonalise(x, dtype=torch.float32), orthogonalise(x, dtype=torch.bfloat16).float()
    assert (exact - rough).norm() / exact.norm() < 0.05


def test_update_has_the_root_mean_square_of_adamws() -> None:
    torch.manual_seed(0)
    param = nn.Parameter(torch.zeros(64, 32))
    param.grad = torch.randn(64, 32)
    Muon([param], **settings(weight_decay=0.0, lr=1.0)).step()  # type: ignore[arg-type]
    # A full-rank orthogonal update of rms 1/sqrt(max(rows, cols)) times 0.2 sqrt(max(rows, cols)).
    assert 0.15 < param.detach().square().mean().sqrt() < 0.25


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_is_there_from_the_start(kind: str) -> None:
    run = tiny_run(optim={"type": kind})
    model = tiny_model().build("cpu")
    state = build_optimizer(model, run.optim).state()
    assert set(state) == {name for name, _ in model.named_parameters()}
    adam = {"step", "exp_avg", "exp_avg_sq"}
    expected = {"momentum_buffer"} if kind == "muon" else adam
    assert set(state["layers.0.mixer.q.weight"]) == expected
    assert set(state["embed.weight"]) == adam
    assert all(float(value.abs().sum()) == 0 for entry in state.values() for value in entry.values())


def test_adamw_equals_its_definition() -> None:
    """Two steps by hand, with decoupled decay."""
    run = tiny_run(optim={"lr": 0.1, "weight_decay": 0.5, "betas": [0.8, 0.9], "eps": 1e-6})
    model = tiny_model().build("cpu")
    for param in model.parameters():
        nn.init.normal_(param)
    optimizer = build_optimizer(model, run.optim)
    name = "layers.1.channel.down.weight"
    weight = optimizer.params[name]
    expected, mean, square = weight.detach().clone(), torch.zeros_like(weight), torch.zeros_like(weight)
    for step in (1, 2):
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        grad: Tensor = weight.grad  # type: ignore[assignment]
        mean, square = 0.8 * mean + 0.2 * grad, 0.9 * square + 0.1 * grad**2
        expected = expected * (1 - 0.05 * 0.5)
        root = (square / (1 - 0.9**step)).sqrt() + 1e-6
        expected = expected - 0.05 * (mean / (1 - 0.8**step)) / root
        optimizer.step(0.5)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-6)


def test_scale_of_the_learning_rate() -> None:
    assert lr_scale(100, 25) == lr_scale(25, 100) == pytest.approx(0.2 * math.sqrt(100))
