"""The same tiny run gives the same losses and gradient norms under every strategy."""

from __future__ import annotations

from typing import Any

import pytest

from llm.core.errors import UserError
from llm.train.strategies import make_strategy
from tests.distributed.harness import run_ranks
from tests.distributed.steps import losses_and_norms, tiny_model, tiny_run

pytestmark = pytest.mark.distributed

ADAMW: dict[str, Any] = {}
MUON: dict[str, Any] = {"type": "muon"}
PLACES = {
    "ddp-2": (2, {"strategy": "ddp"}),
    "fsdp2-1": (1, {"strategy": "fsdp2"}),
    "fsdp2-2": (2, {"strategy": "fsdp2"}),
    "fsdp2-2-whole": (2, {"strategy": "fsdp2", "reshard_after_forward": False}),
    "fsdp2-2-offload": (2, {"strategy": "fsdp2", "cpu_offload": True}),
    "fsdp2-4": (4, {"strategy": "fsdp2"}),
    "hsdp-2x2": (4, {"strategy": "fsdp2", "replicate": 2}),
}
ZERO = {f"zero{stage}-2": (2, {"strategy": "deepspeed", "zero_stage": stage}) for stage in (1, 2, 3)}


def compare(
    place: tuple[int, dict[str, Any]], *, optim: dict[str, Any], tied: bool, steps: int, accumulation: int
) -> None:
    world_size, parallel = place
    model = tiny_model(tied=tied)
    losses, norms = losses_and_norms(0, tiny_run(optim=optim), model, steps, 1)
    assert losses[-1] < losses[0] - 0.02 * steps
    results = run_ranks(
        losses_and_norms, world_size, tiny_run(optim=optim, parallel=parallel), model, steps, accumulation, timeout=250
    )
    assert all(result == results[0] for result in results)
    assert results[0][0] == pytest.approx(losses, rel=1e-4)
    assert results[0][1] == pytest.approx(norms, rel=1e-3)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("optim", [ADAMW, MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize("name", PLACES)
def test_losses_are_those_of_one_process(name: str, optim: dict[str, Any], tied: bool) -> None:
    compare(PLACES[name], optim=optim, tied=tied, steps=8, accumulation=1)


@pytest.mark.parametrize("accumulation", [2, 4])
@pytest.mark.parametrize("name", ["ddp-2", "fsdp2-2"])
def test_accumulation_changes_nothing(name: str, accumulation: int) -> None:
    compare(PLACES[name], optim=ADAMW, tied=True, steps=5, accumulation=accumulation)


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_accumulation_in_one_process(accumulation: int) -> None:
    model = tiny_model()
    losses, norms = losses_and_norms(0, tiny_run(), model, 5, 1)
    others, other_norms = losses_and_norms(0, tiny_run(), model, 5, accumulation)
    assert others == pytest.approx(losses, rel=1e-5)
    assert other_norms == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize(("name", "accumulation"), [("zero1-2", 2), ("zero2-2", 2), ("zero3-2", 2)])
def test_deepspeed(name: str, accumulation: int) -> None:
    pytest.importorskip("deepspeed")
    compare(ZERO[name], optim=ADAMW, tied=True, steps=4, accumulation=accumulation)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("optim", [ADAMW, MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize("name", [*PLACES, *ZERO])
def test_fifty_steps(name: str, optim: dict[str, Any], accumulation: int, tied: bool) -> None:
    place = (PLACES | ZERO)[name]
    if accumulation * place[0] > 8:
        pytest.skip("fewer sequences than microbatches")
    compare(place, optim=optim, tied=tied, steps=50, accumulation=accumulation)


@pytest.mark.parametrize("parallel", [{"strategy": "ddp"}, {"strategy": "fsdp2"}], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing(parallel: dict[str, Any], mode: str) -> None:
    train = {"activation_checkpointing": mode}
    losses, norms = losses_and_norms(0, tiny_run(), tiny_model(), 4, 1)
    found = run_ranks(losses_and_norms, 2, tiny_run(parallel=parallel, train=train), tiny_model(), 4, 2)[0]
    assert found[0] == pytest.approx(losses, rel=1e-5)
    assert found[1] == pytest.approx(norms, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_activation_checkpointing_under_zero3(mode: str) -> None:
    pytest.importorskip("deepspeed")
    train = {"activation_checkpointing": mode}
    losses, norms = losses_and_norms(0, tiny_run(), tiny_model(), 4, 1)
    found = run_ranks(losses_and_norms, 2, tiny_run(parallel=ZERO["zero3-2"][1], train=train), tiny_model(), 4, 2)[0]
    assert found[0] == pytest.approx(losses, rel=1e-5)
    assert found[1] == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["ddp-2", "fsdp2-2"])
def test_experts_and_their_balance_loss(name: str, precision: str) -> None:
    """The balance loss is a mean over each microbatch, so the microbatches must be the same ones: 2 x 1 and 1 x 2."""
    world_size, parallel = PLACES[name]
    model = tiny_model(channel={"type": "moe", "n_experts": 4, "top_k": 2, "d_hidden": 16, "aux_weight": 1.0})
    without = tiny_model(channel={"type": "moe", "n_experts": 4, "top_k": 2, "d_hidden": 16, "aux_weight": 0.0})
    losses, norms = losses_and_norms(0, tiny_run(), model, 5, 2)
    assert norms[0] != pytest.approx(losses_and_norms(0, tiny_run(), without, 1, 2)[1][0], rel=1e-2)
    run = tiny_run(parallel=parallel, train={"precision": precision})
    found = run_ranks(losses_and_norms, world_size, run, model, 5, 1)[0]
    assert found[0] == pytest.approx(losses, rel=1e-4 if precision == "fp32" else 3e-3)
    assert found[1] == pytest.approx(norms, rel=1e-4 if precision == "fp32" else 3e-2)


@pytest.mark.parametrize("name", ["ddp-2", "fsdp2-2"])
def test_bf16_is_near_fp32(name: str) -> None:
    losses, _ = losses_and_norms(0, tiny_run(), tiny_model(), 5, 1)
    run = tiny_run(parallel=PLACES[name][1], train={"precision": "bf16"})
    found = run_ranks(losses_and_norms, 2, run, tiny_model(), 5, 2)[0][0]
    assert found != losses
    assert found == pytest.approx(losses, rel=2e-3)


def test_one_strategy_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="parallel.strategy=single, but 2 processes"):
        make_strategy(tiny_run())


def test_replicas_must_divide_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="parallel.replicate 2 does not divide the 3 processes"):
        make_strategy(tiny_run(parallel={"strategy": "fsdp2", "replicate": 2}))


def test_no_gpu_is_said() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="train.device=cuda"):
        make_strategy(tiny_run(train={"device": "cuda"}))
