"""The optimizer of a run: one or more torch optimizers over parameters known by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llm.train.config import OptimConfig
from llm.train.optim.groups import ParamRule, block_prefixes, grouped, named_parameters, param_rules
from llm.train.optim.muon import Muon, Shards, newton_schulz_dtype
from llm.train.optim.rowwise import RowwiseAdamW

STATE_NAMES = {
    "adamw": ("step", "exp_avg", "exp_avg_sq"),
    "muon": ("momentum_buffer",),
    "rowwise_adamw": ("row_step", "exp_avg", "row_exp_avg_sq"),
}


class OptimizerSet:
    """The optimizers of a run behind one step. `rules` and `names` tell what happens to which parameter."""

    def __init__(
        self, params: dict[str, nn.Parameter], optimizers: list[torch.optim.Optimizer], rules: dict[str, ParamRule]
    ) -> None:
        self.params = params
        self.rules = rules
        self.optimizers = optimizers
        self.peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

    def step(self, lr_factor: float) -> None:
        """One update at each group's peak learning rate times `lr_factor`."""
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * lr_factor
            optimizer.step()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Parameter name -> state name -> live tensor."""
        held = {id(param): state for optimizer in self.optimizers for param, state in optimizer.state.items()}
        return {name: dict(held[id(param)]) for name, param in self.params.items()}


def build_optimizer(
    model: nn.Module, optim: OptimConfig, *, precision: str = "fp32", shards: Shards | None = None
) -> OptimizerSet:
    """The optimizers of `model`, with their state laid out as zeros. precision: the run's, for Muon's iteration;
    shards: how parameters are stored."""
    params = named_parameters(model)
    rules = param_rules({name: tuple(p.shape) for name, p in params.items()}, block_prefixes(model), optim)
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for rule, members in grouped(params, rules).items():
        group = {"params": list(members.values()), "lr": rule.lr, "weight_decay": rule.weight_decay}
        by_kind.setdefault(rule.kind, []).append(group)
    optimizers: list[torch.optim.Optimizer] = []
    if "adamw" in by_kind:
        optimizers.append(build_adamw(by_kind["adamw"], optim))
    if "muon" in by_kind:
        optimizers.append(
            Muon(
                by_kind["muon"], lr=optim.lr, weight_decay=optim.weight_decay, momentum=optim.momentum,
                nesterov=optim.nesterov, ns_steps=optim.ns_steps, shards=shards,
                ns_dtype=newton_schulz_dtype(next(iter(params.values())).device.type, precision),
            )
        )  # fmt: skip
    if "rowwise_adamw" in by_kind:
        optimizers.append(
            RowwiseAdamW(
                by_kind["rowwise_adamw"], lr=optim.lr, betas=optim.betas, eps=optim.eps,
                weight_decay=optim.weight_decay, shards=shards,
            )
        )  # fmt: skip
    return OptimizerSet(params, optimizers, rules)


def build_adamw(groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.AdamW:
    """torch's AdamW in its fused form (on a CPU, too, several times as fast as the others), its state made at once."""
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
    for group in optimizer.param_groups:
        for param in group["params"]:
            optimizer.state[param].update(
                step=torch.zeros((), dtype=torch.float32, device=param.device),
                exp_avg=torch.zeros_like(param),
                exp_avg_sq=torch.zeros_like(param),
            )
    return optimizer
