"""Whole sequences, block by block: one document per row, packed documents, and rows that go on from a decode state.

Blocks are counted from the start of each document. Shapes: q, k [B, H, T, d], v [B, H, T, d_v], gates [B, H, T, ...].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.test_time_memory.block import (
    Block,
    Coefficients,
    Gates,
    MemoryState,
    Outer,
    answer,
    before_write,
    coefficients,
    exact_factors,
    last_tokens,
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

    def map(self, fn: Callable[[Tensor], Tensor]) -> Tokens:
        """fn applied to every tensor."""
        gates = Gates(*(None if g is None else fn(g) for g in self.gates))
        return Tokens(None if self.q is None else fn(self.q), fn(self.k), fn(self.v), gates)


def run_document(
    form: Form, outer: Outer, state: MemoryState, tokens: Tokens, *, recompute: bool = False
) -> tuple[Tensor, MemoryState]:
    """One document per row, from its start: (y [B, H, T, d_v], the last state). recompute: hold no more than the states
    between blocks for the backward pass."""
    n_tokens, outputs = tokens.k.shape[2], []
    for start in range(0, n_tokens, form.block):
        end = min(start + form.block, n_tokens)
        first = max(0, start - form.window + 1)
        here = tokens.map(lambda x, start=start, end=end: x[:, :, start:end])
        block = Block(here.q, tokens.k[:, :, first:end], tokens.v[:, :, first:end], here.gates)
        y, state = _run(form, outer, state, block, recompute)
        outputs.append(y)
    return torch.cat(outputs, dim=2), state


def _run(form: Form, outer: Outer, state: MemoryState, block: Block, recompute: bool) -> tuple[Tensor, MemoryState]:
    if recompute and torch.is_grad_enabled():
        y, after = checkpoint(run_block, form, outer, state, block, use_reentrant=False)
    else:
        y, after = run_block(form, outer, state, block)
    assert y is not None
    return y, after


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
    opened = _opened(form, outer, initial, openings)
    later = _gathered(tokens, document, packing.later, packing.has_later, b, form.window - 1)
    state = _at_piece(opened, 0)
    outputs = []
    for piece in range(1, n_pieces):
        y, after = _run(form, outer, state, _block_at(later, piece), recompute)
        outputs.append(y)
        fresh = packing.has_opening[:, piece, None, None, None]
        started = _at_piece(opened, piece)
        state = MemoryState(*(_choose(fresh, new, old) for new, old in zip(started[:2], after[:2])))
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
    spare = -n_tokens % b
    z, z_read = outer.lift(tokens.k), outer.lift(tokens.q)

    def windows(x: Tensor) -> Tensor:
        """[B, H, T, ...] -> [B, H, G, 2 b, ...]"""
        trailing = (0, 0) * (x.dim() - 3)
        return F.pad(x, (*trailing, b, spare)).unfold(2, 2 * b, b).movedim(-1, 3)

    documents = windows(document[:, None])
    same = (documents[..., :, None] == documents[..., None, :]) & (documents > 0)[..., None, :]
    gates = Gates(*(None if gate is None else windows(gate) for gate in tokens.gates))
    block = Block(None, windows(z), windows(tokens.v), gates, steps=documents > 0)
    co = coefficients(form, block, same)
    if form.exact:
        inputs, errors = exact_factors(form, state, block.k, block.v, gates.log_alpha, before_write(co, same))
    else:
        found = gradient_factors(form, initial, z, tokens.v, outer.norm)
        inputs, errors = (tuple(windows(x) for x in group) for group in found)
    z_read = windows(z_read)
    if form.optimizer == "muon":
        outputs = []
        for piece in range(same.shape[2]):
            part = Coefficients(*(x[:, :, piece] if isinstance(x, Tensor) else x for x in co))
            found = ((x[:, :, piece] for x in group) for group in (inputs, errors))
            y, _ = run_muon(form, outer, state, z_read[:, :, piece], *map(tuple, found), part, same[:, :, piece])
            assert y is not None
            outputs.append(y[:, :, -b:])
        return torch.cat(outputs, dim=2)[:, :, :n_tokens]
    co = last_tokens(before_write(co, same) if form.pre else co, b)
    y = answer(form, outer, state, z_read[:, :, :, -b:], inputs, errors, co)
    return y.flatten(2, 3)[:, :, :n_tokens]


def _gathered(tokens: Tokens, document: Tensor, starts: Tensor, exists: Tensor, b: int, halo: int) -> Block:
    """The blocks of b tokens from starts [B, G] with `halo` tokens before them, leading dimensions [B, H, G]."""
    n_tokens = document.shape[1]
    index = starts[..., None] + torch.arange(-halo, b, device=starts.device)
    inside = (index >= 0) & (index < n_tokens)
    index = index.clamp(0, n_tokens - 1)
    own = torch.take_along_dim(document, starts.clamp(max=n_tokens - 1), dim=1)[..., None]
    found = torch.take_along_dim(document, index.flatten(1), dim=1).view_as(index)
    valid = (inside & (found == own) & exists[..., None])[:, None]

    def take(x: Tensor, which: Tensor) -> Tensor:
        flat = which.flatten(1)[:, None]
        return torch.take_along_dim(x, flat.reshape(*flat.shape, *(1,) * (x.dim() - 3)), dim=2).unflatten(
            2, which.shape[1:]
        )

    steps = index[..., halo:]
    gates = Gates(*(None if gate is None else take(gate, steps) for gate in tokens.gates))
    q = None if tokens.q is None else take(tokens.q, steps)
    return Block(q, take(tokens.k, index), take(tokens.v, index), gates, valid[..., halo:], valid)


def _opened(form: Form, outer: Outer, initial: Weights, openings: Block) -> MemoryState:
    """States after the openings, [B, H, G, m, n] each; piece by piece where the weights after every token are held."""
    start = MemoryState(initial)
    if form.optimizer != "muon" or form.muon_block:
        return run_block(form, outer, start, openings)[1]
    n_pieces = openings.k.shape[2]
    states = [run_block(form, outer, start, _block_at(openings, piece))[1] for piece in range(n_pieces)]
    return MemoryState(*(tuple(torch.stack(w, dim=2) for w in zip(*group)) for group in zip(*(s[:2] for s in states))))


def _block_at(blocks: Block, piece: int) -> Block:
    def at(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[:, :, piece]

    q, k, v, gates, steps, keys = blocks
    return Block(at(q), k[:, :, piece], v[:, :, piece], Gates(*map(at, gates)), at(steps), at(keys))  # type: ignore[arg-type]


def _at_piece(states: MemoryState, piece: int) -> MemoryState:
    return MemoryState(*(tuple(w[:, :, piece] for w in group) for group in states[:2]))


def _choose(mask: Tensor, new: Weights, old: Weights) -> Weights:
    return tuple(torch.where(mask, a, b) for a, b in zip(new, old))


class Past(NamedTuple):
    """What a row that goes on brings besides its state: the last c - 1 keys and targets [B, H, c - 1, d], oldest first,
    how many of them are real [B], and its place in its block [B] (0: a block begins)."""

    k: Tensor
    v: Tensor
    count: Tensor
    place: Tensor


def run_rows(
    form: Form, outer: Outer, state: MemoryState, past: Past, tokens: Tokens, counts: Tensor
) -> tuple[Tensor | None, MemoryState]:
    """T more tokens of rows that stand anywhere in their blocks; of row b only the first counts[b] are real.

    Where blocks matter `state` has an anchor, or what replaces it for one Newton-Schulz per block.
    """
    b, n_tokens, halo = form.block, tokens.k.shape[2], form.window - 1
    device = counts.device
    k, v = torch.cat([past.k, tokens.k], dim=2), torch.cat([past.v, tokens.v], dim=2)
    e = torch.arange(halo + n_tokens, device=device)
    keys = (e >= halo - past.count[:, None]) & (e < halo + counts[:, None])
    real = keys[:, halo:]
    time = e[:n_tokens]
    if not form.aligned:
        outputs = []
        for start in range(0, n_tokens, b):
            end = min(start + b, n_tokens)
            here = tokens.map(lambda x, start=start, end=end: x[:, :, start:end])
            near = slice(start, end + halo)
            steps, seen = real[:, None, start:end], keys[:, None, near]
            block = Block(here.q, k[:, :, near], v[:, :, near], here.gates, steps, seen)
            y, state = run_block(form, outer, state, block)
            outputs.append(y)
        return _joined(outputs), state
    if n_tokens <= b:
        room = b - past.place
        steps = real & (time < room[:, None])
        block = Block(tokens.q, k, v, tokens.gates, steps[:, None], keys[:, None])
        y, state = run_block(form, outer, state, block, complete=counts >= room)
        if n_tokens > 1:
            steps = real & (time >= room[:, None])
            never = torch.zeros_like(counts, dtype=torch.bool)
            rest, state = run_block(form, outer, state, block._replace(steps=steps[:, None]), complete=never)
            y = None if y is None or rest is None else torch.where(steps[:, None, :, None], rest, y)
        return y, state
    return _run_grid(form, outer, state, past.place, tokens._replace(k=k, v=v), keys, counts)


def _joined(outputs: list[Tensor | None]) -> Tensor | None:
    found = [y for y in outputs if y is not None]
    return torch.cat(found, dim=2) if found else None


def _run_grid(
    form: Form, outer: Outer, state: MemoryState, place: Tensor, tokens: Tokens, keys: Tensor, counts: Tensor
) -> tuple[Tensor | None, MemoryState]:
    """More tokens than a block has: rows are laid on a grid of blocks, `place` empty slots first. k, v and keys begin
    with the past."""
    b, halo = form.block, form.window - 1
    n_tokens = tokens.gates.eta.shape[2]
    device = counts.device
    n_slots = (n_tokens + 2 * b - 2) // b * b

    def take(x: Tensor, index: Tensor) -> Tensor:
        index = index.clamp(0, x.shape[2] - 1)
        return torch.take_along_dim(x, index.reshape(index.shape[0], 1, -1, *(1,) * (x.dim() - 3)), dim=2)

    outputs = []
    for start in range(0, n_slots, b):
        index = start + torch.arange(b, device=device) - place[:, None]
        steps = (index >= 0) & (index < counts[:, None])
        near = start + torch.arange(b + halo, device=device) - place[:, None]
        seen = (
            torch.take_along_dim(keys, near.clamp(0, keys.shape[1] - 1), dim=1) & (near >= 0) & (near < keys.shape[1])
        )
        gates = Gates(*(None if gate is None else take(gate, index) for gate in tokens.gates))
        q = None if tokens.q is None else take(tokens.q, index)
        block = Block(q, take(tokens.k, near), take(tokens.v, near), gates, steps[:, None], seen[:, None])
        y, state = run_block(form, outer, state, block, complete=steps[:, -1])
        outputs.append(y)
    joined = _joined(outputs)
    time = place[:, None] + torch.arange(n_tokens, device=device)
    return None if joined is None else take(joined, time), state
