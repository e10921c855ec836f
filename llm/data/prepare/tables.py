"""Sources of records: JSON lines, Parquet, and any data set of the `datasets` library."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from pydantic import model_validator

from llm.config.base import Count
from llm.core.errors import UserError, nearest
from llm.data.prepare.source import SOURCES, Context, Item, Lines, Reject, SourceConfig, Task, split_text
from llm.data.prepare.text import after_separator, find_files, group_files, ranges, relative_names

_COMPRESSED = (".gz", ".zst")


def text_of(record: Any, field: str, file: str, line: int) -> str | Reject:
    """The text in a record, or why there is none. A dotted `field` looks into nested records."""
    value = record
    for name in field.split("."):
        if not isinstance(value, dict):
            return Reject(file, line, f"not an object with a field {field!r} but {type(value).__name__}")
        if name not in value:
            return Reject(file, line, f"no field {field!r}")
        value = value[name]
    if not isinstance(value, str):
        return Reject(file, line, f"field {field!r} is {type(value).__name__}, not text")
    if not value.strip():
        return Reject(file, line, "empty")
    return value


def record_items(text: str, file: str, name: str, line: int, context: Context) -> Iterator[Item]:
    """Pieces of one record's text, or its reject."""
    try:
        data = text.encode()
    except UnicodeEncodeError:
        yield Reject(file, line, "not valid Unicode: a lone surrogate")
        return
    if len(data) > context.max_record_bytes:
        yield Reject(file, line, f"longer than {context.max_record_bytes} bytes")
        return
    key = hashlib.sha256(data).digest() if context.holdout.fraction else b""
    yield from split_text(text, len(data), context.split(key, name), context)


def check_holdout(context: Context) -> None:
    """Record sources know documents, not characters."""
    if context.holdout.by == "position":
        raise UserError("holdout.by 'position' goes with a text source only; use by: hash")


@SOURCES.register("jsonl", tiny=lambda: JsonlSource(paths=["*.jsonl"]), paper="none")
class JsonlSource(SourceConfig):
    """JSON lines, also compressed as .gz or .zst: a record per line, its text in `field` (dots look into objects)."""

    paths: list[str]
    field: str = "text"

    def plan(self, context: Context) -> list[Task]:
        check_holdout(context)
        files = find_files(self.paths, "jsonl")
        tasks: list[Task] = []
        small: list[tuple[str, str]] = []
        for path, name in zip(files, relative_names(files)):
            if os.path.getsize(path) <= context.task_bytes or path.endswith(_COMPRESSED):
                small.append((path, name))
                continue
            tasks += group_files(small, context) + ranges(path, name, context, partial(_line_start, path))
            small = []
        return tasks + group_files(small, context)

    def read(self, task: Task, context: Context) -> Iterator[Item]:
        if "range" in task:
            path, name, start, end = task["range"][:4]
            with open(path, "rb") as stream:
                stream.seek(start)
                yield from self._read(stream, path, name, end - start, context)
            return
        for path, name, *_ in task["files"]:
            try:
                with _open(path) as stream:
                    yield from self._read(stream, path, name, None, context)
            except (gzip.BadGzipFile, EOFError, OSError) as error:
                if not path.endswith(_COMPRESSED):
                    raise
                yield Reject(path, 0, f"damaged compression: {error}")

    def _read(self, stream: BinaryIO, path: str, name: str, left: int | None, context: Context) -> Iterator[Item]:
        limit = 6 * context.max_record_bytes + 4096
        line = 0
        while left is None or left > 0:
            data = stream.readline(limit)
            if not data:
                break
            line += 1
            size, too_long = len(data), False
            while not data.endswith(b"\n") and len(data) == limit:
                too_long = True
                data = stream.readline(limit)
                size += len(data)
            if left is not None:
                left -= size
            if too_long:
                yield Reject(path, line, f"longer than {context.max_record_bytes} bytes")
                continue
            yield from self._record(data, path, name, line, context)
        yield Lines(path, line)

    def _record(self, data: bytes, path: str, name: str, line: int, context: Context) -> Iterator[Item]:
        if not data.strip():
            yield Reject(path, line, "empty")
            return
        try:
            record = json.loads(data.decode())
        except UnicodeDecodeError as error:
            yield Reject(path, line, f"invalid UTF-8: {error.reason}")
            return
        except (ValueError, RecursionError) as error:
            yield Reject(path, line, f"broken JSON: {error}")
            return
        text = text_of(record, self.field, path, line)
        if isinstance(text, Reject):
            yield text
        else:
            yield from record_items(text, path, name, line, context)


def _line_start(path: str, offset: int) -> int:
    with open(path, "rb") as stream:
        return after_separator(stream, offset, b"\n")


def _open(path: str) -> BinaryIO:
    if path.endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.endswith(".zst"):
        return cast(BinaryIO, io.BufferedReader(_Zstd(path), 1 << 20))
    return open(path, "rb")


class _Zstd(io.RawIOBase):
    """Bytes of a .zst file of one or more frames; damage in it raises OSError, like damage in a .gz file."""

    def __init__(self, path: str) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise UserError(f"{path} needs zstandard: pip install zstandard, or decompress it") from error
        self._module = zstandard
        self._stream = open(path, "rb")
        self._frame: Any = None
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._stream.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._stream.read(1 << 16)
            if not self._input:
                if self._frame is not None:
                    raise OSError("the file ends within a zstd frame")
                return 0
            self._frame = self._frame or self._module.ZstdDecompressor().decompressobj()
            try:
                self._output = self._frame.decompress(self._input)
            except self._module.ZstdError as error:
                raise OSError(str(error)) from error
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        n = min(len(buffer), len(self._output))
        buffer[:n], self._output = self._output[:n], self._output[n:]
        return n


@SOURCES.register("parquet", tiny=lambda: ParquetSource(paths=["*.parquet"]), paper="none")
class ParquetSource(SourceConfig):
    """Parquet files: a document per row, its text in column `field`. Reject lines count rows from 1."""

    paths: list[str]
    field: str = "text"

    def plan(self, context: Context) -> list[Task]:
        check_holdout(context)
        files = find_files(self.paths, "parquet")
        tasks: list[Task] = []
        for path, name in zip(files, relative_names(files)):
            table = _parquet(path)
            names = table.schema_arrow.names
            if self.field not in names:
                close = nearest(self.field, names)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise UserError(f"{path} has no column {self.field!r}{hint} (columns: {', '.join(names)})")
            first = 1
            column = names.index(self.field)
            status = os.stat(path)
            for group in range(table.num_row_groups):
                about = table.metadata.row_group(group)
                size = (
                    about.column(column).total_uncompressed_size
                    if about.num_columns == len(names)
                    else about.total_byte_size
                )
                where = [path, name, group, first, status.st_size, status.st_mtime_ns]
                tasks.append({"group": where, "bytes": size})
                first += about.num_rows
        return tasks

    def read(self, task: Task, context: Context) -> Iterator[Item]:
        path, name, group, row = task["group"][:4]
        for batch in _parquet(path).iter_batches(batch_size=256, row_groups=[group], columns=[self.field]):
            for value in batch.column(0):
                yield from self._row(value, path, name, row, context)
                row += 1

    def _row(self, value: Any, path: str, name: str, row: int, context: Context) -> Iterator[Item]:
        try:
            text = value.as_py()
        except UnicodeDecodeError as error:
            yield Reject(path, row, f"invalid UTF-8: {error.reason}")
            return
        if not isinstance(text, str):
            yield Reject(path, row, f"field {self.field!r} is {type(text).__name__}, not text")
        elif not text.strip():
            yield Reject(path, row, "empty")
        else:
            yield from record_items(text, path, name, row, context)


def _parquet(path: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("source 'parquet' needs pyarrow: pip install pyarrow") from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"cannot read the parquet file {path}: {str(error).splitlines()[0]}") from error


@SOURCES.register("datasets", tiny=lambda: DatasetsSource(path="data"), paper="none")
class DatasetsSource(SourceConfig):
    """Any data set that the `datasets` library opens without running code of the data set's own.

    path: a name on the hub, a builder such as "json", or a folder (also one that `save_to_disk` wrote). name: its
    configuration; split: its part; data_files, data_dir: as `load_dataset` takes them; field: the column of the text.
    streaming: read without a copy on disk; max_documents: only so many from the beginning. rows_per_task: rows that one
    task reads where the data set is not streamed. Reject lines count rows from 1.
    """

    path: str
    name: str | None = None
    split: str = "train"
    data_files: str | list[str] | None = None
    data_dir: str | None = None
    field: str = "text"
    streaming: bool = False
    max_documents: Count | None = None
    rows_per_task: Count = 20_000

    @model_validator(mode="after")
    def _coherent(self) -> DatasetsSource:
        if self.streaming and self.rows_per_task != 20_000:
            raise ValueError("rows_per_task would be ignored with streaming: true; leave it out")
        return self

    def _load(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise UserError("source 'datasets' needs the library: pip install datasets") from error
        datasets.disable_progress_bars()
        try:
            if (Path(self.path) / "state.json").exists() or (Path(self.path) / "dataset_dict.json").exists():
                found = datasets.load_from_disk(self.path)
                found = found[self.split] if isinstance(found, dict) else found
                return found.to_iterable_dataset() if self.streaming else found
            return datasets.load_dataset(
                self.path,
                self.name,
                split=self.split,
                data_files=self.data_files,
                data_dir=self.data_dir,
                streaming=self.streaming,
            )
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"cannot open the data set {self.path!r}, split {self.split!r}: {reason}") from error

    def plan(self, context: Context) -> list[Task]:
        check_holdout(context)
        data = self._load()
        columns = data.column_names
        if columns is not None and self.field.split(".")[0] not in columns:
            raise UserError(f"the data set {self.path!r} has no column {self.field!r} (columns: {', '.join(columns)})")
        if self.streaming:
            shards = 1 if self.max_documents is not None else max(1, data.num_shards)
            return [{"shard": [i, shards], "bytes": 0} for i in range(shards)]
        rows = len(data) if self.max_documents is None else min(len(data), self.max_documents)
        if not rows:
            raise UserError(f"the data set {self.path!r}, split {self.split!r}, has no rows")
        step = self.rows_per_task
        mark = str(getattr(data, "_fingerprint", ""))
        return [{"rows": [at, min(rows, at + step), mark], "bytes": 0} for at in range(0, rows, step)]

    def identity(self, tasks: list[Task]) -> Any:
        return [
            {key: value for key, value in task.items() if key != "rows"} | {"rows": task.get("rows", [])[:2]}
            for task in tasks
        ]

    def read(self, task: Task, context: Context) -> Iterator[Item]:
        data = self._load().select_columns([self.field.split(".")[0]])
        where = f"{self.path}[{self.split}]"
        first = 1
        if "rows" in task:
            low, high = task["rows"][:2]
            data, first = data.select(range(low, high)), low + 1
        else:
            index, shards = task["shard"]
            if shards > 1:
                data = data.shard(num_shards=shards, index=index)
                where = f"{where} shard {index}"
            if self.max_documents is not None:
                data = data.take(self.max_documents)
        for row, record in enumerate(data, start=first):
            text = text_of(record, self.field, where, row)
            if isinstance(text, Reject):
                yield text
            else:
                yield from record_items(text, where, where, row, context)
