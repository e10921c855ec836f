"""State written under one strategy goes on under another; skipped steps; weights that depend on names alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm.core.errors import UserError
from llm.core.init import initialise
from llm.train.strategies import NamedState
from tests.distributed.harness import run_ranks
from tests.distributed.steps import (
    load_and_train,
    losses_and_norms,
    plain,
    start,
    tiny_model,
    tiny_run,
    train_and_state,
    train_steps,
)

pytestmark = pytest.mark.distributed

PLACES: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {"strategy": "single"}),
    "ddp-2": (2, {"strategy": "ddp"}),
    "fsdp2-2": (2, {"strategy": "fsdp2"}),
    "hsdp-2x2": (4, {"strategy": "fsdp2", "replicate": 2}),
}
ZERO = {f"zero{stage}-2": (2, {"strategy": "deepspeed", "zero_stage": stage}) for stage in (1, 2, 3)}


def call(fn: Any, place: tuple[int, dict[str, Any]], *args: Any, optim: dict[str, Any]) -> Any:
    world_size, parallel = place
    return run_ranks(fn, world_size, tiny_run(parallel=parallel, optim=optim), *args, timeout=200)[0]


def exchange(source: str, targets: list[str], kind: str, *, tied: bool) -> None:
    places = PLACES | ZERO
    optim = {"type": kind}
    model = tiny_model(tied=tied)
    straight, _ = losses_and_norms(0, tiny_run(optim=optim), model, 6, 1)
    state: NamedState = call(train_and_state, places[source], model, 3, optim=optim)
    names = [name for name, _ in model.build("meta").named_parameters()]
    assert list(state.model) == names and list(state.optim) == names
    assert ("unembed.weight" in names) != tied
    assert float(state.optim["embed.weight"]["step"]) == 3.0
    expected = train_and_state(0, tiny_run(optim=optim), model, 3)
    for name in names:
        # Updates hardly depend on the scale of gradients; their moments tell it.
        for key, moment in expected.optim[name].items():
            scale = float(moment.abs().max())
            torch.testing.assert_close(
                state.optim[name][key], moment, rtol=1e-3, atol=1e-3 * scale, msg=f"{name} {key}"
            )
    for target in targets:
        losses = call(load_and_train, places[target], model, state, 3, 3, optim=optim)
        assert losses == pytest.approx(straight[3:], rel=1e-4), target


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("source", PLACES)
def test_state_goes_on_anywhere(source: str, kind: str) -> None:
    exchange(source, list(PLACES), kind, tied=source != "ddp-2")


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("source", ZERO)
def test_state_of_deepspeed_goes_on_anywhere(source: str, kind: str, tied: bool) -> None:
    pytest.importorskip("deepspeed")
    exchange(source, ["single", "fsdp2-2", *ZERO], kind, tied=tied)


def test_deepspeed_takes_and_gives_state() -> None:
    pytest.importorskip("deepspeed")
    exchange("zero3-2", ["single"], "adamw", tied=True)
    exchange("fsdp2-2", ["zero2-2"], "adamw", tied=True)


def fresh_state(rank: int, run: Any, model: Any) -> NamedState:
    return plain(start(run, model).state())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ["ddp-2", "hsdp-2x2"])
def test_weights_depend_on_names_alone(name: str, tied: bool) -> None:
    model = tiny_model(tied=tied)
    plain_model = model.build("cpu")
    plain_model.tie()
    initialise(plain_model, 7)
    state: NamedState = call(fresh_state, PLACES[name], model, optim={})
    for key, value in plain_model.named_parameters():
        assert torch.equal(state.model[key], value), key


def skipped_state(rank: int, run: Any, model: Any) -> tuple[NamedState, NamedState, list[float]]:
    strategy = start(run, model)
    train_steps(strategy, 2, 1)
    before = plain(strategy.state())
    step = strategy.step
    strategy.step = lambda lr_factor, skip: step(lr_factor, skip=True)  # type: ignore[method-assign]
    train_steps(strategy, 1, 1, first=17)
    strategy.step = step  # type: ignore[method-assign]
    after = plain(strategy.state())
    return before, after, train_steps(strategy, 2, 1, first=2)[0]


@pytest.mark.parametrize("name", ["single", "fsdp2-2", "zero2-2", "zero3-2"])
def test_a_skipped_step_leaves_no_trace(name: str) -> None:
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    straight, _ = losses_and_norms(0, tiny_run(), tiny_model(), 4, 1)
    before, after, losses = call(skipped_state, (PLACES | ZERO)[name], tiny_model(), optim={})
    for key, value in before.model.items():
        assert torch.equal(value, after.model[key]), key
        for part, held in before.optim[key].items():
            assert torch.equal(held, after.optim[key][part]), (key, part)
    assert losses == pytest.approx(straight[2:], rel=1e-5)


def evaluated(rank: int, run: Any, model: Any) -> tuple[float, float, list[float]]:
    """Loss of an evaluation, of the same one after taking the state, and of the steps that follow."""
    from llm.core.seq import SeqInfo

    strategy = start(run, model)
    train_steps(strategy, 2, 1)
    tokens = torch.arange(16)[None]
    values = []
    kinds = {key: type(tensor) for key, tensor in strategy.state().model.items()}
    for _ in range(2):
        with torch.no_grad(), strategy.unsharded() as whole:
            whole.eval()
            values.append(float(whole.head(whole(tokens, SeqInfo.contiguous(1, 16)).hidden).logsumexp(-1).sum()))
            whole.train()
        assert {key: type(tensor) for key, tensor in strategy.state().model.items()} == kinds
    return values[0], values[1], train_steps(strategy, 2, 1, first=2)[0]


@pytest.mark.parametrize("name", ["ddp-2", "fsdp2-2", "zero3-2"])
def test_evaluation_between_steps(name: str) -> None:
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    first, second, losses = call(evaluated, (PLACES | ZERO)[name], tiny_model(), optim={})
    expected, _, straight = evaluated(0, tiny_run(), tiny_model())
    assert first == second == pytest.approx(expected, rel=1e-5)
    assert losses == pytest.approx(straight, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.model.pop("final_norm.weight"), "no parameter 'final_norm.weight'"),
        (lambda s: s.model.update({"extra.weight": torch.zeros(1)}), "'extra.weight' that this run does not know"),
        (
            lambda s: s.model.update({"embed.weight": torch.zeros(2, 3)}),
            r"'embed.weight' has shape \[2, 3\], this run's has \[61, 32\]",
        ),
        (lambda s: s.optim["embed.weight"].pop("exp_avg"), "no optimizer state 'embed.weight/exp_avg'"),
    ],
)
def test_a_state_that_does_not_fit_is_named(change: Any, says: str) -> None:
    strategy = start(tiny_run(), tiny_model())
    state = plain(strategy.state())
    change(state)
    with pytest.raises(UserError, match=says):
        strategy.load(state)


@pytest.mark.parametrize("name", ["ddp-2", "fsdp2-2", "zero2-2"])
def test_expert_biases_move_by_the_load_of_all_ranks(name: str) -> None:
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    model = tiny_model(
        channel={"type": "moe", "n_experts": 4, "d_hidden": 16, "router": "sigmoid", "balance_rate": 0.01}
    )
    expected = train_and_state(0, tiny_run(), model, 3).model
    found: NamedState = call(train_and_state, (PLACES | ZERO)[name], model, 3, optim={})
    assert expected["layers.0.channel.balance"].abs().sum() > 0
    for layer in range(2):
        key = f"layers.{layer}.channel.balance"
        assert torch.equal(found.model[key], expected[key])
        assert float(found.model[f"layers.{layer}.channel.load"].sum()) == 0
    assert found.model.keys() == expected.keys()
