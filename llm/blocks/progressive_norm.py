"""Progressive re-parameterised batch norm (SLAB): a norm that training turns, step by step, into a per-channel affine
map, which inference folds into the linear layers around it (`llm/models/merge_norms.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from llm.blocks.base import NORMS, NormConfig
from llm.blocks.norms import LayerNormConfig, RMSNormConfig
from llm.core.cost import Cost
from llm.core.errors import UserError
from llm.core.init import Init, constant
from llm.core.progress import Progress
from llm.core.registry import About

DECAY_SHARE = 0.8
"""Share of the run, after its warm steps, over which the blend falls to zero unless `decay_steps` says otherwise."""


@NORMS.register(
    "prep_bn",
    tiny=lambda: PRepBNConfig(),
    paper="arXiv:2405.11582",
    status="experimental",
    tinies={
        "layer_norm": lambda: PRepBNConfig(inner=LayerNormConfig(), start_weight=1.0, start_eta=1.0),
        "blended": lambda: PRepBNConfig(evaluate="blended", warm_steps=3, freeze_steps=5),
        "no_eta": lambda: PRepBNConfig(eta=False),
    },
    about=About(
        equation="training: y = λ norm(x) + (1 − λ)(BN(x) + η x), λ from 1 to 0; inference: BN(x) + η x = a ⊙ x + d",
        use="Inference where a norm's reductions cost: a and d are folded into the next linears, and no norm is left.",
        weakness="Below λ = 1 training sees batch statistics, hence other tokens of its microbatch, also later ones; a "
        "loss in evaluation mode means nothing before λ has reached 0.",
    ),
)
class PRepBNConfig(NormConfig):
    """Progressive re-parameterised batch norm.

    inner: the norm that training begins with. start: λ after the warm steps; 0 is batch norm from the first step.
    warm_steps: optimizer steps with the inner norm alone, in which batch statistics are not collected. decay_steps:
    those in which λ falls to 0 linearly; None: four fifths of what remains after the warm ones. freeze_steps: at the
    end of the run, training normalises by the running statistics, which then stand still, as inference does.
    eta: the branch η x, one number per norm. start_weight, start_eta: initial BN weight and η; zeros, as for Llama,
    make the batch branch grow from nothing. eps, momentum: of the batch norm.
    evaluate: batch_norm, as published, leaves the inner norm out even while λ > 0; blended keeps the mixture.
    """

    inner: NormConfig = RMSNormConfig()
    start: float = Field(1.0, ge=0, le=1)
    warm_steps: int = Field(0, ge=0)
    decay_steps: int | None = Field(None, ge=1)
    freeze_steps: int = Field(0, ge=0)
    eta: bool = True
    start_weight: float = 0.0
    start_eta: float = 0.0
    eps: float = Field(1e-6, gt=0)
    momentum: float = Field(0.1, gt=0, le=1)
    evaluate: Literal["batch_norm", "blended"] = "batch_norm"

    @model_validator(mode="after")
    def _can_work(self) -> PRepBNConfig:
        if isinstance(self.inner, PRepBNConfig):
            raise UserError("prep_bn: inner cannot be prep_bn itself; take rms_norm or layer_norm")
        if not self.eta and self.start_eta:
            raise UserError("prep_bn: start_eta has no effect with eta: false; remove it or set eta: true")
        return self

    def build(self, dim: int) -> PRepBN:
        return PRepBN(dim, self)

    def cost(self, dim: int) -> Cost:
        own = 2 * dim + self.eta
        return self.inner.cost(dim) + Cost(params=own, active_params=own)

    def schedule(self, progress: Progress) -> tuple[float, bool, bool]:
        """(λ, statistics are collected, statistics stand still) of a step."""
        if progress.step < self.warm_steps:
            return 1.0, False, False
        decay = self.decay_steps or max(1, round(DECAY_SHARE * (progress.total_steps - self.warm_steps)))
        blend = self.start * max(0.0, 1.0 - (progress.step - self.warm_steps) / decay)
        frozen = progress.step >= progress.total_steps - self.freeze_steps
        return blend, not frozen, frozen


class PRepBN(nn.Module):
    """inner; weight, bias [dim], eta [1] or None.

    running_mean, running_var [dim], blend (λ) and frozen (0 or 1) [1] are buffers of the checkpoint. moments [2, dim]
    and count [1] hold sums of x - running_mean and of its squares over the tokens of the current optimizer step, which
    `after_step` adds over ranks: running statistics are those of the whole batch, whatever its cut into ranks and
    microbatches. The batch statistics of the training forward itself are those of the microbatch.
    """

    running_mean: Tensor
    running_var: Tensor
    blend: Tensor
    frozen: Tensor
    moments: Tensor
    count: Tensor

    def __init__(self, dim: int, config: PRepBNConfig) -> None:
        super().__init__()
        self.config = config
        self.collects = True
        self.inner = config.inner.build(dim)
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))
        self.eta = nn.Parameter(torch.empty(1)) if config.eta else None
        self.register_buffer("running_mean", torch.empty(dim))
        self.register_buffer("running_var", torch.empty(dim))
        self.register_buffer("blend", torch.empty(1))
        self.register_buffer("frozen", torch.empty(1))
        self.register_buffer("moments", torch.empty(2, dim), persistent=False)
        self.register_buffer("count", torch.empty(1), persistent=False)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """x [..., dim]; valid [...] bool: what is no padding, which statistics leave out."""
        wide = torch.promote_types(x.dtype, torch.float32)
        values = x.to(wide)
        blend = self.blend.to(wide)
        if self.training:
            mean, var = self._batch_statistics(values, valid)
            still = self.frozen > 0
            mean = torch.where(still, self.running_mean.to(wide), mean)
            var = torch.where(still, self.running_var.to(wide), var)
            batch = (values - mean) * torch.rsqrt(var + self.config.eps) * self.weight + self.bias
            batch = batch if self.eta is None else batch + self.eta * values
        else:
            scale, shift = self.affine()
            batch = values * scale.to(wide) + shift.to(wide)
            if self.config.evaluate == "batch_norm":
                return batch.to(x.dtype)
        return (blend * self.inner(x).to(wide) + (1 - blend) * batch).to(x.dtype)

    def _batch_statistics(self, values: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and variance [dim] over all tokens; adds to the sums of this optimizer step."""
        tokens = values.flatten(0, -2)
        real = tokens.new_ones(tokens.shape[0], 1) if valid is None else valid.reshape(-1, 1).to(tokens.dtype)
        n = real.sum().clamp(min=1)
        mean = (tokens * real).sum(0) / n
        var = ((tokens - mean).square() * real).sum(0) / n
        with torch.no_grad():
            offset = (tokens.detach() - self.running_mean) * real
            self.moments += torch.stack([offset.sum(0), offset.square().sum(0)]).to(self.moments.dtype)
            self.count += real.sum().to(self.count.dtype)
        return mean, var

    def affine(self) -> tuple[Tensor, Tensor]:
        """(a, d) [dim]: at inference, and with λ = 0, the norm is a * x + d."""
        scale = self.weight * torch.rsqrt(self.running_var + self.config.eps)
        shift = self.bias - scale * self.running_mean
        return (scale if self.eta is None else scale + self.eta), shift

    @torch.no_grad()
    def before_step(self, progress: Progress) -> None:
        """Follow the schedule; sums of a step that was skipped are forgotten."""
        blend, self.collects, frozen = self.config.schedule(progress)
        self.blend.fill_(blend)
        self.frozen.fill_(float(frozen))
        self.moments.zero_()
        self.count.zero_()

    @torch.no_grad()
    def after_step(self, all_reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Move the running statistics by those of the step's tokens over all ranks."""
        if not self.collects:
            return
        sums = torch.cat([self.moments.flatten(), self.count])
        sums = all_reduce(sums) if all_reduce is not None else sums
        (offset, square), n = sums[:-1].view(2, -1), sums[-1]
        # Without the factor n / (n - 1), nothing changes when activation checkpointing shows tokens a second time.
        offset, square = offset / n.clamp(min=1), square / n.clamp(min=1)
        var = (square - offset.square()).clamp(min=0)
        rate = self.config.momentum * (n > 0).to(n.dtype)
        self.running_mean += rate * offset
        self.running_var += rate * (var - self.running_var)
        self.moments.zero_()
        self.count.zero_()

    def init_spec(self) -> dict[str, Init]:
        config = self.config
        values = {"weight": config.start_weight, "eta": config.start_eta, "running_var": 1.0, "blend": config.start}
        zeros = dict.fromkeys(("bias", "running_mean", "frozen", "moments", "count"), 0.0)
        return {name: constant(value) for name, value in (values | zeros).items()}


class ChannelAffine(nn.Module):
    """scale, shift [dim]: what is left of a norm that inference could not fold into a linear layer."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale)
        self.shift = nn.Parameter(shift)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return (x.to(wide) * self.scale + self.shift).to(x.dtype)

    def init_spec(self) -> dict[str, Init]:
        return {"scale": constant(1.0), "shift": constant(0.0)}


@torch.no_grad()
def fold_into_next(linear: Any, scale: Tensor, shift: Tensor) -> None:
    """Make a dense layer of x the same layer of scale * x + shift, in place; it gains a bias if it had none."""
    bias = linear.weight @ shift.to(linear.weight.dtype)
    linear.bias = nn.Parameter(bias if linear.bias is None else linear.bias + bias)
    linear.weight = nn.Parameter(linear.weight * scale.to(linear.weight.dtype))


@torch.no_grad()
def fold_into_previous(linear: Any, scale: Tensor, shift: Tensor) -> None:
    """Make a dense layer put out scale * y + shift, in place; it gains a bias if it had none."""
    shift, scale = shift.to(linear.weight.dtype), scale.to(linear.weight.dtype)
    linear.bias = nn.Parameter(shift.clone() if linear.bias is None else scale * linear.bias + shift)
    linear.weight = nn.Parameter(scale[:, None] * linear.weight)
