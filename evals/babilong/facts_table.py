"""usage: python -m evals.babilong.facts_table FOLDER [n_stories=1000] [seed=0]

Compare the simulated worlds with the real bAbI files in FOLDER: shares of the answers, facts before a question, and how
many facts back its supporting facts lie. Prints Markdown. The standard error of a real share is that of its stories,
whose questions are not independent.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence

from evals.babilong.story import NAMES, Story, find_real, read_stories
from evals.babilong.worlds import simulate
from evals.command import run_command
from llm.core.errors import UserError


def shares(stories: Sequence[Story]) -> dict[str, float]:
    """Percent of the questions that have an answer; the order of a list does not count."""
    counts = Counter(_label(q.answer) for story in stories for q in story.questions)
    return {answer: 100 * n / counts.total() for answer, n in counts.items()}


def standard_error(stories: Sequence[Story], answer: str) -> float:
    """Of the share of an answer, in percent, when stories are drawn as wholes."""
    n = sum(len(story.questions) for story in stories)
    mean = sum(_label(q.answer) == answer for story in stories for q in story.questions) / n
    residuals = [
        sum(_label(q.answer) == answer for q in story.questions) - mean * len(story.questions) for story in stories
    ]
    return 100 * math.sqrt(sum(r * r for r in residuals)) / n


def _label(answer: str) -> str:
    return ",".join(sorted(answer.split(","))) if len(answer) > 3 else answer


def lengths(stories: Sequence[Story]) -> list[int]:
    """Facts before each question."""
    return [q.n_facts for story in stories for q in story.questions]


def distances(stories: Sequence[Story]) -> list[int]:
    """Facts back from each question to each of its supporting facts; 1 is the last fact."""
    return [q.n_facts - fact for story in stories for q in story.questions for fact in q.support]


def _summary(values: list[int]) -> str:
    ordered = sorted(values)
    return f"{statistics.fmean(values):.1f} ({ordered[len(ordered) // 10]}-{ordered[9 * len(ordered) // 10]})"


def table(folder: str, n_stories: int, seed: int) -> str:
    """Two tables in Markdown: one line per task, and one per answer."""
    first = [
        "| task | questions per story | facts before a question | supporting facts | facts back to a support "
        "| largest difference of a share |",
        "|---|---|---|---|---|---|",
    ]
    second = [
        "| task | answer | real % | simulated % | difference | standard error of the real |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for task in NAMES:
        real = list(read_stories(find_real(folder, task)))
        ours = [simulate(task, seed, index) for index in range(n_stories)]
        theirs, mine = shares(real), shares(ours)
        apart = {answer: mine.get(answer, 0.0) - theirs.get(answer, 0.0) for answer in sorted({*theirs, *mine})}
        worst = max(apart, key=lambda answer: abs(apart[answer]))
        pairs = [
            tuple(f"{statistics.fmean(len(s.questions) for s in stories):.1f}" for stories in (real, ours)),
            (_summary(lengths(real)), _summary(lengths(ours))),
            tuple(
                f"{statistics.fmean(len(q.support) for s in stories for q in s.questions):.2f}"
                for stories in (real, ours)
            ),
            (_summary(distances(real)), _summary(distances(ours))),
        ]
        cells = [f"{a} / {b}" for a, b in pairs]
        error = standard_error(real, worst)
        first.append(f"| {task} | " + " | ".join(cells) + f" | {worst} {apart[worst]:+.1f} ± {error:.1f} |")
        for answer, difference in apart.items():
            error = standard_error(real, answer)
            real_share, own_share = theirs.get(answer, 0.0), mine.get(answer, 0.0)
            second.append(
                f"| {task} | {answer} | {real_share:.1f} | {own_share:.1f} | {difference:+.1f} | {error:.1f} |"
            )
    return "\n".join([*first, "", *second])


def main(argv: list[str]) -> int:
    """Run the command."""
    if not argv or {"-h", "--help"} & set(argv):
        print(str(__doc__).strip())
        return 0 if argv else 2
    settings = {"n_stories": 1000, "seed": 0}
    for word in argv[1:]:
        key, _, value = word.partition("=")
        if key not in settings or not value.isdigit():
            raise UserError(f"unknown argument {word!r}; allowed: n_stories=NUMBER, seed=NUMBER")
        settings[key] = int(value)
    print(table(argv[0], settings["n_stories"], settings["seed"]))
    return 0


if __name__ == "__main__":
    run_command(main, "facts_table")
