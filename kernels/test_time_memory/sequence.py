"""Whole sequences, block by block: one document per row, packed documents, and rows that go on from a decode state.

Blocks are counted from the start of each document. Shapes: q, k [B, H, T, d], v [B, H, T, d_v], gates [B, H, T, ...];
G blocks side by side are [B, H, G, b, ...].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.test_time_memory.block import (
    Block,
    Gates,
    MemoryState,
    Outer,
    answer,
    factors,
    last_tokens,
    prepare,
    run_block,
    run_muon,
)
from kernels.test_time_memory.network import Form, Weights, gradient_factors, recall


class Tokens(NamedTuple):
    """q None: nothing is read."""

    q: Tensor | None
    k: Tensor
    v: Tensor
    gates: Gates


def each_tensor(tree: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """The same nested tuples with fn applied to every tensor."""
    if isinstance(tree, Tensor):
        return fn(tree)
    if not isinstance(tree, tuple):
        return tree
    parts = [each_tensor(part, fn) for part in tree]
    return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)


def pieces_of(tree: Any, n_pieces: int) -> list[Any]:
    """One tree per piece of tensors [B, H, G, ...]. Views by one `unbind`, whose gradient is linear in G."""
    if isinstance(tree, Tensor):
        return list(tree.unbind(2))
    if not isinstance(tree, tuple) or not tree:
        return [tree] * n_pieces
    rows = zip(*(pieces_of(part, n_pieces) for part in tree))
    return [type(tree)(*row) for row in rows] if hasattr(tree, "_fields") else list(rows)


def _pad_time(x: Tensor, before: int, behind: int) -> Tensor:
    """x [B, H, T, ...] with zeros in front and behind."""
    return F.pad(x, (*(0, 0) * (x.dim() - 3), before, behind)) if before or behind else x


def _windows(x: Tensor, size: int, step: int) -> Tensor:
    """x [B, H, T, ...] -> [B, H, G, size, ...], one window at every `step` tokens."""
    if size == step:
        return x.unflatten(2, (-1, step))
    return x.unfold(2, size, step).movedim(-1, 3)


class _Scan:
    """Runs the blocks of one sequence after another."""

    def __init__(self, form: Form, outer: Outer, blocks: Block, recompute: bool) -> None:
        self.form, self.outer = form, outer
        self.again = recompute and torch.is_grad_enabled()
        n_pieces = blocks.k.shape[2]
        self.pieces = pieces_of(blocks if self.again else prepare(form, outer, blocks), n_pieces)

    def __call__(self, piece: int, state: MemoryState, complete: Tensor | None = None) -> tuple[Tensor, MemoryState]:
        """(y [B, H, b, d_v], the state after it). complete: as `run_block` has it."""
        block = self.pieces[piece]
        if self.again:
            y, after = checkpoint(run_block, self.form, self.outer, state, block, complete, use_reentrant=False)
        else:
            y, after = run_block(self.form, self.outer, state, block, complete)
        assert y is not None
        return y, after


def run_document(
    form: Form, outer: Outer, state: MemoryState, tokens: Tokens, *, recompute: bool = False
) -> tuple[Tensor, MemoryState]:
    """One document per row, from its start: (y [B, H, T, d_v], the last state). recompute: hold no more than the states
    between blocks for the backward pass."""
    n_tokens, halo = tokens.k.shape[2], form.window - 1
    b = min(form.block, n_tokens)
    spare = -n_tokens % b
    at = torch.arange(-halo, n_tokens + spare, device=tokens.k.device)[None, None]
    real = _windows((at >= 0) & (at < n_tokens), b + halo, b) if halo or spare else None
    steps = None if real is None or not spare else real[..., halo:]

    def cut(x: Tensor) -> Tensor:
        return _windows(_pad_time(x, 0, spare), b, b)

    def with_halo(x: Tensor) -> Tensor:
        return _windows(_pad_time(x, halo, spare), b + halo, b)

    q, gates = each_tensor((tokens.q, tokens.gates), cut)
    scan = _Scan(form, outer, Block(q, with_halo(tokens.k), with_halo(tokens.v), gates, steps, real), recompute)
    outputs = []
    unfinished = torch.zeros(tokens.k.shape[0], dtype=torch.bool, device=tokens.k.device) if form.renormed else None
    for piece in range(len(scan.pieces)):
        y, state = scan(piece, state, None if (piece + 1) * form.block <= n_tokens else unfinished)
        outputs.append(y)
    return torch.cat(outputs, dim=2)[:, :, :n_tokens], state


class Packing(NamedTuple):
    """Where the blocks of packed documents are, for rows cut into G pieces of b tokens (blocks begin anywhere).

    A document's first block starts from the initial memory: all of these are treated in parallel. A later block follows
    one that began b tokens earlier, hence at most one later block begins in each piece, and at most one first block
    that is followed by another (an opening).

    later, opening [B, G]: the token at which it begins (any where there is none); has_later, has_opening [B, G] bool.
    """

    later: Tensor
    has_later: Tensor
    opening: Tensor
    has_opening: Tensor


def find_blocks(positions: Tensor, block: int) -> Packing:
    """positions [B, T], which restart at 0 with each document."""
    padded = F.pad(positions, (0, -positions.shape[1] % block), value=-1)
    pieces = torch.arange(0, padded.shape[1], block, device=positions.device)

    def only(mask: Tensor) -> tuple[Tensor, Tensor]:
        marks = mask.unflatten(1, (-1, block))
        return pieces + marks.long().argmax(-1), marks.any(-1)

    is_opening = F.pad(padded[:, block:], (0, block), value=-1) == block
    return Packing(*only((padded >= block) & (padded % block == 0)), *only(is_opening))


def run_packed(
    form: Form, outer: Outer, initial: Weights, tokens: Tokens, positions: Tensor, *, recompute: bool = False
) -> Tensor:
    """Documents packed in rows, each with the outputs it has alone: y [B, H, T, d_v]. initial: weights [H, m, n]."""
    b = form.block
    document = (positions == 0).long().cumsum(dim=1)
    packing = find_blocks(positions, b)
    y_first = _first_blocks(form, outer, initial, tokens, document)
    n_pieces = packing.later.shape[1]
    if n_pieces == 1:
        return y_first
    openings = _gathered(tokens._replace(q=None), document, packing.opening, packing.has_opening, b, 0)
    opened = pieces_of(_opened(form, outer, initial, openings), n_pieces)
    later = _gathered(tokens, document, packing.later, packing.has_later, b, form.window - 1)
    scan = _Scan(form, outer, later, recompute)
    state: MemoryState = opened[0]
    outputs = []
    for piece in range(1, n_pieces):
        y, after = scan(piece, state)
        outputs.append(y)
        fresh = packing.has_opening[:, piece, None, None, None]
        started = opened[piece]
        state = MemoryState(
            _choose(fresh, started.memory, after.memory), _choose(fresh, started.momentum, after.momentum)
        )
    y_later = torch.cat(outputs, dim=2)
    begin = torch.arange(positions.shape[1], device=positions.device) - positions % b
    index = (begin.div(b, rounding_mode="floor") - 1) * b + positions % b
    y_later = torch.take_along_dim(y_later, index.clamp(min=0)[:, None, :, None], dim=2)
    return torch.where((positions < b)[:, None, :, None], y_first, y_later)


def _first_blocks(form: Form, outer: Outer, initial: Weights, tokens: Tokens, document: Tensor) -> Tensor:
    """What every token would answer if it stood in the first block of its document, [B, H, T, d_v]: each piece of b
    tokens beside the piece before it, with a mask of documents."""
    b, n_tokens = form.block, document.shape[1]
    assert tokens.q is not None
    state = MemoryState(initial)
    if form.muon_block:
        return recall(form, initial, outer.lift(tokens.q), outer.norm)

    def windows(x: Tensor) -> Tensor:
        return _windows(_pad_time(x, b, -n_tokens % b), 2 * b, b)

    documents = windows(document[:, None])
    same = (documents[..., :, None] == documents[..., None, :]) & (documents > 0)[..., None, :]
    lifted = tokens._replace(q=outer.lift(tokens.q), k=outer.lift(tokens.k))
    q, k, v, gates = each_tensor(lifted, windows)
    block = Block(q, k, v, gates, documents > 0)
    prepared = prepare(form, Outer(_as_is, outer.norm), block, same)
    if form.exact:
        inputs, errors = factors(form, outer, state, prepared)
    else:
        inputs, errors = each_tensor(gradient_factors(form, initial, lifted.k, tokens.v, outer.norm), windows)
    if form.optimizer != "muon":
        assert prepared.z_read is not None
        seen = last_tokens(prepared.seen, b)
        y = answer(form, outer, state, prepared.z_read[:, :, :, -b:], inputs, errors, seen).flatten(2, 3)
        return y[:, :, :n_tokens]
    outputs = []
    for part, own_inputs, own_errors in pieces_of((prepared, inputs, errors), same.shape[2]):
        each, _ = run_muon(form, outer, state, part, own_inputs, own_errors)
        assert each is not None
        outputs.append(each[:, :, -b:])
    return torch.cat(outputs, dim=2)[:, :, :n_tokens]


def _as_is(x: Tensor) -> Tensor:
    return x


def _gathered(tokens: Tokens, document: Tensor, starts: Tensor, exists: Tensor, b: int, halo: int) -> Block:
    """The blocks of b tokens from starts [B, G] with `halo` tokens before them."""
    n_tokens = document.shape[1]
    index = starts[..., None] + torch.arange(-halo, b, device=starts.device)
    inside = (index >= 0) & (index < n_tokens)
    index = index.clamp(0, n_tokens - 1)
    own = torch.take_along_dim(document, starts.clamp(max=n_tokens - 1), dim=1)[..., None]
    found = torch.take_along_dim(document, index.flatten(1), dim=1).view_as(index)
    valid = (inside & (found == own) & exists[..., None])[:, None]

    def take(x: Tensor, which: Tensor) -> Tensor:
        return _take_time(x, which.flatten(1)).unflatten(2, which.shape[1:])

    steps = index[..., halo:]
    q, gates = each_tensor((tokens.q, tokens.gates), lambda x: take(x, steps))
    return Block(q, take(tokens.k, index), take(tokens.v, index), gates, valid[..., halo:], valid)


def _take_time(x: Tensor, index: Tensor) -> Tensor:
    """x [B, H, T, ...] at index [B, N] -> [B, H, N, ...]."""
    return torch.take_along_dim(x, index.reshape(index.shape[0], 1, -1, *(1,) * (x.dim() - 3)), dim=2)


def _opened(form: Form, outer: Outer, initial: Weights, openings: Block) -> MemoryState:
    """States after the openings, [B, H, G, m, n] each; piece by piece where the weights after every token are held."""
    start = MemoryState(initial)
    if form.optimizer != "muon" or form.muon_block:
        return run_block(form, outer, start, openings)[1]
    pieces = pieces_of(openings, openings.k.shape[2])
    states = [run_block(form, outer, start, piece)[1] for piece in pieces]
    memory, momentum = (
        tuple(torch.stack(w, dim=2) for w in zip(*group))
        for group in ((s.memory for s in states), (s.momentum for s in states))
    )
    return MemoryState(memory, momentum)


def _choose(mask: Tensor, new: Weights, old: Weights) -> Weights:
    return tuple(torch.where(mask, a, b) for a, b in zip(new, old))


class Past(NamedTuple):
    """What a row that goes on brings besides its state: the last c - 1 keys and targets [B, H, c - 1, d], oldest first,
    how many of them are real [B], and its place in its block [B] (0: a block begins)."""

    k: Tensor
    v: Tensor
    n_real: Tensor
    place: Tensor


def run_rows(
    form: Form, outer: Outer, state: MemoryState, past: Past, tokens: Tokens, counts: Tensor
) -> tuple[Tensor | None, MemoryState]:
    """T more tokens of rows that stand anywhere in their blocks; of row b only the first counts[b] are real.

    Where blocks matter `state` has an anchor, or what replaces it for one Newton-Schulz per block.
    """
    b, n_tokens, halo = form.block, tokens.k.shape[2], form.window - 1
    k, v = torch.cat([past.k, tokens.k], dim=2), torch.cat([past.v, tokens.v], dim=2)
    at = torch.arange(halo + n_tokens, device=counts.device)
    keys = (at >= halo - past.n_real[:, None]) & (at < halo + counts[:, None])
    real = keys[:, halo:]
    if not form.aligned:
        outputs = []
        for start in range(0, n_tokens, b):
            here, near = slice(start, start + b), slice(start, start + b + halo)
            q, gates = each_tensor((tokens.q, tokens.gates), partial(_part, part=here))
            block = Block(q, k[:, :, near], v[:, :, near], gates, real[:, None, here], keys[:, None, near])
            y, state = run_block(form, outer, state, block, complete=real[:, start + b - 1 : start + b].any(1))
            outputs.append(y)
        return _joined(outputs), state
    if n_tokens > b:
        return _run_grid(form, outer, state, past.place, tokens._replace(k=k, v=v), keys, counts)
    room = b - past.place
    steps = real & (at[:n_tokens] < room[:, None])
    block = Block(tokens.q, k, v, tokens.gates, steps[:, None], keys[:, None])
    y, state = run_block(form, outer, state, block, complete=counts >= room)
    if n_tokens > 1:
        steps = real & (at[:n_tokens] >= room[:, None])
        never = torch.zeros_like(counts, dtype=torch.bool)
        rest, state = run_block(form, outer, state, block._replace(steps=steps[:, None]), complete=never)
        y = None if y is None or rest is None else torch.where(steps[:, None, :, None], rest, y)
    return y, state


def _part(x: Tensor, part: slice) -> Tensor:
    return x[:, :, part]


def _joined(outputs: list[Tensor | None]) -> Tensor | None:
    found = [y for y in outputs if y is not None]
    return torch.cat(found, dim=2) if found else None


def _run_grid(
    form: Form, outer: Outer, state: MemoryState, place: Tensor, tokens: Tokens, keys: Tensor, counts: Tensor
) -> tuple[Tensor | None, MemoryState]:
    """More tokens than a block has: rows are laid on a grid of blocks, `place` empty slots first. k, v and keys begin
    with the past."""
    b, halo = form.block, form.window - 1
    n_tokens, n_keys = tokens.gates.eta.shape[2], keys.shape[1]
    outputs = []
    for start in range(0, n_tokens + b - 1, b):
        slot = start + torch.arange(b, device=counts.device) - place[:, None]
        near = start + torch.arange(b + halo, device=counts.device) - place[:, None]
        steps = (slot >= 0) & (slot < counts[:, None])
        inside = (near >= 0) & (near < n_keys)
        near, slot = near.clamp(0, n_keys - 1), slot.clamp(0, n_tokens - 1)
        seen = torch.take_along_dim(keys, near, dim=1) & inside
        q, gates = each_tensor((tokens.q, tokens.gates), partial(_take_time, index=slot))
        k, v = _take_time(tokens.k, near), _take_time(tokens.v, near)
        block = Block(q, k, v, gates, steps[:, None], seen[:, None])
        y, state = run_block(form, outer, state, block, complete=steps[:, -1])
        outputs.append(y)
    joined = _joined(outputs)
    time = place[:, None] + torch.arange(n_tokens, device=counts.device)
    return None if joined is None else _take_time(joined, time), state
