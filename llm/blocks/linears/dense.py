"""Dense linear layer: y = x W^T + b."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.blocks.base import LINEARS, InitConfig, LinearConfig, compute_dtype, linear_init
from llm.blocks.linears.packed import Packed
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
    """weight [d_out, d_in], bias [d_out] or None.

    may_join: whether the weight may move into one tensor with those of the layers that are applied beside it.
    joined: that tensor [sum of d_out, d_in], kept by the first of them, of whose rows their weights are views.
    by_output: the first of its outputs are also used by themselves, so the weights of an output stay together.
    packed: a copy of the weight, or of the joined one, for a few rows on a CPU (llm/blocks/linears/packed.py).
    matrices: parameters that may be put into eight bits; quantized: whether they are (llm/generate/quantize.py).
    """

    matrices = ("weight",)
    may_join = False
    by_output = False
    quantized = False
    joined: Tensor | None = None
    packed: Packed | None = None

    def __init__(self, d_in: int, d_out: int, *, bias: bool, std: float, init: InitConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None
        self.std = std
        self.init = init

    def forward(self, x: Tensor) -> Tensor:
        if self.quantized:
            return quantized_linear(x, self.weight, self.bias)
        if self.packed is not None and (y := self.packed.linear(x, self.weight, self.bias, [self.weight])) is not None:
            return y
        return F.linear(x, self.weight, self.bias)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> DenseLinear:
        self.joined = None  # on another device or in another dtype the weights part again
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "joined"}  # nor are copies views

    def init_spec(self) -> dict[str, Init]:
        return {"weight": linear_init(self.std, self.init), "bias": constant(0.0)}


FEW_ROWS = 64
"""Up to this many rows, and from 4 on, a CPU is faster with a weight that lies output by output in front."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b of a weight [d_out, d_in] that lies output by output, the fastest way for the number of rows."""
    few = 4 <= x.numel() // x.shape[-1] <= FEW_ROWS and x.device.type == "cpu"
    if not few or bias is not None or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    return (weight @ x.flatten(0, -2).t()).t().contiguous().unflatten(0, x.shape[:-1])


VERY_FEW_ROWS = 8
"""Up to this many rows in bf16 a CPU is faster when it converts int8 weights as it multiplies by them."""


def is_quantized(weight: Tensor) -> bool:
    """Whether it is a tensor of torchao: small numbers `qdata` and, for each row, a `scale`."""
    return hasattr(weight, "qdata")


def quantized_linear(x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    """x W^T + b of a weight [d_out, d_in] of torchao, in the dtype of an ordinary linear layer."""
    x = x.to(compute_dtype(x.device, x.dtype))
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and not torch.compiler.is_compiling():
        rows = x.reshape(-1, x.shape[-1])
        if 0 < rows.shape[0] <= VERY_FEW_ROWS and _int8_kernel_fits(rows, weight.qdata):
            y = torch._weight_int8pack_mm(rows, weight.qdata, weight.scale.flatten().to(x.dtype))
            y = y.unflatten(0, x.shape[:-1])
            return y if bias is None else y + bias.to(y.dtype)
    return F.linear(x, weight, bias)


def _int8_kernel_fits(rows: Tensor, weight: Tensor) -> bool:
    """Whether torch's CPU kernel, which does not check, may read these rows and weights in steps of whole vectors."""
    return (
        weight.dtype == torch.int8
        and weight.shape[0] % 4 == 0
        and weight.shape[1] % 32 == 0
        and rows.is_contiguous()
        and weight.is_contiguous()
        and rows.data_ptr() % 32 == weight.data_ptr() % 32 == 0
    )


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
    (a weight that is split over devices or quantised stays apart, too).

    Their parameters stay apart, so that optimizers and checkpoints know each by its name; see `let_join`.
    """
    dense = [
        part
        for part in linears
        if type(part) is DenseLinear and not part.quantized and not hasattr(part.weight, "device_mesh")
    ]
    if len(dense) != len(linears) or len({linear.bias is None for linear in dense}) > 1:
        return None
    weight = _joined_weight(dense)
    biases: list[Tensor] = [linear.bias for linear in dense if linear.bias is not None]
    bias = torch.cat(biases) if biases else None
    packed = dense[0].packed
    if packed is not None and (y := packed.linear(x, weight, bias, [part.weight for part in dense])) is not None:
        return y
    return linear(x, weight, bias) if dense[0].by_output else F.linear(x, weight, bias)


def let_join(model: nn.Module) -> None:
    """For inference: layers that are applied together may put their weights into one tensor when they first are, which
    saves copying them at every step; on a CPU all weights lie input by input, which a product with few rows reads up to
    twice as fast. Names, values and in-place changes of the parameters stay as they are, but the parameters are not
    contiguous any more: who writes them to a file makes them so. Calling it again changes nothing."""
    for module in model.modules():
        if type(module) is DenseLinear and not module.quantized:
            module.may_join = module.joined is None
            apart = module.by_output or hasattr(module.weight, "device_mesh")
            if module.weight.device.type == "cpu" and not apart and module.weight.stride(0) != 1:
                module.weight.data = _by_input(module.weight.data)


def _by_input(weight: Tensor) -> Tensor:
    """The same values [d_out, d_in] in another place, those of one input beside one another."""
    return weight.t().contiguous().t()


def _joined_weight(linears: Sequence[DenseLinear]) -> Tensor:
    """The weights beside one another [sum of d_out, d_in]: as they lie in memory where they have been joined."""
    first = linears[0]
    joined = first.joined
    if joined is not None and joined.shape[0] == sum(linear.weight.shape[0] for linear in linears):
        if torch.compiler.is_compiling() or joined.data_ptr() == first.weight.data_ptr():
            return joined
    weight = torch.cat([linear.weight for linear in linears])
    if weight.device.type == "cpu" and first.may_join and not first.by_output:
        weight = _by_input(weight)
    if all(linear.may_join for linear in linears) and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        sizes = [linear.weight.shape[0] for linear in linears]
        for linear, rows in zip(linears, weight.split(sizes), strict=True):
            linear.weight.data = rows
            linear.may_join = False
        first.joined = weight
    return weight
