"""Files: safetensors written with a hash and fsync, slices read back. Nothing here can unpickle.

The safetensors layout: 8 bytes little-endian header length, JSON header (name -> dtype, shape, offsets), raw data.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from llm.checkpoint.faults import reach

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

_PIECE = 16 * 2**20


@dataclass(frozen=True)
class FileEntry:
    """A file's size in bytes and the SHA-256 of its contents."""

    size: int
    sha256: str


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in files; one that they cannot hold is our bug."""
    assert dtype in DTYPE_NAMES, f"{dtype} cannot be saved; store it as one of {', '.join(DTYPES)}"
    return DTYPE_NAMES[dtype]


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileEntry:
    """Write a safetensors file, hashed while it is written and flushed to the disk. OSError if the disk refuses.

    Tensors on a device are brought to the host one at a time.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    with path.open("xb") as file:

        def put(data: bytes | memoryview) -> None:
            file.write(data)
            digest.update(data)

        put(len(head).to_bytes(8, "little"))
        put(head)
        for number, name in enumerate(names):
            if number == len(names) // 2:
                reach("tensors-half-written")
            data = _bytes_of(tensors[name])
            for start in range(0, len(data), _PIECE):
                put(data[start : start + _PIECE])
        _flush(file)
    return FileEntry(8 + len(head) + offset, digest.hexdigest())


def write_text(path: Path, text: str) -> FileEntry:
    """Write a text file and flush it to the disk."""
    data = text.encode()
    with path.open("xb") as file:
        file.write(data)
        _flush(file)
    return FileEntry(len(data), hashlib.sha256(data).hexdigest())


def read_slice(path: Path, key: str, start: tuple[int, ...] = (), sizes: tuple[int, ...] | None = None) -> Tensor:
    """The part of tensor `key` that begins at `start` and has `sizes` (None: all of it), as a CPU tensor."""
    from safetensors import safe_open

    with safe_open(path, framework="pt", device="cpu") as file:
        if sizes is None or not sizes:
            return file.get_tensor(key)
        part = tuple(slice(first, first + size) for first, size in zip(start, sizes, strict=True))
        return file.get_slice(key)[part]


def hash_file(path: Path) -> str:
    """SHA-256 of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(path: Path) -> None:
    """Flush a directory, so that names created or renamed in it outlast a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _bytes_of(tensor: Tensor) -> memoryview:
    data: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(data)


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
