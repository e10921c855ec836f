"""Small models and contexts for the tests of blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from llm.blocks.base import BuildCtx, InitConfig
from llm.blocks.norms import RMSNormConfig
from llm.blocks.rope import RopeConfig
from llm.core.init import initialise


def context(d_model: int = 32, max_seq_len: int = 64, **changes: Any) -> BuildCtx:
    """What a block may know, with rotary positions and RMSNorm unless told otherwise."""
    known: dict[str, Any] = {
        "d_model": d_model,
        "layer": 0,
        "n_layers": 2,
        "max_seq_len": max_seq_len,
        "linears": {},
        "norm_config": RMSNormConfig(),
        "position_config": RopeConfig(),
        "init": InitConfig(std=None, scale_residual=False),
    }
    return BuildCtx(**(known | changes))


def ready(module: nn.Module, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """The module with values, vectors away from their trivial start."""
    initialise(module, seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return module.to(dtype)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Modules made inside have this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
