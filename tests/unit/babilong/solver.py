"""Answers to bAbI questions by rule, from the words of the facts and of the question alone."""

from __future__ import annotations

import re
from collections.abc import Sequence

GO = r"(?:moved|went back|went|travelled|journeyed) to the (\w+)"
GET = r"(?:got|took|grabbed|picked up) the (\w+)"
DROP = r"(?:dropped|left|discarded|put down) the (\w+)"
TIMES = ("yesterday", "this morning", "this afternoon", "this evening")
STEPS = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}
SIDES = {"above": (0, 1), "below": (0, -1), "to the right of": (1, 0), "to the left of": (-1, 0)}
SINGULAR = {"mice": "mouse", "sheep": "sheep", "wolves": "wolf", "cats": "cat"}
MOTIVES = {
    "hungry": ("kitchen", "apple"),
    "thirsty": ("kitchen", "milk"),
    "bored": ("garden", "football"),
    "tired": ("bedroom", "pajamas"),
}


class Reader:
    """What a careful reader knows after each fact."""

    def __init__(self, facts: Sequence[str]) -> None:
        self.at: dict[str, str] = {}
        self.not_at: dict[str, str] = {}
        self.either: dict[str, tuple[str, str]] = {}
        self.held: dict[str, list[str]] = {}
        self.taken: dict[str, dict[str, None]] = {}
        self.lies: dict[str, str | None] = {}
        self.trail: dict[str, list[str]] = {}
        self.gifts: list[tuple[str, str, str]] = []
        self.by_time: dict[str, dict[int, str]] = {}
        self.places: dict[str, dict[str, tuple[int, int]]] = {}
        self.bigger: set[tuple[str, str]] = set()
        self.fears: dict[str, str] = {}
        self.kind: dict[str, str] = {}
        self.trait: dict[str, str] = {}
        self.subjects: list[str] = []
        for fact in facts:
            assert self.read(fact.removesuffix(".")), f"the solver does not know this fact: {fact!r}"

    def go(self, person: str, place: str) -> None:
        self.at[person] = place
        self.not_at.pop(person, None)
        self.either.pop(person, None)
        for thing in self.held.get(person, []):
            self.seen(thing, place)

    def seen(self, thing: str, place: str) -> None:
        trail = self.trail.setdefault(thing, [])
        if trail[-1:] != [place]:
            trail.append(place)

    def read(self, fact: str) -> bool:
        if found := re.fullmatch(rf"(?:(\w+(?: \w+)?) )?(\w+) {GO}(?: ({'|'.join(TIMES)}))?", fact):
            when, person, place, late = found.groups()
            time = late or (when or "").lower()
            if time in TIMES:
                self.by_time.setdefault(person, {})[TIMES.index(time)] = place
                return True
        if found := re.fullmatch(rf"(\w+) and (\w+) {GO}", fact):
            self.subjects = [found[1], found[2]]
        elif found := re.fullmatch(rf"(?:After that|Following that|Then|Afterwards) (?:he|she|they) {GO}", fact):
            pass
        elif found := re.fullmatch(rf"(\w+) {GO}", fact):
            self.subjects = [found[1]]
        if found:
            for person in self.subjects:
                self.go(person, found[len(found.groups())])
        elif found := re.fullmatch(rf"(\w+) {GET}(?: there)?", fact):
            self.held.setdefault(found[1], []).append(found[2])
            self.taken.setdefault(found[1], {})[found[2]] = None
            if place := self.at.get(found[1]) or self.lies.get(found[2]):
                self.seen(found[2], place)
        elif found := re.fullmatch(rf"(\w+) {DROP}(?: there)?", fact):
            if found[2] in self.held.get(found[1], []):
                self.held[found[1]].remove(found[2])
            self.lies[found[2]] = self.at.get(found[1])
        elif found := re.fullmatch(r"(\w+) (?:gave|handed|passed) the (\w+) to (\w+)", fact):
            giver, thing, to = found.groups()
            self.gifts.append((giver, thing, to))
            if thing in self.held.get(giver, []):
                self.held[giver].remove(thing)
            self.held.setdefault(to, []).append(thing)
            self.taken.setdefault(to, {})[thing] = None
        elif found := re.fullmatch(r"(\w+) is in the (\w+)", fact):
            self.go(found[1], found[2])
        elif found := re.fullmatch(r"(\w+) is (?:not|no longer) in the (\w+)", fact):
            self.at.pop(found[1], None)
            self.not_at[found[1]] = found[2]
        elif found := re.fullmatch(r"(\w+) is either in the (\w+) or the (\w+)", fact):
            self.at.pop(found[1], None)
            self.either[found[1]] = found[2], found[3]
        elif found := re.fullmatch(r"The (\w+) is (north|south|east|west) of the (\w+)", fact):
            self.relate(found[1], STEPS[found[2]], found[3])
        elif found := re.fullmatch(rf"The (.+) is ({'|'.join(SIDES)}) the (.+)", fact):
            self.relate(found[1], SIDES[found[2]], found[3])
        elif found := re.fullmatch(r"The (.+) is bigger than the (.+)", fact):
            self.bigger.add((found[1], found[2]))
        elif found := re.fullmatch(r"The (.+) fits inside the (.+)", fact):
            self.bigger.add((found[2], found[1]))
        elif found := re.fullmatch(r"(\w+) are afraid of (\w+)", fact):
            self.fears[SINGULAR[found[1].lower()]] = SINGULAR[found[2]]
        elif found := re.fullmatch(r"(\w+) is a (\w+)", fact):
            self.kind[found[1]] = found[2]
        elif found := re.fullmatch(r"(\w+) is (\w+)", fact):
            self.trait[found[1]] = found[2]
        return found is not None

    def relate(self, one: str, step: tuple[int, int], other: str) -> None:
        self.places.setdefault(one, {})[other] = -step[0], -step[1]
        self.places.setdefault(other, {})[one] = step

    def apart(self, start: str, end: str) -> tuple[list[tuple[int, int]], tuple[int, int]] | None:
        """Shortest steps from one place to another, and their sum."""
        ways: dict[str, list[tuple[int, int]]] = {start: []}
        queue = [start]
        for place in queue:
            for there, step in self.places.get(place, {}).items():
                if there not in ways:
                    ways[there] = [*ways[place], step]
                    queue.append(there)
        if end not in ways:
            return None
        return ways[end], (sum(x for x, _ in ways[end]), sum(y for _, y in ways[end]))

    def below(self, big: str) -> set[str]:
        """All that is known to be smaller."""
        smaller = {small for large, small in self.bigger if large == big}
        return smaller.union(*map(self.below, smaller))

    def place_of(self, thing: str) -> str | None:
        holder = next((person for person, things in self.held.items() if thing in things), None)
        return self.at.get(holder) if holder is not None else self.lies.get(thing)


def solve(facts: Sequence[str], question: str) -> str | None:
    """The answer; None where the facts do not tell."""
    r, ask = Reader(facts), question.removesuffix("?")
    if found := re.fullmatch(r"Where is (\w+)", ask):
        return r.at.get(found[1])
    if found := re.fullmatch(r"Where is the (\w+)", ask):
        return r.place_of(found[1])
    if found := re.fullmatch(r"Where was the (\w+) before the (\w+)", ask):
        trail = r.trail.get(found[1], [])
        at = max((i for i, place in enumerate(trail) if place == found[2]), default=0)
        return trail[at - 1] if at else None
    if found := re.fullmatch(r"Where was (\w+) before the (\w+)", ask):
        told = r.by_time.get(found[1], {})
        order = [told[time] for time in sorted(told)]
        at = max((i for i, place in enumerate(order) if place == found[2]), default=0)
        return order[at - 1] if at else None
    if found := re.fullmatch(r"What is (north|south|east|west) of the (\w+)", ask):
        return _beside(r, found[2], STEPS[found[1]])
    if found := re.fullmatch(r"What is the (\w+) (north|south|east|west) of", ask):
        x, y = STEPS[found[2]]
        return _beside(r, found[1], (-x, -y))
    if found := re.fullmatch(r"Is (\w+) in the (\w+)", ask):
        person, place = found.groups()
        if person in r.at:
            return "yes" if r.at[person] == place else "no"
        if person in r.either:
            return "maybe" if place in r.either[person] else "no"
        return "no" if r.not_at.get(person) == place else None
    if found := re.fullmatch(r"How many objects is (\w+) carrying", ask):
        return ("none", "one", "two", "three")[len(r.held.get(found[1], []))] if found[1] in r.held else None
    if found := re.fullmatch(r"What is (\w+) carrying", ask):
        if found[1] not in r.held:
            return None
        return ",".join(thing for thing in r.taken.get(found[1], {}) if thing in r.held[found[1]]) or "nothing"
    for pattern, which in (
        (r"What did (?P<giver>\w+) give to (?P<to>\w+)", 1),
        (r"Who gave the (?P<thing>\w+)", 0),
        (r"Who gave the (?P<thing>\w+) to (?P<to>\w+)", 0),
        (r"Who did (?P<giver>\w+) give the (?P<thing>\w+) to", 2),
        (r"Who received the (?P<thing>\w+)", 2),
    ):
        if found := re.fullmatch(pattern, ask):
            named = found.groupdict()
            for gift in reversed(r.gifts):
                if all(named.get(key, part) == part for key, part in zip(("giver", "thing", "to"), gift)):
                    return gift[which]
            return None
    return _properties(r, ask)


def _properties(r: Reader, ask: str) -> str | None:
    if found := re.fullmatch(rf"Is the (.+) ({'|'.join(SIDES)}) the (.+)", ask):
        way, step = r.apart(found[3], found[1]), SIDES[found[2]]
        if way is None:
            return None
        return "yes" if way[1][0] * step[0] + way[1][1] * step[1] > 0 else "no"
    sizes = re.fullmatch(r"Is the (?P<big>.+) bigger than the (?P<small>.+)", ask) or re.fullmatch(
        r"Does the (?P<small>.+) fit in the (?P<big>.+)", ask
    )
    if sizes:
        if sizes["small"] in r.below(sizes["big"]):
            return "yes"
        return "no" if sizes["big"] in r.below(sizes["small"]) else None
    if found := re.fullmatch(r"How do you go from the (\w+) to the (\w+)", ask):
        way = r.apart(found[1], found[2])
        names = {step: name[0] for name, step in STEPS.items()}
        return None if way is None else ",".join(names[step] for step in way[0])
    if found := re.fullmatch(r"What is (\w+) afraid of", ask):
        return r.fears.get(r.kind.get(found[1].capitalize(), ""))
    if found := re.fullmatch(r"What color is (\w+)", ask):
        kind = r.kind.get(found[1])
        return next((r.trait[name] for name in reversed(r.trait) if kind and r.kind.get(name) == kind), None)
    if found := re.fullmatch(r"Where will (\w+) go", ask):
        return MOTIVES[r.trait[found[1].capitalize()]][0] if found[1].capitalize() in r.trait else None
    if found := re.fullmatch(r"Why did (\w+) (?:go to|get) the (\w+)", ask):
        state = r.trait.get(found[1].capitalize())
        return state if state and found[2] in MOTIVES[state] else None
    raise AssertionError(f"the solver does not know this question: {ask!r}")


def _beside(r: Reader, room: str, step: tuple[int, int]) -> str | None:
    return next((other for other, way in r.places.get(room, {}).items() if way == step), None)
