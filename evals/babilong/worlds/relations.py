"""Relations between things: qa4 (compass), qa17 (positions), qa18 (sizes), qa19 (paths)."""

from __future__ import annotations

from random import Random

from evals.babilong.story import Story
from evals.babilong.worlds.base import ROOMS, World, other

STEPS = {"north": (0, 1), "east": (1, 0), "south": (0, -1), "west": (-1, 0)}
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}


def _compass_fact(rng: Random, room: str, direction: str, of: str) -> str:
    """`room` lies in `direction` of `of`, told from either side."""
    if rng.random() < 0.5:
        room, direction, of = of, OPPOSITE[direction], room
    return f"The {room} is {direction} of the {of}."


def two_arguments(rng: Random) -> Story:
    """qa4: three rooms in a row, two facts, a question about the middle one."""
    story = Story()
    direction = rng.choice(("north", "east"))
    first, middle, last = rng.sample(ROOMS, 3)
    facts = [(first, OPPOSITE[direction], middle), (last, direction, middle)]
    rng.shuffle(facts)
    for fact in facts:
        story.tell(_compass_fact(rng, *fact))
    support = rng.randrange(2)
    room, side, _ = facts[support]
    if rng.random() < 0.5:
        story.ask(f"What is {side} of the {middle}?", room, (support,))
    else:
        story.ask(f"What is the {middle} {OPPOSITE[side]} of?", room, (support,))
    return story


SHAPES = ("triangle", "red square", "blue square", "yellow square", "red sphere", "pink rectangle")
SIDES = {"to the right of": (1, 0), "to the left of": (-1, 0), "above": (0, 1), "below": (0, -1)}


def positions(rng: Random) -> Story:
    """qa17: three shapes, each a step from the next; eight questions about the two that no fact names together."""
    story = Story()
    ends = rng.sample(SHAPES, 3)
    middle = ends.pop()
    while True:
        at = {end: rng.choice(list(SIDES.values())) for end in ends}
        if at[ends[0]] != at[ends[1]]:
            break
    for end in ends:
        pair = [(end, middle, at[end]), (middle, end, (-at[end][0], -at[end][1]))]
        one, two, step = rng.choice(pair)
        side = next(name for name, s in SIDES.items() if s == step)
        story.tell(f"The {one} is {side} the {two}.")
    for _ in range(8):
        one, two = rng.sample(ends, 2)
        apart = at[one][0] - at[two][0], at[one][1] - at[two][1]
        side = rng.choice([s for s, step in SIDES.items() if abs(step[0] * apart[0]) + abs(step[1] * apart[1])])
        step = SIDES[side]
        answer = "yes" if step[0] * apart[0] + step[1] * apart[1] > 0 else "no"
        story.ask(f"Is the {one} {side} the {two}?", answer, (ends.index(one), ends.index(two)))
    return story


CONTAINERS = ("suitcase", "container", "box", "chest")
SMALL = ("box of chocolates", "chocolate")


def sizes(rng: Random) -> Story:
    """qa18: what is bigger; five questions that need two facts."""
    story = Story()
    order = [*rng.sample(CONTAINERS, 4), *SMALL]
    told: dict[tuple[str, str], int] = {}
    chains: list[tuple[str, str, tuple[int, int]]] = []
    while not chains:
        if len(story.facts) == 15:
            return sizes(rng)
        for _ in range(5):
            big, small = sorted(rng.sample(order, 2), key=order.index)
            bigger = rng.random() < 0.5
            text = f"The {big} is bigger than the {small}." if bigger else f"The {small} fits inside the {big}."
            told.setdefault((big, small), story.tell(text))
        chains = [
            (big, small, (one, two))
            for (big, between), one in told.items()
            for (middle, small), two in told.items()
            if between == middle and (big, small) not in told
        ]
    for _ in range(5):
        big, small, support = rng.choice(chains)
        yes = rng.random() < 0.5
        one, two = (big, small) if yes else (small, big)
        answer = "yes" if yes else "no"
        if rng.random() < 0.5:
            story.ask(f"Is the {one} bigger than the {two}?", answer, support)
        else:
            story.ask(f"Does the {two} fit in the {one}?", answer, support)
    return story


def paths(rng: Random) -> Story:
    """qa19: six rooms on a grid, each told by its way from another one; the two steps from one room to another."""
    story = Story()
    rooms = rng.sample(ROOMS, 6)
    at = {rooms[0]: (0, 0)}
    edges: list[tuple[str, str, str]] = []
    for room in rooms[1:]:
        free = [
            (of, direction, place)
            for of, (x, y) in at.items()
            for direction, (dx, dy) in STEPS.items()
            if (place := (x + dx, y + dy)) not in at.values()
        ]
        of, direction, place = rng.choice(free)
        at[room] = place
        edges.append((room, direction, of))
    rng.shuffle(edges)
    ways: dict[str, dict[str, tuple[str, int]]] = {room: {} for room in rooms}
    for fact, (room, direction, of) in enumerate(edges):
        story.tell(_compass_fact(rng, room, direction, of))
        ways[of][room] = direction, fact
        ways[room][of] = OPPOSITE[direction], fact
    start = rng.choice([room for room in rooms if any(len(ways[next_room]) > 1 for next_room in ways[room])])
    middle = rng.choice([room for room in ways[start] if len(ways[room]) > 1])
    end = other(rng, list(ways[middle]), start)
    steps = [ways[start][middle], ways[middle][end]]
    letters = ",".join(direction[0] for direction, _ in steps)
    story.ask(f"How do you go from the {start} to the {end}?", letters, [fact for _, fact in steps])
    return story


WORLDS: dict[str, World] = {"qa4": two_arguments, "qa17": positions, "qa18": sizes, "qa19": paths}
