"""What the worlds share: words, and the choice of what to ask about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import TypeVar

from evals.babilong.story import Story

T = TypeVar("T")
World = Callable[[Random], Story]

PEOPLE = ("Mary", "John", "Sandra", "Daniel")
PRONOUN = {"Mary": "she", "John": "he", "Sandra": "she", "Daniel": "he"}
ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OTHER_PEOPLE = ("Bill", "Fred", "Julie", "Mary")
PLACES = ("bedroom", "cinema", "kitchen", "office", "park", "school")
OBJECTS = ("apple", "football", "milk")
GO = ("moved", "went", "went back", "travelled", "journeyed")
THEN = ("After that", "Following that", "Then", "Afterwards")
N_QUESTIONS = 5
WINDOW = 5
"""Facts back from a question within which its newest support lies, as in the real files."""


def other(rng: Random, items: Sequence[T], *excluded: T) -> T:
    """One of the items that is not excluded."""
    return rng.choice([item for item in items if item not in excluded])


def recent(story: Story, support: Sequence[int], window: int = WINDOW) -> bool:
    """Whether the newest supporting fact is among the last `window` facts."""
    return max(support) >= len(story.facts) - window
