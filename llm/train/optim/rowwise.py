"""Row-wise AdamW for look-up tables: one second moment per row, and rows without a gradient stay as they are.

A row of a table [..., R, D] moves only in steps whose tokens address it. An ordinary Adam would go on moving it by old
momentum, shrink it by weight decay, and correct its moments for steps that it never took. Here a row without a gradient
keeps its values, its moments and its own count of steps.

    g2 = mean over the row of grad^2,  m = b1 m + (1 - b1) grad,  v = b2 v + (1 - b2) g2
    row = (1 - lr * weight_decay) row - lr * m / (1 - b1^n) / (sqrt(v / (1 - b2^n)) + eps),  n = steps of this row
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from llm.train.optim.muon import Shards, WholeTensors


class RowwiseAdamW(torch.optim.Optimizer):
    """Takes parameters [..., R, D] that are whole along D; state: "exp_avg" as the parameter, "row_step" and
    "row_exp_avg_sq" [..., R, 1]. shards: how the parameters are stored (default: whole)."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        shards: Shards | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.shards: Shards = shards if shards is not None else WholeTensors()
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param].update(
                    row_step=_zero_rows(param), exp_avg=torch.zeros_like(param), row_exp_avg_sq=_zero_rows(param)
                )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        local = self.shards.local
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    held = {name: local(value) for name, value in self.state[param].items()}
                    update_rows(
                        local(param), local(param.grad), held["row_step"], held["exp_avg"], held["row_exp_avg_sq"],
                        lr=group["lr"], betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"],
                    )  # fmt: skip


def update_rows(
    param: Tensor,
    grad: Tensor,
    row_step: Tensor,
    exp_avg: Tensor,
    row_exp_avg_sq: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step of rows [..., R, D] in place; no value is looked at on the host."""
    beta1, beta2 = betas
    square = torch.linalg.vector_norm(grad, dim=-1, keepdim=True).square_().div_(grad.shape[-1])
    seen = (square > 0).to(square.dtype)
    row_step.add_(seen)
    exp_avg.lerp_(grad, seen * (1 - beta1))
    row_exp_avg_sq.lerp_(square, seen * (1 - beta2))
    count = row_step.clamp(min=1)
    root = (row_exp_avg_sq / (1 - beta2**count)).sqrt_().add_(eps)
    param.mul_(1 - lr * weight_decay * seen)
    param.addcmul_(exp_avg, seen / (root * (1 - beta1**count)), value=-lr)


def _zero_rows(param: Tensor) -> Tensor:
    """Zeros [..., R, 1], laid out as the parameter."""
    return torch.zeros_like(param[..., :1])
