"""Variable tracking and common words (after RULER, Hsieh et al. 2024), and multi-query recall at growing length."""

from __future__ import annotations

import string

from numpy.random import Generator

from evals.retrieval.base import Draft, Hidden, Task, draw_depths
from evals.retrieval.needles import REPEATED, Names
from evals.retrieval.text import Background
from evals.synthetic.mqar import MQAR

N_HOPS = 4
N_COMMON, TIMES_COMMON, TIMES_OTHER = 10, 30, 3
N_ASKED = 4


def variable_tracking(rng: Generator, n_units: int, background: Background, depth: float | None) -> Draft:
    """A chain of assignments among repeated sentences; every variable of the chain has the value that is asked for."""
    value = str(rng.integers(10_000, 100_000))
    names: list[str] = []
    while len(names) < N_HOPS + 1:
        name = "".join(string.ascii_uppercase[int(i)] for i in rng.integers(26, size=5))
        if name not in names:
            names.append(name)
    depths = sorted(draw_depths(rng, len(names)))
    lines = [f"VAR {names[0]} = {value}"]
    lines += [f"VAR {new} = VAR {old}" for old, new in zip(names, names[1:])]
    hidden = [Hidden(line, at) for line, at in zip(lines, depths, strict=True)]
    intro = "The text below assigns values to variables. Follow the assignments.\n"
    question = (
        f"\nQuestion: Which variables have the value {value}, directly or through other variables?\n"
        f"Answer: The {len(names)} variables with the value {value} are"
    )
    return Draft(intro, [REPEATED] * n_units, hidden, question, names)


def common_words(rng: Generator, n_units: int, background: Background, depth: float | None) -> Draft:
    """A numbered list of words: ten of them 30 times, n_units others 3 times each; the ten are asked for."""
    chosen = [background.words[int(i)] for i in rng.permutation(len(background.words))[: N_COMMON + n_units]]
    common = chosen[:N_COMMON]
    listed = [*common * TIMES_COMMON, *chosen[N_COMMON:] * TIMES_OTHER]
    order = rng.permutation(len(listed))
    text = " ".join(f"{number}. {listed[int(i)]}" for number, i in enumerate(order, start=1))
    intro = "Below is a numbered list of words. Some of them come up far more often than the others.\n"
    question = (
        f"\nQuestion: Which {N_COMMON} words come up most often in the list?\n"
        f"Answer: The {N_COMMON} most frequent words in the list are"
    )
    return Draft(intro, [text], [], question, common)


def recall(rng: Generator, n_units: int, background: Background, depth: float | None) -> Draft:
    """n_units keys with a number each, one a line, as many as the length allows; four of them are asked for."""
    n = max(n_units, N_ASKED)
    row = MQAR(length=3 * n, n_pairs=[n], vocab_size=2 * n + 1).example(rng)
    names = Names(rng, background)
    words = {int(token): names.word() for token in row.inputs[: 2 * n : 2]}
    numbers = {int(token): names.number() for token in row.inputs[1 : 2 * n : 2]}
    lines = [f"{words[int(k)]}: {numbers[int(v)]}" for k, v in row.inputs[: 2 * n].reshape(n, 2)]
    asked = [int(place) for place in row.asked.nonzero()[0]][:N_ASKED]
    keys = [words[int(row.inputs[place])] for place in asked]
    intro = "Below is a list of names, each with its number.\n"
    listed = ", ".join(keys[:-1]) + " and " + keys[-1]
    question = f"\nQuestion: What are the numbers of {listed}, in this order?\n"
    question += f"Answer: The numbers of {listed}, in this order, are"
    return Draft(intro, lines, [], question, [numbers[int(row.answers[place])] for place in asked])


TASKS = {
    "variable_tracking": Task("variable_tracking", variable_tracking, max_new_tokens=48, has_depth=False),
    "common_words": Task(
        "common_words",
        common_words,
        max_new_tokens=120,
        least=1,
        most=lambda b: len(b.words) - N_COMMON,
        has_depth=False,
    ),
    "recall": Task("recall", recall, max_new_tokens=64, least=N_ASKED, has_depth=False),
}
