"""Console, throughput, signals, garbage collection, sinks, profiler, samples and what the config asks for."""

from __future__ import annotations

import gc
import importlib.util
import io
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from llm.core.errors import UserError
from llm.train.callbacks import check_logging, default_callbacks
from llm.train.callbacks.base import Callback
from llm.train.callbacks.collector import GarbageCollection
from llm.train.callbacks.console import Console, duration, human
from llm.train.callbacks.diagnostics import MemorySnapshot, Profiler
from llm.train.callbacks.environment import environment, git_revision
from llm.train.callbacks.jsonl import JsonlWriter, read_metrics
from llm.train.callbacks.samples import Samples
from llm.train.callbacks.signals import Signals
from llm.train.callbacks.sinks import TensorBoard, WeightsAndBiases
from llm.train.callbacks.throughput import (
    Memory,
    Throughput,
    hardware_flops_per_token,
    training_flops_per_token,
)
from tests.unit.train.helpers import do_step, run_config, stand_in


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (950, "950"), (1250, "1.25k"), (999.9, "1k"), (12_340_000, "12.3M"), (4.2e9, "4.2B"), (1e12, "1T")],
)
def test_human(value: float, text: str) -> None:
    assert human(value) == text


@pytest.mark.parametrize(
    "seconds, text", [(0, "0:00"), (59.6, "1:00"), (245, "4:05"), (3723, "1:02:03"), (float("inf"), "-")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_throughput_is_tokens_over_seconds_and_mfu_follows(tmp_path: Path) -> None:
    trainer, throughput = stand_in(tmp_path, step=3), Throughput()
    throughput.on_start(trainer)
    throughput.peak = 1e9
    out = do_step(trainer, [throughput], 4)
    assert out.metrics["tokens_per_second"] == 128 / 0.5
    flops = 3 * trainer.model_cost.total.flops_per_token
    assert out.metrics["mfu"] == out.metrics["hfu"] == 256 * flops / 1e9
    # 10 x slower, as when it compiles
    for step in range(5, 9):
        do_step(trainer, [throughput], step, seconds=5.0 if step == 5 else 0.5)
    assert throughput.mean_tokens_per_second == pytest.approx(256)
    assert "mfu" not in do_step(trainer, [throughput], 8).metrics, "no tokens, no speed"


def test_mfu_is_zero_on_hardware_without_a_known_peak(tmp_path: Path) -> None:
    trainer, throughput = stand_in(tmp_path), Throughput()
    throughput.on_start(trainer)
    throughput.peak = float("inf")
    assert do_step(trainer, [throughput], 1).metrics["mfu"] == 0.0


def test_hardware_flops_count_what_is_computed_again() -> None:
    cost = run_config().model.cost(32)
    model = training_flops_per_token(cost)
    assert model == 3 * (cost.blocks.flops_per_token + cost.head.flops_per_token + cost.embed.flops_per_token)
    assert hardware_flops_per_token(cost, "none") == hardware_flops_per_token(cost, "selective") == model
    assert hardware_flops_per_token(cost, "full") == model + cost.blocks.flops_per_token


def test_console_shows_plain_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    stream = io.StringIO()
    throughput = Throughput()
    console = Console(throughput, stream=stream)
    trainer = stand_in(tmp_path)
    for callback in (throughput, console):
        callback.on_start(trainer)
    console.on_eval(trainer, {"loss": 1.5, "perplexity": 4.48, "bits_per_byte": 0.75, "num_tokens": 1000})
    for step in range(1, 5):
        do_step(trainer, [throughput, console], step)
    console.on_end(trainer)
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("small: 10 steps, 1.28k tokens")
    assert "0.7500 bits per byte" in lines[1]
    assert [line.split()[1] for line in lines[2:]] == ["1/10", "2/10", "4/10"], "the first one and every log_every"
    assert lines[-1] == "step  4/10  loss 0.8000  bpb 0.7500  lr 3.33e-04  grad 0.40  256 tok/s  left 0:03"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_console_draws_a_bar_on_a_terminal(tmp_path: Path) -> None:
    stream = Terminal()
    throughput = Throughput()
    console = Console(throughput, stream=stream)
    trainer = stand_in(tmp_path)
    console.on_start(trainer)
    do_step(trainer, [throughput, console], 7)
    assert console.bar is not None
    assert console.bar.tasks[0].completed == 7
    console.on_error(trainer, RuntimeError())
    assert console.bar is None
    assert "loss 0.5000" in stream.getvalue()


def test_console_says_why_a_step_was_left_out(tmp_path: Path) -> None:
    stream = io.StringIO()
    trainer, console = stand_in(tmp_path), Console(Throughput(), stream=stream)
    do_step(trainer, [console], 1, judged=(float("nan"), 1.0), skipped=True)
    assert stream.getvalue() == "step 1 left out: loss is nan\n"


def test_console_is_silent_on_other_ranks(tmp_path: Path) -> None:
    stream = io.StringIO()
    trainer, console = stand_in(tmp_path, rank=1), Console(Throughput(), stream=stream)
    console.on_start(trainer)
    do_step(trainer, [console], 1)
    assert stream.getvalue() == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_asks_once_and_handlers_come_back(number: signal.Signals, tmp_path: Path, capfd: Any) -> None:
    before = signal.getsignal(number)
    signals = Signals()
    signals.on_start(stand_in(tmp_path))
    try:
        assert not signals()
        os.kill(os.getpid(), number)
        assert signals()
        assert signals.requested == number.name
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):
                pass
    finally:
        signals.restore()
    assert signal.getsignal(number) is before


def test_garbage_collection_is_off_in_between_and_on_afterwards(tmp_path: Path) -> None:
    assert gc.isenabled()
    trainer, collection = stand_in(tmp_path), GarbageCollection(every=2)
    collection.on_start(trainer)
    assert not gc.isenabled()
    assert gc.get_freeze_count() > 0
    collection.on_end(trainer)
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_memory_is_the_peak_in_gib(tmp_path: Path) -> None:
    trainer, memory = stand_in(tmp_path), Memory()
    memory.on_start(trainer)
    assert 0.05 < do_step(trainer, [memory], 1).metrics["memory_gib"] < 64


def test_tensorboard_writes_scalars_every_log_every_steps(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer, board = stand_in(tmp_path), TensorBoard()
    board.on_start(trainer)
    for step in range(1, 5):
        do_step(trainer, [board], step, metrics={"mfu": float("nan")})
    board.on_eval(trainer, {"loss": 1.5, "perplexity": 4.48, "num_tokens": 10})
    board.on_end(trainer)
    events = EventAccumulator(str(tmp_path / "small" / "tensorboard")).Reload()
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("train/loss")] == [(2, 4 / 3), (4, 0.8)]
    assert "eval/loss" in events.Tags()["scalars"]
    assert "train/mfu" not in events.Tags()["scalars"]


@pytest.mark.parametrize("package, callback", [("tensorboard", TensorBoard), ("wandb", WeightsAndBiases)])
def test_a_missing_package_is_a_clear_error(
    package: str, callback: type[Callback], tmp_path: Path, monkeypatch: Any
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else real(name, *a))
    with pytest.raises(UserError, match=f"log.{package}=true needs the package {package}.*pip install {package}"):
        callback().on_start(stand_in(tmp_path))
    with pytest.raises(UserError, match=package):
        check_logging(run_config(log={package: True}), "cpu")


def test_profiler_traces_the_asked_steps(tmp_path: Path) -> None:
    import torch

    trainer, profiler = stand_in(tmp_path), Profiler(2, 3)
    profiler.on_start(trainer)
    for step in range(1, 5):
        assert (profiler.profile is not None) == (step in (2, 3))
        torch.ones(4) @ torch.ones(4)
        do_step(trainer, [profiler], step)
    folder = tmp_path / "small" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["steps-2-3.json.gz", "steps-2-3.txt"]
    assert "aten::dot" in (folder / "steps-2-3.txt").read_text()


def test_samples_are_recorded_at_their_steps(tmp_path: Path, monkeypatch: Any) -> None:
    import torch

    import llm.generate.text as text

    def generate_text(model: Any, tokenizer: Any, prompts: list[str], sampling: Any) -> list[str]:
        torch.rand(3)
        return [f"{prompts[0]}{sampling.max_new_tokens}"]

    monkeypatch.setattr(text, "generate_text", generate_text)
    trainer, writer = stand_in(tmp_path), JsonlWriter()
    samples = Samples(4, "ab", 7, writer)
    writer.on_start(trainer)
    rng = torch.get_rng_state()
    for step in range(1, 11):
        do_step(trainer, [writer, samples], step)
    assert torch.equal(torch.get_rng_state(), rng), "sampling must not change what is learnt"
    writer.close()
    records = [r for r in read_metrics(tmp_path / "small" / "metrics.jsonl") if r["kind"] == "sample"]
    assert [(r["step"], r["prompt"], r["text"]) for r in records] == [
        (4, "ab", "ab7"),
        (8, "ab", "ab7"),
        (10, "ab", "ab7"),
    ]


@pytest.mark.parametrize(
    "log, tokenizer, named",
    [
        ({"memory_snapshot": True}, True, "log.memory_snapshot=true needs CUDA"),
        ({"profile_steps": [5, 3]}, True, "log.profile_steps"),
        ({"profile_steps": [0, 3]}, True, "log.profile_steps"),
        ({"sample_every_steps": 5}, False, "log.sample_every_steps needs a tokenizer"),
    ],
)
def test_what_cannot_be_honoured_is_refused(log: dict[str, Any], tokenizer: bool, named: str) -> None:
    with pytest.raises(UserError, match=named):
        check_logging(run_config(log=log), "cpu", has_tokenizer=tokenizer)


def test_memory_snapshot_is_refused_on_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs CUDA"):
        MemorySnapshot().on_start(stand_in(tmp_path))


def test_the_config_picks_the_callbacks() -> None:
    callbacks, signals = default_callbacks(run_config())
    assert signals in callbacks
    names = {type(callback).__name__ for callback in callbacks}
    assert names == {"Signals", "GarbageCollection", "Throughput", "Memory", "JsonlWriter", "Console", "Report"}
    everything = {
        "tensorboard": True,
        "wandb": True,
        "profile_steps": [1, 2],
        "memory_snapshot": True,
        "sample_every_steps": 2,
    }
    more, _ = default_callbacks(run_config(log={**everything, "report": False}))
    assert {type(callback).__name__ for callback in more} == names - {"Report"} | {
        "TensorBoard", "WeightsAndBiases", "Profiler", "MemorySnapshot", "Samples",
    }  # fmt: skip
    orders = {type(callback).__name__: callback.order for callback in [*callbacks, *more]}
    assert orders["Throughput"] < orders["JsonlWriter"] < orders["Console"] < orders["Report"] < Callback.order


def test_environment_names_its_conditions() -> None:
    import torch

    found = environment(torch.device("cpu"), 2)
    assert found["versions"]["torch"] == torch.__version__
    assert found["hardware"]["world_size"] == 2
    assert found["hardware"]["device_name"]


def test_git_revision_outside_a_checkout_is_empty(tmp_path: Path) -> None:
    assert git_revision(tmp_path) == ""


def test_a_sample_prompt_that_cannot_be_encoded_is_refused_before_the_first_step(tmp_path: Path) -> None:
    from llm.data.tokenizer.simple import CharsTokenizer

    trainer = stand_in(tmp_path)
    with pytest.raises(UserError, match="needs a tokenizer"):
        Samples(4, "ab", 7, JsonlWriter()).on_start(trainer)
    trainer.tokenizer = CharsTokenizer("ab")
    Samples(4, "ab", 7, JsonlWriter()).on_start(trainer)
    with pytest.raises(UserError, match="log.sample_prompt 'abc' cannot be encoded"):
        Samples(4, "abc", 7, JsonlWriter()).on_start(trainer)
