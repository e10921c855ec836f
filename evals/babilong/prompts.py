"""What is said before and after a context: our own words, or the official ones from a file."""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import model_validator

from evals.babilong.sampler import for_tests
from evals.babilong.story import NAMES
from evals.babilong.worlds import simulate_sample
from llm.config.base import Config
from llm.core.errors import UserError

CONTEXT = "<context>\n"
N_EXAMPLES = 2
EXAMPLE_SEED = 20240614
MOST_EXAMPLE_FACTS = 8

HIDDEN = "I will give you a text in which facts about {what} are hidden between sentences that do not matter. "
WHERE = "What was told last is where somebody is. "
CARRIED = "Whoever carries a thing takes it along; a thing that was dropped stays there. "
ONE_WORD = "Answer with a single word and nothing else."

_TEXTS: dict[str, tuple[str, str, str]] = {
    "qa1": ("the places of people", WHERE, 'Answer in this form: "The most recent location of P is L."'),
    "qa2": ("people who move and carry things", CARRIED, 'Answer in this form: "The O is in the L."'),
    "qa3": (
        "people who move and carry things",
        f"{CARRIED}You are asked where a thing was before it came to a place. ",
        'Answer in this form: "Before the L1 the O was in the L2."',
    ),
    "qa4": ("how places lie to one another", "", ONE_WORD),
    "qa5": ("people who give things to one another", "You are asked about the last gift that fits. ", ONE_WORD),
    "qa6": ("people who move and carry things", WHERE, "Answer yes or no and nothing else."),
    "qa7": ("people who take, drop and give things", CARRIED, "Answer none, one, two or three and nothing else."),
    "qa8": (
        "people who take and drop things",
        CARRIED,
        "Answer with the things, divided by commas without blanks, or with nothing, and no other word.",
    ),
    "qa9": ("where people are and are not", WHERE, "Answer yes or no and nothing else."),
    "qa10": (
        "where people are or may be",
        f"{WHERE}Who is in one of two places may be in each. ",
        "Answer yes, no or maybe and nothing else.",
    ),
    "qa11": ("the places of people", f"{WHERE}He or she is who was named before. ", ONE_WORD),
    "qa12": ("the places of people", WHERE, ONE_WORD),
    "qa13": ("the places of people", f"{WHERE}They are those who were named before. ", ONE_WORD),
    "qa14": (
        "where people went at times of the day",
        "The times, not the order of the facts, tell what was before: yesterday, morning, afternoon, evening. ",
        ONE_WORD,
    ),
    "qa15": ("animals and what their kinds are afraid of", "", ONE_WORD),
    "qa16": ("animals and their colours", "Animals of one kind have the same colour. ", ONE_WORD),
    "qa17": ("how shapes lie to one another", "", "Answer yes or no and nothing else."),
    "qa18": ("the sizes of things", "", "Answer yes or no and nothing else."),
    "qa19": (
        "how places lie to one another",
        "",
        "Answer with two of the letters n, s, e and w, divided by a comma, and nothing else.",
    ),
    "qa20": (
        "how people feel and what they do",
        "The hungry and the thirsty go to the kitchen, the bored to the garden, the tired to the bedroom. ",
        ONE_WORD,
    ),
}


@dataclass(frozen=True)
class Texts:
    """What a task is introduced with."""

    instruction: str
    examples: str
    post_prompt: str


class PromptConfig(Config):
    """file: of the official texts (babilong's prompts.py, of which the literal is read and nothing is run, or JSON of
    the same form); None: our own. instruction, examples, post_prompt: whether these parts are given. answer_prefix:
    what is put behind the question (official: nothing).
    """

    file: str | None = None
    instruction: bool = True
    examples: bool = True
    post_prompt: bool = True
    answer_prefix: str = ""

    @model_validator(mode="after")
    def _readable(self) -> PromptConfig:
        if self.file is not None and Path(self.file).suffix not in (".py", ".json"):
            raise UserError(f"the prompts file {self.file} must be a .py or .json file")
        return self

    @property
    def label(self) -> str:
        """What results are marked with."""
        return "own prompts" if self.file is None else f"prompts of {Path(self.file).name}"

    def around(self, task: str, question: str) -> tuple[str, str]:
        """(text before the context, text behind it)."""
        texts = own_texts(task) if self.file is None else official_texts(self.file, task)
        parts = [
            texts.instruction if self.instruction else "",
            texts.examples if self.examples else "",
            texts.post_prompt if self.post_prompt else "",
        ]
        before = "\n\n".join(parts).strip() + f"\n\n{CONTEXT}"
        return before.lstrip(), f"\n</context>\n\nQuestion: {question}".rstrip() + self.answer_prefix


def sentence(task: str, question: str, answer: str) -> str:
    """An answer in the form that the task asks for."""
    words = question.rstrip("?").split()
    return {
        "qa1": f"The most recent location of {words[-1]} is {answer}.",
        "qa2": f"The {words[-1]} is in the {answer}.",
        "qa3": f"Before the {words[-1]} the {words[3] if len(words) > 3 else ''} was in the {answer}.",
    }.get(task, answer)


def own_texts(task: str) -> Texts:
    """Our own words, with examples that no test sample has."""
    what, rule, form = _TEXTS[task]
    found: list[str] = []
    index = 0
    while len(found) < N_EXAMPLES:
        sample = simulate_sample(task, EXAMPLE_SEED, index)
        index += 1
        if for_tests(sample.facts) or len(sample.facts) > MOST_EXAMPLE_FACTS + index // 20:
            continue
        facts = " ".join(sample.facts)
        answer = sentence(task, sample.question, sample.answer)
        found.append(f"<example>\n{facts} {sample.question}\nAnswer: {answer}\n</example>")
    return Texts(HIDDEN.format(what=what) + rule.strip(), "\n".join(found), form)


def official_texts(file: str, task: str) -> Texts:
    """The texts of a task in a file; UserError when it holds none of them."""
    tree = _read(Path(file))
    texts = tree.get(task)
    if not isinstance(texts, dict) or not all(isinstance(texts.get(k), str) for k in Texts.__dataclass_fields__):
        raise UserError(f"{file} holds no instruction, examples and post_prompt of {task}")
    return Texts(*(texts[key] for key in Texts.__dataclass_fields__))


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            tree = json.loads(text)
            return tree if isinstance(tree, dict) else {}
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Dict):
                found = ast.literal_eval(node.value)
                if set(found) & set(NAMES):
                    return found
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"cannot read the prompts file {path}: {error}") from error
    raise UserError(f"{path} assigns no dictionary of prompts with keys qa1 to qa20")
