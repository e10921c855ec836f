"""Token stores: Megatron's indexed format, written in a stream and read through a memory map.

<name>.bin: the tokens of all documents, one after another.
<name>.idx (little endian): magic "MMIDIDX\\0\\0", uint64 version 1, uint8 dtype code, uint64 n_sequences,
uint64 n_documents + 1, int32 length of each sequence, int64 byte offset of each sequence, int64 index of each
document's first sequence and, last, n_sequences. A document may have several sequences: long ones are written in parts.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llm.core.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
MANIFEST = "manifest.json"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 where every id fits, else int32."""
    return np.dtype(np.uint16) if vocab_size < 65536 else np.dtype(np.int32)


def write_index(
    stream: BinaryIO,
    dtype: np.dtype[Any],
    n_sequences: int,
    n_documents: int,
    lengths: Iterable[np.ndarray],
    pointers: Iterable[np.ndarray],
    documents: Iterable[np.ndarray],
) -> None:
    """Write an .idx file from chunks, so that memory does not grow with the data.

    lengths: tokens of each sequence. pointers: byte offset of each. documents: first sequence of each document and,
    last, n_sequences.
    """
    stream.write(HEADER.pack(MAGIC, 1, CODES[dtype], n_sequences, n_documents + 1))
    for kind, chunks in (("<i4", lengths), ("<i8", pointers), ("<i8", documents)):
        for chunk in chunks:
            stream.write(np.ascontiguousarray(chunk, dtype=kind).tobytes())


def write_store(prefix: str | Path, documents: Iterable[Iterable[int] | np.ndarray], vocab_size: int) -> None:
    """Write documents that fit in memory as `prefix`.bin and .idx; each is stored as given (end it with eos)."""
    dtype = token_dtype(vocab_size)
    arrays = [np.asarray(document, dtype=dtype) for document in documents]
    lengths = np.array([len(array) for array in arrays], dtype=np.int64)
    pointers = (np.cumsum(lengths) - lengths) * dtype.itemsize
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{prefix}.bin", "wb") as stream:
        for array in arrays:
            stream.write(array.tobytes())
    with open(f"{prefix}.idx", "wb") as stream:
        write_index(stream, dtype, len(arrays), len(arrays), [lengths], [pointers], [np.arange(len(arrays) + 1)])


class TokenStore:
    """Documents of one split. Opening checks the files against one another; tokens are read through a memory map.

    prefix: path without .bin and .idx. tokens: [n_tokens], all documents one after another.
    offsets: [n_documents + 1] int64, document i is tokens[offsets[i]:offsets[i + 1]].
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        self.bin_path = Path(f"{prefix}.bin")
        self.idx_path = Path(f"{prefix}.idx")
        for path in (self.bin_path, self.idx_path):
            if not path.is_file():
                raise UserError(
                    f"no such file: {path}; a token store needs {self.bin_path.name} and {self.idx_path.name}"
                )
        self._open_index()
        size = self.bin_path.stat().st_size
        expected = int(self.offsets[-1]) * self.dtype.itemsize
        if size != expected:
            raise UserError(
                f"{self.bin_path} has {size} bytes, its index describes {expected}: "
                "truncated or from another run; prepare it again"
            )
        if size:
            self.tokens = np.memmap(self.bin_path, dtype=self.dtype, mode="r")
        else:
            self.tokens = np.empty(0, dtype=self.dtype)  # type: ignore[assignment]

    def _open_index(self) -> None:
        size = self.idx_path.stat().st_size
        with open(self.idx_path, "rb") as stream:
            head = stream.read(HEADER.size)
        if len(head) < HEADER.size or head[:9] != MAGIC:
            raise UserError(f"{self.idx_path} is not a Megatron index: wrong first bytes; prepare the data again")
        _, version, code, n_sequences, n_entries = HEADER.unpack(head)
        if version != 1 or code not in DTYPES:
            raise UserError(
                f"{self.idx_path}: version {version}, dtype code {code} cannot be read "
                f"(known: version 1, codes {sorted(DTYPES)})"
            )
        end = HEADER.size + 12 * n_sequences + 8 * n_entries
        if n_entries < 1 or size not in (end, end + n_sequences):
            raise UserError(
                f"{self.idx_path} has {size} bytes, its header describes {end}: truncated; prepare the data again"
            )
        self.dtype = np.dtype(DTYPES[code])
        raw = np.memmap(self.idx_path, dtype=np.uint8, mode="r")
        lengths = raw[HEADER.size :][: 4 * n_sequences].view("<i4")
        pointers = raw[HEADER.size + 4 * n_sequences :][: 8 * n_sequences].view("<i8")
        documents = np.array(raw[HEADER.size + 12 * n_sequences : end].view("<i8"))
        self.n_documents = int(n_entries) - 1
        self.n_sequences = int(n_sequences)
        if documents[0] != 0 or documents[-1] != n_sequences or (np.diff(documents) < 0).any():
            raise UserError(f"{self.idx_path}: its document table is damaged; prepare the data again")
        total = int(pointers[-1]) // self.dtype.itemsize + int(lengths[-1]) if n_sequences else 0
        starts = np.append(pointers, total * self.dtype.itemsize)
        self.offsets = starts[documents] // self.dtype.itemsize
        if self.offsets[0] != 0 or (np.diff(self.offsets) < 0).any():
            raise UserError(f"{self.idx_path}: its sequence offsets are damaged; prepare the data again")

    @property
    def n_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.offsets[-1])

    def __len__(self) -> int:
        return self.n_documents

    def document(self, i: int) -> np.ndarray:
        """Tokens of document i, [n] of the store's dtype, without a copy."""
        if not 0 <= i < self.n_documents:
            raise IndexError(f"document {i} of {self.n_documents}")
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, [n_documents] int64."""
        return np.diff(self.offsets)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the content: the manifest's hashes, or where there is none a hash of index and sampled tokens."""
        listed = (read_manifest(self.prefix.parent, required=False) or {}).get("files", {})
        if self.bin_path.name in listed and self.idx_path.name in listed:
            text = listed[self.bin_path.name]["sha256"] + listed[self.idx_path.name]["sha256"]
            return hashlib.sha256(text.encode()).hexdigest()
        digest = hashlib.sha256(self.idx_path.read_bytes())
        step = max(1, self.n_tokens // 65536)
        digest.update(np.ascontiguousarray(self.tokens[::step]).tobytes())
        return digest.hexdigest()

    def verify(self) -> None:
        """Compare both files with the sha256 in the manifest; UserError names the one that differs."""
        manifest = read_manifest(self.prefix.parent)
        assert manifest is not None
        for path in (self.bin_path, self.idx_path):
            entry = manifest["files"].get(path.name)
            if entry is None:
                raise UserError(f"{path} is not listed in {MANIFEST}; prepare the data again")
            if file_sha256(path) != entry["sha256"]:
                raise UserError(f"{path} differs from its sha256 in {MANIFEST}: it is damaged; prepare the data again")


def file_sha256(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_manifest(folder: str | Path, *, required: bool = True) -> dict[str, Any] | None:
    """The manifest of a folder of prepared data; UserError when it is missing (if required) or cannot be read."""
    folder = Path(folder)
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(
            f"no prepared data at {folder}: there is no such folder; run launch/prepare.py with out={folder}"
        )
    if not path.is_file():
        if not required:
            return None
        hint = (
            "its preparation did not finish; run it again"
            if (folder / ".work").exists()
            else "run launch/prepare.py first"
        )
        raise UserError(f"no {MANIFEST} in {folder}: {hint}")
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); prepare the data again") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("splits"), dict):
        raise UserError(f"{path} is not a manifest of prepared data; prepare the data again")
    return manifest


def open_split(folder: str | Path, split: str) -> TokenStore:
    """The store of one split of prepared data; UserError names the splits there are."""
    manifest = read_manifest(folder)
    assert manifest is not None
    found = manifest["splits"].get(split)
    if found is None or not found.get("documents"):
        filled = sorted(name for name, entry in manifest["splits"].items() if entry.get("documents"))
        raise UserError(
            f"{folder} has no documents in split {split!r} (there are: {', '.join(filled) or 'none'}); "
            "set holdout and prepare again"
        )
    store = TokenStore(Path(folder) / split)
    if store.n_tokens != found["tokens"]:
        raise UserError(
            f"{store.bin_path} has {store.n_tokens} tokens, {MANIFEST} says {found['tokens']}; prepare the data again"
        )
    return store
