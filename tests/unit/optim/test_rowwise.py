"""Row-wise AdamW against torch's AdamW and its definition; rows without a gradient; which parameters get it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm.core.errors import UserError
from llm.train.config import OptimConfig
from llm.train.optim.build import build_optimizer
from llm.train.optim.groups import param_rules
from llm.train.optim.rowwise import RowwiseAdamW
from tests.distributed.steps import tiny_model, tiny_run

SETTINGS: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.5}


def table(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, dtype=torch.float64))


def steps(optimizer: torch.optim.Optimizer, param: nn.Parameter, grads: list[Tensor]) -> Tensor:
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    return param.detach().clone()


def test_rows_of_one_number_are_torchs_adamw() -> None:
    ours, grads = table(3, 5, 1), [torch.randn(3, 5, 1, dtype=torch.float64) for _ in range(4)]
    theirs = nn.Parameter(ours.detach().clone())
    found = steps(RowwiseAdamW([ours], **SETTINGS), ours, grads)
    torch.testing.assert_close(found, steps(torch.optim.AdamW([theirs], **SETTINGS), theirs, grads))


def test_equals_its_definition() -> None:
    param = table(4, 6)
    expected = param.detach().clone()
    mean, square, count = torch.zeros(4, 6, dtype=torch.float64), torch.zeros(4, dtype=torch.float64), [0] * 4
    grads = [torch.randn(4, 6, dtype=torch.float64) for _ in range(3)]
    grads[0][1] = grads[2][1] = grads[1][3] = 0.0
    for grad in grads:
        for r in range(4):
            if not bool(grad[r].any()):
                continue
            count[r] += 1
            mean[r] = 0.8 * mean[r] + 0.2 * grad[r]
            square[r] = 0.9 * square[r] + 0.1 * (grad[r] ** 2).mean()
            root = (square[r] / (1 - 0.9 ** count[r])).sqrt() + 1e-6
            expected[r] = expected[r] * (1 - 0.1 * 0.5) - 0.1 * mean[r] / (1 - 0.8 ** count[r]) / root
    torch.testing.assert_close(steps(RowwiseAdamW([param], **SETTINGS), param, grads), expected)


def test_rows_without_a_gradient_stay_to_the_bit() -> None:
    param = nn.Parameter(torch.randn(2, 8, 5))
    optimizer = RowwiseAdamW([param], **SETTINGS)
    steps(optimizer, param, [torch.randn(2, 8, 5)])
    before = {name: value.clone() for name, value in optimizer.state[param].items()} | {"param": param.detach().clone()}
    grad = torch.zeros(2, 8, 5)
    grad[1, 3] = torch.randn(5)
    steps(optimizer, param, [grad])
    after = {**optimizer.state[param], "param": param.detach()}
    for name, value in before.items():
        changed = (after[name] != value).any(-1)
        assert changed.nonzero().tolist() == [[1, 3]], name


def test_a_row_that_comes_late_moves_as_at_a_first_step() -> None:
    """Its moments are corrected by its own count."""
    param = nn.Parameter(torch.zeros(2, 4))
    optimizer = RowwiseAdamW([param], **(SETTINGS | {"weight_decay": 0.0, "betas": (0.9, 0.999)}))
    early, late = torch.zeros(2, 4), torch.zeros(2, 4)
    early[0], late[1] = 1.0, 1.0
    steps(optimizer, param, [early] * 50)
    moved = steps(optimizer, param, [late])[1]
    torch.testing.assert_close(moved, torch.full((4,), -0.1), rtol=1e-4, atol=0)


def test_state_is_there_from_the_start() -> None:
    run = tiny_run(optim={"groups": [{"match": ["embed.*"], "optimizer": "rowwise_adamw"}]})
    optimizer = build_optimizer(tiny_model().build("cpu"), run.optim)
    state = optimizer.state()["embed.weight"]
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "row_step": (61, 1), "exp_avg": (61, 32), "row_exp_avg_sq": (61, 1),
    }  # fmt: skip
    assert all(float(value.abs().sum()) == 0 for value in state.values())
    assert set(optimizer.state()["final_norm.weight"]) == {"step", "exp_avg", "exp_avg_sq"}


SHAPES = {"layers.0.mixer.q.tables": (4, 16, 32), "layers.0.mixer.q.bias": (32,), "layers.0.mixer.out.weight": (32, 32)}


def test_muon_takes_no_tables() -> None:
    found = param_rules(SHAPES, ("layers.0.",), OptimConfig(type="muon"))
    assert {name for name, rule in found.items() if rule.kind == "muon"} == {"layers.0.mixer.out.weight"}


def test_a_vector_has_no_rows() -> None:
    groups = [{"match": ["*.bias"], "optimizer": "rowwise_adamw"}]
    with pytest.raises(UserError, match=r"groups\[0\].optimizer=rowwise_adamw matches layers.0.mixer.q.bias of shape"):
        param_rules(SHAPES, ("layers.0.",), OptimConfig.model_validate({"groups": groups}))
