"""The two forms in which a sample is put to a model: as a prompt to be answered in words, or as it was fine-tuned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from evals.babilong.metric import is_right
from evals.babilong.prompts import PromptConfig
from evals.babilong.sampler import Hidden
from llm.data.tokenizer import Tokenizer
from llm.generate.events import Completion
from llm.generate.prefill import PromptStream

Form = Literal["prompt", "finetuned"]
PART = 4096
MOST_NEW_TOKENS = 20
GEN = "GEN"
"""Its first token stands between the question and the answer."""


class PromptForm:
    """Instruction, examples, context and question in words, with the token that starts documents before them; greedy,
    20 new tokens (official)."""

    def __init__(self, tokenizer: Tokenizer, prompts: PromptConfig) -> None:
        self.tokenizer, self.prompts = tokenizer, prompts
        self.max_new_tokens = MOST_NEW_TOKENS

    def stream(self, hidden: Hidden) -> PromptStream:
        """The sample as a prompt that is never held whole. Texts around the context are tokenized by themselves."""
        before, after = self.prompts.around(hidden.sample.task, hidden.sample.question)
        head = [self.tokenizer.start_id, *self.tokenizer.encode(before)]
        return _around(head, hidden, self.tokenizer.encode(after))

    def judge(self, hidden: Hidden, made: Completion) -> dict[str, Any]:
        """What was said, and whether it is right by both metrics."""
        sample, said = hidden.sample, self.tokenizer.decode(made.tokens)
        asked = sample.task, sample.question, sample.answer, said
        return {"output": said, "right": is_right(*asked), "right_fixed": is_right(*asked, metric="fixed")}


class FinetunedForm:
    """[context][question][GEN][answer][EOS] (RMT, ARMT), greedy, right when answer and EOS are exactly that."""

    def __init__(self, tokenizer: Tokenizer, longest_answer: int = 24) -> None:
        self.tokenizer = tokenizer
        self.gen = int(tokenizer.encode(GEN)[0])
        self.max_new_tokens = longest_answer

    def question(self, text: str) -> list[int]:
        """Tokens of a question, which stand behind the context."""
        return [*self.tokenizer.encode(f" {text}"), self.gen]

    def answer(self, text: str) -> list[int]:
        """Tokens that are to be said, end of text included."""
        return [*self.tokenizer.encode(text), self.tokenizer.eos_id]

    def stream(self, hidden: Hidden) -> PromptStream:
        """The sample without its answer."""
        return _around([], hidden, self.question(hidden.sample.question))

    def judge(self, hidden: Hidden, made: Completion) -> dict[str, Any]:
        """What was said, and whether it is exactly the answer."""
        right = made.finish == "eos" and made.tokens == self.answer(hidden.sample.answer)[:-1]
        return {"output": self.tokenizer.decode(made.tokens), "right": right, "right_fixed": right}


AnyForm = PromptForm | FinetunedForm


def _around(head: list[int], hidden: Hidden, tail: list[int]) -> PromptStream:
    def parts() -> Iterator[np.ndarray | list[int]]:
        yield head
        yield from hidden.chunks(PART)
        yield tail

    return PromptStream(len(head) + hidden.n_tokens + len(tail), parts)
