"""The bake-off: widths that match, runs that are not repeated, a candidate that fails, the table."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from evals.compare import runs as compare_runs
from evals.compare.config import CompareConfig, MeasureConfig
from evals.compare.measure import measure
from evals.compare.recall import recall_all, recall_model
from evals.compare.report import plots, summarise, table
from evals.compare.solve import solve
from llm.config.load import dump_config
from llm.config.yaml_io import dump_yaml
from llm.core.errors import UserError
from tests.unit.generate.runs import prepare_data

BLOCK = {"mixer": {"type": "attention", "n_heads": 2}, "channel": {"type": "swiglu", "d_hidden": 64}}
CANDIDATES: dict[str, Any] = {
    "attention": {},
    "window": {"block": {"mixer": {"window": 8}}},
    "mlp": {"block": {"channel": {"type": "mlp"}}},
    "retention": {"block": {"mixer": {"type": "retention", "n_heads": 2}}},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [f"def function_{i}(x):\n    return x + {i}\n" * 6 for i in range(20)]
    return prepare_data(tmp_path_factory.mktemp("data"), texts)


def comparison(folder: Path, data: Path, **changes: Any) -> CompareConfig:
    base = folder / "base.yaml"
    tree = {
        "name": "base",
        "model": {"d_model": 32, "max_seq_len": 32, "layers": [{"pattern": [BLOCK], "repeat": 2}]},
        "data": {"path": str(data), "seq_len": 16},
        "train": {"tokens": 256, "batch_tokens": 64, "micro_batch_size": 2, "precision": "fp32"},
        "eval": {"batches": 2},
    }
    base.write_text(dump_yaml(tree))
    measured = {"lengths": [8], "contexts": [8], "batch_tokens": 16, "seconds": 0.01}
    given: dict[str, Any] = {"name": "c", "base": str(base), "candidates": CANDIDATES, "runs_dir": str(folder / "runs")}
    return CompareConfig.model_validate(given | {"measure": measured, "match": {"step": 4}} | changes)


@pytest.mark.parametrize("what", ["params", "active_params", "flops"])
def test_widths_match(tmp_path: Path, data: Path, what: str) -> None:
    for found in solve(comparison(tmp_path, data, match={"what": what, "step": 4}), 257):
        assert abs(found.mismatch) < 0.03, (found.name, found.mismatch)
        built = found.model.build("meta")
        if what == "params":
            blocks = sum(p.numel() for _, block in built.blocks() for p in block.parameters())
            assert blocks == found.reached
    target = 100_000
    for found in solve(comparison(tmp_path, data, match={"what": what, "step": 4, "target": target}), 257):
        assert abs(found.mismatch) < 0.05, (found.name, found.mismatch)


def test_nothing_is_matched_on_request(tmp_path: Path, data: Path) -> None:
    found = solve(comparison(tmp_path, data, match={"what": "none"}), 257)
    assert [one.model.d_model for one in found] == [32] * 4 and all(one.mismatch == 0.0 for one in found)


def test_a_wrong_candidate_is_named(tmp_path: Path, data: Path) -> None:
    wrong = {"attention": {}, "odd": {"block": {"mixer": {"n_headz": 3}}}}
    with pytest.raises(UserError, match="candidate odd: .*n_headz"):
        solve(comparison(tmp_path, data, candidates=wrong), 257)


def test_candidates_see_the_same_data(tmp_path: Path, data: Path) -> None:
    config = comparison(tmp_path, data)
    configs = [compare_runs.run_config(config, found, 1) for found in solve(config, 257)]
    assert len({run.model.to_dict().__repr__() for run in configs}) == 4
    assert len({repr((run.data, run.train, run.seed, run.schedule)) for run in configs}) == 1


@pytest.mark.slow
def test_whole_comparison(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = {name: CANDIDATES[name] for name in ("attention", "window")}
    broken = {"mlp": {"optim": {"lr": 1e30}, "block": {"channel": {"type": "mlp"}}}}
    config = comparison(tmp_path, data, candidates=two | broken, run={"train": {"anomaly": {"policy": "stop"}}})
    candidates = solve(config, 257)
    lines: list[str] = []
    runs = compare_runs.train_all(config, candidates, lines.append)
    assert {(run.candidate, run.seed) for run in runs if run.error is None} == {
        (name, seed) for name in two for seed in (0, 1)
    }
    assert all(run.error for run in runs if run.candidate == "mlp"), "a diverging candidate must be reported"
    again: list[str] = []
    compare_runs.train_all(config, [found for found in candidates if found.name in two], again.append)
    assert again == [], "finished runs are not trained again"
    measured = {found.name: measure(found.model, config.measure) for found in candidates}
    result = summarise(config, candidates, runs, measured)
    text = table(result)
    assert "`window`" in text and "±" in text and "failed: " in text and "256 tokens in 4 steps" in text
    assert len(plots(result, tmp_path)) == 6


def test_measure_grows_with_attention_alone(tmp_path: Path, data: Path) -> None:
    settings = MeasureConfig(lengths=[8], contexts=[8, 64], batch_tokens=16, seconds=0.01)
    found = {one.name: measure(one.model, settings) for one in solve(comparison(tmp_path, data), 257)}
    assert found["attention"]["state_bytes"][64] == 8 * found["attention"]["state_bytes"][8]
    assert found["retention"]["state_bytes"][64] == found["retention"]["state_bytes"][8]
    assert all(value > 0 for one in found.values() for value in one["decode_seconds"].values())


def test_recall_is_of_one_block_behind_the_same_layer(tmp_path: Path, data: Path) -> None:
    looped = {"model": {"wrappers": [{"type": "loop", "n_loop": 2, "n_loops": 2}]}}
    tiny = {"d_model": 16, "length": 12, "n_pairs": [2, 4], "vocab_size": 9, "steps": 2, "eval_examples": 8}
    config = comparison(tmp_path, data, recall=tiny, candidates=CANDIDATES | {"loop": looped})
    assert config.recall is not None
    candidates = solve(config, 257)
    for found in candidates:
        model = recall_model(found.model, config.recall)
        if found.name == "loop":
            assert model is None
            continue
        assert model is not None
        first, second = model.blocks()
        assert getattr(first.mixer, "window", None) == 2 and first.channel is None
        assert second.mixer.type == found.model.blocks()[0].mixer.type
    lines: list[str] = []
    assert recall_all(config, candidates, lines.append, train=False) == {} and not lines
    results = recall_all(config, candidates[1:2], lines.append, train=True)
    assert results["window"]["steps"] == [2] and set(results["window"]["by_pairs"]) == {"2", "4"}
    assert recall_all(config, candidates, lines.append, train=False) == results and lines == ["recall of window"]
    text = table(summarise(config, candidates, [], {}, results))
    row = next(line for line in text.splitlines() if line.startswith("| `window`"))
    assert row.endswith(f"| {results['window']['by_pairs']['2']:.3f} | {results['window']['by_pairs']['4']:.3f} |")


def test_differences_are_those_of_the_same_seed(tmp_path: Path, data: Path) -> None:
    config = comparison(tmp_path, data, candidates={"attention": {}, "window": CANDIDATES["window"]})
    candidates = solve(config, 257)
    values = {("attention", 0): 2.0, ("attention", 1): 3.0, ("window", 0): 2.5, ("window", 1): 3.7}
    runs = []
    for (name, seed), value in values.items():
        folder = tmp_path / f"{name}-{seed}"
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(
            json.dumps({"kind": "eval", "step": 4, "bits_per_byte": value, "loss": value}) + "\n"
        )
        runs.append(compare_runs.Finished(name, seed, folder, None))
    result = summarise(config, candidates, runs, {})
    assert result["rows"][1]["differences"] == pytest.approx([0.5, 0.7])
    line = next(line for line in table(result).splitlines() if line.startswith("| `window`"))
    assert "| 3.1000 ± 0.6000 | +0.6000 ± 0.1000 |" in line


def test_a_folder_of_another_run_is_refused(tmp_path: Path, data: Path) -> None:
    config = comparison(tmp_path, data)
    run = compare_runs.run_config(config, solve(config, 257)[0], 0)
    compare_runs.refuse_foreign(run)
    folder = Path(run.runs_dir) / run.name
    folder.mkdir(parents=True)
    dump_config(run.replace(runs_dir="elsewhere"), folder / "config.yaml")
    compare_runs.refuse_foreign(run)
    dump_config(run.replace(seed=5), folder / "config.yaml")
    with pytest.raises(UserError, match="attention-s0 holds a run with another config .section seed differs"):
        compare_runs.refuse_foreign(run)


def test_two_comparisons_do_not_share_a_folder(tmp_path: Path) -> None:
    with compare_runs.locked(tmp_path):
        with pytest.raises(UserError, match="another comparison is at work"), compare_runs.locked(tmp_path):
            pass
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    with compare_runs.locked(tmp_path):
        pass
