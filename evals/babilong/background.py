"""Text in which facts are hidden: sentences of any source of documents, in the tokens of one tokenizer."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import numpy as np
from pydantic import Field, model_validator

from llm.config.base import Config, Count
from llm.core.errors import UserError
from llm.data.prepare import text  # noqa: F401  (it registers the sources)
from llm.data.prepare.source import Context, Holdout, Piece, SourceConfig
from llm.data.prepare.text import StdlibSource
from llm.data.tokenizer import Tokenizer

WORDS = (
    "Mary John Sandra Daniel Bill Fred Jeff Julie Jason Antoine Sumit Yann Lily Bernhard Brian Julius Greg Gertrude "
    "Winona Emily Jessica bathroom bedroom garden hallway kitchen office cinema park school apple football milk pajamas"
).split()
"""Names, rooms and things of the twenty tasks."""
MOST_CHARS = 1000
_NAMED = re.compile(rf"\b(?:{'|'.join(WORDS)})s?\b", re.IGNORECASE)
_ENDS = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+|\n\s*\n")


class BackgroundConfig(Config):
    """source: of documents, as in data preparation. max_bytes: text to be taken, of documents in an order by the hash
    of their text. min_tokens, max_tokens: other sentences are left out (official: 10, no limit). filter: leave out
    sentences that hold a name, a room or a thing of the tasks, so that nothing but the facts tells about them.
    """

    source: SourceConfig = Field(default_factory=StdlibSource)
    max_bytes: Count = Field(32_000_000, ge=1)
    min_tokens: int = Field(10, ge=1)
    max_tokens: int | None = None
    filter: bool = True

    @model_validator(mode="after")
    def _not_empty(self) -> BackgroundConfig:
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise UserError(f"max_tokens={self.max_tokens} is less than min_tokens={self.min_tokens}")
        return self


def sentences(document: str) -> Iterator[str]:
    """The sentences of a document but the first and the last, which a cut may have left incomplete.

    A sentence ends at a period, question or exclamation mark before white space, or at an empty line. What is longer
    than MOST_CHARS characters is a table or the like and is left out.
    """
    at, parts = 0, []
    for found in _ENDS.finditer(document):
        parts.append(document[at : found.end()].strip())
        at = found.end()
    yield from (part for part in parts[1:] if part and len(part) <= MOST_CHARS)


@dataclass(frozen=True)
class Background:
    """ids [N] int32: all sentences one after another. starts [S + 1] int64: where each begins. books [B + 1] int64: the
    first sentence of each document. hash: of the ids. n_filtered: sentences that named something of the tasks."""

    ids: np.ndarray
    starts: np.ndarray
    books: np.ndarray
    n_filtered: int
    hash: str

    def passages(self, rng: Random, n_tokens: int) -> list[tuple[int, int]]:
        """Stretches of sentences (first, end) with at least n_tokens tokens, of which the last sentence is needed: each
        from a random place of a random document to its end, or as far as needed."""
        found: list[tuple[int, int]] = []
        while n_tokens > 0:
            book = rng.randrange(len(self.books) - 1)
            first = rng.randrange(int(self.books[book]), int(self.books[book + 1]))
            enough = int(np.searchsorted(self.starts, self.starts[first] + n_tokens, side="left"))
            end = min(enough, int(self.books[book + 1]))
            found.append((first, end))
            n_tokens -= int(self.starts[end] - self.starts[first])
        return found

    def sentence(self, number: int) -> np.ndarray:
        """Tokens of a sentence, with the blank before it."""
        return self.ids[self.starts[number] : self.starts[number + 1]]


def read_documents(config: BackgroundConfig) -> Iterator[str]:
    """The documents to be taken: one at least, and no more than max_bytes of them."""
    context = Context(Holdout(), 0, 4 << 20, 1 << 30, 1 << 30)
    documents: list[str] = []
    for task in config.source.plan(context):
        for item in config.source.read(task, context):
            if isinstance(item, Piece):
                documents[len(documents) :] = [item.text] if item.first else [documents.pop() + item.text]
    documents.sort(key=lambda document: hashlib.blake2b(document.encode(), digest_size=8).digest())
    n_bytes = 0
    for number, document in enumerate(documents):
        n_bytes += len(document.encode())
        if number and n_bytes > config.max_bytes:
            return
        yield document


def open_background(config: BackgroundConfig, tokenizer: Tokenizer) -> Background:
    """Read and tokenize; UserError where nothing is left."""
    flat: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    books = [0]
    n_filtered = 0
    for document in read_documents(config):
        kept = list(sentences(document))
        if config.filter:
            n_all = len(kept)
            kept = [sentence for sentence in kept if not _NAMED.search(sentence)]
            n_filtered += n_all - len(kept)
        if not kept:
            continue
        ids, lengths = tokenizer.encode_flat([f" {sentence}" for sentence in kept])
        fits = (lengths >= config.min_tokens) & (lengths <= (config.max_tokens or np.iinfo(np.int64).max))
        if fits.any():
            flat.append(ids[np.repeat(fits, lengths)])
            sizes.append(lengths[fits])
            books.append(books[-1] + int(fits.sum()))
    if not flat:
        raise UserError(
            f"the background {config.source.type_name!r} holds no sentence of at least {config.min_tokens} tokens; "
            "give other text with background.source"
        )
    ids = np.concatenate(flat).astype(np.int32)
    starts = np.concatenate([[0], np.concatenate(sizes).cumsum()])
    return Background(ids, starts, np.array(books), n_filtered, hashlib.sha256(ids.tobytes()).hexdigest()[:16])
