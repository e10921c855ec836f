"""Log-probabilities of continuations: batches of like length, and a context that several continuations share is read
once, into a decode state whose rows are then copied. Works with every mixer that keeps its contract.

Shapes: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llm.core.seq import SeqInfo
from llm.generate.prefill import prefill
from llm.models.decoder import DecoderLike

HEAD_CHUNK = 2048
"""Tokens whose logits are held at once."""
SHARED_FROM = 8
"""Shorter contexts are read once for each continuation, which is faster than through a state."""

Ids = Sequence[int]


@dataclass(frozen=True)
class Score:
    """logprob: nats of the whole continuation. greedy: whether each of its tokens is the likeliest one."""

    logprob: float
    greedy: bool


@dataclass
class _Group:
    """A context and the places, in the order asked for, of the continuations behind it."""

    context: Ids
    places: list[int] = field(default_factory=list)


class Scorer:
    """Scores continuations with a model.

    max_rows: continuations that run together (None: as many as fit). batch_tokens: tokens with padding that run
    together, of one row at least. chunk: tokens of shared contexts that are read at once. share: whether contexts are
    shared at all. n_read: tokens read so far, padding not counted.
    """

    def __init__(
        self,
        model: DecoderLike,
        *,
        max_rows: int | None = None,
        batch_tokens: int = 16384,
        chunk: int = 1024,
        share: bool = True,
    ) -> None:
        self.model = model
        self.max_rows, self.batch_tokens, self.chunk, self.share = max_rows, batch_tokens, chunk, share
        weight = next(model.parameters())  # type: ignore[attr-defined]
        self.device, self.dtype = weight.device, weight.dtype
        self.n_read = 0

    def __call__(
        self, pairs: Sequence[tuple[Ids, Ids]], progress: Callable[[int], None] = lambda n: None
    ) -> list[Score]:
        """Scores of (context, continuation) pairs, neither of them empty, in their order. progress: told how many more
        are done."""
        assert all(context and continuation for context, continuation in pairs)
        groups: dict[tuple[int, ...], _Group] = {}
        for place, (context, _) in enumerate(pairs):
            groups.setdefault(tuple(context), _Group(context)).places.append(place)
        shared = [g for g in groups.values() if self.share and len(g.places) > 1 and len(g.context) >= SHARED_FROM]
        alone = set(range(len(pairs))) - {place for group in shared for place in group.places}
        scores: dict[int, Score] = {}
        with torch.inference_mode():
            for batch in self._batches(shared, pairs):
                found = self._shared(batch, pairs)
                scores |= found
                progress(len(found))
            singles = [_Group(pairs[place][0], [place]) for place in alone]
            for batch in self._batches(singles, pairs):
                found = self._whole([group.places[0] for group in batch], pairs)
                scores |= found
                progress(len(found))
        return [scores[place] for place in range(len(pairs))]

    def _batches(self, groups: Sequence[_Group], pairs: Sequence[tuple[Ids, Ids]]) -> Iterator[list[_Group]]:
        """Groups of like length together, the longest first; a group is cut where it alone is too much."""

        def length(group: _Group) -> int:
            return len(group.context) + max(len(pairs[place][1]) for place in group.places)

        batch: list[_Group] = []
        n_rows = longest = 0
        for group in sorted(groups, key=length, reverse=True):
            most = max(1, self.batch_tokens // length(group))
            most = min(most, self.max_rows or most)
            for start in range(0, len(group.places), most):
                part = _Group(group.context, group.places[start : start + most])
                total = n_rows + len(part.places)
                if batch and (total * longest > self.batch_tokens or total > (self.max_rows or total)):
                    yield batch
                    batch, n_rows = [], 0
                if not batch:
                    longest = length(group)
                batch.append(part)
                n_rows += len(part.places)
        if batch:
            yield batch

    def _whole(self, places: Sequence[int], pairs: Sequence[tuple[Ids, Ids]]) -> dict[int, Score]:
        """Contexts and continuations in one forward."""
        rows = [[*pairs[place][0], *pairs[place][1][:-1]] for place in places]
        tokens = self._padded(rows)
        self.n_read += sum(map(len, rows))
        hidden = self.model(tokens, SeqInfo.contiguous(*tokens.shape, device=self.device)).hidden
        parts = [
            hidden[row, len(pairs[place][0]) - 1 : len(rows[row])] for row, place in enumerate(places)
        ]  # [T of the continuation, D] each
        return self._scores(places, parts, pairs)

    def _shared(self, groups: Sequence[_Group], pairs: Sequence[tuple[Ids, Ids]]) -> dict[int, Score]:
        """Contexts once, then all their continuations behind copies of what was remembered of them."""
        places = [place for group in groups for place in group.places]
        origin = [number for number, group in enumerate(groups) for _ in group.places]
        contexts = [group.context for group in groups]
        rest = [pairs[place][1][:-1] for place in places]
        self.n_read += sum(map(len, contexts)) + sum(map(len, rest))
        capacity = max(map(len, contexts)) + max(map(len, rest))
        state = self.model.new_state(len(contexts), capacity, dtype=self.dtype, device=self.device)
        last = prefill(self.model, contexts, state, self.chunk)
        parts = [last[number][None] for number in origin]
        going_on = [row for row, tokens in enumerate(rest) if tokens]
        if going_on:
            state.reorder(torch.tensor([origin[row] for row in going_on], device=self.device))
            tokens = self._padded([rest[row] for row in going_on])
            lengths = torch.tensor([len(rest[row]) for row in going_on], device=self.device)
            steps = torch.arange(tokens.shape[1], device=self.device)
            seq = SeqInfo(positions=state.end()[:, None] + steps, valid=steps < lengths[:, None])
            hidden = self.model(tokens, seq, state=state).hidden
            for number, row in enumerate(going_on):
                parts[row] = torch.cat([parts[row], hidden[number, : len(rest[row])]])
        return self._scores(places, parts, pairs)

    def _scores(
        self, places: Sequence[int], parts: Sequence[Tensor], pairs: Sequence[tuple[Ids, Ids]]
    ) -> dict[int, Score]:
        """parts: hidden states [T, D] that say the tokens of each continuation."""
        targets = torch.tensor([i for place in places for i in pairs[place][1]], device=self.device)
        said, right = [], []
        for hidden, wanted in zip(torch.cat(list(parts)).split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True):
            logits = self.model.head(hidden).float()
            said.append(logits.log_softmax(dim=-1).gather(1, wanted[:, None])[:, 0].double())
            right.append(logits.argmax(dim=-1) == wanted)
        lengths = [len(pairs[place][1]) for place in places]
        columns = zip(places, torch.cat(said).cpu().split(lengths), torch.cat(right).cpu().split(lengths), strict=True)
        return {place: Score(float(logprobs.sum()), bool(greedy.all())) for place, logprobs, greedy in columns}

    def _padded(self, rows: Sequence[Ids]) -> Tensor:
        """[B, T] int64, zeros on the right."""
        tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        for number, row in enumerate(rows):
            tokens[number, : len(row)] = torch.as_tensor(row)
        return tokens.to(self.device)
