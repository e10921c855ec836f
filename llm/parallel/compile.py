"""torch.compile per block, in place."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from llm.core.errors import UserError


def compile_blocks(model: nn.Module, device: torch.device) -> None:
    """Compile each block's forward for static shapes; decoding with a state is left as it is. No name changes.

    The hooks of FSDP and DeepSpeed stay outside of the compiled code. UserError where there is no compiler.
    """
    require_compiler(device)
    for _, block in model.blocks():  # type: ignore[operator]
        block.forward = _compiled(block.forward)


def require_compiler(device: torch.device) -> None:
    """UserError, with what to do, when torch.compile cannot work here."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise UserError(
                "train.compile=true needs the package triton on a GPU; pip install triton, or set train.compile=false"
            )
        return
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None and shutil.which("clang++") is None:
        raise UserError(
            f"train.compile=true needs a C++ compiler on a CPU ({compiler} was not found); install g++, or set "
            "train.compile=false"
        )


def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(forward, dynamic=False)

    def run(x: torch.Tensor, seq: Any, state: Any = None) -> Any:
        return forward(x, seq, state) if state is not None else compiled(x, seq)

    return run
