"""The benchmark runs on a CPU and its verdict can fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm.core.errors import UserError
from llm.models.config import ModelConfig
from llm.train import bench
from llm.train.bench import BenchConfig, bench_train, build_peer, make_run, to_line

CONFIG: dict[str, Any] = {"shapes": "tiny", "seq_len": 32, "batch": 2, "steps": 4, "warmup": 1, "device": "cpu"}


def test_tiny_is_measured_and_correct() -> None:
    (record,) = bench_train(BenchConfig(**CONFIG))
    assert "error" not in record, record.get("error")
    assert record["correct"] is True
    assert record["max_relative_difference"] < 1e-4
    assert record["tokens_per_second"] > 0
    assert record["steps"] == 3, "four timed steps, one of which saves"
    assert (record["shape"], record["implementation"], record["seq_len"], record["batch"]) == (
        "tiny",
        "manyformer",
        32,
        2,
    )
    assert {"versions", "device_name", "git_revision", "mfu", "hfu", "peak_memory_gib", "parameters"} <= set(record)
    json.loads(to_line(record), parse_constant=pytest.fail)


def test_a_wrong_loss_is_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    real = bench.train

    def wrong(run: Any, timer: Any, **options: Any) -> None:
        real(run, timer, **options)
        if not run.name.endswith("-reference"):
            timer.losses[1] *= 1.001

    monkeypatch.setattr(bench, "train", wrong)
    (record,) = bench_train(BenchConfig(**CONFIG))
    assert record["correct"] is False


def test_a_shape_that_fails_leaves_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(bench, "train", fail)
    (record,) = bench_train(BenchConfig(**CONFIG))
    assert record["correct"] is False
    assert record["error"] == "RuntimeError: CUDA out of memory"
    assert record["seq_len"] == 32


def test_unknown_shapes_are_named() -> None:
    with pytest.raises(UserError, match="unknown shape 'llama-125m'; did you mean 'llama-124m'"):
        list(bench_train(BenchConfig(shapes=["llama-125m"])))


@pytest.mark.parametrize(
    "shape, count", [("llama-124m", 123_587_328), ("llama-360m", 359_867_392), ("llama-1.3b", 1_317_134_336)]
)
def test_shapes_are_what_their_names_say(shape: str, count: int) -> None:
    section, seq_len, _ = bench.SHAPES[shape]
    model = ModelConfig.model_validate(section | {"max_seq_len": seq_len})
    assert model.vocab_size == 50304
    assert model.head.tied
    assert model.cost(seq_len).total.params == pytest.approx(count, rel=0.05)


def test_the_run_uses_its_whole_vocabulary(tmp_path: Path) -> None:
    import numpy as np

    from llm.data.store import TokenStore

    run = make_run(BenchConfig(**CONFIG), "tiny", tmp_path, cuda=False)
    tokens = TokenStore(run.data.path or "").tokens
    assert len(tokens) >= 5 * 64 + 1
    assert int(np.max(tokens)) < 512
    assert run.data.isolate is False


@pytest.mark.slow
def test_the_peer_has_the_same_parameters_and_is_measured() -> None:
    pytest.importorskip("transformers")
    own, peer = bench_train(BenchConfig(**CONFIG, peer="transformers", verify=False))
    assert peer["implementation"] == "transformers"
    assert "error" not in peer, peer.get("error")
    assert peer["parameters"] == own["parameters"]


def test_the_peer_refuses_what_it_cannot_be() -> None:
    pytest.importorskip("transformers")
    model = ModelConfig.model_validate(
        {"vocab_size": 8, "d_model": 8, "layers": [{"pattern": [{"mixer": {"type": "attention", "n_heads": 2}}]}]}
    )
    with pytest.raises(UserError, match="equal layers"):
        build_peer(model)
