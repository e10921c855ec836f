"""When an answer in words counts as right: the official rule, and one that looks for whole words."""

from __future__ import annotations

import re
from typing import Literal

Metric = Literal["official", "fixed"]

ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
YES_NO = ("yes", "no")
LABELS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa4", "qa11", "qa12", "qa13"), ROOMS),
    "qa5": ("bill", "fred", "jeff", "mary", "apple", "football", "milk"),
    **dict.fromkeys(("qa6", "qa9", "qa17", "qa18"), YES_NO),
    "qa7": ("none", "one", "two", "three"),
    "qa8": ("apple", "football", "milk", "nothing"),
    "qa10": ("yes", "no", "maybe"),
    "qa14": ("bedroom", "cinema", "kitchen", "office", "park", "school"),
    "qa15": ("cat", "mouse", "sheep", "wolf"),
    "qa16": ("gray", "green", "white", "yellow"),
    "qa19": ("e,e", "e,n", "e,s", "n,e", "n,n", "n,w", "s,e", "s,s", "s,w", "w,n", "w,s", "w,w"),
    "qa20": ("bedroom", "garden", "kitchen", "bored", "hungry", "thirsty", "tired"),
}
"""Task -> what may be an answer, or a part of one."""


def answer_in(output: str) -> str:
    """The part of an output that counts: in lower case, up to the first period or the next context or example."""
    return output.lower().split(".")[0].split("<context>")[0].split("<example>")[0]


def labels_in(task: str, text: str, metric: Metric) -> set[str]:
    """Labels of a task in a text in lower case. official: as any part of it, "one" in "none" too; fixed: as words."""
    if metric == "official":
        return {label for label in LABELS[task] if label in text}
    return {label for label in LABELS[task] if re.search(rf"(?<![a-z]){re.escape(label)}(?![a-z])", text)}


def is_right(task: str, question: str, target: str, output: str, metric: Metric = "official") -> bool:
    """Whether the output names the target and no other label; what the question names itself does not count.

    official is the rule of the benchmark (compare_answers), by which the target "none" of qa7 is never right.
    """
    found = labels_in(task, answer_in(output), metric) - labels_in(task, question.lower(), metric)
    target = target.lower()
    parts = set(target.split(",")) if "," in target and len(target) > 3 else {target}
    return found == parts


def chance(task: str) -> float:
    """Share of right answers of one who says one of the task's labels at random."""
    return 1 / len(LABELS[task])
