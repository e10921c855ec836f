"""Needles in a haystack: RULER's eight variants (Hsieh et al. 2024, arXiv:2404.06654)."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from functools import partial
from typing import Literal

from numpy.random import Generator

from evals.retrieval.base import Draft, Hidden, Task, draw_depths
from evals.retrieval.text import Background

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
REPEATED = "The rain is soft. The road is long. The lamp is lit. On we walk. Then we turn around."
Kind = Literal["numbers", "uuids"]


class Names:
    """Keys and values that were not given out before."""

    def __init__(self, rng: Generator, background: Background) -> None:
        self.rng, self.used = rng, set[str]()
        self.words = background.words

    def _fresh(self, draw: Callable[[], str]) -> str:
        found = draw()
        while found in self.used:
            found = draw()
        self.used.add(found)
        return found

    def word(self) -> str:
        """Two words with a hyphen."""
        return self._fresh(lambda: "-".join(self.words[int(i)] for i in self.rng.integers(len(self.words), size=2)))

    def number(self) -> str:
        """Seven digits."""
        return self._fresh(lambda: str(self.rng.integers(10**6, 10**7)))

    def uuid(self) -> str:
        """A random UUID."""
        return self._fresh(lambda: str(uuid.UUID(bytes=self.rng.bytes(16), version=4)))

    def value(self, kind: Kind) -> str:
        """A value of a kind."""
        return self.number() if kind == "numbers" else self.uuid()


def make(
    rng: Generator,
    n_units: int,
    background: Background,
    depth: float | None,
    *,
    haystack: Literal["repeat", "essay", "needle"],
    kind: Kind = "numbers",
    uuid_keys: bool = False,
    n_keys: int = 1,
    n_values: int = 1,
    n_asked: int = 1,
) -> Draft:
    """n_keys keys with n_values values each are hidden; the values of the first n_asked keys are asked for."""
    names = Names(rng, background)
    new_key = names.uuid if uuid_keys else names.word
    keys = [new_key() for _ in range(n_keys)]
    pairs = [(key, names.value(kind)) for key in keys for _ in range(n_values)]
    depths = draw_depths(rng, len(pairs))
    if depth is not None:
        depths[0] = depth
    hidden = [
        Hidden(NEEDLE.format(kind=kind, key=key, value=value), at)
        for (key, value), at in zip(pairs, depths, strict=True)
    ]
    if haystack == "repeat":
        units = [REPEATED] * n_units
    elif haystack == "essay":
        start = int(rng.integers(len(background.sentences)))
        units = [background.sentences[(start + i) % len(background.sentences)] for i in range(n_units)]
    else:
        units = [NEEDLE.format(kind=kind, key=new_key(), value=names.value(kind)) for _ in range(n_units)]
    one = n_values * n_asked == 1
    what = f"special magic {kind.removesuffix('s') if one else kind}"
    asked = ", ".join(keys[: n_asked - 1]) + (" and " if n_asked > 1 else "") + keys[n_asked - 1]
    question = (
        f"\nQuestion: What {'is' if one else 'are all'} the {what} for {asked} mentioned in the provided text?\n"
        f"Answer: The {what} for {asked} mentioned in the provided text {'is' if one else 'are'}"
    )
    intro = f"The text below hides special magic {kind}. Remember them, you will be asked about them.\n"
    answers = [value for key, value in pairs if key in keys[:n_asked]]
    return Draft(intro, units, hidden, question, answers, separator=" " if haystack == "essay" else "\n")


NEEDLES = {
    "niah_single_1": partial(make, haystack="repeat"),
    "niah_single_2": partial(make, haystack="essay"),
    "niah_single_3": partial(make, haystack="essay", kind="uuids"),
    "niah_multikey_1": partial(make, haystack="essay", n_keys=4),
    "niah_multikey_2": partial(make, haystack="needle"),
    "niah_multikey_3": partial(make, haystack="needle", kind="uuids", uuid_keys=True),
    "niah_multivalue": partial(make, haystack="essay", n_values=4),
    "niah_multiquery": partial(make, haystack="essay", n_keys=4, n_asked=4),
}
TASKS = {name: Task(name, maker) for name, maker in NEEDLES.items()}
