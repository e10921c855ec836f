"""Loop: some layers of a decoder are applied several times with the same weights (AlgoFormer, looped transformers)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from llm.blocks.base import NormConfig, PositionEncoding
from llm.core.cost import Cost, Mode
from llm.core.errors import UserError
from llm.core.init import Init, constant
from llm.core.progress import Progress
from llm.core.registry import About
from llm.core.seq import SeqInfo
from llm.core.state import CompositeState, DecodeState
from llm.models.output import Output
from llm.models.wrappers.base import WRAPPERS, CostOf, Wrapper, WrapperConfig, bare_decoder

if TYPE_CHECKING:
    from llm.models.config import ModelConfig, ModelCost
    from llm.models.decoder import Decoder

Inject = Literal["none", "add", "mul"]


@WRAPPERS.register(
    "loop",
    tiny=lambda: LoopConfig(n_loops=2),
    tinies={
        "pre": lambda: LoopConfig(n_pre=1, n_loop=1, n_loops=3),
        "add": lambda: LoopConfig(n_loop=1, n_loops=3, inject="add", loss_window=2, n_loop_embeddings=2),
        "mul": lambda: LoopConfig(n_loop=1, n_loops=2, inject="mul", loop_norm="rms_norm"),
        "halting": lambda: LoopConfig(n_pre=1, n_loop=1, n_loops=3, tolerance=1e-9),
    },
    paper="arXiv:2402.13572 (AlgoFormer); Yang et al. 2023 (arXiv:2311.12424); Lan et al. 2019 (ALBERT)",
    status="experimental",
    about=About(
        equation="y = post(z_T), z_t = f(z_{t−1}), f(z_{t−1} + e) or f(z_{t−1} ⊙ e) with shared f, e = pre(x)",
        use="Iterative algorithms (solvers, search); depth is bought with compute, not with parameters.",
        weakness="Compute and decode state of the unrolled depth; at equal compute, separate layers do better.",
    ),
)
class LoopConfig(WrapperConfig):
    """The first n_pre layers once, the next n_loop layers (None: all the others) n_loops times, the rest once.

    With n_pre = 0 and n_loop = None this is cross-layer sharing (ALBERT). At inference the number of loops is free: see
    `Loop.loops`.

    inject: what a loop reads, with e the output of the pre layers and z the last iterate: "none" z (z_0 = e), as
    AlgoFormer; "add" z + e (z_0 = 0); "mul" z * e (z_0 = 1).
    loss_window: while training, each of the last so many iterates goes through the rest of the layers and bears a
    loss, all of equal weight. gradient_window: only the last so many loops carry gradients (None: all).
    min_loops: while training, the number of loops is drawn anew for each step from min_loops..n_loops.
    n_loop_embeddings: learned vectors, zero at the start, that are added to what each loop reads; loops beyond the
    last one share it. loop_norm: norm of each iterate. positions: "each" adds absolute positions to what every loop
    reads, "once" to the embeddings alone.
    tolerance: at inference a token keeps its iterate for all later loops once a loop has changed it by no more than
    this, |z_t - z_{t-1}| <= tolerance |z_{t-1}| in the 2-norm; so that depends on this token and earlier ones alone.
    Without a state, loops that no token needs are left out; a state needs what later tokens may read of them.
    """

    n_pre: int = Field(0, ge=0)
    n_loop: int | None = Field(None, ge=1)
    n_loops: int = Field(ge=1)
    inject: Inject = "none"
    loss_window: int = Field(1, ge=1)
    gradient_window: int | None = Field(None, ge=1)
    min_loops: int | None = Field(None, ge=1)
    n_loop_embeddings: int = Field(0, ge=0)
    loop_norm: NormConfig | None = None
    positions: Literal["once", "each"] = "once"
    tolerance: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _coherent(self) -> LoopConfig:
        window = self.gradient_window
        if window is not None and window < self.n_loops and self.inject == "none":
            raise UserError(
                f"loop: gradient_window {window} of {self.n_loops} loops with inject: none would leave all that stands "
                "before the loop without gradients; set inject: add or mul, or remove gradient_window"
            )
        if window is not None and window < min(self.loss_window, self.n_loops):
            raise UserError(
                f"loop: loss_window {self.loss_window} is larger than gradient_window {window}, so some losses would "
                "have no gradient; lower loss_window or raise gradient_window"
            )
        if self.min_loops is not None and self.min_loops > self.n_loops:
            raise UserError(f"loop: min_loops {self.min_loops} is larger than n_loops {self.n_loops}; lower it")
        return self

    def ranges(self, n_layers: int) -> tuple[range, range, range]:
        """Indices of the layers before, in and after the loop."""
        n_loop = self.n_loop if self.n_loop is not None else n_layers - self.n_pre
        end = self.n_pre + n_loop
        if n_loop < 1 or end > n_layers:
            raise UserError(
                f"loop: n_pre {self.n_pre} and n_loop {self.n_loop} do not fit the model's {n_layers} layers; "
                "lower them or add layers"
            )
        return range(self.n_pre), range(self.n_pre, end), range(end, n_layers)

    def wrap(self, inner: Any, model: ModelConfig) -> Loop:
        return Loop(self, bare_decoder(inner, "loop"), model)

    def cost(self, inner: CostOf, model: ModelConfig, seq_len: int, mode: Mode, *, state_dtype_bytes: int) -> ModelCost:
        bare = inner(seq_len, mode)
        _, looped, post = self.ranges(model.n_layers)
        n_loops = float(self.n_loops)
        n_scored = 1
        if mode == "train":
            n_loops = (n_loops + (self.min_loops or n_loops)) / 2
            n_scored = min(self.loss_window, self.n_loops)
        again = model.layers_cost(looped, seq_len, mode, state_dtype_bytes)
        read = model.layers_cost(post, seq_len, mode, state_dtype_bytes)
        blocks = replace(
            bare.blocks,
            flops_per_token=bare.blocks.flops_per_token
            + (n_loops - 1) * again.flops_per_token
            + (n_scored - 1) * read.flops_per_token,
            attention_flops=bare.blocks.attention_flops
            + (n_loops - 1) * again.attention_flops
            + (n_scored - 1) * read.attention_flops,
            state_bytes_per_seq=bare.blocks.state_bytes_per_seq + (self.n_loops - 1) * again.state_bytes_per_seq,
        )
        own = Cost(params=self.n_loop_embeddings * model.d_model, active_params=self.n_loop_embeddings * model.d_model)
        if self.loop_norm is not None:
            own = own + self.loop_norm.cost(model.d_model)
        head = replace(bare.head, flops_per_token=n_scored * bare.head.flops_per_token)
        return replace(bare, blocks=blocks, head=head, wrappers=bare.wrappers + own)

    @classmethod
    def identity(cls) -> WrapperConfig:
        return cls(n_loops=1)


class Loop(Wrapper):
    """loop_embedding [n_loop_embeddings, D].

    n_loops: loops at inference, and at most in training; `new_state` makes a state for so many.
    """

    def __init__(self, config: LoopConfig, inner: Decoder, model: ModelConfig) -> None:
        super().__init__(inner)
        self.settings = config
        self.pre, self.looped, self.post = config.ranges(model.n_layers)
        self.n_loops = config.n_loops
        self.n_training_loops = config.n_loops
        n = config.n_loop_embeddings
        self.loop_embedding = nn.Parameter(torch.empty(n, model.d_model)) if n else None
        self.loop_norm = config.loop_norm.build(model.d_model) if config.loop_norm is not None else None
        if config.positions == "each" and type(inner.position).at_embed is PositionEncoding.at_embed:
            raise UserError(
                f"loop: positions: each adds absolute positions, and model.position is {model.position.type!r}, which "
                "adds none; set positions: once, or learned or sinusoidal positions"
            )

    def init_spec(self) -> dict[str, Init]:
        return {"loop_embedding": constant(0.0)}

    def before_step(self, progress: Progress) -> None:
        """Draw the number of loops of this step."""
        config = self.settings
        if config.min_loops is not None:
            draw = random.Random(f"loops:{progress.seed}:{progress.step}")
            self.n_training_loops = draw.randint(config.min_loops, config.n_loops)

    @contextmanager
    def loops(self, n_loops: int) -> Iterator[None]:
        """Within it the model makes this many loops at inference, whatever it was trained with."""
        if n_loops < 1:
            raise UserError(f"a loop of {n_loops} iterations; the least is 1")
        before, self.n_loops = self.n_loops, n_loops
        try:
            yield
        finally:
            self.n_loops = before

    def forward(self, tokens: Tensor, seq: SeqInfo, *, state: DecodeState | None = None, carry: Any = None) -> Output:
        if state is None:
            n_loops = self.n_training_loops if self.training else self.n_loops
        else:
            assert isinstance(state, CompositeState)
            n_loops = sum(key.startswith("loop") for key in state.parts)
        n_scored = min(self.settings.loss_window, n_loops) if self.training and state is None else 1
        iterates, _ = self._iterate(tokens, seq, state, n_loops, n_scored)
        *extra, hidden = [self.inner.final_norm(self._run(z, seq, state, "post", self.post)) for z in iterates]
        weight = 1.0 / n_scored
        return Output(hidden, carry, weight, tuple((other, weight) for other in extra))

    def loops_used(self, tokens: Tensor, seq: SeqInfo) -> Tensor:
        """[B, T] int64: after how many loops each token halts, at the tolerance of the config."""
        return self._iterate(tokens, seq, None, self.n_loops, 1)[1]

    def _run(self, x: Tensor, seq: SeqInfo, state: DecodeState | None, key: str, layers: range) -> Tensor:
        if not layers:
            return x
        assert state is None or isinstance(state, CompositeState)
        return self.inner.run(x, seq, None if state is None else state[key], layers)

    def _iterate(
        self, tokens: Tensor, seq: SeqInfo, state: DecodeState | None, n_loops: int, n_kept: int
    ) -> tuple[list[Tensor], Tensor]:
        """(the last n_kept iterates [B, T, D], loops of each token [B, T])."""
        config = self.settings
        entered = self._run(self.inner.enter(tokens, seq), seq, state, "pre", self.pre)
        z = entered
        if config.inject != "none":
            z = torch.zeros_like(entered) if config.inject == "add" else torch.ones_like(entered)
        first_with_grad = 0
        if self.training and config.gradient_window is not None:
            first_with_grad = n_loops - config.gradient_window
        used = torch.full(entered.shape[:2], n_loops, dtype=torch.int64, device=entered.device)
        going = torch.ones_like(used, dtype=torch.bool) if seq.valid is None else seq.valid
        halts = config.tolerance is not None and not self.training
        kept: list[Tensor] = []
        for index in range(n_loops):
            with torch.set_grad_enabled(torch.is_grad_enabled() and index >= first_with_grad):
                after = self._run(self._read(z, entered, seq, index), seq, state, f"loop{index}", self.looped)
                after = after if self.loop_norm is None else self.loop_norm(after)
            if halts:
                assert config.tolerance is not None
                stops = going & ((after - z).norm(dim=-1) <= config.tolerance * z.norm(dim=-1))
                after = torch.where(going[..., None], after, z)
                used, going = torch.where(stops, index + 1, used), going & ~stops
            z = after
            kept = [*kept, z][-n_kept:]
            if halts and state is None and not bool(going.any()):
                break
        return kept, used

    def _read(self, z: Tensor, entered: Tensor, seq: SeqInfo, index: int) -> Tensor:
        """What loop `index` reads, [B, T, D]."""
        inject = self.settings.inject
        x = z if inject == "none" else z + entered if inject == "add" else z * entered
        if self.loop_embedding is not None:
            x = x + self.loop_embedding[min(index, self.settings.n_loop_embeddings - 1)].to(x.dtype)
        return self.inner.position.at_embed(x, seq) if self.settings.positions == "each" else x

    def new_state(
        self, batch: int, capacity: int, *, n_tentative: int = 0, dtype: torch.dtype, device: torch.device | str
    ) -> DecodeState:
        """States of the layers by (part, layer), where each loop is a part of its own."""

        def made(layers: range) -> CompositeState:
            options: dict[str, Any] = {"n_tentative": n_tentative, "dtype": dtype, "device": device}
            blocks = self.inner.layers
            return CompositeState({str(i): blocks[i].new_state(batch, capacity, **options) for i in layers})

        parts = {f"loop{index}": made(self.looped) for index in range(self.n_loops)}
        for key, layers in (("pre", self.pre), ("post", self.post)):
            if layers:
                parts[key] = made(layers)
        return CompositeState(parts)
