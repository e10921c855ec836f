"""FIT: the layers of a decoder see groups of tokens; latents of each group, with layers of their own, see all."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from llm.blocks.base import ChannelConfig, NormConfig
from llm.blocks.norms import LayerNormConfig
from llm.config.base import Count
from llm.core.cost import Cost, Mode
from llm.core.errors import UserError
from llm.core.init import Init, normal
from llm.core.registry import About
from llm.core.seq import SeqInfo
from llm.core.state import CompositeState, DecodeState, KVState, valid_counts
from llm.models.output import Output
from llm.models.wrappers.base import WRAPPERS, CostOf, WrapperConfig, bare_decoder
from llm.models.wrappers.latents import CrossAttention, LatentLayer, latent_channel, sinusoids
from llm.models.wrappers.segments import Carried, Closing, Segmented

if TYPE_CHECKING:
    from llm.models.config import ModelConfig, ModelCost


def parse_stages(text: str) -> list[tuple[int, int]]:
    """[(local layers, latent layers)] of a string such as "(2)4(2)", which is [(2, 4), (2, 0)]."""
    if not re.fullmatch(r"(\(\d+\)\d+)*\(\d+\)\d*", text):
        raise UserError(
            f"fit: stages {text!r} is not a string such as (2)4(2), local layers in brackets and latent layers between"
        )
    stages = [(int(a), int(b or 0)) for a, b in re.findall(r"\((\d+)\)(\d*)", text)]
    if any(a == 0 for a, _ in stages) or any(b == 0 for _, b in stages[:-1]):
        raise UserError(f"fit: stages {text!r} has a stage of no layers; give each at least one")
    return stages


@WRAPPERS.register(
    "fit",
    tiny=lambda: FITConfig(stages="(1)1(1)", group=4, n_latents=2, d_latent=24, n_heads=2),
    tinies={
        "sinusoidal": lambda: FITConfig(
            stages="(1)2(1)", group=3, n_latents=3, d_latent=40, n_heads=2, latent_positions="sinusoidal",
            channel="swiglu", norm="rms_norm", bias=False, token_positions=True,
        ),
        "groups": lambda: FITConfig(stages="(2)", group=5),
    },
    paper="arXiv:2305.12689",
    status="experimental",
    about=About(
        equation="x_g ← local(x_g); l_g ← l_g + attend(l_g, x_g); l ← layers(l_{≤g}); x_g ← x_g + attend(x_g, l_{g−1})",
        use="Long sequences below quadratic cost: attention within groups, and over few latents of each group.",
        weakness="What earlier groups held comes through a few latents only, so exact recall across groups is limited.",
    ),
)  # fmt: skip
class FITConfig(WrapperConfig):
    """Far-reaching interleaved transformer in its autoregressive form. The decoder's layers are the local ones.

    stages: "(a)b(a)b(a)": a layers of the decoder within each group, then b layers over the latents of all groups;
    before those, each group's latents read its tokens, and after them, its tokens read the latents of the group before.
    None: all of the decoder's layers are one local stage. group: tokens of a group (None: the sequence is one).
    n_latents: latents of a group, of width d_latent (None: as the model). n_heads: of attention among latents and
    between them and tokens, whose inner width is the smaller of the two. channel: of the latent layers (None: a GELU
    MLP of 4 times the width). latent_positions: what latents start from and are told apart by, "learned" vectors for
    as many groups as model.max_seq_len needs, or "sinusoidal". token_positions: learned vectors for the places in a
    group, added to the embeddings.
    """

    stages: str | None = None
    group: Count | None = Field(None, ge=1)
    n_latents: int = Field(0, ge=0)
    d_latent: int | None = Field(None, ge=2)
    n_heads: int = Field(8, ge=1)
    channel: ChannelConfig | None = None
    norm: NormConfig = LayerNormConfig(eps=1e-6)
    bias: bool = True
    latent_positions: Literal["learned", "sinusoidal"] = "learned"
    token_positions: bool = False

    @model_validator(mode="after")
    def _coherent(self) -> FITConfig:
        stages = [(1, 0)] if self.stages is None else parse_stages(self.stages)
        if stages[-1][1]:
            raise UserError(
                f"fit: the latent layers at the end of stages {self.stages!r} would change no output; end with a local "
                "stage, such as (1)"
            )
        if len(stages) > 1 and (not self.n_latents or self.group is None):
            raise UserError(f"fit: stages {self.stages!r} have latent layers; set group and n_latents")
        if len(stages) == 1 and self.n_latents:
            raise UserError("fit: n_latents has no effect without latent layers; set stages, such as (2)4(2)")
        if self.token_positions and self.group is None:
            raise UserError("fit: token_positions are those within a group; set group")
        return self

    def plan(self, model: ModelConfig) -> list[tuple[range, int]]:
        """[(layers of the decoder, number of latent layers behind them)] for each stage."""
        stages = [(model.n_layers, 0)] if self.stages is None else parse_stages(self.stages)
        if sum(a for a, _ in stages) != model.n_layers:
            raise UserError(
                f"fit: stages {self.stages!r} have {sum(a for a, _ in stages)} local layers and the model has "
                f"{model.n_layers}; make them equal"
            )
        plan, start = [], 0
        for a, b in stages:
            plan.append((range(start, start + a), b))
            start += a
        return plan

    def widths(self, model: ModelConfig) -> tuple[int, int]:
        """(width of latents, inner width of attention between them and tokens)."""
        width = self.d_latent or model.d_model
        inner = min(width, model.d_model)
        for name, value in (("d_latent", width), ("the smaller of d_latent and model.d_model", inner)):
            if self.n_latents and value % self.n_heads:
                raise UserError(f"fit: {name}, {value}, is not divisible by n_heads {self.n_heads}; change one")
        return width, inner

    def wrap(self, inner: Any, model: ModelConfig) -> FIT:
        return FIT(self, bare_decoder(inner, "fit"), model)

    def cost(self, inner: CostOf, model: ModelConfig, seq_len: int, mode: Mode, *, state_dtype_bytes: int) -> ModelCost:
        """Decoding is that of the token after `seq_len` earlier ones: the first of a group also closes the last."""
        plan = self.plan(model)
        (e, r), m, d = self.widths(model), self.n_latents, model.d_model
        n = min(self.group or max(1, seq_len), max(1, seq_len))
        n_closed = max(0, seq_len - 1) // n
        n_latent_layers, n_stages = sum(b for _, b in plan), len(plan) - 1
        dims = replace(model.context(0), d_model=e, norm_config=self.norm).dims(state_dtype_bytes)

        def linear(d_in: int, d_out: int, role: str) -> Cost:
            return dims.linear(d_in, d_out, role=role, bias=self.bias)

        read_q = linear(e, r, "wrapper.read.q") + linear(r, e, "wrapper.read.out")
        read_kv = linear(d, r, "wrapper.read.k") + linear(d, r, "wrapper.read.v")
        write_q = linear(d, r, "wrapper.write.q") + linear(r, d, "wrapper.write.out")
        write_kv = linear(e, r, "wrapper.write.k") + linear(e, r, "wrapper.write.v")
        layer = latent_channel(self, model).cost(dims, max(1, seq_len), mode)
        layer = layer + sum((linear(e, e, f"wrapper.latent.{name}") for name in ("q", "k", "v", "out")), Cost())
        norms = n_stages * 2 * (self.norm.cost(d).params + self.norm.cost(e).params)
        norms += n_latent_layers * 2 * self.norm.cost(e).params
        tables = self.n_groups(model) * m * e if self.latent_positions == "learned" else 0
        tables += (self.group or 0) * d if self.token_positions else 0
        params = tables + norms + n_latent_layers * layer.params
        params += n_stages * (read_q + read_kv + write_q + write_kv).params

        each_token = n_stages * ((read_kv + write_q).flops_per_token + 4.0 * m * r)
        each_group = n_stages * m * (read_q.flops_per_token + 4.0 * n * r + write_kv.flops_per_token)
        each_group += n_latent_layers * m * layer.flops_per_token
        scores = n_latent_layers * 4.0 * e * m * m
        if mode == "decode":
            used = seq_len - n_closed * n
            closes = self.group is not None and used == self.group
            local = inner(0 if closes else used, mode).blocks.flops_per_token
            flops = local + each_token + (each_group + scores * (n_closed + 1) if closes else 0.0)
            context = scores * (n_closed + 1) if closes else 0.0
        else:
            # Whole groups are computed, also the last one, whose tokens are read by no latents. The first reads zeros.
            filled = (n_closed + 1) * n / max(1, seq_len)
            local_cost = inner(n, mode).blocks
            context = scores * n_closed * (n_closed + 1) / 2 / max(1, seq_len)
            flops = (local_cost.flops_per_token + each_token) * filled + context
            edges = n_stages * (m * write_kv.flops_per_token - n * read_kv.flops_per_token)
            flops += (n_closed * each_group + edges) / max(1, seq_len)
            context += local_cost.attention_flops if not n_closed else 0.0
        # Keys and values: of a group's tokens and of latents for each reading, of all latents for each latent layer.
        kept = n_stages * 2 * r * (n + m) + n_latent_layers * 2 * e * m * n_closed
        bare = inner(n, mode)
        blocks = replace(bare.blocks, flops_per_token=flops, attention_flops=context)
        own = Cost(params, params, state_bytes_per_seq=kept * state_dtype_bytes)
        return replace(bare, blocks=blocks, wrappers=bare.wrappers + own)

    def restarts_positions(self) -> bool:
        learned = bool(self.n_latents) and self.latent_positions == "learned"
        return self.group is not None and not learned

    def n_groups(self, model: ModelConfig) -> int:
        """Groups of the longest sequence, of which all but the last are read by latents."""
        return -(-model.max_seq_len // self.group) if self.group is not None else 1

    @classmethod
    def identity(cls) -> WrapperConfig:
        return cls()


class FIT(Segmented):
    """latents [groups, m, e]: start of each group's latents, which is their position code; token_position [n, D].

    reads, writes: between the tokens of a group and latents, one of each for every stage but the last; latent_layers:
    the layers over latents, by stage.
    """

    def __init__(self, config: FITConfig, inner: Any, model: ModelConfig) -> None:
        super().__init__(inner)
        self.settings = config
        self.plan = config.plan(model)
        (e, r), d, m = config.widths(model), model.d_model, config.n_latents
        self.n_heads, self.d_latent, self.d_inner = config.n_heads, e, r
        n_stages = len(self.plan) - 1
        # Latents have layers of their own width; what they start from is the model's.
        ctx = replace(model.context(0), d_model=e, norm_config=config.norm)
        learned = n_stages and config.latent_positions == "learned"
        shape = (config.n_groups(model), m, e)
        self.latents = nn.Parameter(torch.empty(shape)) if learned else None
        self.token_position = nn.Parameter(torch.empty(config.group or 0, d)) if config.token_positions else None
        self.reads = nn.ModuleList(
            CrossAttention(ctx, e, d, r, config.n_heads, "wrapper.read", config.bias) for _ in range(n_stages)
        )
        self.writes = nn.ModuleList(
            CrossAttention(ctx, d, e, r, config.n_heads, "wrapper.write", config.bias) for _ in range(n_stages)
        )
        channel = latent_channel(config, model)
        self.latent_layers = nn.ModuleList(
            nn.ModuleList(LatentLayer(ctx, e, config.n_heads, config.bias, channel) for _ in range(b))
            for _, b in self.plan[:-1]
        )

    def init_spec(self) -> dict[str, Init]:
        return {"latents": normal(0.02), "token_position": normal(0.02)}

    def initial_latents(self, index: Tensor) -> Tensor:
        """[..., m, e] of groups `index` [...]."""
        if self.latents is None:
            m = self.settings.n_latents
            return sinusoids(index[..., None] * m + torch.arange(m, device=index.device), self.d_latent)
        n_groups = self.latents.shape[0]
        if index.device.type == "cpu" and int(index.max()) >= n_groups:
            group = self.settings.group
            raise UserError(
                f"fit: a sequence of more than {n_groups} groups of {group} tokens has no learned latent positions; "
                "raise model.max_seq_len or set latent_positions: sinusoidal"
            )
        return self.latents[index]

    def _enter(self, x: Tensor, seq: SeqInfo) -> Tensor:
        x = self.inner.enter(x, seq)
        return x if self.token_position is None else x + F.embedding(seq.positions, self.token_position).to(x.dtype)

    def forward(self, tokens: Tensor, seq: SeqInfo, *, state: DecodeState | None = None, carry: Any = None) -> Output:
        if seq.packed:
            raise UserError(
                "fit cannot keep documents that share a row apart: its groups would not begin with them; set "
                "data.packing=pad, or data.isolate=false"
            )
        x = tokens if tokens.is_floating_point() else self.inner.embed(tokens)
        return Output(self._sequence(x) if state is None else self._decode(x, seq, state), carry)  # type: ignore[arg-type]

    def _sequence(self, x: Tensor) -> Tensor:
        """Hidden states of a whole sequence x [B, T, D], all groups at once; a group that is not full is padded."""
        batch, length = x.shape[:2]
        n = min(self.settings.group or length, length)
        n_groups = -(-length // n)
        if n_groups * n > length:
            x = F.pad(x, (0, 0, 0, n_groups * n - length))
        seq = SeqInfo.contiguous(batch * n_groups, n, device=x.device)
        y = self._enter(x.reshape(batch * n_groups, n, -1), seq)
        m = self.settings.n_latents
        latents, among, seen = y.new_zeros(batch, 0, m, self.d_latent), seq, None
        if n_groups > 1 and len(self.plan) > 1:
            group = torch.arange(n_groups - 1, device=x.device)
            latents = self.initial_latents(group).to(y.dtype).expand(batch, -1, -1, -1)
            among = SeqInfo.contiguous(batch, (n_groups - 1) * m, device=x.device)
            of_latent = group.repeat_interleave(m)
            seen = of_latent[:, None] >= of_latent
        for stage, (layers, _) in enumerate(self.plan):
            y = self.inner.run(y, seq, layers=layers)
            if stage == len(self.plan) - 1:
                break
            if seen is not None:
                latents = self._update(stage, latents, y.unflatten(0, (batch, n_groups))[:, :-1], seen, among)
            # A group reads the latents of the one before it; its own hold tokens that are still to come.
            before = torch.cat([latents.new_zeros(batch, 1, m, self.d_latent), latents], dim=1)
            y = self.writes[stage](y, before.flatten(0, 1))
        hidden = self.inner.final_norm(y).reshape(batch, n_groups * n, -1)
        return hidden[:, :length] if n_groups * n > length else hidden

    def _update(self, stage: int, latents: Tensor, groups: Tensor, seen: Tensor, among: SeqInfo) -> Tensor:
        """Latents [B, G, m, E] after reading groups [B, G, n, D] and the latent layers of a stage."""
        shape = latents.shape
        x = self.reads[stage](latents.flatten(0, 1), groups.flatten(0, 1)).reshape(shape[0], -1, shape[-1])
        for layer in self._latent_layers(stage):
            x = layer(x, seen, among)
        return x.reshape(shape)

    def _latent_layers(self, stage: int) -> list[LatentLayer]:
        return list(self.latent_layers[stage])  # type: ignore[call-overload]

    def start(self, batch: int, like: Tensor) -> Carried:
        nothing = like.new_zeros(batch, self.settings.n_latents, self.d_latent)
        carried: Carried = {}
        for stage, write in enumerate(self.writes):
            assert isinstance(write, CrossAttention)
            carried[f"k{stage}"], carried[f"v{stage}"] = write.project(nothing)
        return carried

    def read(
        self, x: Tensor, seq: SeqInfo, state: DecodeState | None, carried: Carried, first: Tensor | bool, at: Any
    ) -> tuple[Output, Any]:
        assert isinstance(state, CompositeState)
        counts = valid_counts(seq)
        x = self._enter(x, seq)
        for stage, (layers, _) in enumerate(self.plan):
            x = self.inner.run(x, seq, state["local"], layers)
            if stage < len(self.plan) - 1:
                read, write, held = self.reads[stage], self.writes[stage], state[f"read{stage}"]
                assert isinstance(read, CrossAttention) and isinstance(write, CrossAttention)
                assert isinstance(held, KVState)
                keys, values = read.project(x)
                held.append(keys, values, counts)
                x = write.attend(x, carried[f"k{stage}"], carried[f"v{stage}"])
        return Output(self.inner.final_norm(x)), None

    def close(self, carried: Carried, written: Any, first: Tensor | bool, closing: Closing | None) -> Carried:
        assert closing is not None and isinstance(closing.inner, CompositeState)
        if not carried:
            return {}
        n, m, log = self.settings.group, self.settings.n_latents, closing.log
        rows = closing.rows
        assert isinstance(log, CompositeState)
        like = carried["k0"]
        latents = self.initial_latents(torch.tensor(closing.index, device=rows.device)).to(like.dtype)
        among = SeqInfo.contiguous(len(rows), m, device=rows.device)
        after: Carried = {}
        for stage, (read, write) in enumerate(zip(self.reads, self.writes)):
            assert isinstance(read, CrossAttention) and isinstance(write, CrossAttention)
            held = closing.inner[f"read{stage}"]
            assert isinstance(held, KVState)
            latents = read.attend(latents, held.k[:, :n], held.v[:, :n])
            for number, layer in enumerate(self._latent_layers(stage)):
                latents = layer.step(latents, log[f"{stage}.{number}"], m * rows, among)
            after[f"k{stage}"], after[f"v{stage}"] = write.project(latents)
        return after

    def new_state(
        self, batch: int, capacity: int, *, n_tentative: int = 0, dtype: torch.dtype, device: torch.device | str
    ) -> DecodeState:
        """What a group needs, and the keys and values of all latents."""
        return self.make_state(
            batch, capacity, self.settings.group, n_tentative=n_tentative, dtype=dtype, device=device
        )

    def new_inner(
        self, batch: int, capacity: int, *, n_tentative: int, dtype: torch.dtype, device: torch.device | str
    ) -> DecodeState:
        n = min(self.settings.group or capacity, capacity)
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        parts: dict[str, DecodeState] = {"local": self.inner.new_state(batch, n, n_tentative=n_tentative, **options)}
        for stage in range(len(self.plan) - 1):
            parts[f"read{stage}"] = self._keys(batch, n + n_tentative, self.d_inner, **options)
        return CompositeState(parts)

    def new_log(
        self, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> tuple[DecodeState | None, int]:
        m, n_closed = self.settings.n_latents, (capacity - 1) // (self.settings.group or capacity)
        if len(self.plan) == 1 or not n_closed:
            return None, 0
        return CompositeState(
            {
                f"{stage}.{number}": self._keys(batch, m * n_closed, self.d_latent, dtype=dtype, device=device)
                for stage in range(len(self.latent_layers))
                for number in range(len(self._latent_layers(stage)))
            }
        ), m

    def _keys(self, batch: int, capacity: int, width: int, **options: Any) -> KVState:
        return KVState(batch, capacity, self.n_heads, width // self.n_heads, **options)
