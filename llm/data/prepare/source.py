"""What a source of documents is: a plan of independent tasks, and a reader of each task."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field, model_validator

from llm.config.base import Config, Tagged
from llm.core.registry import Registry

SOURCES: Registry[SourceConfig] = Registry("data source")
TRAIN, VALID = "train", "valid"
SPLITS = (TRAIN, VALID)
_WORD = frozenset(b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_VISIBLE = frozenset(range(0x21, 0x7F))


class Piece(NamedTuple):
    """A document, or a part of a long one: the parts follow one another in a source's order.

    n_bytes: UTF-8 size of the text. first, last: whether the document begins and ends here.
    """

    text: str
    n_bytes: int
    split: str
    first: bool = True
    last: bool = True


class Reject(NamedTuple):
    """A record that was left out. line: counted from 1; in a task that begins inside a file, from the task's start."""

    file: str
    line: int
    reason: str


class Lines(NamedTuple):
    """Number of line ends in a task's part of a file; the last item of a task that covers a part only."""

    file: str
    number: int


Item = Piece | Reject | Lines
Task = dict[str, Any]
"""Plain data that describes a task to its source; "bytes" is its size, for progress and balance (0: not known)."""


class Holdout(Config):
    """Which documents become the `valid` split.

    fraction: share of the documents, chosen by a hash (of the path where a file is a document, else of the text), or
    share of the characters at the end of the source with by="position". files: globs, matched with a file's path and
    its name, of files that are held out whole.
    """

    by: Literal["hash", "position"] = "hash"
    fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    files: list[str] = []

    @model_validator(mode="after")
    def _coherent(self) -> Holdout:
        if self.by == "position" and (self.files or not self.fraction):
            raise ValueError("by: position needs fraction > 0 and takes no files")
        return self


@dataclass(frozen=True)
class Context:
    """What planning and reading may depend on, besides the source's own config.

    task_bytes: aimed-at size of a task. piece_bytes: longer documents are encoded and stored in parts of this size.
    max_record_bytes: longer lines and records are rejected.
    """

    holdout: Holdout
    seed: int
    task_bytes: int
    piece_bytes: int
    max_record_bytes: int

    def split(self, key: bytes | str, file: str) -> str:
        """The split of a document with this identity from this file."""
        if self.holdout.files and self.matches(file):
            return VALID
        if self.holdout.by == "hash" and self.holdout.fraction:
            data = key.encode() if isinstance(key, str) else key
            digest = hashlib.blake2b(data, digest_size=8, key=self.seed.to_bytes(8, "little", signed=True)).digest()
            if int.from_bytes(digest, "big") < self.holdout.fraction * 2.0**64:
                return VALID
        return TRAIN

    def matches(self, file: str) -> bool:
        """True when a file is held out by name."""
        path = PurePosixPath(file)
        return any(fnmatch.fnmatch(str(path), glob) or fnmatch.fnmatch(path.name, glob) for glob in self.holdout.files)


class SourceConfig(Tagged):
    """Base of the sources. `plan` runs once, in the main process; `read` in the workers, and must always give the same
    items for the same task."""

    registry: ClassVar[Registry[Any] | None] = SOURCES

    def plan(self, context: Context) -> list[Task]:
        """The tasks in order. Raises UserError when there is nothing to read."""
        raise NotImplementedError

    def read(self, task: Task, context: Context) -> Iterator[Item]:
        """Pieces and rejects of one task, in order."""
        raise NotImplementedError

    def identity(self, tasks: list[Task]) -> Any:
        """Plain data that changes when the input changes; kept, so that a restart notices."""
        return tasks


def split_text(text: str, n_bytes: int, split: str, context: Context) -> Iterator[Piece]:
    """One document as pieces of at most `piece_bytes`, cut where a tokenizer would split anyway."""
    if n_bytes <= context.piece_bytes:
        yield Piece(text, n_bytes, split)
        return
    data = text.encode()
    at = 0
    while at < len(data):
        end = len(data) if len(data) - at <= context.piece_bytes else at + safe_cut(data[at : at + context.piece_bytes])
        yield Piece(data[at:end].decode(), end - at, split, first=at == 0, last=end == len(data))
        at = end


def safe_cut(data: bytes, window: int = 1 << 16) -> int:
    """Where to cut `data`, which goes on after its end; always > 0. Within the last `window` bytes: before a line end
    behind a letter or digit, else before a blank behind any visible ASCII character; else at the last whole character.

    No usual pre-tokenizer joins the two sides of the first two, so the tokens do not depend on such a cut.
    """
    low = max(1, len(data) - window)
    for sign, behind in ((b"\n", _WORD), (b" ", _VISIBLE)):
        at = data.rfind(sign, low)
        while at >= low:
            if data[at - 1] in behind:
                return at
            at = data.rfind(sign, low, at)
    at = len(data)
    for _ in range(4):
        if at > 1 and _inside_character(data, at):
            at -= 1
    return at


def _inside_character(data: bytes, at: int) -> bool:
    """True when data[:at] ends within a UTF-8 character."""
    for back in range(1, min(4, at) + 1):
        byte = data[at - back]
        if byte & 0xC0 != 0x80:
            size = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return back < size
    return False
