"""Reading a checkpoint outside a training process, and the checks before a load."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm.checkpoint import folders
from llm.checkpoint.manifest import NAME as MANIFEST
from llm.checkpoint.manifest import Damaged, Manifest, find_damage, read_manifest
from llm.checkpoint.storage import DTYPES, read_slice
from llm.core.errors import UserError, nearest

log = logging.getLogger("llm.checkpoint")


def rng_file(rank: int) -> str:
    """Where a rank's RNG states lie."""
    return f"rng/rank-{rank:05d}.safetensors"


def resolve_checkpoint(path: Path) -> Path:
    """The step folder that a run folder, a checkpoints folder or a step folder stands for: its last good one.

    Files are read in full and compared with their hashes; a damaged one is named and the one before it taken.
    UserError when there is none, or when a step folder was named and is damaged.
    """
    path = Path(path)
    if not path.exists():
        close = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else []
        hint = f"; did you mean {path.parent / close[0]}?" if close else ""
        raise UserError(f"no checkpoint at {path}: it does not exist{hint}")
    if (path / MANIFEST).exists() or path in folders.step_folders(path.parent):
        problems = damage(path)
        if problems:
            raise Damaged(f"checkpoint {path} is damaged: {'; '.join(problems)}")
        return path
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = folders.step_folders(root)
    for folder in reversed(found):
        problems = damage(folder)
        if not problems:
            return folder
        log.error("checkpoint %s is damaged and not used: %s", folder, "; ".join(problems))
    if found:
        raise UserError(f"none of the {len(found)} checkpoints in {root} is intact")
    raise UserError(f"no checkpoint in {root}; give a run folder, its checkpoints folder, or one step-* folder in it")


def damage(folder: Path) -> list[str]:
    """Everything that is wrong with a checkpoint, files read in full."""
    try:
        return find_damage(folder, read_manifest(folder), hashes=True)
    except Damaged as error:
        return [str(error)]


def load_model_tensors(path: Path) -> dict[str, Tensor]:
    """All model tensors of a checkpoint in full, by dotted name, on the CPU; for evaluation, generation and export.

    path: a step folder (see `resolve_checkpoint`). Only the model's files are read. Damaged when they are not sound.
    """
    return _load_part(Path(path), "model")


def load_optim_tensors(path: Path) -> dict[str, dict[str, Tensor]]:
    """All optimizer state of a checkpoint in full, parameter name -> state name -> tensor, on the CPU; empty where none
    was saved."""
    state: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _load_part(Path(path), "optim").items():
        parameter, _, key = name.rpartition("/")
        state.setdefault(parameter, {})[key] = tensor
    return state


class StoredTensors(Mapping[str, Tensor]):
    """The model's tensors in a step folder by dotted name, each read when it is asked for, and not kept.

    Damaged when the model's files are not sound.
    """

    def __init__(self, folder: Path, part: str = "model") -> None:
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        problems = find_damage(self.folder, manifest, hashes=True, only=(f"{part}/",))
        if problems:
            raise Damaged(f"checkpoint {folder} is damaged: {'; '.join(problems)}")
        names = [name for name in manifest.tensors if name.startswith(f"{part}/")]
        self.entries = {name.removeprefix(f"{part}/"): manifest.tensors[name] for name in names}

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entries[name]
        full = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        for chunk in entry.chunks:
            box = tuple(slice(o, o + size) for o, size in zip(chunk.offsets, chunk.sizes, strict=True))
            full[box] = read_slice(self.folder / chunk.file, chunk.key)
        return full

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def _load_part(folder: Path, part: str) -> dict[str, Tensor]:
    return dict(StoredTensors(folder, part))


def load_meta(path: Path) -> dict[str, Any]:
    """The meta of a step folder, as it was given to `save`."""
    return json.loads((Path(path) / "meta.json").read_text())


def load_config_yaml(path: Path) -> str:
    """The resolved config that made a step folder, as YAML text."""
    return (Path(path) / "config.yaml").read_text()


def check_fit(
    folder: Path,
    manifest: Manifest,
    flat: dict[str, Tensor],
    elsewhere: set[str],
    parts: frozenset[str],
    strict: bool,
) -> tuple[dict[str, Tensor], str | None]:
    """What of `flat` can be filled, and what is wrong with the match (None: nothing).

    elsewhere: names that any rank asks for. A saved tensor that nobody asks for is a mistake too when strict.
    """
    heads = tuple(f"{part}/" for part in sorted(parts - {"rng"}))
    missing = sorted(set(flat) - set(manifest.tensors))
    unused = sorted(name for name in manifest.tensors if heads and name.startswith(heads) and name not in elsewhere)
    shared = {name: tensor for name, tensor in flat.items() if name in manifest.tensors}
    mistakes = []
    for name, tensor in shared.items():
        entry = manifest.tensors[name]
        if tuple(tensor.shape) != entry.shape:
            mistakes.append(f"{name} has shape {list(entry.shape)} in it and {list(tensor.shape)} here")
        elif tensor.dtype != DTYPES[entry.dtype]:
            if tensor.is_floating_point() and DTYPES[entry.dtype].is_floating_point:
                log.warning("%s: %s is converted from %s to %s", folder, name, DTYPES[entry.dtype], tensor.dtype)
            else:
                mistakes.append(f"{name} is {DTYPES[entry.dtype]} in it and {tensor.dtype} here")
    if strict and missing:
        mistakes.append(f"it lacks {_some(missing)}")
    if strict and unused:
        mistakes.append(f"there is no place for its {_some(unused)}")
    if not strict and (missing or unused):
        log.warning("%s: not filled: %s; not used: %s", folder, _some(missing), _some(unused))
    if not mistakes:
        return shared, None
    more = f"; and {len(mistakes) - 3} more" if len(mistakes) > 3 else ""
    return shared, f"checkpoint {folder} does not fit this run: {'; '.join(mistakes[:3])}{more}"


def fill_rng(folder: Path, manifest: Manifest, rank: int, rng: dict[str, Tensor]) -> None:
    """Fill this rank's RNG states in place; one that was not saved, or has another form, stays as it is."""
    from safetensors import safe_open

    name = rng_file(rank)
    if name not in manifest.files:
        return
    with safe_open(folder / name, framework="pt", device="cpu") as file:
        for key in set(rng) & set(file.keys()):
            saved = file.get_tensor(key)
            if saved.shape == rng[key].shape and saved.dtype == rng[key].dtype:
                rng[key].copy_(saved)


def load_rng(folder: Path) -> dict[str, Tensor]:
    """RNG states of the first rank; empty where none were saved."""
    from safetensors.torch import load_file

    path = folder / rng_file(0)
    return load_file(path) if path.is_file() else {}


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{len(names)} tensors ({shown}{', ...' if len(names) > 3 else ''})" if names else "nothing"
