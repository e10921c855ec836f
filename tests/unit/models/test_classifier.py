"""Sequence classifiers: published counts, streams equal whole sequences, look-ahead, and that they learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from llm.core.errors import UserError
from llm.core.init import initialise
from llm.models.classifier import SequenceClassifier, SequenceClassifierConfig
from llm.models.streaming import BatchNorm, Chain, Convolution, LMUCell, ResidualStage
from llm.models.zoo import OTHERS
from llm.models.zoo.lmuformer import PERMUTED_DIGITS, speech_commands

CELL: dict[str, Any] = {"stem": None, "n_blocks": 0}
STYLES = ["relu", "spiking", "spiking_shortcut"]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(**fields: Any) -> SequenceClassifier:
    """A small model in float64 and evaluation mode, with statistics and norms away from their start."""
    small = {"d_input": 6, "n_classes": 5, "d_model": 12, "order": 8, "window": 20.0}
    model = SequenceClassifierConfig.model_validate(small | fields).build("cpu").double()
    initialise(model, 0)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, BatchNorm):
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    noise = torch.randn(tensor.shape, generator=rng, dtype=torch.float64)
                    tensor.add_(0.2 * noise if tensor is not module.running_var else noise.abs())
    return model.eval()


@pytest.mark.parametrize("name", list(OTHERS))
def test_published_counts(name: str) -> None:
    assert OTHERS[name].counted() == OTHERS[name].facts.params


@pytest.mark.parametrize(("d", "q"), [(256, 256), (64, 32)])
def test_count_by_the_published_formula(d: int, q: int) -> None:
    model = SequenceClassifierConfig.model_validate(speech_commands(d_model=d, order=q)).build()
    patch = 128 * 3 * d + 3 * 3 * d**2 + 8 * d + 3 * d**2
    wanted = patch + (d + 1) + d * (q + d) + d + d**2 + 3 * d + 8 * d**2 + 15 * d + 35 * (d + 1)
    assert sum(p.numel() for p in model.parameters()) == wanted


def test_multiplications_per_frame() -> None:
    """About 1.6 million per frame besides the memory's, as derived for the published model."""
    model = SequenceClassifierConfig.model_validate(speech_commands()).build("cpu").eval()
    initialise(model, 0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 128, 128))
    counts = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    memory = sum(n for name, n in counts.items() if name.endswith(".memory"))
    assert (counts["Global"] - memory) / 2 / 128 == pytest.approx(1.6e6, rel=0.02)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pool", ["mean", "last"])
def test_a_stream_equals_the_whole_sequence(style: str, causal: bool, pool: str) -> None:
    """Frames one by one, in uneven pieces and all at once; the last logits are those of the sequence."""
    model = build(style=style, causal=causal, pool=pool, n_blocks=2)
    x = randn(3, 23, 6)
    with torch.no_grad():
        wanted, whole = model.prefix_logits(x), model(x)
    torch.testing.assert_close(wanted[:, -1], whole)
    for pieces in ([1] * 23, [1, 7, 2, 12, 1], [23], [0, 3, 0, 20]):
        state = model.new_state(3, dtype=torch.float64)
        found, n_seen = [], 0
        for piece in x.split(pieces, dim=1):
            found.append(model.stream(piece, state))
            n_seen += piece.shape[1]
            assert sum(part.shape[1] for part in found) == max(0, n_seen - model.lookahead)
        found.append(model.stream(x[:, :0], state, last=True))
        torch.testing.assert_close(torch.cat(found, dim=1), wanted, rtol=1e-9, atol=1e-9)
        assert state.n_frames == 23


def test_a_bare_cell_streams_without_delay() -> None:
    model = build(**CELL, d_input=1, pool="last")
    x = randn(2, 30, 1)
    state = model.new_state(2, dtype=torch.float64)
    found = torch.cat([model.stream(frame, state) for frame in x.split(1, dim=1)], dim=1)
    torch.testing.assert_close(found, model.prefix_logits(x), rtol=1e-9, atol=1e-9)


def test_the_published_model_looks_five_frames_ahead() -> None:
    """Five convolutions of three taps; made causal, none."""
    for causal, ahead in ((False, 5), (True, 0)):
        model = build(causal=causal, n_blocks=1)
        assert model.lookahead == ahead
        x = randn(1, 20, 6).requires_grad_()
        (grad,) = torch.autograd.grad(model.body(x)[0, 8].sum(), x)
        seen = grad[0].abs().sum(-1) > 1e-9
        assert seen[: 9 + ahead].all() and not seen[9 + ahead :].any()


@torch.no_grad()
def test_spiking_cell_by_steps() -> None:
    """The real-valued memory and three layers of potentials are all that a step needs."""
    model = build(style="spiking", n_blocks=1)
    cell = next(module for module in model.modules() if isinstance(module, LMUCell))
    cell.act_input.stages[0].bias.fill_(2.0)  # type: ignore[index, union-attr]
    x = (randn(2, 40, 12) > 0).double()
    wanted = cell(x)
    state = cell.new_state(2, torch.float64, "cpu")
    found = torch.cat([cell.extend(frame, state, False) for frame in x.split(1, dim=1)], dim=1)
    assert torch.equal(found, wanted) and 0 < float(wanted.mean()) < 1
    potentials = [state[name][1]["potential"] for name in ("act_input", "act_memory", "act_hidden")]
    assert [tuple(p.shape) for p in potentials] == [(2, 1), (2, 8), (2, 12)]
    assert state["m"].unique().numel() > 2


@pytest.mark.parametrize("length", [2, 20, 64, 500])
def test_any_length(length: int) -> None:
    """The response is no buffer of one length."""
    model = build()
    x = randn(1, length, 6)
    state = model.new_state(1, dtype=torch.float64)
    torch.testing.assert_close(model.stream(x, state, last=True), model.prefix_logits(x), rtol=1e-9, atol=1e-9)


def test_convolution_equals_torch() -> None:
    theirs = torch.nn.Conv1d(4, 7, 3, padding=1).double()
    ours = Convolution(4, 7, 3, bias=True).double()
    ours.load_state_dict(theirs.state_dict())
    x = randn(2, 9, 4)
    torch.testing.assert_close(ours(x), theirs(x.mT).mT)
    norm, mine = torch.nn.BatchNorm1d(4).double(), BatchNorm(4).double()
    initialise(mine, 0)
    for _ in range(3):
        torch.testing.assert_close(mine(x), norm(x.mT).mT)
    torch.testing.assert_close(mine.running_var, norm.running_var)
    torch.testing.assert_close(mine.running_mean, norm.running_mean)


def test_residual_waits_for_a_late_branch() -> None:
    stage = ResidualStage(Chain(Convolution(2, 2, 5), Convolution(2, 2, 3)))
    initialise(stage, 0)
    x = randn(1, 4, 2).float()
    state = stage.new_state(1, torch.float32, "cpu")
    parts = [stage.extend(frame, state, False).shape[1] for frame in x.split(1, dim=1)]
    assert parts == [0, 0, 0, 1] and stage.extend(x[:, :0], state, True).shape[1] == 3


@pytest.mark.parametrize("style", STYLES)
def test_every_parameter_learns(style: str) -> None:
    """Tones of different frequency: the loss falls, and every parameter has a gradient."""
    model = build(style=style, n_blocks=1, d_input=1, n_classes=2, window=16.0).float().train()
    t = torch.arange(24.0)
    phases = torch.linspace(0, 3, 8)
    x = torch.cat([(t * rate + phases[:, None]).sin() for rate in (0.3, 0.9)])[..., None]
    y = torch.arange(2).repeat_interleave(8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-5:]) < 0.5 * losses[0], (losses[0], losses[-5:])
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stem": None}, "blocks are residual and 12 wide, the frames that reach them 6"),
        ({"stem": {"width": 2}}, "stem.width 2 cannot look as far ahead as back"),
        ({"style": "spiking", "stem": {"norm_first": True}}, "has the published stem"),
        ({"window": 0}, "greater than 0"),
    ],
)
def test_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((UserError, ValueError), match=message):
        build(**fields)


def test_a_stream_needs_evaluation_mode() -> None:
    model = build().train()
    with pytest.raises(AssertionError, match="eval"):
        model.stream(randn(1, 2, 6), model.new_state(1))


def test_permuted_digits_cell_has_no_residual() -> None:
    model = SequenceClassifierConfig.model_validate(PERMUTED_DIGITS).build("cpu").eval()
    initialise(model, 0)
    assert model(torch.rand(2, 784, 1)).shape == (2, 10) and model.lookahead == 0
