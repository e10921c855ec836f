"""The contracts reject what is wrong: each deliberately broken part fails the checks named here, and no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm.blocks.base import (
    BuildCtx,
    ChannelConfig,
    ChannelMixer,
    LinearConfig,
    MixerConfig,
    NormConfig,
    PositionConfig,
    PositionEncoding,
    Residual,
    ResidualConfig,
    TokenMixer,
)
from llm.blocks.linears.dense import DenseLinear
from llm.core.cost import Cost, Dims, Mode
from llm.core.init import Init, computed, constant
from llm.core.registry import Entry
from llm.core.seq import SeqInfo
from llm.core.state import CompositeState, ConvState, DecodeState, RecurrentState, SegmentState
from llm.models.wrappers.base import WrapperConfig
from llm.models.wrappers.loop import Loop, LoopConfig
from llm.models.wrappers.rmt import RMT, RMTConfig
from tests.contracts.checks import (
    CHANNEL_CHECKS,
    LINEAR_CHECKS,
    MIXER_CHECKS,
    NORM_CHECKS,
    POSITION_CHECKS,
    RESIDUAL_CHECKS,
)
from tests.contracts.checks.exemptions import check_exemptions
from tests.contracts.checks.wrappers import WRAPPER_CHECKS
from tests.contracts.examples import (
    GatedRecurrence,
    GatedRecurrenceConfig,
    LeakyIntegrator,
    LeakyIntegratorConfig,
    ShortConvolution,
    ShortConvolutionConfig,
)

ZERO = Cost()
DECODING = {"prefill_and_steps", "ragged_prefill", "commit", "abort", "reorder", "export_restore"}


def failing(checks: Any, config: Any, expected: set[str]) -> dict[str, str]:
    """Contract -> message, of all checks that fail; the slow one runs only where it is expected to."""
    messages = {}
    for name, check in checks.items():
        if name == "overfits" and name not in expected:
            continue
        try:
            check(config)
        except Exception as error:
            messages[name] = f"{type(error).__name__}: {error}"
    return messages


def _with(base: type[MixerConfig], module: Callable[[Any, BuildCtx], TokenMixer], cost: Cost = ZERO) -> MixerConfig:
    """A config of the base's kind that builds another module, or states its cost wrongly by `cost`."""

    class Broken(base):  # type: ignore[valid-type,misc]
        def build(self, ctx: BuildCtx) -> TokenMixer:
            return module(self, ctx)

        def cost(self, dims: Dims, seq_len: int, mode: Mode) -> Cost:
            own = base.cost(self, dims, seq_len, mode)
            return own + cost

    return Broken()


class SeesFuture(ShortConvolution):
    """Adds the next token, where there is one."""

    def forward(self, x: Tensor, seq: SeqInfo) -> Tensor:
        return super().forward(x + 0.1 * torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], dim=1), seq)


class LeaksGradientFromFuture(LeakyIntegrator):
    """Outputs are right, and gradients come from where they cannot."""

    def forward(self, x: Tensor, seq: SeqInfo) -> Tensor:
        return super().forward(x, seq) + _leak(x) - x


class _Leak(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad + 0.1 * grad.roll(1, dims=1)


def _leak(x: Tensor) -> Tensor:
    return _Leak.apply(x)


class LeaksThroughConvolution(ShortConvolution):
    """Its taps reach into the document before."""

    def convolve(self, history: Tensor, seq: SeqInfo) -> Tensor:
        return super().convolve(history, SeqInfo(torch.full_like(seq.positions, self.width)))


class LeaksThroughRecurrence(GatedRecurrence):
    """Is not reset where a document starts."""

    def factors(self, x: Tensor, seq: SeqInfo) -> dict[str, Tensor]:
        return super().factors(x, SeqInfo(seq.positions + 1, valid=seq.valid))


class LeaksOnlyGradients(LeakyIntegrator):
    """Gradients of a document reach the documents packed before it."""

    def forward(self, x: Tensor, seq: SeqInfo) -> Tensor:
        return super().forward(_CrossDocuments.apply(x, seq.document_ids()), seq)


class _CrossDocuments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, documents: Tensor) -> Tensor:
        ctx.save_for_backward(documents)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (documents,) = ctx.saved_tensors
        later = (documents[:, None, :] > documents[:, :, None]).to(grad.dtype)
        return grad + 0.01 * later @ grad, None


class _Forgetful(ConvState):
    def _rollback(self, accepted: Tensor) -> None:
        pass


class DoesNotRollBack(ShortConvolution):
    """Keeps rejected inputs."""

    def new_state(self, batch: int, capacity: int, *, n_tentative: int = 0, dtype: Any, device: Any) -> DecodeState:
        return _Forgetful(batch, self.width, self.d_model, n_tentative=n_tentative, dtype=dtype, device=device)


class ReplaysOneTooMany(GatedRecurrence):
    """Replays a rejected token."""

    def replay(self, tensors: dict[str, Tensor], factors: dict[str, Tensor], counts: Tensor) -> dict[str, Tensor]:
        return super().replay(tensors, factors, counts + (counts > 0))


class AdvancesOnPadding(GatedRecurrence):
    """Folds padding into its state."""

    def factors(self, x: Tensor, seq: SeqInfo) -> dict[str, Tensor]:
        return super().factors(x, SeqInfo(seq.positions))


class _Unmoved(RecurrentState):
    def reorder(self, index: Tensor) -> None:
        super().reorder(torch.arange(len(index)) % self.batch)


class ReordersWrongly(LeakyIntegrator):
    """Changes the batch size, and takes no notice of which rows were asked for."""

    def new_state(self, batch: int, capacity: int, *, n_tentative: int = 0, dtype: Any, device: Any) -> DecodeState:
        wide = torch.promote_types(dtype, torch.float32)
        return _Unmoved(batch, {"h": (self.d_model,)}, n_tentative=n_tentative, dtype=wide, device=device)


class _Amnesic(ConvState):
    def restore(self, tensors: Any) -> None:
        super().restore(tensors | {"x": torch.zeros_like(tensors["x"])})


class RestoresNothing(ShortConvolution):
    """Restores the length alone."""

    def new_state(self, batch: int, capacity: int, *, n_tentative: int = 0, dtype: Any, device: Any) -> DecodeState:
        return _Amnesic(batch, self.width, self.d_model, n_tentative=n_tentative, dtype=dtype, device=device)


class _Growing(ConvState):
    def append(self, x: Tensor, counts: Tensor | None = None) -> Tensor:
        self.seen = getattr(self, "seen", 0) + x.shape[1]
        return super().append(x, counts)

    def nbytes(self) -> int:
        return super().nbytes() + getattr(self, "seen", 0)


class Grows(ShortConvolution):
    """Remembers more with every token."""

    def new_state(self, batch: int, capacity: int, *, n_tentative: int = 0, dtype: Any, device: Any) -> DecodeState:
        return _Growing(batch, self.width, self.d_model, n_tentative=n_tentative, dtype=dtype, device=device)


class NaNParameter(LeakyIntegrator):
    """Starts with a parameter that is not finite."""

    def __init__(self, config: Any, ctx: BuildCtx) -> None:
        super().__init__(config, ctx)
        self.spare = nn.Parameter(torch.empty(3))

    def init_spec(self) -> dict[str, Init]:
        return {**super().init_spec(), "spare": constant(float("nan"))}


class StartsFromGlobalRandomness(LeakyIntegrator):
    """Does not start from (seed, name)."""

    def init_spec(self) -> dict[str, Init]:
        return {"decay": computed(lambda: torch.randn(self.d_model))}


class StartsTheSameForAnySeed(LeakyIntegrator):
    """Takes no notice of the seed."""

    def init_spec(self) -> dict[str, Init]:
        return {"decay": computed(lambda: torch.linspace(-1, 1, self.d_model))}


class HidesATensor(LeakyIntegrator):
    """Holds a tensor that no checkpoint, device move or init by name sees."""

    def __init__(self, config: Any, ctx: BuildCtx) -> None:
        super().__init__(config, ctx)
        self.offset = torch.zeros(ctx.d_model)


class BreaksTheGraph(LeakyIntegrator):
    """Cannot be compiled as a whole."""

    def forward(self, x: Tensor, seq: SeqInfo) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(x, seq)


class CompilesPerPacking(LeakyIntegrator):
    """Puts the number of documents into the graph."""

    def forward(self, x: Tensor, seq: SeqInfo) -> Tensor:
        if seq.cu_seqlens is not None and seq.cu_seqlens.shape[0] == 4:
            return super().forward(x, seq) + 0.0
        return super().forward(x, seq)


class WrongGradient(LeakyIntegrator):
    """Cuts a path of its gradient."""

    def scan(self, x: Tensor, seq: SeqInfo, h: Tensor) -> Tensor:
        return super().scan(0.5 * x + 0.5 * x.detach(), seq, h)


class ReturnsFloat32(LeakyIntegrator):
    """Widens what it is given."""

    def forward(self, x: Tensor, seq: SeqInfo) -> Tensor:
        y = super().forward(x, seq)
        return y.float() if x.dtype == torch.bfloat16 else y


class LosesPrecision(LeakyIntegrator):
    """Sums bf16 values beyond their precision."""

    def forward(self, x: Tensor, seq: SeqInfo) -> Tensor:
        y = super().forward(x, seq)
        return (y + 100.0) - 100.0 if x.dtype == torch.bfloat16 else y


def _one_tap() -> MixerConfig:
    return ShortConvolutionConfig(width=1)


BROKEN_MIXERS: dict[str, tuple[Callable[[], MixerConfig], set[str]]] = {
    "sees_future": (
        lambda: _with(ShortConvolutionConfig, SeesFuture),
        {"causality", "packing", "bf16"} | DECODING,
    ),
    "gradient_from_future": (
        lambda: _with(LeakyIntegratorConfig, LeaksGradientFromFuture),
        {"causality", "packing", "gradients"},
    ),
    "leaks_through_convolution": (lambda: _with(ShortConvolutionConfig, LeaksThroughConvolution), {"packing"}),
    "leaks_through_recurrence": (lambda: _with(GatedRecurrenceConfig, LeaksThroughRecurrence), {"packing"}),
    "leaks_only_gradients": (lambda: _with(LeakyIntegratorConfig, LeaksOnlyGradients), {"packing"}),
    "does_not_roll_back": (lambda: _with(ShortConvolutionConfig, DoesNotRollBack), {"commit", "abort"}),
    "replays_one_too_many": (lambda: _with(GatedRecurrenceConfig, ReplaysOneTooMany), {"commit"}),
    "advances_on_padding": (lambda: _with(GatedRecurrenceConfig, AdvancesOnPadding), {"ragged_prefill"}),
    "reorders_wrongly": (lambda: _with(LeakyIntegratorConfig, ReordersWrongly), {"reorder"}),
    "restores_nothing": (lambda: _with(ShortConvolutionConfig, RestoresNothing), {"export_restore"}),
    "wrong_gradient": (lambda: _with(LeakyIntegratorConfig, WrongGradient), {"gradients"}),
    "wrong_parameter_cost": (
        lambda: _with(LeakyIntegratorConfig, LeakyIntegrator, Cost(params=1)),
        {"params_cost"},
    ),
    "wrong_flops": (
        lambda: _with(LeakyIntegratorConfig, LeakyIntegrator, Cost(flops_per_token=2048.0)),
        {"flops_cost"},
    ),
    "wrong_context_flops": (
        lambda: _with(LeakyIntegratorConfig, LeakyIntegrator, Cost(flops_per_token=99.0, attention_flops=99.0)),
        {"flops_cost"},
    ),
    "wrong_state_bytes": (
        lambda: _with(LeakyIntegratorConfig, LeakyIntegrator, Cost(state_bytes_per_seq=-64)),
        {"state_cost"},
    ),
    "grows": (lambda: _with(ShortConvolutionConfig, Grows), {"state_cost"}),
    "nan_parameter": (
        lambda: _with(LeakyIntegratorConfig, NaNParameter, Cost(params=3, active_params=3)),
        {"init", "overfits"},
    ),
    "global_randomness": (lambda: _with(LeakyIntegratorConfig, StartsFromGlobalRandomness), {"init", "bf16"}),
    "same_for_any_seed": (lambda: _with(LeakyIntegratorConfig, StartsTheSameForAnySeed), {"init"}),
    "hides_a_tensor": (lambda: _with(LeakyIntegratorConfig, HidesATensor), {"init"}),
    "breaks_the_graph": (lambda: _with(LeakyIntegratorConfig, BreaksTheGraph), {"compile"}),
    "compiles_per_packing": (lambda: _with(LeakyIntegratorConfig, CompilesPerPacking), {"compile"}),
    "returns_float32": (lambda: _with(LeakyIntegratorConfig, ReturnsFloat32), {"bf16"}),
    "loses_precision": (lambda: _with(LeakyIntegratorConfig, LosesPrecision), {"bf16"}),
    "looks_back_nowhere": (_one_tap, {"overfits"}),
}


@pytest.mark.parametrize("name", BROKEN_MIXERS)
def test_broken_mixer(name: str) -> None:
    make, expected = BROKEN_MIXERS[name]
    messages = failing(MIXER_CHECKS, make(), expected)
    assert set(messages) == expected, messages


class _MixesTokens(ChannelMixer):
    def __init__(self, ctx: BuildCtx, *, wrong: str) -> None:
        super().__init__()
        self.wrong = wrong
        self.up = ctx.linear(ctx.d_model, ctx.d_model, role="channel.up")
        self.down = ctx.linear(ctx.d_model, ctx.d_model, role="channel.down")

    def forward(self, x: Tensor, seq: SeqInfo, state: DecodeState | None = None) -> Tensor:
        y = self.down(torch.tanh(self.up(x)))
        if self.wrong == "tokens":
            y = y + 0.01 * x.mean(1, keepdim=True)
        if self.wrong == "boundaries":
            y = y + 0.01 * seq.document_ids()[..., None].to(x.dtype)
        return y


class _Channel(ChannelConfig):
    wrong: str = ""

    def build(self, ctx: BuildCtx) -> ChannelMixer:
        return _MixesTokens(ctx, wrong=self.wrong)

    def cost(self, dims: Dims, seq_len: int, mode: Mode) -> Cost:
        d = dims.d_model
        up = dims.linear(d, d, role="channel.up")
        return up if self.wrong == "cost" else up + dims.linear(d, d, role="channel.down")


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [("", set()), ("tokens", {"token_wise"}), ("boundaries", {"token_wise"}), ("cost", {"params_cost", "flops_cost"})],
)
def test_broken_channel(wrong: str, expected: set[str]) -> None:
    messages = failing(CHANNEL_CHECKS, _Channel(wrong=wrong), expected)
    assert set(messages) == expected, messages


class _MixesRows(RMT):
    """Rows of a batch share a memory."""

    def close(self, carried: Any, written: Any, first: Any, closing: Any) -> Any:
        return super().close(carried, written.mean(dim=0, keepdim=True).expand_as(written), first, closing)


class _KeepsRejectedSegments(SegmentState):
    def commit(self, accepted: Tensor) -> None:
        self.committing = True
        super().commit(accepted)
        self.committing = False

    def _merge(self, lanes: list[int]) -> None:
        super()._merge([len(self.lanes) - 1] * self.batch if getattr(self, "committing", False) else lanes)


class _DoesNotGoBack(RMT):
    """Goes on in the next segment although the tokens that opened it were rejected."""

    def new_state(self, *args: Any, **kwargs: Any) -> DecodeState:
        state = super().new_state(*args, **kwargs)
        state.__class__ = _KeepsRejectedSegments
        return state


class _ReadsAcrossDocuments(RMT):
    """Takes packed documents for one."""

    def forward(self, tokens: Tensor, seq: SeqInfo, *, state: Any = None, carry: Any = None) -> Any:
        return super().forward(tokens, SeqInfo(seq.positions, valid=seq.valid), state=state, carry=carry)


class _OneStateForAllLoops(Loop):
    """All loops write into the state of the first."""

    def new_state(self, *args: Any, **kwargs: Any) -> DecodeState:
        state = super().new_state(*args, **kwargs)
        assert isinstance(state, CompositeState)
        return CompositeState({key: state["loop0"] if key.startswith("loop") else state[key] for key in state.parts})


class _Recurrent(RMTConfig):
    n_memory: int = 2
    segment: int | None = 5
    wrong: str = ""

    def wrap(self, inner: Any, model: Any) -> Any:
        kinds = {
            "mixes_rows": _MixesRows,
            "does_not_go_back": _DoesNotGoBack,
            "reads_across": _ReadsAcrossDocuments,
        }
        return kinds.get(self.wrong, RMT)(self, inner, model)

    @classmethod
    def identity(cls) -> WrapperConfig:
        return cls(n_memory=0, segment=None)


class _NoIdentity(_Recurrent):
    @classmethod
    def identity(cls) -> WrapperConfig:
        return cls(n_memory=1, segment=None)


class _Looped(LoopConfig):
    n_loops: int = 3

    def wrap(self, inner: Any, model: Any) -> Any:
        return _OneStateForAllLoops(self, inner, model)

    @classmethod
    def identity(cls) -> WrapperConfig:
        return cls(n_loops=1)


BROKEN_WRAPPERS: dict[str, tuple[Callable[[], WrapperConfig], set[str]]] = {
    "mixes_rows": (lambda: _Recurrent(wrong="mixes_rows"), DECODING),
    "does_not_go_back": (lambda: _Recurrent(wrong="does_not_go_back"), {"commit"}),
    "reads_across": (lambda: _Recurrent(wrong="reads_across"), {"packing"}),
    "no_identity": (_NoIdentity, {"identity"}),
    "one_state_for_all_loops": (_Looped, DECODING | {"bf16", "flops_cost", "state_cost"}),
}


@pytest.mark.parametrize("name", BROKEN_WRAPPERS)
def test_broken_wrapper(name: str) -> None:
    make, expected = BROKEN_WRAPPERS[name]
    messages = failing(WRAPPER_CHECKS, make(), expected)
    assert set(messages) == expected, messages


class _Linear(LinearConfig):
    wrong: str = ""

    def build(self, d_in: int, d_out: int, *, bias: bool, std: float, init: Any) -> nn.Module:
        wrong_bias = bias and self.wrong != "bias"
        return DenseLinear(d_in, d_out, bias=wrong_bias, std=2 * std if self.wrong == "std" else std, init=init)

    def cost(self, d_in: int, d_out: int, *, bias: bool) -> Cost:
        params = d_in * d_out + d_out * bias
        return Cost(params=params, active_params=params, flops_per_token=2.0 * d_in * d_out)


@pytest.mark.parametrize(("wrong", "expected"), [("std", {"init_std"}), ("bias", {"cost"})])
def test_broken_linear(wrong: str, expected: set[str]) -> None:
    checks = {name: check for name, check in LINEAR_CHECKS.items() if name != "role_override"}
    messages = failing(checks, _Linear(wrong=wrong), expected)
    assert set(messages) == expected, messages


class _OverTokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean((-1, -2), keepdim=True) + 1e-6).sqrt()


class _Norm(NormConfig):
    def build(self, dim: int) -> nn.Module:
        return _OverTokens()

    def cost(self, dim: int) -> Cost:
        return Cost()


def test_broken_norm() -> None:
    messages = failing(NORM_CHECKS, _Norm(), {"values"})
    assert set(messages) == {"values"}, messages


class _CountsWithinCall(PositionEncoding):
    def at_embed(self, x: Tensor, seq: SeqInfo) -> Tensor:
        return x + torch.arange(x.shape[1], dtype=x.dtype)[:, None]


class _Absolute(PositionEncoding):
    def at_qk(self, q: Tensor, k: Tensor, seq: SeqInfo) -> tuple[Tensor, Tensor]:
        return q * (1 + 0.1 * seq.positions[..., None, None]).to(q.dtype), k


class _Position(PositionConfig):
    wrong: str

    def build(self, ctx: BuildCtx) -> PositionEncoding:
        return _CountsWithinCall() if self.wrong == "offsets" else _Absolute()


@pytest.mark.parametrize("wrong", ["offsets", "relative"])
def test_broken_position(wrong: str) -> None:
    messages = failing(POSITION_CHECKS, _Position(wrong=wrong), {wrong})
    assert set(messages) == {wrong}, messages


class _CallsTwice(Residual):
    def forward(self, x: Tensor, mixer: Any, channel: Any) -> Tensor:
        x = x if mixer is None else x + 0.5 * mixer(x) + 0.5 * mixer(x)
        return x if channel is None else x + channel(x)


class _DropsChannel(Residual):
    def forward(self, x: Tensor, mixer: Any, channel: Any) -> Tensor:
        return x + 0.0 * (channel(x) if channel else x) + (mixer(x) if mixer else 0.0)


class _Residual(ResidualConfig):
    wrong: str

    def build(self, ctx: BuildCtx, *, mixer: bool, channel: bool) -> Residual:
        return _CallsTwice() if self.wrong == "twice" else _DropsChannel()

    def cost(self, dims: Dims, *, mixer: bool, channel: bool) -> Cost:
        return Cost()


@pytest.mark.parametrize("wrong", ["twice", "drops"])
def test_broken_residual(wrong: str) -> None:
    messages = failing(RESIDUAL_CHECKS, _Residual(wrong=wrong), {"calls"})
    assert set(messages) == {"calls"}, messages


def _entry(config: MixerConfig, exempt: dict[str, str]) -> Entry[MixerConfig]:
    return Entry("part", type(config), lambda: config, "test only", "stable", exempt=exempt)


REASON = "A mixer with one tap has no memory, so it cannot tell equal tokens apart."


@pytest.mark.parametrize(
    ("config", "exempt", "message"),
    [
        (_one_tap, {"learns": REASON}, "which is no contract"),
        (_one_tap, {"overfits": "cannot"}, "must give its reason in a sentence"),
        (ShortConvolutionConfig, {"params_cost": REASON}, "all its variants pass"),
        (_one_tap, {"overfits": REASON}, None),
    ],
)
def test_exemptions_are_looked_at(config: Any, exempt: dict[str, str], message: str | None) -> None:
    entry = _entry(config(), exempt)
    if message is None:
        check_exemptions(MIXER_CHECKS, entry)
        return
    with pytest.raises(AssertionError, match=message):
        check_exemptions(MIXER_CHECKS, entry)
