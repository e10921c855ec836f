"""Simulated bAbI worlds: a story is a function of (task, seed, index) and of nothing else.

moves: qa1, 9-14. carrying: qa2, 3, 5-8. relations: qa4, 17-19. kinds: qa15, 16, 20.
"""

from __future__ import annotations

from random import Random

from evals.babilong.story import Sample, Story, samples_of
from evals.babilong.worlds import carrying, kinds, moves, relations
from llm.core.errors import UserError, nearest

WORLDS = moves.WORLDS | carrying.WORLDS | relations.WORLDS | kinds.WORLDS
"""Task -> what tells one story with a random generator."""


def simulate(task: str, seed: int, index: int) -> Story:
    """Story `index` of a task."""
    if task not in WORLDS:
        close = nearest(task, WORLDS)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"unknown task {task!r}{hint} (allowed: qa1 to qa20)")
    return WORLDS[task](Random(f"babi/{task}/{seed}/{index}"))


def simulate_sample(task: str, seed: int, index: int) -> Sample:
    """Sample `index` of a task: one question of the story of that index."""
    samples = samples_of(task, f"seed{seed}/{index}", simulate(task, seed, index))
    return Random(f"question/{task}/{seed}/{index}").choice(samples)
