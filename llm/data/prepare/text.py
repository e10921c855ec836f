"""Sources made of text files: whole files, parts of them, lines; and Python's own standard library."""

from __future__ import annotations

import codecs
import glob as globbing
import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from llm.core.errors import UserError
from llm.data.prepare.source import (
    SOURCES,
    TRAIN,
    VALID,
    Context,
    Item,
    Lines,
    Piece,
    Reject,
    SourceConfig,
    Task,
    safe_cut,
    split_text,
)

_CHUNK = 1 << 20


def find_files(paths: list[str], what: str) -> list[str]:
    """Files of paths, folders (searched to the bottom) and globs, sorted, each once; UserError when one gives none."""
    found: set[str] = set()
    for path in paths:
        if os.path.isfile(path):
            found.add(path)
            continue
        pattern = os.path.join(path, "**", "*") if os.path.isdir(path) else path
        hits = [hit for hit in globbing.glob(pattern, recursive=True) if os.path.isfile(hit)]
        if not hits:
            raise UserError(
                f"no {what} file at {path!r}: there is no such file or folder, and no file matches it as a glob"
            )
        found.update(hits)
    if not found:
        raise UserError(f"a {what} source needs at least one path")
    return sorted(found)


def relative_names(files: list[str]) -> list[str]:
    """Paths relative to the folder that all of them share, with forward slashes; they name the documents."""
    base = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
    return [os.path.relpath(os.path.abspath(file), base).replace(os.sep, "/") for file in files]


def stamp(file: str) -> list[Any]:
    """Size and time of change of a file."""
    status = os.stat(file)
    return [status.st_size, status.st_mtime_ns]


def group_files(files: list[tuple[str, str]], context: Context) -> list[Task]:
    """Tasks of whole (path, name) files, of about `task_bytes` together."""
    tasks: list[Task] = []
    group: list[list[Any]] = []
    size = 0
    for path, name in files:
        status = stamp(path)
        if group and size + status[0] > context.task_bytes:
            tasks.append({"files": group, "bytes": size})
            group, size = [], 0
        group.append([path, name, *status])
        size += status[0]
    if group:
        tasks.append({"files": group, "bytes": size})
    return tasks


def ranges(path: str, name: str, context: Context, align: Callable[[int], int]) -> list[Task]:
    """Tasks for the byte ranges of one large file; `align(offset)` moves an offset to where a range may begin."""
    status = stamp(path)
    cuts = [0]
    for offset in range(context.task_bytes, status[0], context.task_bytes):
        cut = align(offset)
        if cuts[-1] < cut < status[0]:
            cuts.append(cut)
    cuts.append(status[0])
    return [
        {"range": [path, name, start, end, *status], "bytes": end - start} for start, end in zip(cuts[:-1], cuts[1:])
    ]


def read_whole(path: str, name: str, context: Context, split: str | None = None) -> Iterator[Item]:
    """A file that is one document and fits in a task."""
    data = Path(path).read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        yield Reject(path, data.count(b"\n", 0, error.start) + 1, f"invalid UTF-8: {error.reason}")
        return
    if not text.strip():
        yield Reject(path, 1, "empty")
        return
    yield from split_text(text, len(data), split or context.split(name, name), context)


def read_range(
    path: str, start: int, end: int, split: str, context: Context, *, first: bool, last: bool
) -> Iterator[Item]:
    """A range of a file that is one document; the file is known to be valid UTF-8."""
    with open(path, "rb") as stream:
        stream.seek(start)
        data, left = b"", end - start
        while left or data:
            more = stream.read(min(left, context.piece_bytes - len(data)))
            left -= len(more)
            data += more
            cut = safe_cut(data) if left else len(data)
            yield Piece(data[:cut].decode(), cut, split, first=first, last=last and not left and cut == len(data))
            first = False
            data = data[cut:]


def scan_utf8(path: str) -> tuple[int, str] | None:
    """None when a file is valid UTF-8, else (line, reason) of the first fault; memory does not grow with the file."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines = 1
    with open(path, "rb") as stream:
        while True:
            chunk = stream.read(_CHUNK)
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                return lines + chunk.count(b"\n", 0, max(0, error.start)), f"invalid UTF-8: {error.reason}"
            if not chunk:
                return None
            lines += chunk.count(b"\n")


@SOURCES.register("text", tiny=lambda: TextSource(paths=["*.txt"]), paper="none")
class TextSource(SourceConfig):
    """Text files in UTF-8.

    paths: files, folders and globs. document: what one document is: the whole file, a line, a paragraph (lines up to a
    blank one) or whatever `separator` divides. max_document_bytes: files longer than this are cut into documents of
    about that size at line ends; without it a file of any size stays one document.
    """

    paths: list[str]
    document: Literal["file", "line", "paragraph", "separator"] = "file"
    separator: str | None = None
    max_document_bytes: int | None = None

    @model_validator(mode="after")
    def _coherent(self) -> TextSource:
        if (self.document == "separator") != bool(self.separator):
            raise ValueError("separator and document: separator go together")
        if self.max_document_bytes is not None and (self.document != "file" or self.max_document_bytes < 1024):
            raise ValueError("max_document_bytes must be at least 1024 and goes with document: file only")
        return self

    def plan(self, context: Context) -> list[Task]:
        files = find_files(self.paths, "text")
        names = relative_names(files)
        if context.holdout.by == "position":
            return self._plan_by_position(files, names, context)
        if context.holdout.files and not any(map(context.matches, names)):
            raise UserError(
                f"holdout.files {context.holdout.files} match none of the {len(files)} text files, such as {names[0]!r}"
            )
        tasks: list[Task] = []
        small: list[tuple[str, str]] = []
        for path, name in zip(files, names):
            if os.path.getsize(path) <= context.task_bytes:
                small.append((path, name))
                continue
            tasks += group_files(small, context)
            small = []
            tasks += self._plan_large(path, name, context)
        return tasks + group_files(small, context)

    def _plan_large(self, path: str, name: str, context: Context) -> list[Task]:
        if self.document != "file":
            return ranges(path, name, context, partial(self._align, path))
        fault = scan_utf8(path)
        if fault is not None:
            return [{"reject": [path, *fault], "bytes": 0}]
        step = self.max_document_bytes
        tasks = ranges(path, name, context, partial(_align_cut, path))
        for task in tasks:
            task["split"] = None if step else context.split(name, name)
        return tasks

    def _plan_by_position(self, files: list[str], names: list[str], context: Context) -> list[Task]:
        if self.document != "file":
            raise UserError("holdout.by 'position' goes with document: file only; use by: hash")
        for path in files:
            fault = scan_utf8(path)
            if fault is not None:
                raise UserError(f"{path} line {fault[0]}: {fault[1]}; holdout.by 'position' needs files without faults")
        counts = [_count_characters(path) for path in files]
        boundary = int(sum(counts) * (1 - context.holdout.fraction))
        tasks: list[Task] = []
        for path, name, count in zip(files, names, counts):
            in_train = min(max(boundary, 0), count)
            boundary -= count
            size = os.path.getsize(path)
            cut = _byte_of_character(path, in_train)
            for split, start, end in ((TRAIN, 0, cut), (VALID, cut, size)):
                edges = [
                    start,
                    *(_align_cut(path, at) for at in range(start + context.task_bytes, end, context.task_bytes)),
                    end,
                ]
                for low, high in zip(edges[:-1], edges[1:]):
                    if low < high:
                        tasks.append(
                            {
                                "range": [path, name, low, high, *stamp(path)],
                                "split": split,
                                "edges": [start, end],
                                "bytes": high - low,
                            }
                        )
        return tasks

    def _align(self, path: str, offset: int) -> int:
        with open(path, "rb") as stream:
            if self.document == "separator":
                assert self.separator is not None
                return after_separator(stream, offset, self.separator.encode())
            at = after_separator(stream, offset, b"\n")
            if self.document == "paragraph":
                stream.seek(at)
                while line := stream.readline():
                    at += len(line)
                    if not line.strip():
                        break
            return at

    def read(self, task: Task, context: Context) -> Iterator[Item]:
        if "reject" in task:
            yield Reject(*task["reject"])
            return
        if "range" in task:
            path, name, start, end = task["range"][:4]
            if self.document == "file":
                yield from self._read_file_range(task, path, name, start, end, context)
            else:
                yield from self._read_records(path, name, start, end, context)
            return
        for path, name, size, _ in task["files"]:
            if self.document != "file":
                yield from self._read_records(path, name, 0, size, context)
            elif self.max_document_bytes is not None and size > self.max_document_bytes:
                fault = scan_utf8(path)
                if fault is not None:
                    yield Reject(path, *fault)
                    continue
                yield from self._read_cut(path, name, 0, size, context)
            else:
                yield from read_whole(path, name, context)

    def _read_file_range(
        self, task: Task, path: str, name: str, start: int, end: int, context: Context
    ) -> Iterator[Item]:
        if self.max_document_bytes is not None and task.get("split") is None:
            yield from self._read_cut(path, name, start, end, context)
            return
        low, high = task.get("edges", [0, task["range"][4]])
        yield from read_range(path, start, end, task["split"], context, first=start == low, last=end == high)

    def _read_cut(self, path: str, name: str, start: int, end: int, context: Context) -> Iterator[Item]:
        """The range in documents of about max_document_bytes; the hash that picks the split is of name and offset."""
        assert self.max_document_bytes is not None
        with open(path, "rb") as stream:
            stream.seek(start)
            data, at = b"", start
            while at < end:
                data += stream.read(min(end - at, self.max_document_bytes) - len(data))
                cut = safe_cut(data) if at + len(data) < end else len(data)
                yield from split_text(data[:cut].decode(), cut, context.split(f"{name}@{at}", name), context)
                data = data[cut:]
                at += cut

    def _read_records(self, path: str, name: str, start: int, end: int, context: Context) -> Iterator[Item]:
        if self.document == "separator":
            assert self.separator is not None
            records = _separated(path, start, end, self.separator.encode(), context.max_record_bytes)
        else:
            records = _line_records(path, start, end, self.document == "paragraph", context.max_record_bytes)
        line = 1
        for data, newlines, fault in records:
            if fault is not None:
                yield Reject(path, line, fault)
            elif data.strip():
                try:
                    text = data.decode()
                except UnicodeDecodeError as error:
                    yield Reject(path, line + data.count(b"\n", 0, error.start), f"invalid UTF-8: {error.reason}")
                else:
                    yield from split_text(text, len(data), context.split(hashlib.sha256(data).digest(), name), context)
            line += newlines
        yield Lines(path, line - 1)


def _line_records(
    path: str, start: int, end: int, paragraphs: bool, limit: int
) -> Iterator[tuple[bytes, int, str | None]]:
    """(bytes without the line end, line ends consumed, fault) of each line or paragraph of a range."""
    with open(path, "rb") as stream:
        stream.seek(start)
        at = start
        lines: list[bytes] = []
        size, fault = 0, None
        while at < end:
            line = stream.readline(limit + 2)
            if not line:
                break
            at += len(line)
            while not line.endswith(b"\n") and len(line) > limit:
                fault = f"longer than {limit} bytes"
                rest = stream.readline(limit + 2)
                at += len(rest)
                line = rest if len(rest) > limit else rest or b"\n"
            blank = not line.strip()
            size += len(line)
            if size > limit + 1:
                fault = f"longer than {limit} bytes"
            if fault is None:
                lines.append(line)
            else:
                lines.append(b"")
            if not paragraphs or blank or at >= end:
                newlines = len(lines) if fault or at < end or line.endswith(b"\n") else len(lines) - 1
                yield b"".join(lines).rstrip(b"\r\n"), newlines, fault
                lines, size, fault = [], 0, None


def _separated(
    path: str, start: int, end: int, separator: bytes, limit: int
) -> Iterator[tuple[bytes, int, str | None]]:
    """(bytes, line ends consumed, fault) of the records of a range between separators."""
    with open(path, "rb") as stream:
        stream.seek(start)
        data, left, newlines, fault = b"", end - start, 0, None
        while left or data:
            more = stream.read(min(left, _CHUNK))
            left -= len(more)
            data += more
            parts = data.split(separator)
            data = parts.pop() if left else b""
            for part in parts:
                if fault is None and len(part) > limit:
                    fault = f"longer than {limit} bytes"
                yield part, newlines + part.count(b"\n") + separator.count(b"\n"), fault
                newlines, fault = 0, None
            if len(data) > limit:
                fault = f"longer than {limit} bytes"
                keep = len(separator) - 1
                newlines += data.count(b"\n", 0, len(data) - keep)
                data = data[len(data) - keep :]


def after_separator(stream: Any, offset: int, separator: bytes) -> int:
    """Offset behind the first separator that ends after `offset`; the end of the file when there is none."""
    at = max(0, offset - len(separator))
    stream.seek(at)
    data = b""
    while chunk := stream.read(_CHUNK):
        data += chunk
        hit = data.find(separator)
        if hit >= 0:
            return at + hit + len(separator)
        keep = len(separator) - 1
        at += len(data) - keep
        data = data[len(data) - keep :]
    return at + len(data)


def _align_cut(path: str, offset: int) -> int:
    """A safe place to cut a document, at or somewhat before `offset`."""
    with open(path, "rb") as stream:
        low = max(0, offset - (1 << 16))
        stream.seek(low)
        return low + safe_cut(stream.read(offset - low))


def _count_characters(path: str) -> int:
    import numpy as np

    count = 0
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            count += int(np.count_nonzero((np.frombuffer(chunk, dtype=np.uint8) & 0xC0) != 0x80))
    return count


def _byte_of_character(path: str, index: int) -> int:
    """Byte offset at which character `index` begins."""
    import numpy as np

    at = 0
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            starts = np.flatnonzero((np.frombuffer(chunk, dtype=np.uint8) & 0xC0) != 0x80)
            if index < len(starts):
                return at + int(starts[index])
            index -= len(starts)
            at += len(chunk)
    return at


@SOURCES.register("stdlib", tiny=lambda: StdlibSource(), paper="none")
class StdlibSource(SourceConfig):
    """The running Python's own standard library: its .py files, each a document named by its relative path.

    exclude: folders left out, relative to the library. Empty files are left out as well.
    """

    exclude: list[str] = ["site-packages", "dist-packages", "__pycache__", "lib2to3/tests/data"]

    def plan(self, context: Context) -> list[Task]:
        root = Path(sysconfig.get_paths()["stdlib"])
        files: list[tuple[str, str]] = []
        for folder, folders, names in os.walk(root):
            base = Path(folder).relative_to(root)
            folders[:] = [
                name for name in folders if name not in self.exclude and (base / name).as_posix() not in self.exclude
            ]
            files += [
                (os.path.join(folder, name), (base / name).as_posix())
                for name in names
                if name.endswith(".py") and os.path.getsize(os.path.join(folder, name))
            ]
        if not files:
            raise UserError(f"the standard library at {root} has no .py files; use a text source instead")
        if context.holdout.by == "position":
            raise UserError("holdout.by 'position' goes with a text source only; use by: hash")
        return group_files(sorted(files, key=lambda file: file[1]), context)

    def read(self, task: Task, context: Context) -> Iterator[Item]:
        for path, name, *_ in task["files"]:
            yield from read_whole(path, name, context)
