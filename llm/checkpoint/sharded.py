"""Who writes and reads which part of a tensor: the planners of torch.distributed.checkpoint over our own files.

Each chunk (the local part of a DTensor, or a whole tensor) is written once, by one of the ranks that hold it, into that
rank's safetensors file; the manifest says where. A reader takes the slices that its own layout needs, whatever layout
wrote them.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    LoadPlan,
    LoadPlanner,
    Metadata,
    SavePlan,
    StorageReader,
)
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import WriteItem
from torch.futures import Future

from llm.checkpoint.manifest import Chunk, Manifest, TensorEntry, read_manifest
from llm.checkpoint.ranks import Ranks
from llm.checkpoint.storage import DTYPES, dtype_name, read_slice


@dataclass
class SaveLayout:
    """items: what this rank writes. tensors: where everything lies, on rank 0 (empty elsewhere)."""

    items: list[WriteItem]
    tensors: dict[str, TensorEntry] = field(default_factory=dict)


class SaveLayouts:
    """Works out the layout of a save; it is kept while no rank's tensors change in name, shape or split."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._items: list[WriteItem] | None = None
        self._layout: SaveLayout | None = None

    def of(self, flat: dict[str, Tensor]) -> tuple[SaveLayout, DefaultSavePlanner]:
        """This rank's layout and a planner that finds the live data of its items. A collective."""
        first = self._ranks.rank == 0
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(flat, is_coordinator=first)
        local = planner.create_local_plan()
        local = SavePlan([item for item in local.items if not _empty_part(item)])
        if not self._ranks.all_true(self._layout is not None and local.items == self._items):
            plans = self._ranks.gather(local)
            layouts = None
            if first:
                plans, _ = planner.create_global_plan(plans)
                tensors = _entries(plans)
                layouts = [SaveLayout(plan.items, tensors if rank == 0 else {}) for rank, plan in enumerate(plans)]
            self._layout = self._ranks.scatter(layouts)
            self._items = local.items
        assert self._layout is not None
        return self._layout, planner


def file_of(name: str, rank: int) -> str:
    """The file in which `rank` keeps its chunks of tensor `name` ("model/..." or "optim/...")."""
    return f"{name.split('/', 1)[0]}/rank-{rank:05d}.safetensors"


def key_of(item: WriteItem) -> str:
    """The name of a chunk within its file: the tensor's, with the offsets unless it is whole."""
    data = item.tensor_data
    assert data is not None, f"{item.index.fqn} is not a tensor"
    name = item.index.fqn.split("/", 1)[1]
    return name if data.chunk.sizes == data.size else f"{name}@{','.join(map(str, data.chunk.offsets))}"


def _empty_part(item: WriteItem) -> bool:
    """A rank's empty share of a tensor which others hold."""
    data = item.tensor_data
    return data is not None and math.prod(data.chunk.sizes) == 0 and math.prod(data.size) > 0


def _entries(plans: list[SavePlan]) -> dict[str, TensorEntry]:
    chunks: dict[str, list[Chunk]] = defaultdict(list)
    known: dict[str, tuple[str, tuple[int, ...]]] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            name, data = item.index.fqn, item.tensor_data
            assert data is not None, f"{name} is not a tensor"
            known[name] = (dtype_name(data.properties.dtype), tuple(data.size))
            box = data.chunk
            chunks[name].append(Chunk(file_of(name, rank), key_of(item), tuple(box.offsets), tuple(box.sizes)))
    return {name: TensorEntry(*known[name], tuple(chunks[name])) for name in sorted(known)}


class Staging:
    """Host copies of what is being saved, so that training may go on. Buffers are reused from save to save."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def copy(self, files: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """The same tensors by file and key, copied to the host (pinned when they come from a GPU)."""
        cuda = False
        staged: dict[str, dict[str, Tensor]] = {}
        for file, tensors in files.items():
            staged[file] = {}
            for key, tensor in tensors.items():
                buffer = self._buffers.get((file, key))
                if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                    buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                    self._buffers[file, key] = buffer
                buffer.copy_(tensor, non_blocking=tensor.is_cuda)
                cuda = cuda or tensor.is_cuda
                staged[file][key] = buffer
        if cuda:
            torch.cuda.synchronize()
        return staged


def live_files(layout: SaveLayout, planner: DefaultSavePlanner, rank: int) -> dict[str, dict[str, Tensor]]:
    """The live local tensors that this rank writes, by file and key."""
    files: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for item in layout.items:
        data = planner.resolve_data(item)
        assert isinstance(data, Tensor), f"{item.index.fqn} is not a tensor"
        files[file_of(item.index.fqn, rank)][key_of(item)] = data.detach()
    return dict(files)


class SafetensorsReader(StorageReader):
    """Reads our checkpoints for torch.distributed.checkpoint, also for its own `load(..., storage_reader=)`."""

    def __init__(self, folder: str | os.PathLike, manifest: Manifest | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = manifest

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        if checkpoint_id is not None and Path(checkpoint_id) != self.folder:
            self.folder, self.manifest = Path(checkpoint_id), None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self.manifest is None:
            self.manifest = read_manifest(self.folder)
        entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        for name, entry in self.manifest.tensors.items():
            boxes = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in entry.chunks]
            properties = TensorProperties(dtype=DTYPES[entry.dtype])
            entries[name] = TensorStorageMetadata(properties, torch.Size(entry.shape), boxes)
        return Metadata(entries)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if self.manifest is None:
            self.manifest = read_manifest(self.folder)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        assert self.manifest is not None
        for item in plan.items:
            offsets = tuple(item.storage_index.offset or ())
            entry = self.manifest.tensors[item.storage_index.fqn]
            chunk = next(chunk for chunk in entry.chunks if chunk.offsets == offsets)
            whole = tuple(item.lengths) == chunk.sizes
            sizes = None if whole else tuple(item.lengths)
            part = read_slice(self.folder / chunk.file, chunk.key, tuple(item.storage_offsets), sizes)
            target = planner.resolve_tensor(item).detach()
            assert target.shape == part.shape, f"{item.storage_index.fqn}: {target.shape} for {part.shape}"
            target.copy_(part)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return Path(checkpoint_id).is_dir()


@torch.no_grad()
def read_into(folder: Path, manifest: Manifest, flat: dict[str, Tensor]) -> None:
    """Fill tensors and DTensors in place with this rank's parts of them. Every name must be in the manifest."""
    reader = SafetensorsReader(folder, manifest)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(flat), reader.read_metadata(), is_coordinator=False)
    plan = planner.finish_plan(planner.create_local_plan())
    reader.read_data(plan, planner).wait()
