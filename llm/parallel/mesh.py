"""Process groups and device meshes, from the environment that torchrun sets."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llm.core.errors import UserError

TIMEOUT = timedelta(minutes=15)
"""After this a collective call that some rank never joins is an error."""


@dataclass(frozen=True)
class Place:
    """Where this process stands among the others, and what it computes on."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device


def find_place(device: Literal["auto", "cpu", "cuda"] = "auto") -> Place:
    """This process's place from RANK, LOCAL_RANK and WORLD_SIZE; without them, the only one. Selects the GPU.

    UserError for a GPU that is not there.
    """
    rank, world_size = _from_environment("RANK", 0), _from_environment("WORLD_SIZE", 1)
    local_rank = _from_environment("LOCAL_RANK", rank)
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and not n_gpus):
        return Place(rank, local_rank, world_size, torch.device("cpu"))
    if not n_gpus:
        raise UserError("train.device=cuda, but torch sees no GPU here; set train.device=cpu or auto")
    if local_rank >= n_gpus:
        raise UserError(
            f"more processes on this machine than GPUs: local rank {local_rank} with {n_gpus} GPUs; start torchrun "
            f"with --nproc-per-node {n_gpus}, or set train.device=cpu"
        )
    torch.cuda.set_device(local_rank)
    return Place(rank, local_rank, world_size, torch.device("cuda", local_rank))


def _from_environment(key: str, default: int) -> int:
    text = os.environ.get(key, str(default))
    if not text.isdecimal():
        raise UserError(
            f"the environment variable {key} is {text!r}, not a whole number; torchrun sets it, otherwise unset it"
        )
    return int(text)


def join(place: Place) -> bool:
    """Join the process group, nccl on GPUs and gloo on CPUs; True when this call made it. A lone process needs no
    rendezvous."""
    if dist.is_initialized():
        return False
    # gloo beside nccl: checkpoints and offloaded parameters are reduced where they are, on the CPU.
    backend = "gloo" if place.device.type == "cpu" else "cpu:gloo,cuda:nccl"
    device_id = place.device if place.device.type == "cuda" else None
    if place.world_size == 1 and "MASTER_ADDR" not in os.environ:
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT, device_id=device_id
        )
    else:
        dist.init_process_group(
            backend, rank=place.rank, world_size=place.world_size, timeout=TIMEOUT, device_id=device_id
        )
    return True


def data_mesh(place: Place, replicate: int) -> DeviceMesh:
    """Mesh over all ranks: ("shard",), or ("replicate", "shard") with `replicate` groups. UserError when the ranks
    cannot be divided so."""
    if place.world_size % replicate:
        raise UserError(f"parallel.replicate {replicate} does not divide the {place.world_size} processes")
    if replicate == 1:
        return init_device_mesh(place.device.type, (place.world_size,), mesh_dim_names=("shard",))
    shape = (replicate, place.world_size // replicate)
    return init_device_mesh(place.device.type, shape, mesh_dim_names=("replicate", "shard"))
