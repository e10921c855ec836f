"""evals.mixer_speed: a row and a record for any mixer, its fields from the command line, readable mistakes."""

from __future__ import annotations

import json

import pytest

from evals.mixer_speed import main, mixer_config
from llm.blocks.base import MIXERS
from llm.core.errors import UserError

FAST = ["--seq-len", "16", "24", "--d-model", "64", "--seconds", "0.001"]


def test_a_table_and_a_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["retention{n_heads: 2, chunk: 8}", "retention{n_heads: 7}", *FAST]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert [record["mixer"] for record in result["results"][:2]] == ["attention"] * 2
    assert len(table) == 1 + len(result["results"]) == 6
    assert result["conditions"]["d_model"] == 64
    first, second, refused = result["results"][2:]
    assert (first["seq_len"], second["seq_len"]) == (16, 24)
    assert first["params"] == second["params"] > 0
    assert first["state_kib"] == second["state_kib"] == 2 * 32 * 64 * 4 / 1024
    assert second["train_peak_mib"] > first["train_peak_mib"] > 0
    assert all(value > 0 for value in first.values() if isinstance(value, float))
    assert "not divisible" in refused["error"]


@pytest.mark.parametrize("name", MIXERS.names())
def test_every_mixer_has_a_config_of_a_given_width(name: str) -> None:
    config = mixer_config(name, 256)
    assert config.type == name
    if "n_heads" in type(config).model_fields:
        assert config.n_heads == 4  # type: ignore[attr-defined]


def test_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["retentoin", *FAST]) == 2
    assert "did you mean 'retention'?" in capsys.readouterr().err
    with pytest.raises(UserError, match="chunk"):
        mixer_config("retention{chunk: 0}", 64)
