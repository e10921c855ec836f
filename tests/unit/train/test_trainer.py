"""The trainer with injected parts: its arithmetic against float64, and what it does when something happens."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm.core.aux_loss import attach_aux
from llm.core.batch import IGNORE, Microbatch, StepBatch
from llm.core.errors import UserError
from llm.core.seq import SeqInfo
from llm.parallel.mesh import Place
from llm.train.callbacks.base import StepOut
from llm.train.loss import LanguageModelLoss, LossOut
from llm.train.optim.schedule import lr_factor
from llm.train.strategies.single import SingleStrategy
from llm.train.trainer import Trainer
from tests.unit.train.helpers import run_config
from tests.unit.train.trainer_parts import (
    LENGTH,
    ROWS,
    VOCAB,
    Recorder,
    Steps,
    equal,
    exact,
    make,
    rows_of,
    step_batch,
    weights,
)


@pytest.mark.parametrize("z_loss", [0.0, 0.05])
@pytest.mark.parametrize("chunk", [None, 1, 7, 32])
@pytest.mark.parametrize("sizes", [[4], [1, 1, 1, 1], [3, 1], [1, 2, 1]], ids=str)
def test_loss_and_gradients_are_those_of_the_whole_batch(
    tmp_path: Path, sizes: list[int], chunk: int | None, z_loss: float
) -> None:
    """Whatever the accumulation, the microbatches and the chunks, with rows of different numbers of labels."""
    trainer, recorder = make(tmp_path, train={"z_loss": z_loss, "loss_chunk": chunk}, optim={"clip_norm": None})
    tokens, labels = rows_of(0)
    nll, _, grads = exact(trainer, tokens, labels, z_loss)
    out, decision, stop = trainer.train_step(step_batch(tokens, labels, sizes))
    assert (decision, stop) == ("ok", None)
    assert out.loss == pytest.approx(nll, rel=1e-6), "the cross-entropy alone, without the z-loss"
    assert out.n_valid == int((labels != IGNORE).sum()) == ROWS * LENGTH - 30
    assert recorder.grads[0].keys() == grads.keys()
    for name, grad in recorder.grads[0].items():
        torch.testing.assert_close(grad.double(), grads[name], rtol=2e-5, atol=1e-7, msg=name)
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads.values()))
    assert out.grad_norm == pytest.approx(norm, rel=1e-5)


def test_z_loss_is_part_of_what_is_trained_on(tmp_path: Path) -> None:
    trainer, _ = make(tmp_path)
    tokens, labels = rows_of(0)
    nll, total, _ = exact(trainer, tokens, labels, z_loss=0.05)
    out = LanguageModelLoss(0.05)(trainer.strategy.model, Microbatch(tokens, labels, SeqInfo.contiguous(*tokens.shape)))
    assert float(out.sum.detach()) / int(out.count) == pytest.approx(total, rel=1e-6)
    assert float(out.metrics["loss"]) / int(out.count) == pytest.approx(nll, rel=1e-6)
    assert total > nll * 1.01


def test_a_microbatch_without_labels_changes_nothing(tmp_path: Path) -> None:
    tokens, labels = rows_of(0)
    plain, _ = make(tmp_path / "a")
    padded, _ = make(tmp_path / "b")
    first, *_ = plain.train_step(step_batch(tokens, labels, [2, 2]))
    more = torch.cat([tokens, tokens[:2]]), torch.cat([labels, torch.full_like(labels[:2], IGNORE)])
    second, *_ = padded.train_step(step_batch(*more, [2, 2, 2]))
    assert (second.loss, second.n_valid) == (first.loss, first.n_valid)
    assert equal(weights(padded), weights(plain))


def test_clipping_scales_the_gradient_of_the_whole_step(tmp_path: Path) -> None:
    trainer, recorder = make(tmp_path, optim={"clip_norm": 0.01})
    out, *_ = trainer.train_step(step_batch(*rows_of(0), [1, 3]))
    clipped = math.sqrt(sum(float(grad.square().sum()) for grad in recorder.grads[0].values()))
    assert out.grad_norm > 0.1 and clipped == pytest.approx(0.01, rel=1e-3)


class WithAux(nn.Module):
    """An embedding and a head, with an auxiliary loss on what lies between them: the mean square of the activations."""

    WEIGHT = 0.3

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(VOCAB, 8)
        self.head = nn.Linear(8, VOCAB, bias=False)

    def blocks(self) -> list[Any]:
        return []

    def forward(self, tokens: Tensor, seq: SeqInfo) -> Any:
        x = self.embed(tokens)
        return SimpleNamespace(hidden=attach_aux(x, x.square().mean(), weight=self.WEIGHT, name="square"))

    def cross_entropy_sum(self, batch: Microbatch) -> LossOut:
        logits = self.head(self(batch.tokens, batch.seq).hidden).flatten(0, 1)
        total = nn.functional.cross_entropy(logits, batch.labels.flatten(), ignore_index=IGNORE, reduction="sum")
        return LossOut(total, (batch.labels != IGNORE).sum(), {"loss": total.detach()})


@pytest.mark.parametrize("sizes", [[4], [3, 1], [1, 1, 2]], ids=str)
def test_auxiliary_losses_weigh_as_in_the_whole_batch(tmp_path: Path, sizes: list[int]) -> None:
    model = WithAux()
    whole = copy.deepcopy(model).double()
    trainer, recorder = make(tmp_path, model=model, loss=lambda m, b: m.cross_entropy_sum(b), optim={"clip_norm": None})
    tokens, labels = rows_of(0)[0], rows_of(1)[0]
    x = whole.embed(tokens)
    aux = x.square().mean()
    (nn.functional.cross_entropy(whole.head(x).flatten(0, 1), labels.flatten()) + WithAux.WEIGHT * aux).backward()
    out, *_ = trainer.train_step(step_batch(tokens, labels, sizes))
    assert out.metrics == {"square": pytest.approx(float(aux.detach()), rel=1e-6)}, (
        "the value is reported without its weight"
    )
    for name, parameter in whole.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(recorder.grads[0][name].double(), parameter.grad, rtol=1e-5, atol=1e-8)


def test_learning_rate_follows_tokens_not_steps(tmp_path: Path) -> None:
    schedule = {"type": "linear", "warmup_tokens": 256, "min_ratio": 0.0}
    trainer, recorder = make(tmp_path, model=nn_model(), schedule=schedule, train={"steps": 6}, optim={"lr": 0.01})
    trainer.fit()
    factors = [lr_factor(trainer.run.schedule, 128 * step, 768, 128) for step in range(6)]
    assert trainer.strategy.factors == factors  # type: ignore[attr-defined]
    assert factors[0] == 0.5 and factors[1] == 1.0 and factors[5] < 0.5
    assert [out.lr for out in recorder.outs] == [0.01 * factor for factor in factors]
    assert [out.tokens for out in recorder.outs] == [128 * step for step in range(1, 7)]


def nn_model() -> nn.Module:
    """The small model of `run_config` as a ready module."""
    strategy = SingleStrategy(Place(0, 0, 1, torch.device("cpu")))
    run = run_config()
    strategy.setup(run.model.build("meta"), run, run.seed)
    return strategy.model


def poisoned(loader: Steps, *steps: int) -> Callable[[Any, Microbatch], LossOut]:
    """The usual loss, but not a number on the data of these steps."""
    usual = LanguageModelLoss()

    def loss(model: Any, batch: Microbatch) -> LossOut:
        out = usual(model, batch)
        if loader.current in steps:
            out.sum = out.sum * math.nan
            out.metrics = {"loss": out.metrics["loss"] * math.nan}
        return out

    return loss


def test_skip_leaves_everything_as_it_was_but_counts_the_step(tmp_path: Path) -> None:
    loader = Steps()
    trainer, recorder = make(tmp_path, loader=loader, loss=poisoned(loader, 2), train={"steps": 5})
    before: dict[str, Any] = {}
    batches = iter(loader)
    for step in range(5):
        if step == 2:
            before = copy.deepcopy({"w": weights(trainer), "o": trainer.strategy.state().optim})
        out, decision, _ = trainer.train_step(next(batches))
        assert (decision, out.skipped) == (("skip", True) if step == 2 else ("ok", False))
        if step == 2:
            assert equal(weights(trainer), before["w"])
            after = trainer.strategy.state().optim
            assert all(equal(after[name], before["o"][name]) for name in after)
            assert math.isnan(out.loss)
    assert (trainer.step, trainer.tokens) == (5, 640)
    assert trainer.anomaly.num_anomalies == 1
    assert not equal(weights(trainer), before["w"])
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(trainer).values())


def test_too_many_skips_stop_the_run(tmp_path: Path) -> None:
    loader = Steps()
    trainer, recorder = make(
        tmp_path, loader=loader, loss=poisoned(loader, 1, 2, 3), train={"anomaly": {"max_skips": 2}}
    )
    with pytest.raises(UserError, match=r"step 4: loss is nan, after 2 skipped steps in a row"):
        trainer.fit()
    assert len(recorder.errors) == 1


def test_stop_ends_the_run_and_keeps_what_was_saved(tmp_path: Path) -> None:
    loader = Steps()
    trainer, recorder = make(
        tmp_path,
        loader=loader,
        loss=poisoned(loader, 3),
        train={"anomaly": {"policy": "stop"}},
        checkpoint={"every_steps": 3},
    )
    with pytest.raises(UserError, match="step 4: loss is nan"):
        trainer.fit()
    assert [info.step for info in trainer.parts.checkpointer.list()] == [3], "the save in flight was waited for"
    assert recorder.outs[-1].skipped


@pytest.mark.parametrize(("bad", "lost"), [((4, 7), (4, 7)), ((5,), (4, 5)), ((3, 4), (2, 3, 4))], ids=str)
def test_rollback_passes_over_the_offending_data(tmp_path: Path, bad: tuple[int, ...], lost: tuple[int, ...]) -> None:
    """The same as a run that saw neither these data nor those since the last save: weights and counters, to the bit."""
    sections = {"train": {"steps": 8, "anomaly": {"policy": "rollback"}}, "checkpoint": {"every_steps": 2}}
    loader = Steps()
    trainer, recorder = make(tmp_path / "a", loader=loader, loss=poisoned(loader, *bad), **sections)
    result = trainer.fit()
    reference, recorded = make(tmp_path / "b", loader=Steps(without=lost), **sections)
    expected = reference.fit()
    assert (result.step, result.tokens, result.reason) == (expected.step, expected.tokens, "done")
    assert equal(weights(trainer), weights(reference))
    assert {out.step: out.loss for out in recorder.outs} == dict(enumerate(recorded.losses, start=1))
    assert trainer.anomaly.num_anomalies == len(bad) and loader.next == 8 + len(lost)


def test_rollback_without_a_checkpoint_says_what_to_set(tmp_path: Path) -> None:
    loader = Steps()
    trainer, _ = make(tmp_path, loader=loader, loss=poisoned(loader, 0), train={"anomaly": {"policy": "rollback"}})
    with pytest.raises(UserError, match="no checkpoint to roll back to: set checkpoint.every_steps"):
        trainer.fit()


def test_request_stop_ends_in_order(tmp_path: Path) -> None:
    def during(trainer: Trainer, out: StepOut) -> None:
        if out.step == 2:
            trainer.request_stop("good enough")

    trainer, recorder = make(tmp_path, recorder=Recorder(during))
    result = trainer.fit()
    assert (result.step, result.reason) == (3, "stop: good enough"), "asked in step 2, agreed on in step 3"
    assert recorder.saved == [(3, "final")]


def test_a_signal_saves_and_the_next_run_goes_on(tmp_path: Path) -> None:
    asked = {"signal": False}

    def during(trainer: Trainer, out: StepOut) -> None:
        asked["signal"] = out.step == 3

    trainer, recorder = make(
        tmp_path, recorder=Recorder(during), signal_requested=lambda: asked["signal"], train={"steps": 6}
    )
    result = trainer.fit()
    assert (result.reason, result.step, recorder.saved) == ("signal", 4, [(4, "preempt")])
    again, second = make(tmp_path, train={"steps": 6})
    assert again.fit().reason == "done"
    straight, all_steps = make(tmp_path / "straight", train={"steps": 6})
    straight.fit()
    assert recorder.losses + second.losses == all_steps.losses
    assert equal(weights(again), weights(straight))


def held_out(n: int) -> Callable[[], Iterator[StepBatch]]:
    """A validation of n steps of uneven microbatches; the last one has a row without any label."""

    def once() -> Iterator[StepBatch]:
        for step in range(n):
            tokens, labels = rows_of(1000 + step)
            if step == n - 1:
                labels = labels.clone()
                labels[2:] = IGNORE
            yield step_batch(tokens, labels, [3, 1])

    return once


def test_evaluation_is_exact(tmp_path: Path) -> None:
    token_bytes = torch.arange(VOCAB) % 5
    trainer, recorder = make(
        tmp_path, validation=held_out(3), token_bytes=token_bytes, train={"z_loss": 0.1}, model_section={"dropout": 0.5}
    )
    result = trainer.evaluate()
    assert result is not None and trainer.strategy.model.training
    trainer.strategy.model.eval()
    sums, count, n_bytes = 0.0, 0, 0
    for batch in held_out(3)():
        for part in batch.microbatches:
            n = int((part.labels != IGNORE).sum())
            if n:
                sums += exact(trainer, part.tokens, part.labels)[0] * n
            count += n
            n_bytes += int(token_bytes[part.labels[part.labels != IGNORE]].sum())
    assert result["num_tokens"] == count
    assert result["loss"] == pytest.approx(sums / count, rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(sums / count), rel=1e-5)
    assert result["bits_per_token"] == pytest.approx(sums / count / math.log(2), rel=1e-6)
    assert result["bits_per_byte"] == pytest.approx(sums / math.log(2) / n_bytes, rel=1e-6)


def test_evaluation_does_not_disturb_training(tmp_path: Path) -> None:
    plain, without = make(tmp_path / "a", train={"steps": 4}, model_section={"dropout": 0.2})
    torch.manual_seed(5)
    plain.fit()
    evaluated, recorder = make(
        tmp_path / "b",
        validation=held_out(2),
        eval={"every_steps": 1, "batches": 1},
        train={"steps": 4},
        model_section={"dropout": 0.2},
    )
    torch.manual_seed(5)
    evaluated.fit()
    assert recorder.losses == without.losses and equal(weights(plain), weights(evaluated))
    assert [result["step"] for result in recorder.evals] == [1, 2, 3, 4], "the last step is evaluated once"
    assert all(result["num_tokens"] == ROWS * LENGTH - 30 for result in recorder.evals), "eval.batches holds"


@pytest.mark.parametrize("at_end", [False, True])
def test_a_signal_during_evaluation_ends_it(tmp_path: Path, at_end: bool) -> None:
    """The evaluation is given up at once, the step before it is saved, and the next run evaluates."""
    seen = {"batches": 0}

    def endless() -> Iterator[StepBatch]:
        for batch in held_out(1000)():
            seen["batches"] += 1
            yield batch

    every = {} if at_end else {"every_steps": 2}
    trainer, recorder = make(
        tmp_path, validation=endless, eval=every, train={"steps": 4}, signal_requested=lambda: seen["batches"] >= 3
    )
    result = trainer.fit()
    step = 4 if at_end else 2
    assert (result.reason, result.step, seen["batches"]) == ("signal", step, 3)
    assert recorder.saved == [(step, "preempt")] and not recorder.evals and result.last_eval is None
    again, second = make(tmp_path, validation=held_out(1), train={"steps": 4})
    again.fit()
    assert [result["step"] for result in second.evals] == [4]


def test_a_finished_run_does_nothing_more(tmp_path: Path) -> None:
    sections = {"train": {"steps": 4}, "checkpoint": {"every_steps": 2}}
    trainer, recorder = make(tmp_path, validation=held_out(1), **sections)
    first = trainer.fit()
    assert recorder.saved == [(2, "regular"), (4, "final")], "the last step is saved once, after its evaluation"
    again, second = make(tmp_path, validation=held_out(1), **sections)
    result = again.fit()
    assert (result.step, result.last_eval) == (first.step, first.last_eval)
    assert not second.outs and not second.evals and not second.saved
    assert equal(weights(again), weights(trainer))


def test_an_error_outside_of_the_loop_reaches_the_callbacks(tmp_path: Path) -> None:
    def broken() -> Iterator[StepBatch]:
        raise OSError("the disk is gone")

    trainer, recorder = make(tmp_path, validation=broken, train={"steps": 2})
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.fit()
    assert [str(error) for error in recorder.errors] == ["the disk is gone"]
