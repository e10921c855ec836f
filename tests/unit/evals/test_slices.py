"""Slices of a nested run through the commands: evaluate, generate, export and evals.consistency agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evals.consistency import consistency, main, windows
from evals.perplexity import Document
from llm.generate import load_model
from llm.models.nesting import nested_channels, slice_suffix
from tests.unit.generate.runs import MODEL, prepare_data, write_run

Cli = Callable[..., Any]
NESTED = {**MODEL, "wrappers": [{"type": "nested", "granularities": ["1/4", "1/2", 1]}]}
"""SwiGLU of 96 hidden units in two layers, nested by the wrapper."""


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    data = prepare_data(folder / "data", [f"document {i}: " + "hello world\n" * (i % 7 + 1) for i in range(24)])
    return write_run(folder / "nested", model=NESTED, data=str(data))


@pytest.mark.parametrize(
    ("key", "widths"), [("slice=1/4", [24, 24]), ("slice=[1/4,1]", [24, 96]), ("widths=[50,31]", [50, 31])]
)
def test_a_slice_evaluates_as_the_model_cut_out(
    cli: Cli, run_folder: Path, tmp_path: Path, key: str, widths: list[int]
) -> None:
    done = cli("evaluate", run_folder, key, "precision=fp32")
    assert done.code == 0, done.err
    ours = json.loads(done.out)
    assert ours["widths"] == widths
    assert not (run_folder / "evaluate.json").exists(), "a slice's result is not the run's"
    assert (run_folder / f"evaluate{slice_suffix(widths)}.json").is_file()
    done = cli("export", run_folder, tmp_path / "cut", key, "format=run")
    assert done.code == 0, done.err
    cut = load_model(tmp_path / "cut").model
    assert not nested_channels(cut) and not cut.config.wrappers
    assert ours["params"] == json.loads(done.out)["params"] == sum(p.numel() for p in cut.parameters())
    theirs = json.loads(cli("evaluate", tmp_path / "cut", "precision=fp32").out)
    assert theirs["loss"] == ours["loss"] and theirs["params"] == ours["params"]
    texts = [
        cli("generate", where, "--prompt", "ab", "seed=4", "max_new_tokens=12", "ignore_eos=true", *more).out
        for where, more in ((run_folder, [key]), (tmp_path / "cut", []), (run_folder, []))
    ]
    assert texts[0] == texts[1] != texts[2]


def test_the_whole_run_and_a_slice_become_hugging_face_models(cli: Cli, run_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    for key, hidden in (([], 96), (["slice=1/2"], 48)):
        done = cli("export", run_folder, tmp_path / f"hf-{hidden}", *key)
        assert done.code == 0, done.err
        hf = json.loads((tmp_path / f"hf-{hidden}" / "config.json").read_text())
        assert hf["intermediate_size"] == hidden
        text = [
            cli("generate", where, "--prompt", "ab", "temperature=0", "max_new_tokens=12", "ignore_eos=true", *more).out
            for where, more in ((run_folder, key), (tmp_path / f"hf-{hidden}", []))
        ]
        assert text[0] == text[1]
    assert cli("export", run_folder, tmp_path / "hf-coded", "slice=[1/4,1]").code == 0
    assert "auto_map" in json.loads((tmp_path / "hf-coded" / "config.json").read_text())
    done = cli("export", run_folder, tmp_path / "hf-mixed", "slice=[1/4,1]", "remote_code=never")
    assert done.code == 2 and "cannot export: model.blocks.1.channel.d_hidden is 96" in done.err


def test_consistency(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(run_folder), "widths=[24,48]", "context=16"])
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert [row["widths"] for row in result["slices"]] == [[24, 24], [48, 48], [96, 96], [24, 48]]
    whole = result["slices"][2]
    assert whole["agreement"] == 1.0 and whole["kl"] == 0.0
    for row in (*result["slices"][:2], result["slices"][3]):
        assert 0 <= row["agreement"] < 1 and row["kl"] > 0
    assert any(line.startswith("whole ") for line in lines)


def test_consistency_against_the_definition(run_folder: Path) -> None:
    model = load_model(run_folder).model
    tokens = torch.randint(257, (3, 9))
    (row,) = consistency(model, [(tokens[:, :-1], tokens[:, 1:]), (tokens[:1, :-1], tokens[:1, 1:])], [[24, 96]])
    from llm.core.seq import SeqInfo
    from llm.models.nesting import at_widths

    with torch.no_grad():
        rows = torch.cat([tokens, tokens[:1]])
        seq = SeqInfo.contiguous(4, 8)
        p = model.head(model(rows[:, :-1], seq).hidden).double().softmax(-1)
        with at_widths(model, [24, 96]):
            q = model.head(model(rows[:, :-1], seq).hidden).double().softmax(-1)
    assert row.n_tokens == 32
    assert row.agreement == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert row.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
    assert row.loss == pytest.approx(float(-q.log().gather(-1, rows[:, 1:, None]).mean()), rel=1e-5)


def test_windows() -> None:
    documents = [Document(np.arange(start, start + n), n) for start, n in ((10, 5), (100, 30), (200, 12))]
    (everything,) = windows(documents, 0, context=7, max_tokens=1000, batch_tokens=1000)
    stream = [0, *range(10, 15), 0, *range(100, 130), 0, *range(200, 212)]
    assert everything[0].tolist() == [stream[i : i + 7] for i in range(0, 49, 7)]
    assert everything[1].tolist() == [stream[i : i + 7] for i in range(1, 50, 7)]
    some = list(windows(documents, 0, context=7, max_tokens=22, batch_tokens=14))
    assert [part[0].shape[0] for part in some] == [2, 1]
    assert torch.equal(torch.cat([part[0] for part in some]), everything[0][[0, 2, 4]])
    with pytest.raises(ValueError, match="no window of 50 tokens in 49 tokens of data"):
        windows(documents, 0, context=50, max_tokens=1000, batch_tokens=1000)


MISTAKES = [
    (["slice=1/3", "widths=4"], "give one of slice and widths"),
    (["slice=2"], "slice"),
    (["slice=one"], "expected a fraction of the hidden width"),
    (["slice=[1/4]"], "slice has 1 entries, the model 2 nested layers"),
    (["slice=1/7"], "of 96 hidden units is 13.71"),
    (["widths=[0,1]"], "nested layer 0 has 96 hidden units; given a width of 0"),
]


@pytest.mark.parametrize(("keys", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistakes(cli: Cli, run_folder: Path, tmp_path: Path, keys: list[str], message: str) -> None:
    for command in (["evaluate", run_folder], ["generate", run_folder, "--prompt=x"], ["export", run_folder, tmp_path]):
        done = cli(*command, *keys)
        assert done.code == 2 and message in done.err and "Traceback" not in done.err, done.err


def test_other_mistakes(cli: Cli, run_folder: Path, tmp_path: Path) -> None:
    plain = write_run(tmp_path / "plain")
    for command in (["evaluate", plain], ["generate", plain, "--prompt=x"], ["export", plain, tmp_path / "x"]):
        done = cli(*command, "slice=1/4")
        assert done.code == 2 and "slice is for nested models" in done.err, done.err
    done = cli("export", run_folder, tmp_path / "x", "format=run", "dtype=bf16")
    assert done.code == 2 and "dtype has no effect with format=run" in done.err
    done = cli("export", plain, plain, "format=run")
    assert done.code == 2 and "exists and is not empty" in done.err
    with pytest.raises(ValueError, match="is no nested model"):
        main([str(plain)])
