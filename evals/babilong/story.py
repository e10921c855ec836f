"""Stories of facts and questions, and the reader of the real bAbI files (Weston et al. 2015)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llm.core.errors import UserError

NAMES = tuple(f"qa{number}" for number in range(1, 21))
"""The twenty tasks."""


@dataclass(frozen=True)
class Question:
    """Asked after the first `n_facts` facts of its story. support: indices of the facts that it follows from."""

    text: str
    answer: str
    n_facts: int
    support: tuple[int, ...]


@dataclass
class Story:
    """Facts in the order in which they are told, and the questions among them."""

    facts: list[str] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)

    def tell(self, text: str) -> int:
        """Add a fact; its index."""
        self.facts.append(text)
        return len(self.facts) - 1

    def ask(self, text: str, answer: str, support: tuple[int, ...] | list[int]) -> None:
        """Add a question about the facts so far."""
        self.questions.append(Question(text, answer, len(self.facts), tuple(support)))


@dataclass(frozen=True)
class Sample:
    """One question with all facts before it. id: what it is known by in results. earlier: the questions that its story
    asks before it, which are no part of the text that is tested."""

    id: str
    task: str
    facts: tuple[str, ...]
    question: str
    answer: str
    support: tuple[int, ...]
    earlier: tuple[Question, ...] = ()


def samples_of(task: str, name: str, story: Story) -> list[Sample]:
    """One sample for each question of a story, earlier questions left out."""
    return [
        Sample(
            f"{task}/{name}/{number}", task, tuple(story.facts[: q.n_facts]), q.text, q.answer, q.support,
            tuple(story.questions[:number]),
        )
        for number, q in enumerate(story.questions)
    ]  # fmt: skip


def read_stories(path: str | Path) -> Iterator[Story]:
    """The stories of a bAbI file: lines "ID fact" or "ID question<TAB>answer<TAB>IDs of supporting facts".

    UserError when the file cannot be read or a line has another form.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the bAbI file {path}: {error}") from error
    story = Story()
    places: dict[int, int] = {}
    for number, line in enumerate(lines, start=1):
        found = re.fullmatch(r"(\d+) ([^\t]+)(?:\t([^\t]+)\t([\d ]+))?", line)
        if found is None:
            raise UserError(f"{path} line {number} is no line of a bAbI file: {line[:80]!r}")
        at, text = int(found[1]), found[2].strip()
        if at == 1 and story.facts:
            yield story
            story, places = Story(), {}
        if found[3] is None:
            places[at] = story.tell(text)
            continue
        wanted = [int(n) for n in found[4].split()]
        if not set(wanted) <= set(places):
            raise UserError(f"{path} line {number}: a supporting fact is named that was not told before it")
        story.ask(text, found[3], [places[n] for n in wanted])
    if story.facts:
        yield story


def find_real(folder: str | Path, task: str) -> Path:
    """The training file of a task in a folder of bAbI files; UserError where there is none."""
    found = sorted(Path(folder).glob(f"{task}_*_train.txt"))
    if not found:
        raise UserError(f"no file {task}_*_train.txt in {folder}; give the folder of the bAbI v1.2 task files")
    return found[0]


def read_samples(folder: str | Path, task: str) -> list[Sample]:
    """All samples of a real task."""
    stories = read_stories(find_real(folder, task))
    return [sample for number, story in enumerate(stories) for sample in samples_of(task, f"real/{number}", story)]
