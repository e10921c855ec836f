"""One output as it grows: tokens in, text and log-probabilities out, with nothing that would have to be taken back."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from llm.generate.events import FinishReason, TokenEvent
from llm.generate.text import TextStream


@dataclass(frozen=True)
class TokenInfo:
    """A token of an output. offset: characters of the output before it; logprob and top (token, logprob): of the
    model, natural logarithms."""

    token: int
    offset: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """What has become certain of an output. n_tokens: made so far; finish: why it has ended, None while it goes on."""

    text: str
    infos: tuple[TokenInfo, ...]
    n_tokens: int
    finish: FinishReason | None


class Output:
    """Follows the tokens of one output. Tokens whose bytes are held back, or belong to a stop text, are held back too.

    pieces: bytes of each token [vocab_size]. stop: texts that end the output. end_ids: tokens that do so.
    """

    def __init__(self, pieces: Sequence[bytes], stop: Sequence[str], end_ids: frozenset[int]) -> None:
        self._pieces = pieces
        self._stream = TextStream(pieces, stop)
        self._end_ids = end_ids
        self._fresh: deque[str] = deque()
        self._held: deque[tuple[int, TokenInfo]] = deque()
        self._n_bytes = 0
        self._counter = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0
        self.n_tokens = 0

    def stop(self, token: int) -> bool:
        """Whether the output ends with this token; called for each token once and in order, before its event (of drafts
        that were accepted, several may come before the event of the first)."""
        if token in self._end_ids:
            return True
        self._fresh.append(self._stream.push(token))
        return self._stream.stopped

    def take(self, event: TokenEvent) -> Piece | None:
        """What an event adds; None where that is nothing yet."""
        self.n_tokens += 1
        text = self._fresh.popleft() if self._fresh else ""
        if event.finish is not None and not self._stream.stopped:
            text += self._stream.close()
        if event.logprob is not None:
            self._hold(event)
        infos = []
        while self._held and (event.finish is not None or self._held[0][0] < self._stream.n_ready):
            start, info = self._held.popleft()
            if start < self._stream.n_ready:
                infos.append(info)
        if not text and not infos and event.finish is None:
            return None
        return Piece(text, tuple(infos), self.n_tokens, event.finish)

    def _hold(self, event: TokenEvent) -> None:
        piece = self._pieces[event.token] if event.token < len(self._pieces) else b""
        assert event.logprob is not None
        self._held.append((self._n_bytes, TokenInfo(event.token, self._offset, event.logprob, event.top_logprobs)))
        self._n_bytes += len(piece)
        self._offset += len(self._counter.decode(piece))
