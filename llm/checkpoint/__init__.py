"""Checkpoints: sharded, asynchronous, transactional; loaded at any world size and without unpickling."""

from llm.checkpoint.checkpointer import Checkpointer
from llm.checkpoint.manifest import Damaged
from llm.checkpoint.restore import (
    StoredTensors,
    load_config_yaml,
    load_meta,
    load_model_tensors,
    load_optim_tensors,
    resolve_checkpoint,
)
from llm.checkpoint.state import CheckpointInfo, Kind, TrainState

__all__ = [
    "CheckpointInfo",
    "Checkpointer",
    "Damaged",
    "Kind",
    "StoredTensors",
    "TrainState",
    "load_config_yaml",
    "load_meta",
    "load_model_tensors",
    "load_optim_tensors",
    "resolve_checkpoint",
]
