"""Contracts of wrappers: a wrapped decoder is held to what a token mixer is held to, hidden states for outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm.blocks.base import CHANNELS, MIXERS, BuildCtx, TokenMixer
from llm.core.cost import Cost, Dims, Mode
from llm.core.init import initialise
from llm.core.seq import SeqInfo
from llm.core.state import DecodeState
from llm.models.config import ModelConfig
from llm.models.wrappers.base import Wrapper, WrapperConfig
from tests.contracts.checks import decoding, mixers
from tests.contracts.checks.exemptions import Check
from tests.contracts.checks.harness import VOCAB, gap, tiny_model, train


def wrapped_model(config: WrapperConfig, mixer: Any = None, *, n_layers: int = 2) -> ModelConfig:
    """A small decoder with this wrapper around it."""
    mixer = mixer if mixer is not None else MIXERS.entry("attention").tiny()
    return tiny_model(mixer, CHANNELS.entry("swiglu").tiny(), n_layers=n_layers, wrappers=[config])


@dataclass(frozen=True)
class AsMixer:
    """A wrapped decoder behind the interface of a mixer's config."""

    config: WrapperConfig

    def causal_share(self, seq_len: int) -> float:
        """Of the work between tokens, as of a mixer that multiplies whole squares."""
        return (seq_len + 1) / (2 * seq_len)

    def build(self, ctx: BuildCtx) -> TokenMixer:
        """The model on the current default device, hidden states out."""
        return _Adapter(wrapped_model(self.config).build(torch.get_default_device().type))

    def cost(self, dims: Dims, seq_len: int, mode: Mode) -> Cost:
        """All parameters; FLOPs and state of what runs, that is without the head."""
        cost = wrapped_model(self.config).cost(seq_len, mode, dims.state_dtype_bytes)
        running = cost.blocks + cost.wrappers
        return Cost(
            params=cost.total.params,
            active_params=cost.total.active_params,
            flops_per_token=running.flops_per_token,
            attention_flops=running.attention_flops,
            state_bytes_per_seq=running.state_bytes_per_seq,
        )


class _Adapter(TokenMixer):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        assert isinstance(model, Wrapper)
        self.caps = type(model).caps  # type: ignore[misc]

    def forward(self, x: Tensor, seq: SeqInfo) -> Tensor:
        return self.model(x, seq).hidden

    def prefill(self, x: Tensor, seq: SeqInfo, state: DecodeState) -> Tensor:
        return self.model(x, seq, state=state).hidden

    def new_state(
        self, batch: int, capacity: int, *, n_tentative: int = 0, dtype: torch.dtype, device: torch.device | str
    ) -> DecodeState:
        return self.model.new_state(batch, capacity, n_tentative=n_tentative, dtype=dtype, device=device)


def as_mixer(model: Any) -> TokenMixer:
    """A wrapped model behind the interface of a mixer, hidden states for outputs."""
    return _Adapter(model)


def _of_mixers(check: Check) -> Check:
    return lambda config: check(AsMixer(config))


def check_identity(config: WrapperConfig) -> None:
    """The identity setting changes no bit of the hidden states, of the parameters' names nor of their start values."""
    identity = type(config).identity()
    assert identity is not None, "this wrapper names no identity setting"
    wrapped = wrapped_model(identity).build("cpu")
    bare = wrapped_model(identity).replace(wrappers=[]).build("cpu")
    initialise(wrapped, 0)
    initialise(bare, 0)
    tokens = torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = wrapped(tokens, SeqInfo.contiguous(2, 20)).hidden
        theirs = bare(tokens, SeqInfo.contiguous(2, 20)).hidden
    assert torch.equal(ours, theirs), f"hidden states differ by {gap(ours, theirs):.3g}"
    missing = set(bare.init_names()) - set(wrapped.init_names())
    assert not missing, f"{sorted(missing)} have other names in the wrapped model"


def check_overfits(config: WrapperConfig) -> None:
    """A wrapped decoder learns one batch by heart; every parameter learns."""
    model = wrapped_model(config).build("cpu")
    initialise(model, 0)
    # As the trainer clips: back-propagation over segments has steep places, which throw an unclipped run far back.
    start, end = train(model, 80, lr=3e-3, clip=1.0)
    assert end < 0.25 * start, f"the loss on one batch went from {start:.3f} to {end:.3f} only"
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle, f"{idle} got no gradient"


WRAPPER_CHECKS: dict[str, Check] = {
    "identity": check_identity,
    "causality": _of_mixers(mixers.check_causality),
    "packing": _of_mixers(mixers.check_packing),
    "prefill_and_steps": _of_mixers(decoding.check_prefill_and_steps),
    "ragged_prefill": _of_mixers(decoding.check_ragged_prefill),
    "commit": _of_mixers(decoding.check_commit),
    "abort": _of_mixers(decoding.check_abort),
    "reorder": _of_mixers(decoding.check_reorder),
    "export_restore": _of_mixers(decoding.check_export_restore),
    "gradients": _of_mixers(mixers.check_gradients),
    "params_cost": _of_mixers(mixers.check_params_cost),
    "flops_cost": _of_mixers(mixers.check_flops_cost),
    "state_cost": _of_mixers(mixers.check_state_cost),
    "bf16": _of_mixers(mixers.check_bf16),
    "init": _of_mixers(mixers.check_initial_values),
    "overfits": check_overfits,
}
