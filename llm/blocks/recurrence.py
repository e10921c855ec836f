"""What recurrent mixers with a matrix per head share: the decode state, how it is advanced, and the cost."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from llm.core.cost import Cost, Mode
from llm.core.seq import SeqInfo
from llm.core.state import RecurrentState, choose_policy, valid_counts
from llm.core.states.recurrent import Shapes, Tensors


class Recurrence(Protocol):
    """S [B, H, K, V] after T tokens whose queries and factors are given, and their outputs [B, T, H, V].

    factors {name: [B, T, ...]}: what each token does to the state, keys under the name "k". valid [B, T] or None: False
    for padding on the right, which must not act.
    """

    def __call__(
        self, q: Tensor, factors: Tensors, state: Tensor | None, *, valid: Tensor | None
    ) -> tuple[Tensor, Tensor]: ...


def matrix_state(
    recurrence: Recurrence,
    batch: int,
    shape: tuple[int, int, int],
    factors: Shapes,
    *,
    n_tentative: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> RecurrentState:
    """An empty state "s" of `shape` (H, K, V) per row, at least fp32; rejected tokens go by copies or replay."""
    shapes = {"s": shape}

    def replay(tensors: Tensors, given: Tensors, counts: Tensor) -> Tensors:
        accepted = torch.arange(given["k"].shape[1], device=counts.device) < counts[:, None]
        return {"s": recurrence(given["k"], given, tensors["s"], valid=accepted)[1]}

    return RecurrentState(
        batch,
        shapes,
        n_tentative=n_tentative,
        policy=choose_policy(shapes, factors, n_tentative),
        factors=factors,
        update=replay,
        dtype=torch.promote_types(dtype, torch.float32),
        device=device,
    )


def extend(recurrence: Recurrence, q: Tensor, factors: Tensors, seq: SeqInfo, state: RecurrentState) -> Tensor:
    """Outputs of the tokens after those in `state`, which is advanced by the real ones."""
    s = state.read()["s"]
    counts = valid_counts(seq)
    counts = torch.full_like(state.length, q.shape[1]) if counts is None else counts
    if state.wants != "each":
        y, final = recurrence(q, factors, s, valid=seq.valid)
        state.write({"s": final}, counts, factors=factors)
        return y
    outputs, states = [], []
    for t in range(q.shape[1]):
        now = slice(t, t + 1)
        valid = None if seq.valid is None else seq.valid[:, now]
        y, s = recurrence(q[:, now], {name: tensor[:, now] for name, tensor in factors.items()}, s, valid=valid)
        outputs.append(y)
        states.append(s)
    state.write({"s": s}, counts, each={"s": torch.stack(states, dim=1)})
    return torch.cat(outputs, dim=1)


def linear_attention_cost(
    n_heads: int,
    d_key: int,
    d_value: int,
    *,
    chunk: int,
    seq_len: int,
    mode: Mode,
    state_dtype_bytes: int,
    n_groups: int | None = None,
) -> Cost:
    """Cost of `kernels.linear_attention`: per token, reading and adding to the state, and scores within the chunk."""
    matrix = n_heads * d_key * d_value
    flops = 4.0 * matrix
    if mode != "decode":
        seen = min(chunk, seq_len)
        flops += 2.0 * seen * ((n_groups or n_heads) * d_key + n_heads * d_value)
    return Cost(flops_per_token=flops, state_bytes_per_seq=matrix * max(4, state_dtype_bytes))


def delta_rule_cost(
    n_heads: int, d_key: int, d_value: int, *, chunk: int, seq_len: int, mode: Mode, state_dtype_bytes: int
) -> Cost:
    """Cost of `kernels.delta_rule`: per token, two reads of the state, one addition to it, products of keys with keys
    and queries within the chunk, the triangular system, and the use of what it gives."""
    matrix = n_heads * d_key * d_value
    flops = 6.0 * matrix
    if mode != "decode":
        seen = min(chunk, seq_len)
        flops += n_heads * seen * (4.0 * d_key + 2.0 * d_value + (d_key + d_value))
    return Cost(flops_per_token=flops, state_bytes_per_seq=matrix * max(4, state_dtype_bytes))
