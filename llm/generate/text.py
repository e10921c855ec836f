"""Text on both sides of the engine: UTF-8 safe streaming and stop texts across token borders."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from llm.data.tokenizer import Tokenizer
from llm.generate.engine import Engine
from llm.generate.events import FinishReason
from llm.generate.sampling import Sampling
from llm.models.decoder import DecoderLike


class TextStream:
    """Turns the tokens of one output into text, piece by piece.

    What is given out is never taken back: an unfinished UTF-8 character and a possible beginning of a stop text are
    held back until they are decided. Bytes that can be no UTF-8 become U+FFFD. n_ready: bytes that surely belong to the
    text, an unfinished character included.
    """

    def __init__(self, pieces: Sequence[bytes], stop: Sequence[str] = ()) -> None:
        self._pieces = pieces
        self._stop = [text.encode() for text in stop]
        self._held = b""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.stopped = False
        self.n_ready = 0

    def push(self, token: int) -> str:
        """The text that has become certain with this token; sets `stopped` when a stop text is complete."""
        assert not self.stopped
        piece = self._pieces[token] if token < len(self._pieces) else b""
        if not self._stop:
            self.n_ready += len(piece)
            return self._decoder.decode(piece)
        self._held += piece
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            ready, self._held = self._held[: min(found)], b""
            self.n_ready += len(ready)
            return self._decoder.decode(ready, final=True)
        keep = max(_overlap(self._held, stop) for stop in self._stop)
        split = len(self._held) - keep
        ready, self._held = self._held[:split], self._held[split:]
        self.n_ready += len(ready)
        return self._decoder.decode(ready)

    def close(self) -> str:
        """What was held back, when the output has ended otherwise than by a stop text."""
        held, self._held = self._held, b""
        self.n_ready += len(held)
        return self._decoder.decode(held, final=True)


def _overlap(data: bytes, stop: bytes) -> int:
    """Length of the longest proper beginning of `stop` with which `data` ends."""
    for length in range(min(len(stop) - 1, len(data)), 0, -1):
        if data.endswith(stop[:length]):
            return length
    return 0


class OnText(Protocol):
    """Called with (prompt's index, new text, why it ended or None while it goes on)."""

    def __call__(self, request: int, text: str, finish: FinishReason | None) -> None: ...


def generate_text(
    model: DecoderLike,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling | Sequence[Sampling],
    *,
    on_text: OnText | None = None,
    on_token: Callable[[int], None] | None = None,
    engine: Engine | None = None,
) -> list[str]:
    """The continuation of each prompt, without the prompt itself and without the stop text.

    An empty prompt starts a document; where the engine has a prefix, prompts go on from its text. on_text: receives the
    pieces as they come. on_token: called with each prompt's index for each of its new tokens. engine: default one with
    this model and the tokenizer's end of text.
    """
    engine = engine or Engine(model, eos_id=tokenizer.eos_id)
    samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    if engine.prefix is not None:
        ids = [[*engine.prefix.tokens, *prompt[1:]] for prompt in ids]
    pieces = tokenizer.pieces
    streams = [TextStream(pieces, s.stop) for s in samplings]
    texts = ["" for _ in prompts]
    # Several tokens of an output may be decided before the first of them is told.
    fresh: list[deque[str]] = [deque() for _ in prompts]

    def stop(request: int, token: int) -> bool:
        fresh[request].append(streams[request].push(token))
        return streams[request].stopped

    for event in engine.stream(ids, samplings, stop=stop):
        i = event.request
        new = fresh[i].popleft() if fresh[i] else ""
        if event.finish is not None and event.finish != "stop":
            new += streams[i].close()
        texts[i] += new
        if on_token is not None:
            on_token(i)
        if on_text is not None and (new or event.finish is not None):
            on_text(i, new, event.finish)
    return texts


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Ids of a prompt as the start of a document: the token that starts documents stands before it."""
    return [tokenizer.start_id, *tokenizer.encode(prompt)]
