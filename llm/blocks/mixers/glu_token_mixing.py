"""Activator's gating unit along time, in a causal form: learned maps from positions to earlier positions.

The published option applies the unit to the transposed input, with weights N -> hidden -> N over the positions. Causal,
its three matrices are lower triangular, hence hidden = N, and the shared LayerNorm acts on the channels of each token,
since over positions it would look ahead.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from llm.blocks.base import MIXERS, BuildCtx, Caps, MixerConfig, TokenMixer
from llm.blocks.norms import LayerNormConfig
from llm.blocks.positions import positions_within
from llm.core.cost import Cost, Dims, Mode
from llm.core.init import Init, constant
from llm.core.registry import About
from llm.core.seq import SeqInfo
from llm.core.state import DecodeState, KeyValueState, KVState, valid_counts


@MIXERS.register(
    "glu_token_mixing",
    tiny=lambda: GLUTokenMixingConfig(),
    paper="arXiv:2405.15953 (the token-mixing option; causal form of our own)",
    status="experimental",
    tinies={"longer": lambda: GLUTokenMixingConfig(max_positions=80)},
    about=About(
        equation="y = A_3 (LN(gelu(A_1 x)) ⊙ LN(A_2 x)), A lower triangular over positions, within the document",
        use="A relative of gMLP and MLP-Mixer, for comparisons: which token is read depends on positions alone.",
        weakness="Parameters and compute grow with the square of the longest length, nothing is read by content, and "
        "no position beyond those trained can be used.",
    ),
)
class GLUTokenMixingConfig(MixerConfig):
    """Gated mixing over positions, all channels alike. max_positions: longest document; None for the model's."""

    max_positions: int | None = Field(None, ge=1)

    def build(self, ctx: BuildCtx) -> TokenMixer:
        return GLUTokenMixing(self, ctx)

    def longest(self, max_seq_len: int) -> int:
        return self.max_positions or max_seq_len

    def cost(self, dims: Dims, seq_len: int, mode: Mode) -> Cost:
        n = self.max_positions or dims.max_seq_len
        params = 3 * (n * (n + 1) // 2 + n)
        norm = LayerNormConfig().cost(dims.d_model)
        seen = seq_len + 1 if mode == "decode" else (seq_len + 1) / 2
        flops = 6.0 * dims.d_model * seen
        state = 2 * seq_len * dims.d_model * dims.state_dtype_bytes
        return norm + Cost(params, params, flops_per_token=flops, attention_flops=flops, state_bytes_per_seq=state)


class GLUTokenMixing(TokenMixer):
    """gate, up, down [N (N + 1) / 2]: rows of lower triangular matrices one after another; *_bias [N]; norm [D]."""

    caps = Caps(rollback="free", needs_positions=True)

    def __init__(self, config: GLUTokenMixingConfig, ctx: BuildCtx) -> None:
        super().__init__()
        self.longest = n = config.max_positions or ctx.max_seq_len
        self.d_model = ctx.d_model
        for name in ("gate", "up", "down"):
            self.register_parameter(name, nn.Parameter(torch.empty(n * (n + 1) // 2)))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(n)))
        self.norm = LayerNormConfig().build(ctx.d_model)
        roles = {"gate": "mixer.gate", "up": "mixer.v", "down": "mixer.out"}
        self._init = {name: _rows(ctx, n, role) for name, role in roles.items()}

    def forward(self, x: Tensor, seq: SeqInfo) -> Tensor:
        positions = positions_within(seq, self.longest, "the position maps")
        seen = positions[:, :, None] >= positions[:, None]
        if seq.packed:
            documents = seq.document_ids()
            seen = seen & (documents[:, :, None] == documents[:, None])
        gates = self._gates(x, positions, positions, seen)
        return self._mix("down", gates, positions, positions, seen)

    def prefill(self, x: Tensor, seq: SeqInfo, state: DecodeState) -> Tensor:
        assert isinstance(state, KeyValueState)
        positions = positions_within(seq, self.longest, "the position maps")
        slots = torch.arange(state.extent, device=x.device).expand(x.shape[0], -1)
        past = torch.where(slots < state.end()[:, None], slots, -1)
        inputs = torch.cat([state.read()[0][:, :, 0].to(x.dtype), x], dim=1)
        new = seq.positions if seq.valid is None else torch.where(seq.valid, seq.positions, -1)
        held = torch.cat([past, new], dim=1)
        gates = self._gates(inputs, positions, held, self._seen(seq, held))
        _, values, held = state.append(x[:, :, None], gates[:, :, None], valid_counts(seq))
        return self._mix("down", values[:, :, 0].to(x.dtype), positions, held, self._seen(seq, held))

    @staticmethod
    def _seen(seq: SeqInfo, held: Tensor) -> Tensor:
        return (held[:, None] >= 0) & (held[:, None] <= seq.positions[:, :, None])

    def _gates(self, x: Tensor, positions: Tensor, held: Tensor, seen: Tensor) -> Tensor:
        gate = self._mix("gate", x, positions, held, seen)
        return self.norm(F.gelu(gate)) * self.norm(self._mix("up", x, positions, held, seen))

    def _mix(self, name: str, x: Tensor, positions: Tensor, held: Tensor, seen: Tensor) -> Tensor:
        """[B, T, D]: rows of a map at `positions` [B, T], times x [B, S, D] at `held` [B, S] where `seen`."""
        row = (positions * (positions + 1) // 2)[:, :, None]
        index = torch.where(seen, row + held[:, None], 0)
        rows, bias = getattr(self, name), getattr(self, f"{name}_bias")
        weights = torch.where(seen, rows[index], 0.0)
        return weights.to(x.dtype) @ x + bias[positions][..., None].to(x.dtype)

    def new_state(
        self, batch: int, capacity: int, *, n_tentative: int = 0, dtype: torch.dtype, device: torch.device | str
    ) -> DecodeState:
        return KVState(batch, capacity + n_tentative, 1, self.d_model, dtype=dtype, device=device)

    def init_spec(self) -> dict[str, Init]:
        biases = {f"{name}_bias": constant(0.0) for name in ("gate", "up", "down")}
        return biases | self._init


def _rows(ctx: BuildCtx, n: int, role: str) -> Init:
    """Row i has i + 1 entries, and starts as a linear layer of that many inputs does."""

    def start(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        stds = torch.tensor([ctx.init_std(i + 1, role) for i in range(n)], device="cpu")
        sizes = torch.arange(1, n + 1, device="cpu")
        return torch.empty(shape, device="cpu").normal_(generator=rng) * stds.repeat_interleave(sizes)

    return start
