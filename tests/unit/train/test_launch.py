"""launch/estimate.py and launch/bench.py as a person calls them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch import bench as bench_script
from launch import estimate as estimate_script
from llm.core.errors import UserError

CONFIG = """
name: small
model:
  vocab_size: 64
  d_model: 16
  max_seq_len: 32
  layers: [{pattern: [{mixer: {type: attention, n_heads: 2}, channel: {type: swiglu}}], repeat: 2}]
data: {path: nowhere, seq_len: 32}
train: {steps: 10, batch_tokens: 128, micro_batch_size: 4, precision: fp32, device: cpu}
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return str(path)


def test_estimate_as_json(config: str, capsys: Any) -> None:
    assert (
        estimate_script.main([config, "--json", "world_size=4", "parallel.strategy=fsdp2", "train.batch_tokens=512"])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["world_size"] == 4
    assert set(found["memory_per_rank"]) == {"none", "selective", "full"}
    assert found["memory_per_rank"]["none"]["weights"] == found["parameters"]


def test_estimate_as_tables(config: str, capsys: Any) -> None:
    assert estimate_script.main([config, "train.activation_checkpointing=full"]) == 0
    out = capsys.readouterr().out
    for text in ("parameters", "decode state", "weights", "optimizer", "total", "full (chosen)"):
        assert text in out


@pytest.mark.parametrize("argument", ["world_size=0", "world_size=two"])
def test_estimate_refuses_world_sizes(config: str, argument: str) -> None:
    with pytest.raises(UserError, match="world_size must be a whole number"):
        estimate_script.main([config, argument])


def test_estimate_without_vocabulary_or_data_says_what_to_set(config: str) -> None:
    with pytest.raises(UserError, match="set model.vocab_size=N"):
        estimate_script.main([config, "model.vocab_size=null"])


@pytest.mark.parametrize(
    "arguments, named", [([], "nothing"), (["decode"], "'decode'"), (["train", "--peer"], "--peer needs a name")]
)
def test_bench_names_what_is_wrong(arguments: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        bench_script.main(arguments)


def test_bench_prints_one_line_and_fails_when_wrong(monkeypatch: Any, capsys: Any) -> None:
    import llm.train.bench as bench

    monkeypatch.setattr(
        bench, "bench_train", lambda config: iter([{"shape": "tiny", "correct": config.peer == "none", "x": 1 / 3}])
    )
    assert bench_script.main(["train", "shapes=tiny"]) == 0
    assert bench_script.main(["train", "shapes=tiny", "--peer", "transformers"]) == 1
    first, _ = capsys.readouterr().out.splitlines()
    assert json.loads(first) == {"shape": "tiny", "correct": True, "x": 0.333333}
