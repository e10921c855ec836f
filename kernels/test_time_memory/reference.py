"""The same, token by token, with the inner gradients from autograd: the oracle of the closed forms.

G_t = sum over j < c of gamma_{t,j} grad L(anchor; k_{t-j}, v_{t-j})
gd:       M_t = alpha_t M_{t-1} - eta_t G_t
momentum: S_t = theta_t S_{t-1} - eta_t G_t,   M_t = alpha_t M_{t-1} + S_t
muon:     S_t = theta_t S_{t-1} - G_t,         M_t = alpha_t M_{t-1} + eta_t NS(S_t)
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.test_time_memory.block import Outer
from kernels.test_time_memory.network import Form, Weights, recall, renormed
from kernels.test_time_memory.newton_schulz import newton_schulz
from kernels.test_time_memory.sequence import Tokens


def inner_gradient(form: Form, outer: Outer, anchor: Weights, k: Tensor, v: Tensor, weight: Tensor) -> Weights:
    """Gradient of the weighted losses of n tokens, k [B, H, n, d], v [B, H, n, d_v], weight [B, H, n]."""
    with torch.enable_grad():
        anchor = tuple(w if w.requires_grad else w.detach().requires_grad_() for w in anchor)
        found = recall(form, anchor, outer.lift(k), outer.norm)
        if form.bias == "l2":
            losses = 0.5 * (found - v).square().sum(-1)
        else:
            losses = -(found * v).sum(-1)
        return torch.autograd.grad((losses * weight).sum(), anchor, create_graph=True)


def run_reference(form: Form, outer: Outer, initial: Weights, tokens: Tokens) -> tuple[Tensor, Weights]:
    """One document per row: (y [B, H, T, d_v], the last weights). Gradients are taken at the memory before each block
    of form.block tokens, of one token with `exact`. initial: weights [H, m, n]."""
    q, k, v, gates = tokens
    assert q is not None
    batch, n_heads, n_tokens = gates.eta.shape
    memory: Weights = tuple(w.expand(batch, n_heads, *w.shape[1:]) for w in initial)
    momentum: Weights = tuple(torch.zeros_like(w) for w in memory)
    anchor, held, outputs = memory, memory, []

    def alpha(t: int) -> Tensor | float:
        if gates.log_alpha is None:
            return 1.0
        gate = gates.log_alpha[:, :, t].exp()
        return gate[..., None, :] if gate.dim() == 3 else gate[..., None, None]

    def theta(t: int) -> Tensor | float:
        return 1.0 if gates.log_theta is None else gates.log_theta[:, :, t].exp()[..., None, None]

    for t in range(n_tokens):
        if form.exact or t % form.block == 0:
            anchor = held = memory
        if form.decayed:
            anchor = tuple(alpha(t) * w for w in memory)
        places = [t - j for j in range(form.window) if t - j >= 0]
        gamma = gates.gamma[:, :, t, : len(places)]
        gradient = inner_gradient(form, outer, anchor, k[:, :, places], v[:, :, places], gamma)
        eta = gates.eta[:, :, t, None, None]
        inner = 1.0 if form.optimizer == "muon" and not form.eta_inside else eta
        before = memory
        if form.momentum:
            momentum = tuple(theta(t) * s - inner * g for s, g in zip(momentum, gradient))
            steps = momentum
        else:
            steps = tuple(-inner * g for g in gradient)
        if form.optimizer == "muon":
            last = t == n_tokens - 1 or (t + 1) % form.block == 0
            if form.muon_block and last:
                first = t - t % form.block
                memory = _block_step(form, held, momentum, gates.eta, alpha, first, t)
            elif not form.muon_block:
                outside = 1.0 if form.eta_inside else eta
                steps = tuple(outside * newton_schulz(s, form.ns_steps, form.ns_table) for s in momentum)
        if not form.muon_block:
            memory = tuple(alpha(t) * w + s for w, s in zip(memory, steps))
        written = memory
        if form.renormed and (t + 1) % form.block == 0:
            assert outer.lengths is not None
            memory = renormed(memory, outer.lengths)
        seen = held if form.muon_block else before if form.pre else written
        outputs.append(recall(form, seen, outer.lift(q[:, :, t : t + 1]), outer.norm))
    return torch.cat(outputs, dim=2), memory


def _block_step(
    form: Form, held: Weights, momentum: Weights, eta: Tensor, alpha: object, first: int, last: int
) -> Weights:
    """The memory after a block whose tokens all go along the same orthogonalised momentum."""
    moved = held
    steps = tuple(newton_schulz(s, form.ns_steps, form.ns_table) for s in momentum)
    for t in range(first, last + 1):
        rate = 1.0 if form.eta_inside else eta[:, :, t, None, None]
        moved = tuple(alpha(t) * w + rate * s for w, s in zip(moved, steps))  # type: ignore[operator]
    return moved
