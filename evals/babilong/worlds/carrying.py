"""People who carry things: qa2 and qa3 (where a thing is, or was), qa5 (who gave), qa6 (yes or no), qa7 and qa8 (what
somebody carries)."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from evals.babilong.story import Story
from evals.babilong.worlds.base import GO, N_QUESTIONS, OBJECTS, PEOPLE, ROOMS, World, other, recent

GIVERS = ("Bill", "Fred", "Jeff", "Mary")
GET = ("got", "took", "grabbed", "picked up")
DROP = ("dropped", "left", "discarded", "put down")
GIVE = ("gave", "handed", "passed")
COUNT = ("none", "one", "two", "three")


@dataclass(frozen=True)
class Action:
    """What was told in a fact: person does kind with thing (or goes to place), to somebody when it is given."""

    kind: str
    person: str
    thing: str = ""
    place: str = ""
    to: str = ""


@dataclass
class Room:
    """The world behind the story, of which the reader is told the actions alone.

    One action is drawn among all that are possible: any move together weighs `go`, each way to get or to drop something
    1, each way to give something `give`; so the shares of the kinds are those of the real files. there: chances that
    "there" is said after getting and after dropping.
    """

    rng: Random
    story: Story
    people: tuple[str, ...] = PEOPLE
    go: float = 4.5
    give: float = 0.0
    there: tuple[float, float] = (1.0, 0.2)
    at: dict[str, str] = field(default_factory=dict)
    holder: dict[str, str] = field(default_factory=dict)
    lies: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.at = {person: self.rng.choice(ROOMS) for person in self.people}
        self.lies = {thing: self.rng.choice(ROOMS) for thing in OBJECTS}

    def act(self) -> tuple[int, Action]:
        """Let something happen and tell it; (index of the fact, what it was)."""
        rng = self.rng
        ways = [Action("go", "")]
        for person in self.people:
            ways += [Action("get", person, o) for o in OBJECTS if self.lies.get(o) == self.at[person]]
            held = [o for o in OBJECTS if self.holder.get(o) == person]
            ways += [Action("drop", person, o) for o in held]
            near = [p for p in self.people if p != person and self.at[p] == self.at[person]]
            ways += [Action("give", person, o, to=p) for o in held for p in near if self.give]
        weights = [{"go": self.go, "give": self.give}.get(way.kind, 1.0) for way in ways]
        way = rng.choices(ways, weights)[0]
        if way.kind == "go":
            person = rng.choice(self.people)
            way = Action("go", person, place=other(rng, ROOMS, self.at[person]))
            self.at[person] = way.place
            text = f"{person} {rng.choice(GO)} to the {way.place}."
        elif way.kind == "get":
            self.holder[way.thing] = way.person
            del self.lies[way.thing]
            text = f"{way.person} {rng.choice(GET)} the {way.thing}{self._there(0)}."
        elif way.kind == "drop":
            self.lies[way.thing] = self.at[way.person]
            del self.holder[way.thing]
            text = f"{way.person} {rng.choice(DROP)} the {way.thing}{self._there(1)}."
        else:
            self.holder[way.thing] = way.to
            text = f"{way.person} {rng.choice(GIVE)} the {way.thing} to {way.to}."
        return self.story.tell(text), way

    def _there(self, which: int) -> str:
        return " there" if self.rng.random() < self.there[which] else ""


def two_facts(rng: Random) -> Story:
    """qa2: where a thing is that was dropped, or that somebody has carried to another place."""
    story = Story()
    room = Room(rng, story, go=3.3)
    went: dict[str, tuple[int, str]] = {}
    things: dict[str, tuple[str, int, str, tuple[int, str] | None]] = {}
    while len(story.questions) < N_QUESTIONS:
        for _ in range(2):
            fact, done = room.act()
            if done.kind == "go":
                went[done.person] = fact, done.place
            else:
                things[done.thing] = done.kind, fact, done.person, went.get(done.person)
        candidates = []
        for thing, (kind, fact, person, then) in things.items():
            move = then if kind == "drop" else went.get(person)
            if move is not None and (kind == "drop" or move[0] > fact):
                candidates.append((thing, move[1], (fact, move[0])))
        candidates = [c for c in candidates if recent(story, c[2])]
        if candidates and rng.random() < 0.87:
            thing, place, support = rng.choice(candidates)
            story.ask(f"Where is the {thing}?", place, support)
    return story


def three_facts(rng: Random) -> Story:
    """qa3: where a thing was before it came to the place where it was last."""
    story = Story()
    room = Room(rng, story, go=3.4, there=(0.2, 0.2))
    held: dict[str, tuple[int, str, list[tuple[int, str]]]] = {}
    dropped: dict[str, tuple[int, list[tuple[int, str]]]] = {}
    while len(story.questions) < N_QUESTIONS:
        for _ in range(2):
            fact, done = room.act()
            if done.kind == "go":
                for _, person, moves in held.values():
                    if person == done.person:
                        moves.append((fact, done.place))
            elif done.kind == "get":
                held[done.thing] = fact, done.person, []
                dropped.pop(done.thing, None)
            else:
                dropped[done.thing] = fact, held.pop(done.thing)[2]
        known = {thing: (fact, moves) for thing, (fact, _, moves) in held.items()} | dropped
        candidates = [
            (thing, moves[-2][1], moves[-1][1], (fact, moves[-1][0], moves[-2][0]))
            for thing, (fact, moves) in known.items()
            if len(moves) >= 2
        ]
        candidates = [c for c in candidates if recent(story, c[3])]
        if candidates and rng.random() < 0.7:
            thing, before_place, place, support = rng.choice(candidates)
            story.ask(f"Where was the {thing} before the {place}?", before_place, support)
    return story


def three_arguments(rng: Random) -> Story:
    """qa5: who gave what to whom, of the last time."""
    story = Story()
    room = Room(rng, story, GIVERS, go=4.0, give=4.0, there=(1.0, 0.17))
    last: tuple[int, Action] | None = None
    while len(story.questions) < N_QUESTIONS:
        for _ in range(2):
            fact, done = room.act()
            if done.kind == "give":
                last = fact, done
        if last is None or not recent(story, [last[0]]):
            continue
        fact, done = last
        forms = [
            (f"What did {done.person} give to {done.to}?", done.thing, 2),
            (f"Who gave the {done.thing}?", done.person, 1),
            (f"Who did {done.person} give the {done.thing} to?", done.to, 1),
            (f"Who gave the {done.thing} to {done.to}?", done.person, 1),
            (f"Who received the {done.thing}?", done.to, 1),
        ]
        text, answer, _ = rng.choices(forms, [weight for *_, weight in forms])[0]
        story.ask(text, answer, (fact,))
    return story


def yes_no(rng: Random) -> Story:
    """qa6: whether somebody is in a place."""
    story = Story()
    room = Room(rng, story)
    went: dict[str, tuple[int, str]] = {}
    while len(story.questions) < N_QUESTIONS:
        for _ in range(2):
            fact, done = room.act()
            if done.kind == "go":
                went[done.person] = fact, done.place
        known = [person for person, (fact, _) in went.items() if recent(story, [fact])]
        if known:
            person = rng.choice(known)
            fact, place = went[person]
            yes = rng.random() < 0.5
            asked = place if yes else other(rng, ROOMS, place)
            story.ask(f"Is {person} in the {asked}?", "yes" if yes else "no", (fact,))
    return story


def _carried(rng: Random, give: float, *, lists: bool) -> Story:
    story = Story()
    room = Room(rng, story, go=4.0, give=give)
    facts: dict[str, list[int]] = {}
    acted: dict[str, None] = {}
    carried: dict[str, list[str]] = {}
    taken: dict[str, dict[str, None]] = {}
    while len(story.questions) < N_QUESTIONS:
        for _ in range(2):
            fact, done = room.act()
            if done.kind == "go":
                continue
            acted[done.person] = None
            for person in filter(None, (done.person, done.to)):
                facts.setdefault(person, []).append(fact)
                carried.setdefault(person, [])
            if done.kind != "get":
                if done.thing in carried[done.person]:
                    carried[done.person].remove(done.thing)
            if done.kind != "drop":
                carried[done.to or done.person].append(done.thing)
                taken.setdefault(done.to or done.person, {})[done.thing] = None
        known = [person for person in acted if recent(story, facts[person])]
        if known:
            person = rng.choice(known)
            things = carried[person]
            if lists:
                named = ",".join(thing for thing in taken.get(person, {}) if thing in things)
                story.ask(f"What is {person} carrying?", named or "nothing", facts[person])
            else:
                story.ask(f"How many objects is {person} carrying?", COUNT[len(things)], facts[person])
    return story


def counting(rng: Random) -> Story:
    """qa7: how many things somebody carries."""
    return _carried(rng, 6.0, lists=False)


def lists(rng: Random) -> Story:
    """qa8: which things somebody carries, in the order in which they were first taken."""
    return _carried(rng, 0.0, lists=True)


WORLDS: dict[str, World] = {
    "qa2": two_facts,
    "qa3": three_facts,
    "qa5": three_arguments,
    "qa6": yes_no,
    "qa7": counting,
    "qa8": lists,
}
