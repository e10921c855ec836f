"""One block of tokens in closed form: masked attention for gradient descent and momentum, batched updates for Muon.

With keys and errors of h + b rows (h earlier tokens of the window, then the block), per head:

    band[n, i] = gamma[n, j] where i is j places back from n
    write_S = L_theta diag(eta) band        L_x[t, n] = prod over n < tau <= t of x[tau]
    write   = L_alpha write_S               keep[t] = prod over tau <= t of alpha, push = L_alpha (prod of theta)
    layer(x) = keep (x M^T) + push (x S^T) - ((x inputs^T) * write) errors
    M' = keep_b M + push_b S - (write_b * errors)^T inputs,   S' likewise

which holds for every weight matrix of a memory, with its own inputs and errors. Leading dimensions are [B, H] or
[B, H, G]. With a gate per key channel (vector retention) keep, push and write have a dimension D before the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.test_time_memory.network import Form, LayerNorm, Weights, gelu, gradient_factors, recall, renormed, times
from kernels.test_time_memory.newton_schulz import newton_schulz


class Gates(NamedTuple):
    """Per token. log_alpha [..., T], or [..., T, D] for a gate per key channel, None: nothing is forgotten; log_theta
    [..., T] (momentum), None: 1; eta [..., T]; gamma [..., T, c]."""

    log_alpha: Tensor | None
    log_theta: Tensor | None
    eta: Tensor
    gamma: Tensor


class Block(NamedTuple):
    """q [..., b, d] or None (nothing is read), k, v [..., h + b, d or d_v]: raw keys and the memory's targets.

    steps [..., b], keys [..., h + b] bool: tokens that are steps of this block, and tokens of the document at all; None
    where all are. A token that is no step changes nothing, yet may stand in the window of one that is.
    """

    q: Tensor | None
    k: Tensor
    v: Tensor
    gates: Gates
    steps: Tensor | None = None
    keys: Tensor | None = None


@dataclass(frozen=True)
class Outer:
    """What learns outside: lift(x [..., T, d]) -> [..., T, D], and the layer norm behind the network.

    lengths: of the rows of the weights at the start, [H, m, 1] each, for a form that is renormed.
    """

    lift: Callable[[Tensor], Tensor]
    norm: LayerNorm | None = None
    lengths: Weights | None = None


class MemoryState(NamedTuple):
    """Weights before the next token, their momentum, and the anchor: the weights before the current block, None where
    the block is only about to begin (or where it does not matter).

    keep, push [B, H]: decay and step sizes so far in the block, for one Newton-Schulz per block; None at its beginning.
    """

    memory: Weights
    momentum: Weights = ()
    anchor: Weights | None = None
    keep: Tensor | None = None
    push: Tensor | None = None


class Coefficients(NamedTuple):
    """See the module's text; without a momentum its parts are None. vector: gates are per key channel.

    For Muon `write` is L_alpha diag(eta), to be applied to the orthogonalised momenta, and there is no push.
    """

    keep: Tensor
    write: Tensor
    push: Tensor | None = None
    keep_momentum: Tensor | None = None
    write_momentum: Tensor | None = None
    vector: bool = False


def decays(log: Tensor) -> Tensor:
    """log [..., T] -> [..., T, T]: exp of the sum over n < tau <= t at (t, n), zero above the diagonal.

    Sums instead of differences of sums, so that a gate of exactly zero is no problem.
    """
    n = log.shape[-1]
    after = torch.ones(n, n, dtype=torch.bool, device=log.device).tril(-1)
    summed = torch.where(after, log[..., :, None], 0.0).cumsum(dim=-2)
    return torch.where(after.mT, -torch.inf, summed).exp()


def band(gamma: Tensor, halo: int) -> Tensor:
    """gamma [..., T, c] -> [..., T, halo + T] with gamma[n, j] at column halo + n - j."""
    n, c = gamma.shape[-2:]
    full = F.pad(gamma.flip(-1), (0, n)).flatten(-2)[..., : n * (n + c - 1)].unflatten(-1, (n, n + c - 1))
    return full[..., c - 1 - halo :]


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else torch.where(mask, values, 0.0)


def _triangle(log: Tensor | None, like: Tensor) -> Tensor:
    """L of the module's text, [..., T, T]."""
    if log is not None:
        return decays(log)
    n = like.shape[-1]
    return torch.ones(n, n, dtype=like.dtype, device=like.device).tril().expand(*like.shape, n)


def _totals(log: Tensor | None, like: Tensor, same: Tensor | None) -> Tensor:
    """exp of the sums over tau <= t, within the document."""
    if log is None:
        return torch.ones_like(like)
    if same is None:
        return log.cumsum(-1).exp()
    n = log.shape[-1]
    seen = same & torch.ones(n, n, dtype=torch.bool, device=log.device).tril()
    return torch.where(seen, log[..., None, :], 0.0).sum(-1).exp()


def coefficients(form: Form, block: Block, same: Tensor | None = None) -> Coefficients:
    """Of one block. same [..., b, b]: tokens of one document, where a block holds several (then h = 0)."""
    (log_alpha, log_theta, eta, gamma), steps, keys = block.gates, block.steps, block.keys
    muon = form.optimizer == "muon"
    scale = torch.ones_like(eta) if muon and not form.eta_inside else eta
    source = _masked(scale, steps)[..., None] * band(
        gamma, 0 if same is not None else block.k.shape[-2] - eta.shape[-1]
    )
    source = _masked(_masked(source, None if keys is None else keys[..., None, :]), same)
    diagonal = torch.diagonal(source, dim1=-2, dim2=-1)[..., None, :] if form.window == 1 else None

    vector = log_alpha is not None and log_alpha.dim() > eta.dim()
    same_alpha = same[..., None, :, :] if vector and same is not None else same
    if log_alpha is not None:
        log_alpha = _masked(log_alpha, None if steps is None else steps[..., None] if vector else steps)
        log_alpha = log_alpha.mT if vector else log_alpha
    triangle = _masked(_triangle(log_alpha, eta), same_alpha)
    keep = _totals(log_alpha, eta, same_alpha)

    def applied(x: Tensor) -> Tensor:
        return triangle @ (x[..., None, :, :] if vector else x)

    if not form.momentum:
        if diagonal is not None:
            return Coefficients(keep, triangle * (diagonal[..., None, :, :] if vector else diagonal), vector=vector)
        return Coefficients(keep, applied(source), vector=vector)

    log_theta = None if log_theta is None else _masked(log_theta, steps)
    momentum_triangle = _masked(_triangle(log_theta, eta), same)
    keep_momentum = _totals(log_theta, eta, same)
    write_momentum = momentum_triangle * diagonal if diagonal is not None else momentum_triangle @ source
    if steps is not None:
        triangle = _masked(triangle, steps[..., None, None, :] if vector else steps[..., None, :])
    if muon:
        write = triangle if form.eta_inside else triangle * eta[..., None, :]
        return Coefficients(keep, write, None, keep_momentum, write_momentum)
    push = applied(keep_momentum[..., None])[..., 0]
    return Coefficients(keep, applied(write_momentum), push, keep_momentum, write_momentum, vector)


def before_write(co: Coefficients, same: Tensor | None = None) -> Coefficients:
    """What each token meets before it is written: the coefficients after the token in front of it."""
    write = F.pad(co.write[..., :-1, :], (0, 0, 1, 0))
    keep = F.pad(co.keep[..., :-1], (1, 0), value=1.0)
    push = None if co.push is None else F.pad(co.push[..., :-1], (1, 0))
    if same is not None:
        same = same[..., None, :, :] if co.vector else same
        write = _masked(write, same)
        follows = F.pad(torch.diagonal(same, offset=-1, dim1=-2, dim2=-1), (1, 0))
        keep = torch.where(follows, keep, 1.0)
        push = None
    return co._replace(keep=keep, write=write, push=push)


def last_tokens(co: Coefficients, n: int) -> Coefficients:
    """The coefficients of the last n tokens alone; for reading only."""
    return Coefficients(co.keep[..., -n:], co.write[..., -n:, :], vector=co.vector)


def scores(x: Tensor, inputs: Tensor, co: Coefficients) -> Tensor:
    """(x inputs^T) * write, [..., T, h + b]."""
    if not co.vector:
        return (x @ inputs.mT) * co.write
    return (x[..., :, None, :] * inputs[..., None, :, :] * co.write.movedim(-3, -1)).sum(-1)


def from_state(x: Tensor, weight: Tensor, momentum: Tensor | None, co: Coefficients) -> Tensor:
    """keep (x M^T) + push (x S^T)."""
    if co.vector:
        y = times(x * co.keep.mT, weight)
        return y if momentum is None or co.push is None else y + times(x * co.push.mT, momentum)
    y = co.keep[..., None] * times(x, weight)
    return y if momentum is None or co.push is None else y + co.push[..., None] * times(x, momentum)


def answer(
    form: Form, outer: Outer, state: MemoryState, z: Tensor, inputs: Weights, errors: Weights, co: Coefficients
) -> Tensor:
    """What the memory that moves with the tokens answers to z [..., T, D]: [..., T, d_v]."""

    def layer(index: int, x: Tensor) -> Tensor:
        momentum = state.momentum[index] if state.momentum else None
        y = from_state(x, state.memory[index], momentum, co)
        return y - scores(x, inputs[index], co) @ errors[index]

    if form.network == "matrix":
        u = layer(0, z)
    elif form.network == "mlp":
        u = layer(0, gelu(layer(1, z)))
    else:
        u = layer(0, gelu(layer(1, z)) * layer(2, z))
    return u if outer.norm is None else outer.norm(u)


def final_state(state: MemoryState, inputs: Weights, errors: Weights, co: Coefficients) -> MemoryState:
    """The state after the block (its anchor as before)."""
    memory, momentum = [], []
    rows = co.write[..., -1, :].mT if co.vector else co.write[..., -1, :, None]
    for index, weight in enumerate(state.memory):
        weight = _placed(weight, errors[index])
        old = _placed(state.momentum[index], errors[index]) if state.momentum else None
        if co.vector:
            new = weight * co.keep[..., None, :, -1] - errors[index].mT @ (inputs[index] * rows)
            new = new if old is None or co.push is None else new + old * co.push[..., None, :, -1]
        else:
            new = weight * co.keep[..., -1, None, None] - (errors[index] * rows).mT @ inputs[index]
            new = new if old is None or co.push is None else new + old * co.push[..., -1, None, None]
        memory.append(new)
        if co.write_momentum is not None:
            momentum.append(_final_momentum(old, inputs[index], errors[index], co))
    return state._replace(memory=tuple(memory), momentum=tuple(momentum))


def _final_momentum(old: Tensor | None, inputs: Tensor, errors: Tensor, co: Coefficients) -> Tensor:
    assert co.write_momentum is not None and co.keep_momentum is not None
    new = -(errors * co.write_momentum[..., -1, :, None]).mT @ inputs
    return new if old is None else new + old * co.keep_momentum[..., -1, None, None]


def _placed(weight: Tensor, like: Tensor) -> Tensor:
    """Shared weights [H, m, n] so that they broadcast against [B, H, m, n] or [B, H, G, m, n]."""
    if weight.dim() > 3 or like.dim() <= 4:
        return weight
    return weight[:, None]


class Prepared(NamedTuple):
    """What of a block does not depend on the memory, so that it is computed for all blocks at once.

    z, z_read: lifted keys and queries. exact_query: keys as the memory before each token meets them. co: after each
    token's write; seen: what a read meets; before: in front of each write, with `exact`. same: as in `coefficients`.
    """

    z: Tensor
    z_read: Tensor | None
    v: Tensor
    co: Coefficients
    seen: Coefficients
    before: Coefficients | None = None
    exact_query: Tensor | None = None
    same: Tensor | None = None


def prepare(form: Form, outer: Outer, block: Block, same: Tensor | None = None) -> Prepared:
    """All that can be computed before the memory is known."""
    z = outer.lift(block.k)
    co = coefficients(form, block, same)
    before = before_write(co, same) if form.exact or (form.pre and form.optimizer != "muon") else None
    query, log_alpha = z, block.gates.log_alpha
    if form.decayed and log_alpha is not None:
        query = z * (log_alpha.exp() if co.vector else log_alpha.exp()[..., None])
    return Prepared(
        z,
        None if block.q is None else outer.lift(block.q),
        block.v,
        co,
        before if form.pre and before is not None else co,
        before if form.exact else None,
        query if form.exact else None,
        same,
    )


def factors(form: Form, outer: Outer, state: MemoryState, block: Prepared) -> tuple[Weights, Weights]:
    """(inputs, errors) of the gradients of all tokens, per weight."""
    if not form.exact:
        anchor = state.memory if state.anchor is None else state.anchor
        return gradient_factors(form, anchor, block.z, block.v, outer.norm)
    assert block.before is not None and block.exact_query is not None
    momentum = state.momentum[0] if state.momentum else None
    start = from_state(block.exact_query, state.memory[0], momentum, block.before) - block.v
    system = scores(block.exact_query, block.z, block.before)
    return (block.z,), (torch.linalg.solve_triangular(system, start, upper=False, unitriangular=True),)


def run_block(
    form: Form, outer: Outer, state: MemoryState, block: Block | Prepared, complete: Tensor | None = None
) -> tuple[Tensor | None, MemoryState]:
    """(y [..., b, d_v] or None where nothing is read, the state after the block).

    complete [B] bool: rows whose block of the document ends here; None: all.
    """
    if isinstance(block, Block):
        block = prepare(form, outer, block)
    inputs, errors = factors(form, outer, state, block)
    if form.muon_block:
        return _run_muon_block(form, outer, state, block, inputs, errors, complete)
    if form.optimizer == "muon":
        y, after = run_muon(form, outer, state, block, inputs, errors)
    else:
        y = None if block.z_read is None else answer(form, outer, state, block.z_read, inputs, errors, block.seen)
        after = final_state(state, inputs, errors, block.co)
    if form.renormed:
        assert outer.lengths is not None
        scaled = renormed(after.memory, outer.lengths)
        after = after._replace(memory=_where_ended(complete, scaled, after.memory))
    if state.anchor is not None:
        assert complete is not None
        after = after._replace(anchor=_where_ended(complete, after.memory, state.anchor))
    return y, after


def _where_ended(complete: Tensor | None, new: Weights, old: Weights) -> Weights:
    """New weights [B, H, m, n] for rows that are complete [B] (None: for all)."""
    if complete is None:
        return new
    return tuple(torch.where(complete[:, None, None, None], a, b) for a, b in zip(new, old))


def run_muon(
    form: Form, outer: Outer, state: MemoryState, block: Prepared, inputs: Weights, errors: Weights
) -> tuple[Tensor | None, MemoryState]:
    """A Newton-Schulz for every token: the weights after each are held, [..., b, m, n]."""
    co, each, momentum = block.co, [], []
    for index, weight in enumerate(state.memory):
        weight = _placed(weight, errors[index])
        old = _placed(state.momentum[index], errors[index]) if state.momentum else None
        steps, last = _orthogonal_steps(form, old, inputs[index], errors[index], co)
        moved = torch.einsum("...tn,...nij->...tij", co.write, steps)
        each.append(co.keep[..., None, None] * weight[..., None, :, :] + moved)
        momentum.append(last)
    after = state._replace(memory=tuple(w[..., -1, :, :] for w in each), momentum=tuple(momentum))
    if block.z_read is None:
        return None, after
    if form.pre:
        each = [_before(w, _placed(weight, block.z), block.same) for weight, w in zip(state.memory, each)]
    return recall(form, tuple(each), block.z_read[..., None, :], outer.norm)[..., 0, :], after


def _before(each: Tensor, start: Tensor, same: Tensor | None) -> Tensor:
    """Weights before every token instead of after it; those of a document begin at `start`."""
    start = start[..., None, :, :].expand_as(each[..., :1, :, :])
    moved = torch.cat([start, each[..., :-1, :, :]], dim=-3)
    if same is None:
        return moved
    follows = F.pad(torch.diagonal(same, offset=-1, dim1=-2, dim2=-1), (1, 0))
    return torch.where(follows[..., None, None], moved, start)


def _orthogonal_steps(
    form: Form, old: Tensor | None, inputs: Tensor, errors: Tensor, co: Coefficients
) -> tuple[Tensor, Tensor]:
    """(orthogonalised momentum after each token [..., b, m, n], the last momentum as it is)."""
    assert co.write_momentum is not None and co.keep_momentum is not None
    s = -(co.write_momentum[..., None] * errors[..., None, :, :]).mT @ inputs[..., None, :, :]
    if old is not None:
        s = s + co.keep_momentum[..., None, None] * old[..., None, :, :]
    return newton_schulz(s, form.ns_steps, form.ns_table), s[..., -1, :, :]


def _run_muon_block(
    form: Form,
    outer: Outer,
    state: MemoryState,
    block: Prepared,
    inputs: Weights,
    errors: Weights,
    complete: Tensor | None,
) -> tuple[Tensor | None, MemoryState]:
    """One Newton-Schulz at the end of a block, whose tokens read the memory before it; it moves the memory as far as
    that of every token would."""
    y = None if block.z_read is None else recall(form, state.memory, block.z_read, outer.norm)
    momentum = []
    for index in range(form.n_weights):
        old = _placed(state.momentum[index], errors[index]) if state.momentum else None
        momentum.append(_final_momentum(old, inputs[index], errors[index], block.co))
    keep, push = block.co.keep[..., -1], block.co.write[..., -1, :].sum(-1)
    if state.keep is not None and state.push is not None:
        keep, push = keep * state.keep, keep * state.push + push
    memory = state.memory
    if complete is None or not _nobody(complete):
        steps = (newton_schulz(s, form.ns_steps, form.ns_table) for s in momentum)
        placed = [_placed(old, s) for old, s in zip(memory, momentum)]
        moved = [keep[..., None, None] * old + push[..., None, None] * step for old, step in zip(placed, steps)]
        memory = _where_ended(complete, tuple(moved), memory)
    after = state._replace(memory=memory, momentum=tuple(momentum))
    if state.keep is None:
        return y, after
    assert complete is not None
    ended = complete[:, None]
    return y, after._replace(keep=torch.where(ended, 1.0, keep), push=torch.where(ended, 0.0, push))


def _nobody(complete: Tensor) -> bool:
    """Whether no row is complete, where looking costs nothing: on an accelerator it would wait for the device."""
    return complete.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(complete.any())
