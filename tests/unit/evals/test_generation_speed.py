"""bench generate: all implementations on the same prompts, their outputs compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from evals.generation_speed import GenerateBenchConfig, bench_generate
from llm.core.errors import UserError
from tests.unit.generate.runs import write_run

SMALL = {"n_prompts": 3, "prompt_tokens": 6, "new_tokens": 5, "rounds": 1}


def bench(tmp_path: Path, **keys: object) -> list[dict[str, object]]:
    text = tmp_path / "text.txt"
    text.write_text("for name in names:\n    print(name)\n" * 3)
    run = write_run(tmp_path / "run")
    config = GenerateBenchConfig.model_validate(SMALL | {"run": str(run), "text": str(text)} | keys)
    return list(bench_generate(config))


def test_drafters_beside_plain_decoding(tmp_path: Path) -> None:
    records = bench(tmp_path, drafters="lookup", draft_tokens=[1, "auto"], batch=[1, 2])
    names = ["plain", "lookup 1", "lookup auto"]
    assert [(r["batch"], r["implementation"]) for r in records] == [(b, n) for b in (1, 2) for n in names]
    assert all(r["same_tokens"] and r["share_of_same_tokens"] == 1 for r in records)
    assert records[0]["times_plain"] == 1 and "acceptance" in records[1] and "acceptance" not in records[0]


def test_drawn_texts_are_those_of_plain_decoding_with_look_up(tmp_path: Path) -> None:
    records = bench(tmp_path, drafters=["lookup", "lookup-tree:3"], draft_tokens=2, temperature=0.8, new_tokens=20)
    assert [r["implementation"] for r in records] == ["plain", "lookup 2", "lookup-tree:3 2"]
    assert all(r["same_tokens"] and r["temperature"] == 0.8 for r in records)


def test_transformers_says_the_same(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    plain, peer = bench(tmp_path, peer="transformers", batch=2)
    assert (plain["implementation"], peer["implementation"]) == ("plain", "transformers") and peer["same_tokens"]
    assert peer["times_transformers"] == 1 and plain["times_transformers"] == pytest.approx(
        1 / peer["times_plain"], 0.01
    )


def test_precisions_and_eight_bits(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    pytest.importorskip("transformers")
    found = {
        str(r["implementation"]): r
        for r in bench(tmp_path, precision=["bf16", "fp32"], quantize="int8", peer="transformers")
    }
    assert list(found) == ["plain", "int8", "fp32", "fp32 int8", "transformers"]
    sizes = [found[name]["parameter_bytes"] for name in ("int8", "plain", "fp32 int8", "fp32")]
    assert sizes[1] * 2 == sizes[3] and sizes[0] < sizes[2] < sizes[3]  # type: ignore[operator]
    assert "parameter_bytes" not in found["transformers"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"prompt_tokens": 500}, "context 48"),
        ({"n_prompts": 500}, "too few"),
        ({"text": "none.txt"}, "cannot read none"),
        ({"temperature": 0.5, "peer": "transformers"}, "set temperature=0"),
    ],
)
def test_mistakes(tmp_path: Path, keys: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench(tmp_path, **keys)
