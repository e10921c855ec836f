"""Parts -> the final files of a folder of prepared data, one part in memory at a time."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llm.data.prepare.parts import Totals, finished_parts
from llm.data.prepare.source import SPLITS, VALID
from llm.data.store import token_dtype, write_index

_CHUNK = 1 << 22


class _HashedFile:
    """A file that is hashed while it is written, and renamed to its final name when it is whole."""

    def __init__(self, work: Path, final: Path) -> None:
        self.temporary = work / f"merge.{final.name}"
        self.final = final
        self.stream = open(self.temporary, "wb")
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self.stream.write(data)

    def finish(self) -> dict[str, Any]:
        """Rename it into place; its entry for the manifest."""
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.stream.close()
        os.replace(self.temporary, self.final)
        return {"size": self.size, "sha256": self.digest.hexdigest()}


class Merge:
    """The finished parts of all tasks, and what becomes of them."""

    def __init__(self, work: Path, out: Path, n_tasks: int, vocab_size: int) -> None:
        self.work, self.out, self.n_tasks = work, out, n_tasks
        self.dtype = token_dtype(vocab_size)
        self.totals = {split: Totals() for split in SPLITS}
        self.rejects = 0
        for part in self._parts():
            for split in SPLITS:
                self.totals[split].add(part["splits"][split]["totals"])
            self.rejects += len(part["rejects"])

    def _parts(self) -> Iterator[dict[str, Any]]:
        for task in range(self.n_tasks):
            yield from finished_parts(self.work, task)

    def _files(self, split: str, kind: str) -> Iterator[Path]:
        for part in self._parts():
            if kind in part["splits"][split]["files"]:
                yield self.work / f"{part['attempt']}.{split}.{kind}"

    def run(self, advance: Callable[[int], None]) -> dict[str, dict[str, Any]]:
        """Write all files; `advance(bytes)` reports progress. Returns name -> size and sha256 of each."""
        files: dict[str, dict[str, Any]] = {}
        for split in SPLITS:
            if not self.totals[split].documents:
                continue
            files[f"{split}.bin"] = self._concatenate(split, "bin", advance)
            files[f"{split}.idx"] = self._index(split)
            if split == VALID:
                files[f"{split}.raw"] = self._concatenate(split, "raw", advance)
        files["rejects.jsonl"] = self._rejects()
        return files

    def _concatenate(self, split: str, kind: str, advance: Callable[[int], None]) -> dict[str, Any]:
        target = _HashedFile(self.work, self.out / f"{split}.{kind}")
        for path in self._files(split, kind):
            with open(path, "rb") as stream:
                while data := stream.read(_CHUNK):
                    target.write(data)
                    advance(len(data))
        return target.finish()

    def _sequences(self, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(lengths, whether each ends a document) of the sequences of each part."""
        for path in self._files(split, "seq"):
            coded = np.fromfile(path, dtype="<i8")
            yield coded >> 1, (coded & 1).astype(bool)

    def _index(self, split: str) -> dict[str, Any]:
        totals = self.totals[split]

        def pointers() -> Iterator[np.ndarray]:
            at = 0
            for lengths, _ in self._sequences(split):
                ends = at + np.cumsum(lengths)
                yield (ends - lengths) * self.dtype.itemsize
                at = int(ends[-1])

        def documents() -> Iterator[np.ndarray]:
            yield np.zeros(1, dtype=np.int64)
            at = 0
            for lengths, last in self._sequences(split):
                yield at + 1 + np.flatnonzero(last)
                at += len(lengths)

        target = _HashedFile(self.work, self.out / f"{split}.idx")
        write_index(
            target,  # type: ignore[arg-type]
            self.dtype,
            totals.sequences,
            totals.documents,
            (lengths for lengths, _ in self._sequences(split)),
            pointers(),
            documents(),
        )
        return target.finish()

    def _rejects(self) -> dict[str, Any]:
        """Lines of rejects.jsonl; line numbers of a file that several tasks share are counted from its beginning."""
        target = _HashedFile(self.work, self.out / "rejects.jsonl")
        before: tuple[str, int] = ("", 0)
        for part in self._parts():
            for file, line, reason in part["rejects"]:
                offset = before[1] if file == before[0] else 0
                record = {"file": file, "line": line + offset, "reason": reason}
                target.write((json.dumps(record, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))
            if part["lines"] is not None:
                file, count = part["lines"]
                before = (file, count + (before[1] if file == before[0] else 0))
        return target.finish()
