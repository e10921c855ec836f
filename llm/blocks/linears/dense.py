"""Dense linear layer: y = x W^T + b."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.blocks.base import LINEARS, InitConfig, LinearConfig, linear_init
from llm.core.cost import Cost, matmul_cost
from llm.core.init import Init, constant
from llm.core.registry import About


@LINEARS.register(
    "dense",
    tiny=lambda: DenseLinearConfig(),
    paper="standard",
    about=About(
        equation="y = W x + b",
        use="The default at every role.",
        weakness="Every parameter costs two FLOPs for every token.",
    ),
)
class DenseLinearConfig(LinearConfig):
    """The ordinary linear layer."""

    def build(self, d_in: int, d_out: int, *, bias: bool, std: float, init: InitConfig) -> DenseLinear:
        return DenseLinear(d_in, d_out, bias=bias, std=std, init=init)

    def cost(self, d_in: int, d_out: int, *, bias: bool) -> Cost:
        return matmul_cost(d_in, d_out, bias=bias)


class DenseLinear(nn.Module):
    """weight [d_out, d_in], bias [d_out] or None."""

    def __init__(self, d_in: int, d_out: int, *, bias: bool, std: float, init: InitConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None
        self.std = std
        self.init = init

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def init_spec(self) -> dict[str, Init]:
        return {"weight": linear_init(self.std, self.init), "bias": constant(0.0)}


def project(x: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
    """(linear(x) for each linear), in one matrix product where all are plain dense layers on one device; linears of one
    other class may share work through a method `project_all(x, linears)`."""
    joined = project_joined(x, *linears)
    if joined is None:
        together = getattr(linears[0], "project_all", None)
        if together is not None and len({type(linear) for linear in linears}) == 1:
            return together(x, linears)
        return tuple(linear(x) for linear in linears)
    return joined.split([linear.weight.shape[0] for linear in linears if isinstance(linear, DenseLinear)], dim=-1)


def project_joined(x: Tensor, *linears: nn.Module) -> Tensor | None:
    """The outputs of several linears beside one another in one tensor, or None where they are not plain dense layers
    (a weight that is split over devices stays apart, too).

    Their parameters stay apart, so that optimizers and checkpoints know each by its name.
    """
    dense = [part for part in linears if type(part) is DenseLinear and not hasattr(part.weight, "device_mesh")]
    if len(dense) != len(linears) or len({linear.bias is None for linear in dense}) > 1:
        return None
    weight = torch.cat([linear.weight for linear in dense])
    biases: list[Tensor] = [linear.bias for linear in dense if linear.bias is not None]
    return F.linear(x, weight, torch.cat(biases) if biases else None)
