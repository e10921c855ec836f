"""Cost accounting: what a part costs, computed from its config alone. Tests hold it equal to the built module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Mode = Literal["train", "prefill", "decode"]
"""`train` and `prefill`: forward over `seq_len` tokens; `decode`: one token after `seq_len` earlier ones."""


@dataclass(frozen=True)
class Cost:
    """params: trainable parameters. active_params: those used for one token. flops_per_token: forward FLOPs of one
    token (a multiply-add is two), mean over the sequence; training costs three times that.
    attention_flops: the part of flops_per_token that depends on the context (scores and their use of values).
    state_bytes_per_seq: decode state of one sequence at `seq_len` tokens."""

    params: int = 0
    active_params: int = 0
    flops_per_token: float = 0.0
    attention_flops: float = 0.0
    state_bytes_per_seq: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.params + other.params,
            self.active_params + other.active_params,
            self.flops_per_token + other.flops_per_token,
            self.attention_flops + other.attention_flops,
            self.state_bytes_per_seq + other.state_bytes_per_seq,
        )

    def __radd__(self, other: int) -> Cost:
        return self if other == 0 else NotImplemented


def matmul_cost(d_in: int, d_out: int, *, bias: bool = False) -> Cost:
    """Cost of a dense linear layer."""
    params = d_in * d_out + (d_out if bias else 0)
    return Cost(params=params, active_params=params, flops_per_token=2.0 * d_in * d_out)


@dataclass(frozen=True)
class Dims:
    """What a part may know when it states its cost; the twin of BuildCtx."""

    d_model: int
    layer: int
    n_layers: int
    max_seq_len: int
    linear: Callable[..., Cost]
    """linear(d_in, d_out, *, role, bias=False) -> Cost of whatever stands where that linear stands."""
    norm: Callable[..., Cost]
    """norm(dim, *, role) -> Cost"""
    position: Any = None
    state_dtype_bytes: int = 2
