"""Retrieval tasks: samples that keep their length, needles where they were asked for, and what can be known of them."""

from __future__ import annotations

import json
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evals.retrieval.base import Sample, Sampler, place_of
from evals.retrieval.needles import REPEATED
from evals.retrieval.options import TASKS
from evals.retrieval.run import score
from evals.retrieval.text import Background, read_background
from llm.core.errors import UserError
from llm.data.tokenizer import Tokenizer
from llm.data.tokenizer.backend import train_bpe
from llm.data.tokenizer.simple import BytesTokenizer
from tests.unit.generate.runs import MODEL, write_run

Cli = Callable[..., Any]
LENGTHS = {"bytes": (6000,), "bpe": (3500, 5000)}
LIBRARY = Path(sysconfig.get_paths()["stdlib"])
ESSAYS = [str(LIBRARY / name) for name in ("argparse.py", "typing.py", "inspect.py", "optparse.py", "turtle.py")]


@pytest.fixture(scope="module")
def background() -> Background:
    return read_background(tuple(ESSAYS))


@pytest.fixture(scope="module")
def tokenizers(background: Background) -> dict[str, Tokenizer]:
    return {"bytes": BytesTokenizer(), "bpe": train_bpe(background.sentences[:500], 600)}


def oracle(prompt: str) -> str:
    """The answer by rule, from the prompt alone."""
    text, _, question = prompt.rpartition("\nQuestion: ")
    if "special magic" in question:
        keys = re.search(r" for (.*) mentioned in the provided text\?", question)[1].replace(" and ", ", ").split(", ")  # type: ignore[index]
        found = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", text)
        return " ".join(value for key, value in found if key in keys)
    if "variables" in question:
        value_of: dict[str, str] = {}
        for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text):
            value_of[name] = value_of.get(value, value)
        wanted = re.search(r"value (\d+),", question)[1]  # type: ignore[index]
        return " ".join(name for name, value in value_of.items() if value == wanted)
    if "most often" in question:
        counts = Counter(re.findall(r"\d+\. (\w+)", text))
        return " ".join(word for word, _ in counts.most_common(10))
    listed = re.search(r"numbers of (.*), in this order\?", question)[1].replace(" and ", ", ").split(", ")  # type: ignore[index]
    return " ".join(dict(re.findall(r"^(\S+): (\d+)$", text, re.M))[key] for key in listed)


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("name", TASKS)
def test_samples(name: str, kind: str, tokenizers: dict[str, Tokenizer], background: Background) -> None:
    task, tokenizer = TASKS[name], tokenizers[kind]
    sampler = Sampler(tokenizer, background)
    shuffled = random.Random(0)
    guessed = []
    for length in LENGTHS[kind]:
        for index in range(3):
            sample = sampler(task, length, index)
            n = len(sample.ids) + task.max_new_tokens
            assert n <= length and n > 0.85 * length, "as long as it can be, never longer"
            assert sample.ids == [tokenizer.start_id, *tokenizer.encode(sample.prompt)]
            assert score(oracle(sample.prompt), sample.answers) == 1, sample.prompt
            for hidden in sample.hidden:
                assert sample.prompt[hidden.at : hidden.at + len(hidden.text)] == hidden.text
            again = Sampler(tokenizer, background)(task, length, index)
            assert again == sample and again.ids == sample.ids
            assert Sampler(tokenizer, background, seed=1)(task, length, index).prompt != sample.prompt
            guessed.append(score(guess(sample, shuffled), sample.answers))
    assert sum(guessed) / len(guessed) < 0.15, "what is not read is hardly ever guessed"


def guess(sample: Sample, rng: random.Random) -> str:
    """An answer of the right form that does not read: letters and digits of the true one in another order."""
    if sample.task == "common_words":
        words = sorted(set(re.findall(r"\d+\. (\w+)", sample.prompt)))
        return " ".join(rng.sample(words, 10)) if len(words) > 150 else ""
    return " ".join("".join(rng.sample(text, len(text))) for text in sample.answers)


def test_needles_stand_at_the_depth_asked_for(tokenizers: dict[str, Tokenizer], background: Background) -> None:
    depths = [0.0, 0.25, 0.5, 1.0]
    sampler = Sampler(tokenizers["bpe"], background, depths=depths)
    for index in range(8):
        sample = sampler(TASKS["niah_single_1"], 1024, index)
        before, _, after = sample.prompt.partition(sample.hidden[0].text)
        n_before, n_after = before.count(REPEATED), after.count(REPEATED)
        assert sample.depth == depths[index % 4] and n_before == place_of(depths[index % 4], n_before + n_after)
        assert n_before + n_after == sample.n_units > 5


@pytest.mark.slow
def test_the_standard_library_is_enough_for_long_prompts(tokenizers: dict[str, Tokenizer]) -> None:
    background = read_background()
    sampler = Sampler(tokenizers["bpe"], background)
    for name, length in (("niah_multiquery", 131072), ("niah_multikey_3", 131072), ("common_words", 16384)):
        sample = sampler(TASKS[name], length, 0)
        assert 0.98 * length < len(sample.ids) + TASKS[name].max_new_tokens <= length
        assert score(oracle(sample.prompt), sample.answers) == 1


def test_needles_are_alone(tokenizers: dict[str, Tokenizer], background: Background) -> None:
    sample = Sampler(tokenizers["bpe"], background)(TASKS["niah_multikey_2"], 4096, 0)
    lines = re.findall(r"for (\S+) is: (\d+)\.", sample.prompt)
    assert len({key for key, _ in lines}) == len({value for _, value in lines}) == len(lines) == sample.n_units + 1
    words = background.words
    assert not any(a in b for a in words[:300] for b in words if a != b), "no word is part of another"


def test_scores() -> None:
    assert score(" it is ABC and 12", ["abc", "12", "x", "y"]) == 0.5


def test_what_does_not_fit_is_told(tokenizers: dict[str, Tokenizer], background: Background, tmp_path: Path) -> None:
    sampler = Sampler(tokenizers["bpe"], background)
    with pytest.raises(UserError, match="does not fit into 150 tokens"):
        sampler(TASKS["niah_single_1"], 150, 0)
    few = Background(background.sentences, background.words[:200])
    with pytest.raises(UserError, match="too few words for common_words"):
        Sampler(tokenizers["bpe"], few)(TASKS["common_words"], 30000, 0)
    (tmp_path / "short.txt").write_text("Only a few words here.")
    with pytest.raises(UserError, match="essays hold 1 sentences"):
        read_background((str(tmp_path / "short.txt"),))
    with pytest.raises(UserError, match="cannot read the essay"):
        read_background((str(tmp_path / "none.txt"),))


def test_the_command_goes_on_where_it_was(cli: Cli, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", model={**MODEL, "max_seq_len": 1024})
    words = [f"run={run}", "tasks=[niah_single_1,recall]", "lengths=[700]", "device=cpu", "depths=[0,1]"]
    words.append(f"essays=[{','.join(ESSAYS)}]")
    first = cli("evaluate", "retrieval", *words, "samples=2")
    assert first.code == 0, first.err
    file = run / "retrieval" / "samples.jsonl"
    rows = file.read_bytes().splitlines(keepends=True)
    assert len(rows) == 5
    file.write_bytes(b"".join(rows[:4]) + rows[4][:30])
    again = cli("evaluate", "retrieval", *words, "samples=2")
    assert again.code == 0 and file.read_bytes() == b"".join(rows)
    assert json.loads(again.out) == json.loads(first.out)
    result = json.loads(again.out)
    cell = result["cells"]["niah_single_1"]["700"]
    assert cell["n"] == 2 and cell["n_prompt"] <= 700 - 128 and 0 <= cell["low"] <= cell["score"] <= cell["high"]
    assert [json.loads(row)["depth"] for row in rows[1:3]] == [0, 1]
    for name in ("tasks.png", "niah_single_1.png", "table.md", "summary.json"):
        assert (run / "retrieval" / name).is_file()
    refused = cli("evaluate", "retrieval", *words, "samples=2", "seed=1")
    assert refused.code == 2 and "seed was 42" in refused.err
    wrong = cli("evaluate", "retrieval", f"run={run}", "tasks=niah_single")
    assert wrong.code == 2 and "niah_single_1" in wrong.err
