"""Performer (FAVOR+) in its causal form: softmax attention estimated without bias by positive random features."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kernels.linear_attention import linear_attention
from llm.blocks.base import MIXERS, BuildCtx, Caps, MixerConfig, TokenMixer
from llm.blocks.feature_attention import (
    CHUNK,
    Factors,
    FeatureAttention,
    feature_cost,
    head_width,
    slopes_of,
    to_heads,
    with_ones,
)
from llm.blocks.linears.dense import project
from llm.core.cost import Cost, Dims, Mode
from llm.core.init import Init, name_seed
from llm.core.progress import Progress
from llm.core.registry import About
from llm.core.seq import SeqInfo

FLOOR = -80.0
"""Least logarithm by which keys' features are scaled: what an empty state stands for."""


@MIXERS.register(
    "performer",
    tiny=lambda: PerformerConfig(n_heads=2),
    paper="Choromanski et al. 2021 (arXiv:2009.14794)",
    status="experimental",
    tinies={"few": lambda: PerformerConfig(n_heads=2, d_head=12, n_features=16, bias=True, redraw_every=None)},
    about=About(
        equation="o_t = Σ_{s ≤ t} φ(q_t)·φ(k_s) v_s / Σ_{s ≤ t} φ(q_t)·φ(k_s), φ(x) = exp(w·x − |x|²/2) / √m",
        use="Softmax attention's weights in linear time and constant state, as far as the features reach.",
        weakness="The error falls only as 1/√m and grows exponentially with the norms of queries and keys, so sharp "
        "attention, hence exact recall, is out of reach.",
    ),
)
class PerformerConfig(MixerConfig):
    """Attention by positive orthogonal random features.

    d_head: None for d_model / n_heads. n_features: m, for all heads the same features; None for d_head * ln(d_head).
    redraw_every: optimizer steps after which training draws new features, a function of the run's seed and of the step;
    None: never.
    """

    n_heads: int = Field(ge=1)
    d_head: int | None = Field(None, ge=1)
    n_features: int | None = Field(None, ge=1)
    redraw_every: int | None = Field(1000, ge=1)
    bias: bool = False

    def resolved(self, d_model: int) -> tuple[int, int]:
        """(head width, number of features)."""
        d_head = head_width(self.type, d_model, self.n_heads, self.d_head)
        return d_head, self.n_features or max(1, int(d_head * math.log(d_head)))

    def build(self, ctx: BuildCtx) -> TokenMixer:
        return Performer(self, ctx)

    def cost(self, dims: Dims, seq_len: int, mode: Mode) -> Cost:
        d_head, n_features = self.resolved(dims.d_model)
        inner = self.n_heads * d_head
        cost = sum((dims.linear(dims.d_model, inner, role=f"mixer.{r}", bias=self.bias) for r in "qkv"), Cost())
        cost = cost + dims.linear(inner, dims.d_model, role="mixer.out", bias=self.bias)
        sums = feature_cost(self.n_heads, n_features, d_head, seq_len, mode, dims.state_dtype_bytes)
        tops = self.n_heads * max(4, dims.state_dtype_bytes)
        return cost + sums + Cost(flops_per_token=4.0 * inner * n_features, state_bytes_per_seq=tops)


class Performer(FeatureAttention):
    """q, k, v [D -> H * d], out [H * d -> D]; buffer directions [m, d].

    Keys' features are held relative to the largest that any key of the document had so far, whose logarithm above FLOOR
    is the state's `top` [H]: numerator and denominator share that scale, so it cancels, and nothing overflows.
    """

    caps = Caps(rollback="replay", needs_positions=True)
    directions: Tensor
    eps = 1e-12

    def __init__(self, config: PerformerConfig, ctx: BuildCtx) -> None:
        super().__init__()
        self.redraw_every = config.redraw_every
        self.layer = ctx.layer
        self.drawn = 0
        self.n_heads = config.n_heads
        self.d_head, self.d_feature = config.resolved(ctx.d_model)
        inner = self.n_heads * self.d_head
        self.q, self.k, self.v = (
            ctx.linear(ctx.d_model, inner, role=f"mixer.{role}", bias=config.bias) for role in "qkv"
        )
        self.out = ctx.linear(inner, ctx.d_model, role="mixer.out", bias=config.bias)
        self.position = ctx.position()
        self.position.for_heads(self.d_head)
        self.slopes = slopes_of(self.position, self.n_heads)
        self.register_buffer("directions", torch.empty(self.d_feature, self.d_head))

    def prepare(self, seq: SeqInfo, dtype: torch.dtype) -> None:
        self.position.prepare(seq, torch.promote_types(dtype, torch.float32))

    def features(self, x: Tensor, seq: SeqInfo) -> Factors:
        q, k, v = (to_heads(y, self.d_head) for y in project(x, self.q, self.k, self.v))
        q, k = self.position.at_qk(q, k, seq)
        with torch.autocast(x.device.type, enabled=False):
            log_q, log_k = (self.log_features(y * self.d_head**-0.25) for y in (q, k))
        return {"q": (log_q - log_q.detach().amax(-1, keepdim=True)).exp(), "k": log_k, "v": v}

    def log_features(self, x: Tensor) -> Tensor:
        """w·x − |x|²/2 [..., m] of x [..., d]; the factor 1/√m cancels."""
        return x @ self.directions.to(x.dtype).T - x.square().sum(-1, keepdim=True) / 2

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return super().state_shapes() | {"top": (self.n_heads,)}

    def scan(
        self, factors: Factors, before: Factors, *, starts: Tensor | None, valid: Tensor | None
    ) -> tuple[Tensor, Factors]:
        log_k, v = factors["k"], factors["v"]
        peaks = log_k.detach().amax(-1)
        if valid is not None:
            peaks = torch.where(valid[..., None], peaks, FLOOR)
        first = torch.full_like(peaks[:, :1], FLOOR) if not before else before["top"][:, None].to(peaks.dtype) + FLOOR
        tops = self._tops(peaks, first, starts, valid)
        log_decay = torch.cat([first, tops[:, :-1]], dim=1) - tops
        if self.slopes is not None:
            log_decay = log_decay - log_decay.new_tensor(self.slopes)
        if starts is not None:
            log_decay = torch.where(starts[..., None], 0.0, log_decay)
        keys = (log_k - tops[..., None]).exp()
        sums, s = linear_attention(factors["q"], keys, with_ones(v), log_decay, starts, before.get("s"), valid, CHUNK)
        return sums, {"s": s, "top": tops[:, -1] - FLOOR}

    def _tops(self, peaks: Tensor, first: Tensor, starts: Tensor | None, valid: Tensor | None) -> Tensor:
        """[B, T, H] the largest feature of any key so far, as much as it still weighs, and at least FLOOR."""
        if self.slopes is None:
            return torch.maximum(running_max(peaks, starts), first)
        steps = torch.ones_like(peaks[..., :1]) if valid is None else valid[..., None].to(peaks.dtype)
        fallen = steps.cumsum(1) * peaks.new_tensor(self.slopes)
        return (torch.maximum(running_max(peaks + fallen, starts), first) - fallen).clamp(min=FLOOR)

    @torch.no_grad()
    def before_step(self, progress: Progress) -> None:
        """Draw new features where it is time; those of the first steps are the initial ones."""
        if self.redraw_every is None:
            return
        number = progress.step // self.redraw_every
        if number and number != self.drawn:
            generator = torch.Generator().manual_seed(name_seed(progress.seed, f"performer.{self.layer}.{number}"))
            self.directions.copy_(orthogonal_directions((self.d_feature, self.d_head), generator))
        self.drawn = number

    def init_spec(self) -> dict[str, Init]:
        return {"directions": orthogonal_directions}


def orthogonal_directions(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """[m, d]: blocks of d orthogonal directions, uniformly distributed, with the lengths of Gaussian vectors."""
    m, d = shape

    def normal(*size: int) -> Tensor:
        return torch.empty(size, device="cpu", dtype=torch.float32).normal_(generator=generator)

    q, r = torch.linalg.qr(normal(-(-m // d), d, d))
    rows = (q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]).transpose(-1, -2).flatten(0, 1)
    return rows[:m] * normal(m, d).norm(dim=-1, keepdim=True)


def running_max(x: Tensor, starts: Tensor | None) -> Tensor:
    """Largest value of x [B, T, H] so far within the document, in log2(T) passes where there are several."""
    if starts is None:
        return x.cummax(dim=1).values
    documents = starts.long().cumsum(1)
    shift = 1
    while shift < x.shape[1]:
        same = documents[:, shift:] == documents[:, :-shift]
        earlier = torch.where(same[..., None], x[:, :-shift], float("-inf"))
        x = torch.maximum(x, F.pad(earlier, (0, 0, shift, 0), value=float("-inf")))
        shift *= 2
    return x
