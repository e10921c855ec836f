"""What generation tells: tokens as they come, whole outputs, and what came of speculation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

FinishReason = Literal["eos", "stop", "length", "context"]
"""eos: the model ended the text. stop: a stop text. length: max_new_tokens. context: the model's max_seq_len."""


class TokenEvent(NamedTuple):
    """A token of a request, as soon as it is known. finish: None while the request goes on.

    logprob, top_logprobs: where asked for, the natural logarithm of the probability that the model itself gives to the
    token and to the likeliest ones (token, log-probability), before temperature, filters and penalties.
    """

    request: int
    token: int
    finish: FinishReason | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass
class Completion:
    """The new tokens of a request, without the end-of-text token, and why they ended."""

    tokens: list[int] = field(default_factory=list)
    finish: FinishReason = "length"


@dataclass
class Speculation:
    """What came of speculative decoding so far. n_rounds: drafts checked, one for each row of a forward; n_drafted,
    n_accepted: their tokens; by_accepted: number of rounds by how many tokens were kept."""

    n_rounds: int = 0
    n_drafted: int = 0
    n_accepted: int = 0
    by_accepted: Counter[int] = field(default_factory=Counter)

    def add(self, drafted: Sequence[int], accepted: Sequence[int]) -> None:
        """One more forward, with the tokens of each row."""
        self.n_rounds += len(drafted)
        self.n_drafted += sum(drafted)
        self.n_accepted += sum(accepted)
        self.by_accepted.update(accepted)

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that were kept."""
        return self.n_accepted / self.n_drafted if self.n_drafted else 0.0

    @property
    def tokens_per_forward(self) -> float:
        """Tokens that a forward gave, per row: those kept and one more."""
        return 1 + self.n_accepted / self.n_rounds if self.n_rounds else 1.0
