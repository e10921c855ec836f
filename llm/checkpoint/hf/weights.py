"""Safetensors folders in Hugging Face's layout: strict reading, sharded writing. Nothing here unpickles."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llm.core.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Weights:
    """The tensors of a folder by name, read one at a time. UserError for whatever is missing or damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _files(folder)

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self.files)

    def __getitem__(self, name: str) -> Tensor:
        path = self.folder / self.files[name]
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path}: tensor {name} cannot be read ({_line(error)}); copy the file again") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; UserError when the file is missing, broken or something else."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"no {path.name} in {path.parent}; is this a folder in Hugging Face's layout?") from error
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not valid JSON ({_line(error)}); copy it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, it holds a {type(value).__name__}")
    return value


def _files(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, checked against what each file really holds."""
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
            raise UserError(f"{folder / INDEX} has no weight_map from tensor names to file names; copy it again")
        for name in sorted(set(index.values())):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise UserError(f"{folder / INDEX} names {name!r}; only .safetensors files of the same folder are read")
        held = {name: _header(folder / name) for name in sorted(set(index.values()))}
        for tensor, name in index.items():
            if tensor not in held[name]:
                raise UserError(
                    f"{folder / name} lacks tensor {tensor}, which {INDEX} says it holds; copy the file again"
                )
        return dict(index)
    if (folder / SINGLE).is_file():
        return dict.fromkeys(_header(folder / SINGLE), SINGLE)
    pickled = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pt*"))
    if pickled:
        raise UserError(
            f"{folder} holds its weights only in {pickled[0]}, a pickle file, which can run any code when opened; "
            "convert it to safetensors where you trust it"
        )
    raise UserError(f"no weights in {folder}: expected {SINGLE} or {INDEX}")


def _header(path: Path) -> list[str]:
    """Names of the tensors in a file, whose length must be what its header says."""
    if not path.is_file():
        raise UserError(f"{path} is missing, though {INDEX} names it; copy it again")
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise UserError(f"{path} is damaged or cut short ({_line(error)}); copy it again") from error


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: its shape and how to make it, so that only one shard is in memory at a time."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def write_sharded(folder: Path, planned: Sequence[Planned], dtype: torch.dtype, max_shard_bytes: int) -> None:
    """Write tensors as model.safetensors, or as numbered shards and an index where one file would be too large."""
    size = torch.empty(0, dtype=dtype).element_size()
    shards: list[list[Planned]] = [[]]
    filled = 0
    total = 0
    for tensor in planned:
        n_bytes = size * torch.Size(tensor.shape).numel()
        if shards[-1] and filled + n_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += n_bytes
        total += n_bytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({t.name: _ready(t.make(), t.shape, dtype) for t in shard}, folder / name, metadata={"format": "pt"})
        weight_map.update({t.name: name for t in shard})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _ready(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    assert tuple(tensor.shape) == tuple(shape)
    # A clone, since safetensors refuses tensors that share storage.
    return tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous().clone()
