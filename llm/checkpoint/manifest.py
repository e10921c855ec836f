"""The manifest: which tensors a checkpoint holds, where they lie, and the size and hash of every file.

It is written last, hence a folder without a readable one is not a checkpoint. It carries a digest of itself.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm.checkpoint.storage import DTYPES, FileEntry, hash_file
from llm.core.errors import UserError

SCHEMA = 1
NAME = "manifest.json"


class Damaged(UserError):
    """A checkpoint that must not be used; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor: `sizes` at `offsets`, stored whole under `key` of `file`."""

    file: str
    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class TensorEntry:
    """A tensor by its global shape, and the chunks that cover it."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Manifest:
    """tensors: "model/<name>" or "optim/<parameter>/<key>" -> entry. files: path below the folder -> entry."""

    step: int
    tokens: int
    kind: str
    world_size: int
    tensors: dict[str, TensorEntry]
    files: dict[str, FileEntry]
    created: str = ""

    def dumps(self) -> str:
        """The file's text."""
        body = {"schema": SCHEMA} | asdict(self)
        body["created"] = self.created or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return json.dumps(body | {"digest": _digest(body)}, indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint; raises Damaged when it is missing, broken, altered or of another schema."""
    path = folder / NAME
    try:
        body = json.loads(path.read_bytes())
        if not isinstance(body, dict):
            raise ValueError(f"{path} holds a {type(body).__name__}")
        given = body.pop("digest", None)
        schema = body.pop("schema", None)
    except FileNotFoundError:
        raise Damaged(f"{path} is missing: the checkpoint was never finished") from None
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise Damaged(f"{path} is not a JSON object: truncated or overwritten") from None
    if schema != SCHEMA:
        raise Damaged(f"{path} has schema {schema!r}; this version of the program reads schema {SCHEMA}")
    if given != _digest({"schema": schema} | body):
        raise Damaged(f"{path} does not match its own digest: it was altered")
    return _parse(body)


def find_damage(folder: Path, manifest: Manifest, *, hashes: bool, only: tuple[str, ...] = ("",)) -> list[str]:
    """What is wrong with the files whose names start with one of `only`: missing, wrong size or (`hashes`) altered."""
    found = []
    for name, entry in sorted(manifest.files.items()):
        if not name.startswith(only):
            continue
        path = folder / name
        try:
            size = path.stat().st_size
            if size != entry.size:
                found.append(f"{path} has {size:,} bytes instead of {entry.size:,}: truncated or overwritten")
            elif hashes and _hash_once(path) != entry.sha256:
                found.append(f"{path} does not match its SHA-256: its contents were altered")
        except FileNotFoundError:
            found.append(f"{path} is missing")
        except OSError as error:
            found.append(f"{path} cannot be read: {error.strerror}")
    return found


_hashes: dict[tuple[Path, int, int], str] = {}


def _hash_once(path: Path) -> str:
    """The file's SHA-256, remembered in this process while size and modification time stay; not for a fresh file,
    whose time stamp may be too coarse to show a change."""
    stat = path.stat()
    key = (path.resolve(), stat.st_mtime_ns, stat.st_size)
    if key in _hashes:
        return _hashes[key]
    value = hash_file(path)
    if time.time() - stat.st_mtime > 2.0:
        _hashes[key] = value
    return value


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _parse(body: dict[str, Any]) -> Manifest:
    tensors = {}
    for name, entry in body["tensors"].items():
        assert entry["dtype"] in DTYPES, entry["dtype"]
        chunks = tuple(
            Chunk(chunk["file"], chunk["key"], tuple(chunk["offsets"]), tuple(chunk["sizes"]))
            for chunk in entry["chunks"]
        )
        tensors[name] = TensorEntry(entry["dtype"], tuple(entry["shape"]), chunks)
    files = {name: FileEntry(**entry) for name, entry in body["files"].items()}
    return Manifest(**(body | {"tensors": tensors, "files": files}))
