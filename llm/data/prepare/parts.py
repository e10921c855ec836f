"""A task's work on disk, in parts. A part is there when its .json is there, and that is renamed into place last.

Killed at any moment, a part is whole or absent; the next run goes on behind the last one. Each attempt has file names
of its own, so a worker that outlives its run cannot harm the next.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llm.data.prepare.source import SPLITS, VALID, Context, Lines, Piece, Reject, SourceConfig, Task
from llm.data.store import token_dtype
from llm.data.tokenizer.base import Tokenizer

_BATCH_BYTES = 1 << 20
_BATCH_PIECES = 8192


@dataclass
class Totals:
    """Counts of one split."""

    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    bytes: int = 0

    def add(self, other: dict[str, int]) -> None:
        """Add the counts of a part."""
        for name, value in other.items():
            setattr(self, name, getattr(self, name) + value)


def part_name(task: int, part: int) -> str:
    """Stem of a part's files."""
    return f"{task:06d}-{part:06d}"


def read_part(folder: Path, task: int, part: int) -> dict[str, Any] | None:
    """What a finished part's .json says; None when it is not finished."""
    path = folder / f"{part_name(task, part)}.json"
    return json.loads(path.read_bytes()) if path.exists() else None


def finished_parts(folder: Path, task: int) -> list[dict[str, Any]]:
    """The finished parts of a task, in order."""
    parts: list[dict[str, Any]] = []
    while (part := read_part(folder, task, len(parts))) is not None:
        parts.append(part)
    return parts


def fsync_folder(folder: Path) -> None:
    """Make renames in a folder safe against a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, content: bytes, *, work: Path | None = None) -> None:
    """Write a file so that it is there whole or not at all. work: folder for the file while it is being written."""
    temporary = (work or path.parent) / f".{path.name}.{uuid.uuid4().hex[:8]}"
    with open(temporary, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    fsync_folder(path.parent)


@dataclass
class _Split:
    """Files of one split of a part that is being written. seq: int64 per sequence, 2 * tokens + (ends a document)."""

    base: Path
    totals: Totals = field(default_factory=Totals)
    streams: dict[str, BinaryIO] = field(default_factory=dict)

    def write(self, name: str, data: bytes) -> None:
        if name not in self.streams:
            self.streams[name] = open(f"{self.base}.{name}", "wb")
        self.streams[name].write(data)

    def close(self) -> list[str]:
        for stream in self.streams.values():
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()
        return sorted(self.streams)


class PartWriter:
    """Encodes pieces and writes them as one part."""

    def __init__(self, folder: Path, task: int, part: int, tokenizer: Tokenizer) -> None:
        self.folder = folder
        self.name = part_name(task, part)
        self.attempt = f"{self.name}.{uuid.uuid4().hex[:12]}"
        self.tokenizer = tokenizer
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.splits = {split: _Split(folder / f"{self.attempt}.{split}") for split in SPLITS}
        self.rejects: list[Reject] = []
        self.lines: Lines | None = None
        self.n_bytes = 0

    def write(self, pieces: list[Piece]) -> None:
        """Encode pieces and append them to their splits; eos follows the last piece of each document."""
        ids, lengths = self.tokenizer.encode_flat([piece.text for piece in pieces])
        last = np.fromiter((piece.last for piece in pieces), dtype=bool, count=len(pieces))
        ends = np.cumsum(lengths)
        ids = np.insert(ids, ends[last], self.tokenizer.eos_id).astype(self.dtype)
        lengths = lengths + last
        valid = np.fromiter((piece.split == VALID for piece in pieces), dtype=bool, count=len(pieces))
        held = np.repeat(valid, lengths) if valid.any() else None
        for split, of_split in self.splits.items():
            mine = valid if split == VALID else ~valid
            if not mine.any():
                continue
            part = ids if held is None else ids[held if split == VALID else ~held]
            of_split.write("bin", part.tobytes())
            of_split.write("seq", (2 * lengths[mine] + last[mine]).astype("<i8").tobytes())
            texts = [piece for piece, chosen in zip(pieces, mine) if chosen]
            if split == VALID:
                of_split.write("raw", "".join([piece.text for piece in texts]).encode())
            of_split.totals.documents += int(last[mine].sum())
            of_split.totals.sequences += int(mine.sum())
            of_split.totals.tokens += len(part)
            of_split.totals.bytes += sum(piece.n_bytes for piece in texts)
        self.n_bytes += sum(piece.n_bytes for piece in pieces)

    def commit(self, *, cursor: int, final: bool) -> None:
        """Make the part safe. cursor: items of the task that are done with it. final: the task ends here."""
        splits = {
            split: {"files": of_split.close(), "totals": vars(of_split.totals)}
            for split, of_split in self.splits.items()
        }
        meta = {
            "attempt": self.attempt,
            "cursor": cursor,
            "final": final,
            "splits": splits,
            "rejects": [list(reject) for reject in self.rejects],
            "lines": list(self.lines) if self.lines else None,
        }
        write_atomic(self.folder / f"{self.name}.json", json.dumps(meta).encode())


def run_task(
    folder: Path,
    number: int,
    task: Task,
    source: SourceConfig,
    context: Context,
    tokenizer: Tokenizer,
    part_bytes: int,
) -> Iterator[tuple[int, int, int]]:
    """Do what is left of a task; yields (bytes, documents, rejects) since the last time, for progress."""
    done = finished_parts(folder, number)
    if done and done[-1]["final"]:
        return
    cursor = done[-1]["cursor"] if done else 0
    items = islice(source.read(task, context), cursor, None)
    part, batch_bytes = len(done), min(_BATCH_BYTES, part_bytes)
    writer = PartWriter(folder, number, part, tokenizer)
    batch: list[Piece] = []
    size = 0
    rejects = 0
    for item in items:
        cursor += 1
        if isinstance(item, Reject):
            writer.rejects.append(item)
            rejects += 1
        elif isinstance(item, Lines):
            writer.lines = item
        else:
            batch.append(item)
            size += item.n_bytes
        if size < batch_bytes and len(batch) < _BATCH_PIECES and rejects < _BATCH_PIECES:
            continue
        if batch:
            writer.write(batch)
        yield size, sum(piece.last for piece in batch), rejects
        batch, size, rejects = [], 0, 0
        if writer.n_bytes >= part_bytes or len(writer.rejects) >= 100_000:
            writer.commit(cursor=cursor, final=False)
            part += 1
            writer = PartWriter(folder, number, part, tokenizer)
    if batch:
        writer.write(batch)
    writer.commit(cursor=cursor, final=True)
    yield size, sum(piece.last for piece in batch), rejects
