"""What counts as right, what is said around a context, and the two forms of a sample."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from evals.babilong.background import Background
from evals.babilong.forms import FinetunedForm, PromptForm
from evals.babilong.metric import LABELS, chance, is_right
from evals.babilong.prompts import PromptConfig, own_texts, sentence
from evals.babilong.sampler import Sampler, for_tests
from evals.babilong.story import NAMES
from evals.babilong.worlds import simulate_sample
from evals.records import wilson_interval
from llm.core.errors import UserError
from llm.data.tokenizer.simple import BytesTokenizer
from llm.generate.events import Completion

IN_QA3 = "Where was the milk before the kitchen?"


@pytest.mark.parametrize(
    ("task", "question", "target", "output", "official", "fixed"),
    [
        ("qa7", "How many objects is Mary carrying?", "none", "none", False, True),
        ("qa7", "How many objects is Mary carrying?", "one", "One.", True, True),
        ("qa7", "How many objects is Mary carrying?", "one", "none", False, False),
        ("qa8", "What is Mary carrying?", "apple,milk", "milk and apple", True, True),
        ("qa8", "What is Mary carrying?", "apple,milk", "apple", False, False),
        ("qa8", "What is Mary carrying?", "apple,milk", "apple, milk and football", False, False),
        ("qa3", IN_QA3, "garden", "Before the kitchen the milk was in the garden.", True, True),
        ("qa3", IN_QA3, "garden", "the office", False, False),
        ("qa1", "Where is Mary?", "garden", "the garden or the office", False, False),
        ("qa1", "Where is Mary?", "garden", "Garden. Not the office.", True, True),
        ("qa1", "Where is Mary?", "garden", "Mr. Smith: garden", False, False),
        ("qa1", "Where is Mary?", "garden", "garden <context> office", True, True),
        ("qa1", "Where is Mary?", "garden", "garden <EXAMPLE> office", True, True),
        ("qa1", "Where is Mary?", "garden", "garden Question: office", False, False),
        ("qa1", "Where is Mary?", "garden", "", False, False),
        ("qa15", "What is emily afraid of?", "wolf", "located in wolf", False, True),
        ("qa19", "How do you go from the office to the kitchen?", "n,w", "N,W", True, True),
        ("qa19", "How do you go from the office to the kitchen?", "n,w", "n,w,w", False, False),
        ("qa5", "Who did Fred give the apple to?", "Jeff", "Fred gave the apple to Jeff", True, True),
    ],
)  # fmt: skip
def test_what_is_right(task: str, question: str, target: str, output: str, official: bool, fixed: bool) -> None:
    assert is_right(task, question, target, output) is official
    assert is_right(task, question, target, output, "fixed") is fixed


@pytest.mark.parametrize("task", NAMES)
def test_the_right_answer_is_right_and_a_guess_is_at_chance(task: str) -> None:
    rng = Random(task)
    n, n_lucky = 300, 0
    for index in range(n):
        sample = simulate_sample(task, 2, index)
        said = sentence(task, sample.question, sample.answer)
        assert is_right(task, sample.question, sample.answer, said, "fixed"), (sample, said)
        assert is_right(task, sample.question, sample.answer, said) is (sample.answer != "none"), (sample, said)
        n_lucky += is_right(task, sample.question, sample.answer, rng.choice(LABELS[task]), "fixed")
    low, high = wilson_interval(n_lucky, n, z=4)
    assert low <= chance(task) <= high or task == "qa8", "lists are never guessed"


def test_intervals_are_those_of_Wilson() -> None:
    assert wilson_interval(500, 1000) == pytest.approx((0.4691, 0.5309), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


@pytest.mark.parametrize("task", NAMES)
def test_own_prompts_have_the_official_structure(task: str) -> None:
    before, after = PromptConfig().around(task, "Where is Mary?")
    assert before.count("<example>\n") == before.count("\n</example>") == 2
    assert before.endswith("\n\n<context>\n") and after == "\n</context>\n\nQuestion: Where is Mary?"
    texts = own_texts(task)
    assert before == f"{texts.instruction}\n\n{texts.examples}\n\n{texts.post_prompt}\n\n<context>\n"
    bare = PromptConfig(instruction=False, examples=False, post_prompt=False, answer_prefix="\nAnswer:")
    assert bare.around(task, "Q?") == ("<context>\n", "\n</context>\n\nQuestion: Q?\nAnswer:")


def test_examples_are_no_test_samples() -> None:
    shown = own_texts("qa4").examples
    assert shown.startswith("<example>\nThe ")
    facts = [line.partition(" What")[0] for line in shown.splitlines() if line.startswith("The ")]
    assert len(facts) == 2
    assert not any(for_tests(line.replace(". ", ".\n").splitlines()) for line in facts)


def test_official_prompts_are_read_and_never_run(tmp_path: Path) -> None:
    texts = {"instruction": "Read.", "examples": "<example>\nx\n</example>", "post_prompt": "Say it."}
    code = "import os\nos.abort()\nX = {'a': 1}\nDEFAULT_PROMPTS = {\n 'qa1': {'instruction': 'Re' 'ad.', "
    code += "'examples': '<example>\\nx\\n</example>', 'post_prompt': 'Say it.', 'template': 't'}}\n"
    (tmp_path / "prompts.py").write_text(code)
    (tmp_path / "prompts.json").write_text(json.dumps({"qa1": texts}))
    for name in ("prompts.py", "prompts.json"):
        config = PromptConfig(file=str(tmp_path / name))
        before, _ = config.around("qa1", "Q?")
        assert before == "Read.\n\n<example>\nx\n</example>\n\nSay it.\n\n<context>\n"
        assert config.label == f"prompts of {name}"
        with pytest.raises(UserError, match="of qa2"):
            config.around("qa2", "Q?")
    (tmp_path / "other.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="assigns no dictionary"):
        PromptConfig(file=str(tmp_path / "other.py")).around("qa1", "Q?")
    with pytest.raises(UserError, match="cannot read"):
        PromptConfig(file=str(tmp_path / "none.json")).around("qa1", "Q?")
    with pytest.raises(ValidationError, match="must be a .py or .json"):
        PromptConfig(file="x.txt")


@pytest.fixture(scope="module")
def background() -> Background:
    text = "A long river ran quietly under the old stone bridge. " * 400
    ids = np.frombuffer(f" {text}".encode(), dtype=np.uint8)[:-1].astype(np.int32)
    starts = np.arange(401) * (len(ids) // 400)
    return Background(ids, starts, np.array([0, 400]), 0, "")


def _read(stream: Any) -> list[int]:
    return [int(i) for part in stream.parts() for i in part]


def test_a_prompt_is_what_it_says(background: Background) -> None:
    tokenizer = BytesTokenizer()
    form = PromptForm(tokenizer, PromptConfig())
    hidden = Sampler("qa1", 3000, tokenizer, background)[0]
    stream = form.stream(hidden)
    ids = _read(stream)
    assert len(ids) == len(stream) and ids[0] == tokenizer.start_id
    before, after = PromptConfig().around("qa1", hidden.sample.question)
    context = tokenizer.decode(np.concatenate(list(hidden.chunks(100))))
    assert tokenizer.decode(ids) == before + context + after

    def judged(said: str) -> dict[str, Any]:
        return form.judge(hidden, Completion(tokenizer.encode(said), "length"))

    assert judged(f" {hidden.sample.answer}. And")["right"] is True
    assert judged("nowhere") == {"output": "nowhere", "right": False, "right_fixed": False}


def test_the_fine_tuned_form_asks_for_exactly_the_answer(background: Background) -> None:
    tokenizer = BytesTokenizer()
    form = FinetunedForm(tokenizer)
    hidden = Sampler("qa2", 2000, tokenizer, background)[0]
    ids, answer = _read(form.stream(hidden)), tokenizer.encode(hidden.sample.answer)
    assert tokenizer.decode(ids[2000:]) == f" {hidden.sample.question}G"
    assert form.answer(hidden.sample.answer) == [*answer, tokenizer.eos_id]
    for made, right in (
        (Completion(answer, "eos"), True),
        (Completion(answer, "length"), False),
        (Completion([*answer, 32], "eos"), False),
        (Completion(answer[:-1], "eos"), False),
    ):
        assert form.judge(hidden, made)["right"] is right


@pytest.mark.parametrize("task", NAMES)
def test_every_answer_fits_in_what_is_generated(task: str) -> None:
    tokenizer = BytesTokenizer()
    form = FinetunedForm(tokenizer)
    longest = max(len(form.answer(Sampler(task, 0, tokenizer, None)[index].sample.answer)) for index in range(30))
    assert longest <= form.max_new_tokens
