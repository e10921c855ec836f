"""launch/export.py: run -> Hugging Face folder -> run, and a readable message for each mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm.generate import load_model
from tests.unit.generate.runs import MODEL, write_run

pytest.importorskip("transformers")
Cli = Callable[..., Any]


def test_there_and_back(cli: Cli, tmp_path: Path) -> None:
    run = write_run(tmp_path / "tiny")
    (run / "evaluate.json").write_text(json.dumps({"bits_per_byte": 1.25, "data": "x (valid)"}))
    done = cli("export", run, tmp_path / "hf")
    assert done.code == 0, done.err
    assert json.loads(done.out.splitlines()[-1])["relative"] <= 1e-5
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| held-out bits per byte | 1.2500 (x (valid)) |" in card and "step-000000003" in card
    done = cli("export", "import", tmp_path / "hf", tmp_path / "back")
    assert done.code == 0, done.err
    before, after = load_model(run), load_model(tmp_path / "back")
    assert after.tokenizer.hash == before.tokenizer.hash
    for (name, p), (other, q) in zip(before.model.named_parameters(), after.model.named_parameters(), strict=True):
        assert name == other and bool((p == q).all())
    texts = [
        cli("generate", where, "--prompt", "ab", "seed=4", "max_new_tokens=20", "ignore_eos=true").out
        for where in (run, tmp_path / "hf", tmp_path / "back")
    ]
    assert texts[0] == texts[1] == texts[2]


def test_mistakes(cli: Cli, tmp_path: Path) -> None:
    run = write_run(tmp_path / "tiny")
    other = write_run(tmp_path / "other", model={**MODEL, "position": "learned"})
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("x")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    config = {"model_type": "llama", "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    (pickled / "config.json").write_text(json.dumps({**config, "num_attention_heads": 2}))
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    for arguments, message in (
        ([], "export takes a run and the folder to write; given 0 paths"),
        ([run], "given 1 paths"),
        ([run, full], "is not empty"),
        ([run, tmp_path / "new", "dtype=fp16"], "dtype"),
        ([run, tmp_path / "new", "format=gguf"], "format"),
        ([run, tmp_path / "new", "format=run", "remote_code=always"], "remote_code has no effect"),
        ([other, tmp_path / "new", "remote_code=never"], "model.position is 'learned'"),
        ([tmp_path / "none", tmp_path / "new"], "no checkpoint at"),
        (["import", tmp_path / "none", tmp_path / "new"], "no such folder"),
        (["import", full, tmp_path / "new"], "no config.json in"),
        (["import", pickled, tmp_path / "new"], "only in pytorch_model.bin, a pickle file"),
        (["import", pickled], "import takes the Hugging Face folder and the run folder"),
        (["import", pickled, full], "exists and is not empty"),
    ):
        done = cli("export", *arguments)
        assert done.code == 2, (arguments, done.err)
        assert message in done.err and "Traceback" not in done.err
    assert not (tmp_path / "new").exists()


def test_a_model_of_another_shape_takes_its_code_along(cli: Cli, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", model={**MODEL, "position": "learned"})
    done = cli("export", run, tmp_path / "out")
    assert done.code == 0 and "its code goes along" in done.err, done.err
    assert (tmp_path / "out" / "modeling_manyformer.py").is_file()
    assert cli("export", "import", tmp_path / "out", tmp_path / "back").code == 0
    before, after = load_model(run), load_model(tmp_path / "back")
    for (name, p), (other, q) in zip(before.model.named_parameters(), after.model.named_parameters(), strict=True):
        assert name == other and bool((p == q).all())
