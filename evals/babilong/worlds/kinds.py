"""Properties and motives: qa15 (deduction), qa16 (induction), qa20 (why somebody does something)."""

from __future__ import annotations

from random import Random

from evals.babilong.story import Story
from evals.babilong.worlds.base import GO, World, other

PLURAL = {"mouse": "mice", "sheep": "sheep", "wolf": "wolves", "cat": "cats"}
FEARFUL = ("Gertrude", "Winona", "Emily", "Jessica")


def deduction(rng: Random) -> Story:
    """qa15: what each kind of animal is afraid of and who is what, in any order; four questions."""
    story = Story()
    animals = list(PLURAL)
    fears = {animal: other(rng, animals, animal) for animal in animals}
    kind = {name: rng.choice(animals) for name in FEARFUL}
    lines = [("fear", animal) for animal in animals] + [("kind", name) for name in FEARFUL]
    rng.shuffle(lines)
    place: dict[str, int] = {}
    for what, name in lines:
        if what == "fear":
            place[name] = story.tell(f"{PLURAL[name].capitalize()} are afraid of {PLURAL[fears[name]]}.")
        else:
            place[name] = story.tell(f"{name} is a {kind[name]}.")
    for _ in range(4):
        name = rng.choice(FEARFUL)
        support = (place[name], place[kind[name]])
        story.ask(f"What is {name.lower()} afraid of?", fears[kind[name]], support)
    return story


NAMED = ("Lily", "Bernhard", "Brian", "Julius", "Greg")
ANIMALS = ("frog", "lion", "swan", "rhino")
COLOURS = ("gray", "green", "white", "yellow")


def induction(rng: Random) -> Story:
    """qa16: animals and their colours; the colour of one that is told of another of its kind only."""
    story = Story()
    names = rng.sample(NAMED, 5)
    hidden, shown = names[0], names[1:]
    kind = {name: rng.choice(ANIMALS) for name in shown}
    kind[hidden] = kind[rng.choice(shown)]
    colour = dict(zip(ANIMALS, rng.sample(COLOURS, 4)))
    lines = [(what, name) for name in shown for what in ("kind", "colour")] + [("kind", hidden)]
    rng.shuffle(lines)
    place: dict[tuple[str, str], int] = {}
    for what, name in lines:
        text = f"{name} is a {kind[name]}." if what == "kind" else f"{name} is {colour[kind[name]]}."
        place[what, name] = story.tell(text)
    alike = [name for name in shown if kind[name] == kind[hidden]]
    one = max(alike, key=lambda name: place["colour", name])
    support = (place["kind", hidden], place["kind", one], place["colour", one])
    story.ask(f"What color is {hidden}?", colour[kind[hidden]], support)
    return story


AGENTS = ("Jason", "Antoine", "Sumit", "Yann")
MOTIVES = {
    "hungry": ("kitchen", "apple"),
    "thirsty": ("kitchen", "milk"),
    "bored": ("garden", "football"),
    "tired": ("bedroom", "pajamas"),
}
TAKE = ("got", "took", "grabbed", "picked up")


def motives(rng: Random) -> Story:
    """qa20: somebody feels something, goes somewhere and gets something, with a question after each fact."""
    story = Story()
    state = {agent: rng.choice(list(MOTIVES)) for agent in AGENTS}
    place: dict[str, int] = {}
    done = dict.fromkeys(AGENTS, 0)
    taken: set[str] = set()
    while going := [a for a in AGENTS if done[a] < 2 or (done[a] == 2 and MOTIVES[state[a]][1] not in taken)]:
        agent = rng.choice(going)
        where, what = MOTIVES[state[agent]]
        if done[agent] == 0:
            place[agent] = story.tell(f"{agent} is {state[agent]}.")
            story.ask(f"Where will {agent.lower()} go?", where, (place[agent],))
        elif done[agent] == 1:
            story.tell(f"{agent} {rng.choice(GO)} to the {where}.")
            story.ask(f"Why did {agent.lower()} go to the {where}?", state[agent], (place[agent],))
        else:
            taken.add(what)
            story.tell(f"{agent} {rng.choice(TAKE)} the {what} there.")
            story.ask(f"Why did {agent.lower()} get the {what}?", state[agent], (place[agent],))
        done[agent] += 1
    return story


WORLDS: dict[str, World] = {"qa15": deduction, "qa16": induction, "qa20": motives}
