"""Who is where: qa1, qa11-13 (moves), qa9 and qa10 (negation, uncertainty), qa14 (times of the day)."""

from __future__ import annotations

from random import Random

from evals.babilong.story import Story
from evals.babilong.worlds.base import (
    GO,
    N_QUESTIONS,
    OTHER_PEOPLE,
    PEOPLE,
    PLACES,
    PRONOUN,
    ROOMS,
    THEN,
    World,
    other,
    recent,
)

Places = dict[str, tuple[str, tuple[int, ...]]]
"""person -> (where, supporting facts)"""


def _ask_where(rng: Random, story: Story, at: Places, window: int) -> None:
    person = rng.choice([p for p in at if recent(story, at[p][1], window)])
    where, support = at[person]
    story.ask(f"Where is {person}?", where, support)


def single_fact(rng: Random) -> Story:
    """qa1: two moves, then where one of the movers is."""
    story, at = Story(), Places()
    real = {person: rng.choice(ROOMS) for person in PEOPLE}
    for _ in range(N_QUESTIONS):
        for _ in range(2):
            person = rng.choice(PEOPLE)
            real[person] = other(rng, ROOMS, real[person])
            fact = story.tell(f"{person} {rng.choice(GO)} to the {real[person]}.")
            at[person] = real[person], (fact,)
        _ask_where(rng, story, at, 5)
    return story


def coreference(rng: Random) -> Story:
    """qa11: a move, and one more of "he" or "she"."""
    story, at = Story(), Places()
    real = {person: rng.choice(ROOMS) for person in PEOPLE}
    for _ in range(N_QUESTIONS):
        person = rng.choice(PEOPLE)
        first = other(rng, ROOMS, real[person])
        one = story.tell(f"{person} {rng.choice(GO)} to the {first}.")
        real[person] = other(rng, ROOMS, first)
        two = story.tell(f"{rng.choice(THEN)} {PRONOUN[person]} {rng.choice(GO)} to the {real[person]}.")
        at[person] = real[person], (one, two)
        _ask_where(rng, story, at, 5)
    return story


def conjunction(rng: Random) -> Story:
    """qa12: two people move together, twice."""
    story, at = Story(), Places()
    for _ in range(N_QUESTIONS):
        for _ in range(2):
            pair = rng.sample(PEOPLE, 2)
            where = other(rng, ROOMS, *(at[p][0] for p in pair if p in at))
            fact = story.tell(f"{pair[0]} and {pair[1]} {rng.choice(GO)} to the {where}.")
            at |= dict.fromkeys(pair, (where, (fact,)))
        _ask_where(rng, story, at, 3)
    return story


def compound_coreference(rng: Random) -> Story:
    """qa13: two people move together, and once more as "they"."""
    story, at = Story(), Places()
    for _ in range(N_QUESTIONS):
        pair = rng.sample(PEOPLE, 2)
        first = other(rng, ROOMS, *(at[p][0] for p in pair if p in at))
        one = story.tell(f"{pair[0]} and {pair[1]} {rng.choice(GO)} to the {first}.")
        where = other(rng, ROOMS, first)
        two = story.tell(f"{rng.choice(THEN)} they {rng.choice(GO)} to the {where}.")
        at |= dict.fromkeys(pair, (where, (one, two)))
        _ask_where(rng, story, at, 3)
    return story


def negation(rng: Random) -> Story:
    """qa9: somebody moves, is somewhere, or is not somewhere any longer; yes or no."""
    story = Story()
    told: dict[str, tuple[str, bool, int]] = {}
    for _ in range(N_QUESTIONS):
        for _ in range(2):
            person = rng.choice(PEOPLE)
            last, there, _ = told.get(person, ("", False, -1))
            if rng.random() < 0.27:
                where = last if there else other(rng, ROOMS, last)
                fact = story.tell(f"{person} is {rng.choice(('not', 'no longer'))} in the {where}.")
                told[person] = where, False, fact
                continue
            where = other(rng, ROOMS, last if there else "")
            verb = "is in" if rng.random() < 0.33 else f"{rng.choice(GO)} to"
            told[person] = where, True, story.tell(f"{person} {verb} the {where}.")
        person = rng.choice([p for p in told if recent(story, [told[p][2]])])
        where, there, fact = told[person]
        asked = where if not there or rng.random() < 0.5 else other(rng, ROOMS, where)
        answer = "yes" if there and asked == where else "no"
        story.ask(f"Is {person} in the {asked}?", answer, (fact,))
    return story


def indefinite(rng: Random) -> Story:
    """qa10: as qa9, where somebody may be in one of two places; yes, no or maybe."""
    story = Story()
    told: dict[str, tuple[tuple[str, ...], int]] = {}
    for _ in range(N_QUESTIONS):
        for _ in range(2):
            person = rng.choice(OTHER_PEOPLE)
            last = told.get(person, ((), -1))[0]
            if rng.random() < 0.24:
                pair = tuple(rng.sample(PLACES, 2))
                told[person] = pair, story.tell(f"{person} is either in the {pair[0]} or the {pair[1]}.")
                continue
            where = other(rng, PLACES, *(last if len(last) == 1 else ()))
            verb = "is in" if rng.random() < 0.34 else f"{rng.choice(GO)} to"
            told[person] = (where,), story.tell(f"{person} {verb} the {where}.")
        person = rng.choice([p for p in told if recent(story, [told[p][1]])])
        places, fact = told[person]
        # A little more often than half the named place is one that was told: shares as in the real files.
        asked = rng.choice(places) if rng.random() < 0.55 else other(rng, PLACES, *places)
        answer = "no" if asked not in places else "yes" if len(places) == 1 else "maybe"
        story.ask(f"Is {person} in the {asked}?", answer, (fact,))
    return story


TIMES = ("yesterday", "this morning", "this afternoon", "this evening")
TIME_WEIGHTS = (8, 7, 5, 3)


def times(rng: Random) -> Story:
    """qa14: moves at times of the day, told in any order; where somebody was before another place."""
    story = Story()
    told: dict[str, dict[int, tuple[str, int]]] = {person: {} for person in OTHER_PEOPLE}
    while len(story.questions) < N_QUESTIONS:
        for _ in range(2):
            person = rng.choice([p for p in OTHER_PEOPLE if len(told[p]) < len(TIMES)])
            free = [time for time in range(len(TIMES)) if time not in told[person]]
            time = rng.choices(free, [TIME_WEIGHTS[t] for t in free])[0]
            where = other(rng, PLACES, *(place for place, _ in told[person].values()))
            move, when = f"{rng.choice(GO)} to the {where}", TIMES[time]
            first = rng.random() < 0.5
            text = f"{when.capitalize()} {person} {move}." if first else f"{person} {move} {when}."
            told[person][time] = where, story.tell(text)
        pairs = [
            (person, moves[before], moves[after])
            for person, moves in told.items()
            for before, after in zip(sorted(moves), sorted(moves)[1:])
        ]
        if pairs:
            person, (before_place, before_fact), (place, fact) = rng.choice(pairs)
            story.ask(f"Where was {person} before the {place}?", before_place, (fact, before_fact))
    return story


WORLDS: dict[str, World] = {
    "qa1": single_fact,
    "qa9": negation,
    "qa10": indefinite,
    "qa11": coreference,
    "qa12": conjunction,
    "qa13": compound_coreference,
    "qa14": times,
}
