"""Mixture of experts: each token picks its top-k gated experts; no token is ever dropped.

A token's output depends on that token alone, so packing, batching and decoding cannot change it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from llm.blocks.base import CHANNELS, BuildCtx, ChannelConfig, ChannelMixer, compute_dtype, linear_init
from llm.blocks.channels.gated import GatedChannel, SwiGLUConfig
from llm.blocks.linears.dense import is_quantized
from llm.core.aux_loss import attach_aux
from llm.core.cost import Cost, Dims, Mode
from llm.core.errors import UserError
from llm.core.init import Init, constant
from llm.core.registry import About
from llm.core.seq import SeqInfo
from llm.core.state import DecodeState


@CHANNELS.register(
    "moe",
    tiny=lambda: MoEConfig(n_experts=4, top_k=2, d_hidden=16),
    paper="Shazeer et al. 2017; Fedus et al. 2021 (balance loss); Wang et al. 2024 (balance by bias)",
    tinies={
        "shared": lambda: MoEConfig(n_experts=4, top_k=1, d_hidden=16, n_shared=1, normalize=False),
        "sigmoid": lambda: MoEConfig(
            n_experts=4, top_k=2, d_hidden=16, router="sigmoid", balance_rate=0.01, aux_weight=0.0
        ),
    },
    about=About(
        equation="y = Σ_{e in top-k} g_e(x) FFN_e(x), g = softmax or sigmoid of W_r x",
        use="More parameters at the same FLOPs per token, where memory is cheaper than compute.",
        weakness="All experts must be held; routing can collapse; the balance loss depends on microbatches.",
    ),
)
class MoEConfig(ChannelConfig):
    """Token-choice mixture of n_experts SwiGLU experts of width d_hidden, top_k per token.

    router: softmax over all experts (Mixtral, Qwen3) or a sigmoid each (DeepSeek-V3). normalize: the chosen weights are
    divided by their sum. route_scale: factor on them. n_shared: experts that see every token, as one of that many
    widths. aux_weight: of the balance loss n_experts * sum_e (share of choices) * (mean probability), which is 1 when
    balanced; z_weight: of the mean squared log-sum-exp of the router's logits. balance_rate: instead of a loss, a bias
    per expert that only steers the choice moves by this much per optimizer step towards balance.
    """

    n_experts: int = Field(ge=1)
    top_k: int = Field(2, ge=1)
    d_hidden: int = Field(ge=1)
    n_shared: int = Field(0, ge=0)
    router: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    route_scale: float = Field(1.0, gt=0)
    aux_weight: float = Field(0.01, ge=0)
    z_weight: float = Field(0.0, ge=0)
    balance_rate: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _enough_experts(self) -> MoEConfig:
        if self.top_k > self.n_experts:
            raise UserError(f"moe: top_k {self.top_k} is more than n_experts {self.n_experts}")
        return self

    def shared(self) -> SwiGLUConfig | None:
        """The experts that see every token, as one channel mixer."""
        return SwiGLUConfig(d_hidden=self.n_shared * self.d_hidden) if self.n_shared else None

    def build(self, ctx: BuildCtx) -> MoE:
        return MoE(self, ctx)

    def cost(self, dims: Dims, seq_len: int, mode: Mode) -> Cost:
        router = dims.linear(dims.d_model, self.n_experts, role="channel.router")
        expert = 3 * dims.d_model * self.d_hidden
        experts = Cost(
            params=self.n_experts * expert,
            active_params=self.top_k * expert,
            flops_per_token=2.0 * self.top_k * expert,
        )
        shared = self.shared()
        return router + experts + (shared.cost(dims, seq_len, mode) if shared is not None else Cost())


class MoE(ChannelMixer):
    """router [D -> E]; gate, up [E, hidden, D], down [E, D, hidden].

    balance [E]: the bias on the choice; load [E]: choices since the last optimizer step.
    """

    matrices = ("gate", "up", "down")
    balance: Tensor
    load: Tensor

    def __init__(self, config: MoEConfig, ctx: BuildCtx) -> None:
        super().__init__()
        self.config = config
        self.name = f"layer{ctx.layer}"
        n_experts, hidden, d_model = config.n_experts, config.d_hidden, ctx.d_model
        self.router = ctx.linear(d_model, n_experts, role="channel.router")
        self.gate = nn.Parameter(torch.empty(n_experts, hidden, d_model))
        self.up = nn.Parameter(torch.empty(n_experts, hidden, d_model))
        self.down = nn.Parameter(torch.empty(n_experts, d_model, hidden))
        shared = config.shared()
        self.shared: GatedChannel | None = shared.build(ctx) if shared is not None else None
        if config.balance_rate:
            self.register_buffer("balance", torch.zeros(n_experts))
            self.register_buffer("load", torch.zeros(n_experts))
        self._init = {
            "gate": linear_init(ctx.init_std(d_model, "channel.gate"), ctx.init),
            "up": linear_init(ctx.init_std(d_model, "channel.up"), ctx.init),
            "down": linear_init(ctx.init_std(hidden, "channel.down"), ctx.init),
        }

    def forward(self, x: Tensor, seq: SeqInfo, state: DecodeState | None = None) -> Tensor:
        tokens = x.flatten(0, -2)
        weights, chosen = self.route(tokens)
        out = self._experts(tokens.to(compute_dtype(x.device, x.dtype)), weights, chosen).view(x.shape)
        return out if self.shared is None else out + self.shared(x, seq)

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [N, k] (at least fp32) and experts [N, k] of tokens [N, D]; attaches the auxiliary losses."""
        config = self.config
        with torch.autocast(tokens.device.type, enabled=False):
            logits = self.router(tokens.to(next(self.router.parameters()).dtype))
        logits = logits if logits.dtype == torch.float64 else logits.float()
        scores = logits.softmax(-1) if config.router == "softmax" else logits.sigmoid()
        steered = scores if not config.balance_rate else scores + self.balance
        chosen = steered.detach().topk(config.top_k, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if config.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = weights * config.route_scale
        if self.training:
            weights = self._attach_losses(weights, logits, scores, chosen)
        return weights, chosen

    def _attach_losses(self, weights: Tensor, logits: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
        config = self.config
        counts = _counts(chosen, config.n_experts)
        if config.balance_rate:
            self.load += counts
        if config.aux_weight:
            probabilities = scores if config.router == "softmax" else scores / scores.sum(-1, keepdim=True)
            share = counts / chosen.numel()
            loss = config.n_experts * (share * probabilities.mean(0)).sum()
            weights = attach_aux(weights, loss, weight=config.aux_weight, name=f"moe_balance/{self.name}")
        if config.z_weight:
            loss = logits.logsumexp(-1).square().mean()
            weights = attach_aux(weights, loss, weight=config.z_weight, name=f"moe_z/{self.name}")
        return weights

    def _experts(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """[N, D]: tokens sorted by expert, one grouped product per matrix, sorted back, summed with their weights."""
        top_k = self.config.top_k
        order = chosen.flatten().argsort(stable=True)
        offsets = _counts(chosen, self.config.n_experts).cumsum(0).to(torch.int32)
        rows = tokens[order // top_k]
        hidden = F.silu(grouped_linear(rows, self.gate, offsets)) * grouped_linear(rows, self.up, offsets)
        outputs = grouped_linear(hidden, self.down, offsets)[order.argsort()]
        return (outputs.unflatten(0, (-1, top_k)) * weights[..., None].to(outputs.dtype)).sum(1)

    @torch.no_grad()
    def after_step(self, all_reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        if not self.config.balance_rate:
            return
        load = all_reduce(self.load) if all_reduce is not None else self.load
        self.balance += self.config.balance_rate * torch.sign(load.mean() - load)
        self.load.zero_()

    def init_spec(self) -> dict[str, Init]:
        return {**self._init, "balance": constant(0.0), "load": constant(0.0)}


def _counts(chosen: Tensor, n_experts: int) -> Tensor:
    """[E] fp32: how often each expert was chosen."""
    flat = chosen.flatten()
    return torch.zeros(n_experts, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.float32))


def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """rows[a:b] @ weight[e]^T for each expert e: rows [R, K] sorted by expert, weight [E, N, K], offsets [E] int32."""
    if is_quantized(weight):
        if not torch.compiler.is_compiling():
            return _loop(rows, weight, offsets)
        weight = weight.dequantize()
    weight = weight.to(rows.dtype)
    if rows.dtype == torch.bfloat16 and rows.shape[1] % 8 == 0 and weight.shape[1] % 8 == 0:
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=offsets)
    return _grouped(rows, weight, offsets) if torch.compiler.is_compiling() else _loop(rows, weight, offsets)


def _spans(offsets: Tensor) -> list[tuple[int, int]]:
    ends = offsets.tolist()
    return list(zip([0, *ends[:-1]], ends))


def _loop(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return torch.cat([F.linear(rows[a:b], weight[e]) for e, (a, b) in enumerate(_spans(offsets))])


@torch.library.custom_op("manyformer::grouped_linear", mutates_args=())
def _grouped(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return _loop(rows, weight, offsets)


@_grouped.register_fake
def _(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


@torch.library.custom_op("manyformer::grouped_linear_weight", mutates_args=())
def _grouped_weight(grad: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    """[E, N, K]: grad[a:b]^T @ rows[a:b] of each expert."""
    return torch.stack([grad[a:b].t() @ rows[a:b] for a, b in _spans(offsets)])


@_grouped_weight.register_fake
def _(grad: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(offsets.shape[0], grad.shape[1], rows.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    rows, weight, offsets = ctx.saved_tensors
    return _grouped(grad, weight.transpose(1, 2), offsets), _grouped_weight(grad, rows, offsets), None


_grouped.register_autograd(_grouped_gradients, setup_context=_save)
