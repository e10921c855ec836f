"""How many tokens to draft: a fixed number, or the one with the best speed-up at what has been measured so far."""

from __future__ import annotations

from collections.abc import Sequence

from llm.core.errors import UserError

START_ACCEPTANCE = 0.7
MEMORY = 0.9
"""Weight that a measurement keeps when the next one comes."""
FIRST_ROUNDS = (4, 1, 2)
"""Lengths that are tried before anything is known: two different ones tell what a token more costs."""
WORTHWHILE, RETRY = 1.05, 32
"""Below this speed-up nothing is drafted, but for every so many rounds, to look again."""


def expected_tokens(acceptance: float, n: int) -> float:
    """Tokens per forward with n drafted ones, each kept with this probability if those before it were."""
    return n + 1.0 if acceptance >= 1 else (1 - acceptance ** (n + 1)) / (1 - acceptance)


class DraftLength:
    """most: tokens drafted at once, or the largest number of them with `adaptive`."""

    def __init__(self, most: int = 4, *, adaptive: bool = False) -> None:
        if most < 1:
            raise UserError(f"draft_tokens is {most}; draft at least 1, or do without speculation")
        self.most, self.adaptive = most, adaptive
        self.draft_seconds = 0.0
        self._sums = [0.0] * 5
        self.start(0)

    def start(self, n_rows: int) -> None:
        """A new batch. Costs are kept, they belong to the machine; acceptance belongs to the texts."""
        self.acceptance = [START_ACCEPTANCE] * n_rows
        self.n_rounds = 0

    def extend(self, n_rows: int) -> None:
        """More rows, behind those that are there."""
        self.acceptance += [START_ACCEPTANCE] * n_rows

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        self.acceptance = [self.acceptance[row] for row in rows]

    def next(self) -> int:
        """Tokens to draft in this round."""
        if not self.adaptive:
            return self.most
        if self.n_rounds < len(FIRST_ROUNDS):
            return min(FIRST_ROUNDS[self.n_rounds], self.most)
        best = max(range(self.most + 1), key=self.speed_up)
        if self.speed_up(best) < WORTHWHILE:
            return min(2, self.most) if self.n_rounds % RETRY == 0 else 0
        return best

    def lengths(self) -> list[int]:
        """Lengths that are worth being prepared for: the one there is, or powers of two."""
        powers = [2**i for i in range(self.most.bit_length())] if self.adaptive else []
        return sorted({*powers, self.most})

    def speed_up(self, n: int) -> float:
        """Expected tokens per second with n drafted tokens, relative to none."""
        tokens = sum(expected_tokens(a, n) for a in self.acceptance) / max(1, len(self.acceptance))
        plain = self._forward_seconds(1)
        if plain <= 0:
            return tokens
        return tokens * plain / (self._forward_seconds(n + 1) + n * self.draft_seconds)

    def observe(
        self, drafted: Sequence[int], accepted: Sequence[int], draft_seconds: float, forward_seconds: float
    ) -> None:
        """What came of a round: tokens per row, and the time that drafting and checking took."""
        for row, (n, kept) in enumerate(zip(drafted, accepted)):
            if n:
                # Each kept token is a success; the first that is not kept, if any, is the only failure seen.
                seen = kept + (kept < n)
                weight = MEMORY**seen
                self.acceptance[row] = weight * self.acceptance[row] + (1 - weight) * kept / seen
        longest = max(drafted, default=0)
        if longest:
            each = draft_seconds / longest
            self.draft_seconds = each if not self.draft_seconds else MEMORY * self.draft_seconds + (1 - MEMORY) * each
        x, y = float(longest + 1), forward_seconds
        self._sums = [MEMORY * old + new for old, new in zip(self._sums, (1.0, x, y, x * x, x * y))]
        self.n_rounds += 1

    def _forward_seconds(self, n: int) -> float:
        """Of a forward over n tokens per row, by the line through what was measured."""
        weight, x, y, xx, xy = self._sums
        if weight == 0:
            return 0.0
        spread = weight * xx - x * x
        slope = max(0.0, (weight * xy - x * y) / spread) if spread > 1e-9 * weight * xx else 0.0
        return max(1e-9, y / weight + slope * (n - x / weight))
