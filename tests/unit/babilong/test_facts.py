"""Facts and questions: the reader of bAbI files, and simulated worlds against a solver and against the real files."""

from __future__ import annotations

from pathlib import Path

import pytest

from evals.babilong.facts_table import distances, lengths, main, shares, standard_error
from evals.babilong.story import NAMES, Story, find_real, read_samples, read_stories
from evals.babilong.worlds import simulate, simulate_sample
from llm.core.errors import UserError
from tests.unit.babilong.solver import solve

FILE = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Daniel went back to the hallway.
5 Sandra moved to the garden.
6 Where is Daniel? \thallway\t4
1 John moved to the office.
2 Where is John?\toffice\t1
"""


def test_each_question_of_a_story_is_a_sample_without_earlier_questions(tmp_path: Path) -> None:
    path = tmp_path / "qa1_single-supporting-fact_train.txt"
    path.write_text(FILE)
    first, second, third = read_samples(tmp_path, "qa1")
    assert first.facts == ("Mary moved to the bathroom.", "John went to the hallway.")
    assert second.facts == (*first.facts, "Daniel went back to the hallway.", "Sandra moved to the garden.")
    assert [s.question for s in (first, second, third)] == ["Where is Mary?", "Where is Daniel?", "Where is John?"]
    assert [s.answer for s in (first, second, third)] == ["bathroom", "hallway", "office"]
    assert [s.support for s in (first, second, third)] == [(0,), (2,), (0,)]
    assert third.facts == ("John moved to the office.",)


@pytest.mark.parametrize(
    ("text", "what"),
    [("Mary moved.\n", "no line of a bAbI file"), ("1 Where is Mary?\toffice\t7\n", "was not told"), (None, "cannot")],
)
def test_what_is_no_bAbI_file_is_named(tmp_path: Path, text: str | None, what: str) -> None:
    path = tmp_path / "file.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=what):
        list(read_stories(path))
    with pytest.raises(UserError, match="no file qa1_"):
        find_real(tmp_path, "qa1")
    with pytest.raises(UserError, match="did you mean qa1"):
        simulate("qa01", 0, 0)


def _solved(task: str, n: int) -> None:
    for index in range(n):
        sample = simulate_sample(task, 7, index)
        assert solve(sample.facts, sample.question) == sample.answer, sample


@pytest.mark.parametrize("task", NAMES)
def test_a_solver_answers_every_simulated_question(task: str) -> None:
    _solved(task, 100)


@pytest.mark.slow
@pytest.mark.parametrize("task", NAMES)
def test_a_solver_answers_a_thousand_simulated_questions(task: str) -> None:
    _solved(task, 1000)


AMBIGUOUS = {"qa5": 2, "qa16": 6}
"""Real questions that the facts leave open: two of qa5 ask about a gift that a later one covers, six of qa16 about an
animal whose kind has several colours."""


@pytest.mark.parametrize("task", NAMES)
def test_the_solver_answers_the_real_questions(task: str, shared_data: Path) -> None:
    samples = read_samples(shared_data / "babi", task)
    wrong = [s for s in samples if solve(s.facts, s.question) != s.answer]
    assert len(samples) >= 850
    assert len(wrong) == AMBIGUOUS.get(task, 0), wrong[:1]


@pytest.mark.parametrize("task", NAMES)
def test_supporting_facts_are_enough_and_needed(task: str) -> None:
    """Of a dropped thing the files name no fact that says who had it; a fact may be told twice, or change nothing."""
    for index in range(50):
        sample = simulate_sample(task, 3, index)
        support = sorted(sample.support)
        if task != "qa3":
            assert solve([sample.facts[i] for i in support], sample.question) == sample.answer, sample
        if task in ("qa1", "qa4", "qa12", "qa14", "qa15", "qa17", "qa19", "qa20"):
            for left_out in support:
                rest = [fact for i, fact in enumerate(sample.facts) if i != left_out]
                assert solve(rest, sample.question) != sample.answer, (sample, left_out)


def test_a_story_depends_on_task_seed_and_index_alone() -> None:
    assert simulate("qa2", 1, 5) == simulate("qa2", 1, 5)
    stories = {tuple(simulate("qa2", seed, index).facts) for seed in range(4) for index in range(50)}
    assert len(stories) == 200


def _stories(task: str, n: int) -> list[Story]:
    return [simulate(task, 0, index) for index in range(n)]


def test_shares_of_qa7_are_the_published_ones() -> None:
    """Of the real samples: none 46.8, one 48.9, two 4.2, three 0.2 percent."""
    found = shares(_stories("qa7", 2000))
    for answer, percent in {"none": 46.8, "one": 48.9, "two": 4.2, "three": 0.2}.items():
        assert found[answer] == pytest.approx(percent, abs=2)


@pytest.mark.parametrize("task", NAMES)
def test_simulated_worlds_are_like_the_real_ones(task: str, shared_data: Path) -> None:
    """Every share lies within 3 points of the real one, or within 3.5 standard errors of the real sample."""
    real, ours = list(read_stories(find_real(shared_data / "babi", task))), _stories(task, 600)
    theirs, mine = shares(real), shares(ours)
    for answer in {*theirs, *mine}:
        apart = abs(theirs.get(answer, 0) - mine.get(answer, 0))
        assert apart < max(3, 3.5 * standard_error(real, answer)), answer

    def mean(values: list[int]) -> float:
        return sum(values) / len(values)

    assert mean(lengths(ours)) == pytest.approx(mean(lengths(real)), rel=0.15)
    assert mean(distances(ours)) == pytest.approx(mean(distances(real)), rel=0.2)


def test_the_table_names_what_it_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for task in NAMES:
        (tmp_path / f"{task}_x_train.txt").write_text(FILE)
    assert main([str(tmp_path), "n_stories=3"]) == 0
    out = capsys.readouterr().out
    assert out.count("| qa1 | ") >= 3 and "| qa20 | " in out
    with pytest.raises(UserError, match="allowed: n_stories"):
        main([str(tmp_path), "stories=3"])
