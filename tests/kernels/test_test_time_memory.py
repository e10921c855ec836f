"""Test-time memory: closed forms against the token loop, published special cases, capacity, Newton-Schulz."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.test_time_memory import (
    Features,
    Form,
    Gates,
    LayerNorm,
    MemoryState,
    Outer,
    Past,
    Tokens,
    Weights,
    newton_schulz,
    recall,
    run_document,
    run_packed,
    run_reference,
    run_rows,
)
from kernels.test_time_memory.block import Block, band, decays, run_block
from kernels.test_time_memory.features import monomials, n_features, n_orders
from kernels.test_time_memory.network import gradient_factors, row_lengths
from kernels.test_time_memory.sequence import each_tensor, find_blocks

D, DV, HIDDEN, HEADS, T = 5, 4, 6, 2, 14
SHAPES: dict[str, list[tuple[int, int]]] = {
    "matrix": [(DV, D)],
    "mlp": [(DV, HIDDEN), (HIDDEN, D)],
    "gated_mlp": [(DV, HIDDEN), (HIDDEN, D), (HIDDEN, D)],
}
SAME = Features("id")


def sample(form: Form, *, batch: int = 2, n: int = T, vector: bool = False, seed: int = 0) -> Any:
    """(outer, initial, tokens, leaves) in float64."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    q, k = (F.normalize(draw(batch, HEADS, n, D), dim=-1) for _ in range(2))
    v = draw(batch, HEADS, n, DV)
    log_alpha = F.logsigmoid(draw(batch, HEADS, n, D) if vector else draw(batch, HEADS, n))
    log_theta = F.logsigmoid(draw(batch, HEADS, n))
    eta, gamma = 0.2 * torch.sigmoid(draw(batch, HEADS, n)), torch.sigmoid(draw(batch, HEADS, n, form.window))
    initial = tuple(0.5 * draw(HEADS, *shape) for shape in SHAPES[form.network])
    scale, shift = 1 + 0.1 * draw(HEADS, DV), 0.1 * draw(HEADS, DV)
    leaves = [q, k, v, log_alpha, log_theta, eta, gamma, *initial, scale, shift]
    for leaf in leaves:
        leaf.requires_grad_()
    gates = Gates(log_alpha, log_theta if form.momentum else None, eta, gamma)
    norm = LayerNorm(scale, shift) if form.normed else None
    outer = Outer(SAME, norm, row_lengths(initial) if form.renormed else None)
    return outer, initial, Tokens(q, k, v, gates), leaves


def rows_of(initial: Weights, batch: int) -> MemoryState:
    return MemoryState(tuple(w.expand(batch, *w.shape) for w in initial))


def largest_gap(first: Any, second: Any) -> float:
    """Over all tensors of two lists, relative to their largest value where that exceeds 1; None counts as zero."""
    worst = 0.0
    for a, b in zip(first, second):
        a, b = (torch.zeros(()) if x is None else x.detach() for x in (a, b))
        worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp(min=1.0)))
    return worst


def compare(a: Tensor, b: Tensor, leaves: list[Tensor], tolerance: float = 1e-10) -> None:
    """Equal outputs and equal gradients of everything."""
    assert largest_gap([a], [b]) < tolerance
    weights = torch.randn(a.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    grads = [torch.autograd.grad((y * weights).sum(), leaves, allow_unused=True, retain_graph=True) for y in (a, b)]
    assert largest_gap(*grads) < tolerance


FORMS = {
    "matrix": Form("matrix", block=4, window=2),
    "matrix tokens": Form("matrix", block=1, window=3, optimizer="momentum"),
    "matrix dot": Form("matrix", "dot", block=4, window=5, optimizer="momentum", pre=True),
    "matrix normed": Form("matrix", normed=True, block=4, optimizer="momentum"),
    "exact": Form("matrix", block=5, exact=True),
    "exact decayed": Form("matrix", block=5, exact=True, decayed=True, optimizer="momentum", pre=True),
    "mlp": Form("mlp", block=4),
    "mlp tokens": Form("mlp", block=1, window=2, optimizer="momentum"),
    "mlp wide window": Form("mlp", block=3, window=6, optimizer="momentum"),
    "mlp dot": Form("mlp", "dot", block=4, window=2, pre=True),
    "mlp normed": Form("mlp", normed=True, block=4, window=2, optimizer="momentum"),
    "gated": Form("gated_mlp", block=4, window=2, optimizer="momentum", pre=True),
    "gated wide window": Form("gated_mlp", block=3, window=6),
    "mlp renormed": Form("mlp", block=4, window=2, optimizer="momentum", renormed=True),
    "gated renormed tokens": Form("gated_mlp", block=1, renormed=True, pre=True),
    "muon": Form("mlp", block=4, window=2, optimizer="muon", ns_steps=3),
    "muon inside": Form("gated_mlp", block=3, window=6, optimizer="muon", ns_steps=2, eta_inside=True, pre=True),
    "muon tokens": Form("matrix", block=1, optimizer="muon", ns_steps=3),
    "muon blocks": Form("mlp", block=4, window=3, optimizer="muon", ns_steps=3, muon_block=True),
}
VECTOR = {
    "vector": Form("matrix", block=4, window=2, optimizer="momentum"),
    "vector exact": Form("matrix", block=5, exact=True, decayed=True),
    "vector dot": Form("matrix", "dot", block=4, pre=True),
}
CASES = [pytest.param(form, name in VECTOR, id=name) for name, form in (FORMS | VECTOR).items()]


@pytest.mark.parametrize(("form", "vector"), CASES)
def test_blocks_equal_the_token_loop(form: Form, vector: bool) -> None:
    """14 tokens: the last block is ragged."""
    outer, initial, tokens, leaves = sample(form, vector=vector)
    wanted, last = run_reference(form, outer, initial, tokens)
    y, state = run_document(form, outer, rows_of(initial, 2), tokens)
    compare(y, wanted, leaves)
    assert largest_gap(state.memory, last) < 1e-10
    again, _ = run_document(form, outer, rows_of(initial, 2), tokens, recompute=True)
    compare(again, y, leaves, 1e-14)


@pytest.mark.parametrize(("form", "vector"), CASES)
def test_packed_documents_equal_the_documents_alone(form: Form, vector: bool) -> None:
    outer, initial, tokens, leaves = sample(form, vector=vector)
    lengths = [[3, 1, 10], [9, 5]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    rows = []
    for row, own in enumerate(lengths):
        starts = itertools.accumulate([0, *own])
        parts = [
            each_tensor(tokens, lambda x, r=row, s=s, n=n: x[r : r + 1, :, s : s + n]) for s, n in zip(starts, own)
        ]
        rows.append(torch.cat([run_document(form, outer, rows_of(initial, 1), part)[0] for part in parts], dim=2))
    compare(run_packed(form, outer, initial, tokens, positions), torch.cat(rows), leaves)


@pytest.mark.parametrize(("form", "vector"), CASES)
def test_rows_go_on_from_anywhere(form: Form, vector: bool) -> None:
    """Two rows are fed different numbers of tokens, padded on the right, so that they stand at different places."""
    outer, initial, tokens, _ = sample(form, vector=vector)
    wanted, _ = run_document(form, outer, rows_of(initial, 2), tokens)
    state = each_tensor(rows_of(initial, 2), torch.Tensor.contiguous)
    if form.momentum:
        state = state._replace(momentum=tuple(torch.zeros_like(w) for w in state.memory))
    if form.aligned and form.muon_block:
        one = torch.ones(2, HEADS, dtype=torch.float64)
        state = state._replace(keep=one, push=0 * one)
    elif form.aligned:
        state = state._replace(anchor=state.memory)
    done, halo = torch.zeros(2, dtype=torch.int64), form.window - 1
    found: list[list[Tensor]] = [[], []]

    def at(index: Tensor) -> Any:
        index = index.clamp(0, T - 1)
        return lambda x: torch.take_along_dim(x, index.reshape(2, 1, -1, *(1,) * (x.dim() - 3)), dim=2)

    with torch.no_grad():
        for counts in ([2, 1], [1, 1], [0, 2], [4, 8], [1, 0], [6, 2]):
            count = torch.tensor(counts)
            new = each_tensor(tokens, at(done[:, None] + torch.arange(max(counts))))
            before = at(done[:, None] - halo + torch.arange(halo))
            past = Past(before(tokens.k), before(tokens.v), done.clamp(max=halo), done % form.block)
            y, state = run_rows(form, outer, state, past, new, count)
            for row in range(2):
                found[row].append(y[row, :, : counts[row]])
            done = done + count
    assert largest_gap([torch.stack([torch.cat(row, dim=1) for row in found])], [wanted]) < 1e-10


def test_every_later_token_is_in_exactly_one_block() -> None:
    rng = torch.Generator().manual_seed(0)
    for block in (1, 3, 8):
        for _ in range(20):
            cuts = torch.rand(40, generator=rng) < torch.rand((), generator=rng)
            cuts[0] = True
            starts = torch.where(cuts, torch.arange(40), 0).cummax(0).values
            positions = (torch.arange(40) - starts)[None]
            packing = find_blocks(positions, block)
            assert packing.later.shape[1] == math.ceil(40 / block)
            begins = (positions >= block) & (positions % block == 0)
            assert packing.later[packing.has_later].tolist() == begins[0].nonzero()[:, 0].tolist()
            full = [t for t in range(40 - block) if positions[0, t] == 0 and positions[0, t + block] == block]
            assert packing.opening[packing.has_opening].tolist() == full


def delta_rule(tokens: Tokens, *, decayed: bool, momentum: bool) -> Tensor:
    """One head of (gated) DeltaNet, or of Titans with a matrix, written out."""
    q, k, v, (log_alpha, log_theta, eta, _) = tokens
    w = q.new_zeros(*q.shape[:2], v.shape[-1], k.shape[-1])
    s, outputs = torch.zeros_like(w), []
    for t in range(q.shape[2]):
        alpha = 1.0 if log_alpha is None else log_alpha[:, :, t].exp()[..., None, None]
        start = alpha * w if decayed else w
        error = torch.einsum("bhvd,bhd->bhv", start, k[:, :, t]) - v[:, :, t]
        step = -eta[:, :, t, None, None] * torch.einsum("bhv,bhd->bhvd", error, k[:, :, t])
        if momentum:
            assert log_theta is not None
            s = log_theta[:, :, t].exp()[..., None, None] * s + step
            step = s
        w = alpha * w + step
        outputs.append(torch.einsum("bhvd,bhd->bhv", w, q[:, :, t]))
    return torch.stack(outputs, dim=2)


def zero_state() -> MemoryState:
    return MemoryState((torch.zeros(2, HEADS, DV, D, dtype=torch.float64),))


@pytest.mark.parametrize("model", ["delta_net", "gated_delta_net", "undecayed", "titans"])
def test_delta_rules(model: str) -> None:
    form = Form("matrix", exact=True, block=6, decayed=model == "gated_delta_net",
                optimizer="momentum" if model == "titans" else "gd")  # fmt: skip
    _, _, tokens, _ = sample(form)
    gates = tokens.gates._replace(gamma=torch.ones_like(tokens.gates.gamma))
    if model == "delta_net":
        gates = gates._replace(log_alpha=None)
    tokens = tokens._replace(gates=gates)
    wanted = delta_rule(tokens, decayed=form.decayed, momentum=form.momentum)
    y, _ = run_document(form, Outer(SAME), zero_state(), tokens)
    assert largest_gap([y], [wanted]) < 1e-12
    if model == "gated_delta_net":
        other = delta_rule(tokens, decayed=False, momentum=False)
        assert largest_gap([y], [other]) > 1e-3, "gradients at the undecayed memory are another model"


@pytest.mark.parametrize("gated", [False, True])
def test_delta_rule_of_the_other_kernel(gated: bool) -> None:
    from kernels.delta_rule import delta_rule as other

    form = Form("matrix", exact=True, block=6, decayed=gated)
    _, _, tokens, _ = sample(form)
    gates = Gates(
        tokens.gates.log_alpha if gated else None, None, tokens.gates.eta, torch.ones_like(tokens.gates.gamma)
    )
    y, _ = run_document(form, Outer(SAME), zero_state(), tokens._replace(gates=gates))
    q, k, v, eta = (x.transpose(1, 2) for x in (tokens.q, tokens.k, tokens.v, gates.eta))
    wanted, _ = other(q, k, v, eta, None if gates.log_alpha is None else gates.log_alpha.transpose(1, 2))
    assert largest_gap([y.transpose(1, 2)], [wanted]) < 1e-10


def test_dot_bias_is_linear_attention() -> None:
    form = Form("matrix", "dot", block=4)
    _, _, tokens, _ = sample(form)
    one = torch.ones_like(tokens.gates.eta)
    y, _ = run_document(form, Outer(SAME), zero_state(), tokens._replace(gates=Gates(None, None, one, one[..., None])))
    wanted = torch.tril(tokens.q @ tokens.k.mT) @ tokens.v
    assert largest_gap([y], [wanted]) < 1e-12


def test_gamma_of_the_present_token_alone_is_a_window_of_one() -> None:
    form = Form("mlp", block=4, window=3, optimizer="momentum")
    outer, initial, tokens, _ = sample(form)
    gamma = tokens.gates.gamma * torch.tensor([1.0, 0.0, 0.0])
    y, _ = run_document(form, outer, rows_of(initial, 2), tokens._replace(gates=tokens.gates._replace(gamma=gamma)))
    short = tokens._replace(gates=tokens.gates._replace(gamma=gamma[..., :1]))
    wanted, _ = run_document(Form("mlp", block=4, optimizer="momentum"), outer, rows_of(initial, 2), short)
    assert largest_gap([y], [wanted]) < 1e-12


@pytest.mark.parametrize("optimizer", ["gd", "momentum", "muon"])
def test_without_gamma_the_memory_only_decays(optimizer: Any) -> None:
    form = Form("mlp", block=4, window=2, optimizer=optimizer)
    outer, initial, tokens, _ = sample(form)
    gates = tokens.gates._replace(gamma=torch.zeros_like(tokens.gates.gamma))
    _, state = run_document(form, outer, rows_of(initial, 2), tokens._replace(gates=gates))
    kept = tokens.gates.log_alpha.sum(-1).exp()[..., None, None]
    assert largest_gap(state.memory, [kept * w for w in initial]) < 1e-12


@pytest.mark.parametrize("form", [Form("matrix", "dot", block=4, window=3, optimizer="momentum"),
                                  Form("matrix", block=4, exact=True, decayed=True)])  # fmt: skip
def test_gates_of_zero_forget_all_tokens_before_the_window(form: Form) -> None:
    """With gradients that do not look at the old memory; gates of exactly zero give no NaN, nor do their gradients."""
    outer, initial, tokens, leaves = sample(form)
    t = 9
    shut = torch.zeros(T, dtype=torch.float64)
    shut[t] = -torch.inf
    gates = tokens.gates._replace(log_alpha=tokens.gates.log_alpha + shut)
    if gates.log_theta is not None:
        gates = gates._replace(log_theta=gates.log_theta + shut)
    tokens = tokens._replace(gates=gates)
    y, _ = run_document(form, outer, rows_of(initial, 2), tokens)
    (grad,) = torch.autograd.grad(y[:, :, t:].sum(), [leaves[1]], retain_graph=True)
    first = t - form.window + 1
    assert bool((grad[:, :, :first] == 0).all()) and bool((grad[:, :, first:] != 0).any())
    grads = torch.autograd.grad(y.sum(), leaves[:7], allow_unused=True)
    assert all(bool(torch.isfinite(g).all()) for g in grads if g is not None)


def test_no_token_changes_an_earlier_output() -> None:
    """To the last bit."""
    for form in (FORMS["mlp wide window"], FORMS["muon"], FORMS["exact"], FORMS["muon blocks"]):
        outer, initial, tokens, _ = sample(form)
        with torch.no_grad():
            y, _ = run_document(form, outer, rows_of(initial, 2), tokens)
            for t in (0, 5, 13):
                other = each_tensor(tokens, lambda x, t=t: torch.cat([x[:, :, :t], x[:, :, t:] - 0.5], dim=2))
                z, _ = run_document(form, outer, rows_of(initial, 2), other)
                assert torch.equal(y[:, :, :t], z[:, :, :t])
                assert t == 0 or form.muon_block or not torch.equal(y[:, :, t], z[:, :, t])


def test_the_block_is_part_of_the_model() -> None:
    outer, initial, tokens, _ = sample(Form("mlp"))
    y = [run_document(Form("mlp", block=b), outer, rows_of(initial, 2), tokens)[0] for b in (1, 2, 4)]
    assert largest_gap(y[:1], y[1:2]) > 1e-3 and largest_gap(y[1:2], y[2:]) > 1e-3


@pytest.mark.parametrize("name", ["mlp normed", "gated", "mlp dot", "matrix normed"])
def test_inner_gradients_against_autograd(name: str) -> None:
    form = FORMS[name]
    outer, initial, tokens, _ = sample(form, batch=1, n=1)
    k, v = tokens.k[0, :1], tokens.v[0, :1]

    def loss(weights: Weights) -> Tensor:
        norm = outer.norm and LayerNorm(outer.norm.scale[:1], outer.norm.shift[:1])
        found = recall(form, tuple(w[None] for w in weights), k[None], norm)[0]
        return (0.5 * (found - v).square() if form.bias == "l2" else -found * v).sum()

    weights = tuple(w[:1].detach() for w in initial)
    wanted = torch.func.grad(loss)(weights)
    norm = outer.norm and LayerNorm(outer.norm.scale[:1], outer.norm.shift[:1])
    inputs, errors = gradient_factors(form, tuple(w[None] for w in weights), k[None], v[None], norm)
    found = [torch.einsum("bhti,bhtj->hij", e, i) for e, i in zip(errors, inputs)]
    assert largest_gap(found, wanted) < 1e-12


def test_outer_gradients_through_two_blocks_and_newton_schulz() -> None:
    form = Form("mlp", block=2, window=2, optimizer="muon", ns_steps=2)
    outer, initial, tokens, leaves = sample(form, batch=1, n=4)

    def run(*inputs: Tensor) -> Tensor:
        q, k, v, log_alpha, log_theta, eta, gamma, *weights = inputs
        state = MemoryState(tuple(w[None] for w in weights))
        return run_document(form, outer, state, Tokens(q, k, v, Gates(log_alpha, log_theta, eta, gamma)))[0]

    assert torch.autograd.gradcheck(run, tuple(leaves[:-2]), fast_mode=True, atol=1e-6)


def test_band_and_decays() -> None:
    gamma = torch.arange(1.0, 10.0).reshape(3, 3)
    assert band(gamma, 1).tolist() == [[2, 1, 0, 0], [6, 5, 4, 0], [0, 9, 8, 7]]
    x = torch.tensor([0.5, 0.25, 0.0])
    assert decays(x.log()).tolist() == [[1, 0, 0], [0.25, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize("table", ["quintic", "polar_express", "lact"])
def test_newton_schulz(table: Any) -> None:
    rng = torch.Generator().manual_seed(0)
    s = torch.randn(3, 6, 9, generator=rng, dtype=torch.float64)
    o = newton_schulz(s, 5, table)
    assert largest_gap([newton_schulz(-s, 5, table)], [-o]) < 1e-12
    assert largest_gap([newton_schulz(7 * s, 5, table)], [o]) < 1e-5
    assert largest_gap([newton_schulz(s.mT, 5, table)], [o.mT]) < 1e-10
    assert bool((newton_schulz(torch.zeros_like(s), 5, table) == 0).all())
    low, high, least = {
        "quintic": (0.682, 1.134, 0.01),
        "polar_express": (0.859, 1.141, 1.02e-3),
        "lact": (0.978, 1.032, 0.01),
    }[table]
    small = torch.logspace(math.log10(least), math.log10(0.5**0.5), 2000, dtype=torch.float64)
    values = torch.stack([small, (1 - small.square()).sqrt()], dim=-1)
    turn = torch.linalg.qr(torch.randn(2, 2, generator=rng, dtype=torch.float64))[0]
    found = torch.linalg.svdvals(newton_schulz(turn @ torch.diag_embed(values) @ turn, 5, table))
    assert abs(float(found.min()) - low) < 2e-3 and abs(float(found.max()) - high) < 2e-3


def test_both_published_signs_of_muon_agree() -> None:
    """With a step size of 1 it does not matter on which side of the orthogonalisation it stands (App. D.4)."""
    outer, initial, tokens, _ = sample(Form("mlp", optimizer="muon"))
    gates = tokens.gates._replace(eta=torch.ones_like(tokens.gates.eta))
    y = [
        run_document(Form("mlp", block=4, optimizer="muon", eta_inside=inside), outer, rows_of(initial, 2),
                     tokens._replace(gates=gates))[0]
        for inside in (False, True)
    ]  # fmt: skip
    assert largest_gap(y[:1], y[1:]) < 1e-12


@pytest.mark.parametrize(("kind", "degree"), [("poly2", 2), ("poly3", 3)])
def test_polynomial_features(kind: Any, degree: int) -> None:
    rng = torch.Generator().manual_seed(0)
    x, y = (F.normalize(torch.randn(1, HEADS, 3, D, generator=rng, dtype=torch.float64), dim=-1) for _ in range(2))
    scale = torch.rand(HEADS, degree + 1, generator=rng, dtype=torch.float64)
    tables = tuple((monomials(D, i), n_orders(D, i)) for i in range(2, degree + 1))
    lift = Features(kind, scale=scale, tables=tables, normal=False)
    assert lift(x).shape[-1] == n_features(kind, D) == math.comb(D + degree, degree)
    dots = (x * y).sum(-1)
    a = scale.square()[None, :, :, None]
    wanted = sum(a[:, :, i] * dots**i / math.factorial(i) for i in range(degree + 1))
    assert largest_gap([(lift(x) * lift(y)).sum(-1)], [wanted]) < 1e-12
    linear = Features(kind, scale=torch.eye(degree + 1, dtype=torch.float64)[1].expand(HEADS, -1), tables=tables)
    assert largest_gap([lift_nonzero(linear(x))], [x]) < 1e-12


def lift_nonzero(lifted: Tensor) -> Tensor:
    """The linear features; the others must be zero."""
    others = torch.cat([lifted[..., :1], lifted[..., 1 + D :]], dim=-1)
    assert bool((others == 0).all())
    return lifted[..., 1 : 1 + D]


@pytest.mark.parametrize("degree", [2, 4])
def test_sketches_are_right_on_average(degree: int) -> None:
    """For degree 4 over the second sketch, given the first: over both, the variance of the first comes on top."""
    rng = torch.Generator().manual_seed(0)
    x, y = (F.normalize(torch.randn(1, 1, 1, D, generator=rng, dtype=torch.float64), dim=-1) for _ in range(2))
    y = F.normalize(x + 0.3 * y, dim=-1)
    scale, size, found = torch.eye(3, dtype=torch.float64)[2:], 64, []

    def draw(width: int) -> Tensor:
        return torch.randn(2, width, size, generator=rng, dtype=torch.float64)

    first = draw(D)
    for _ in range(400):
        sketches = (first, draw(size)) if degree == 4 else (draw(D),)
        lift = Features("sketch4" if degree == 4 else "sketch2", scale=scale, sketches=sketches, normal=False)
        assert lift(x).shape[-1] == n_features(lift.kind, D, size)
        found.append((lift(x) * lift(y)).sum())
    inner = Features("sketch2", scale=scale, sketches=(first,), normal=False)
    wanted = float((x * y).sum()) ** 2 / 2 if degree == 2 else float(2 * (inner(x) * inner(y)).sum()) ** 2 / 24
    mean, error = float(torch.stack(found).mean()), float(torch.stack(found).std()) / 20
    assert abs(mean - wanted) < 3 * error < 0.2 * wanted


def test_number_of_features() -> None:
    wanted = {16: (153, 969), 32: (561, 6545), 48: (1225, 20825), 64: (2145, 47905), 96: (4753, 156849),
              256: (33153, 2862209)}  # fmt: skip
    assert {d: (n_features("poly2", d), n_features("poly3", d)) for d in wanted} == wanted


@pytest.mark.parametrize(
    ("kind", "on_sphere", "capacity"), [("id", True, 8), ("poly2", False, 45), ("poly2", True, 44)]
)
def test_capacity(kind: Any, on_sphere: bool, capacity: int) -> None:
    """Any `capacity` pairs can be stored exactly, one more cannot. On the unit sphere the squares of a key sum to the
    constant feature, which costs one."""
    rng = torch.Generator().manual_seed(0)
    tables = ((monomials(8, 2), n_orders(8, 2)),) if kind == "poly2" else ()
    lift = Features(kind, scale=torch.ones(1, 3, dtype=torch.float64), tables=tables)
    for m, fits in ((capacity, True), (capacity + 1, False)):
        k, v = (torch.randn(1, 1, m, 8, generator=rng, dtype=torch.float64) for _ in range(2))
        phi = lift(F.normalize(k, dim=-1) if on_sphere else k)[0, 0]
        solution = torch.linalg.lstsq(phi, v[0, 0], driver="gelsd").solution
        residual = float((phi @ solution - v[0, 0]).norm())
        assert (residual < 1e-8) == fits and (fits or residual > 0.1)


def test_a_token_that_is_no_step_changes_nothing() -> None:
    form = FORMS["mlp wide window"]
    outer, initial, tokens, _ = sample(form, n=8)
    steps = (torch.arange(8) < 5).expand(2, 1, 8)
    _, state = run_block(form, outer, rows_of(initial, 2), Block(*tokens, steps, steps))
    short = each_tensor(tokens, lambda x: x[:, :, :5])
    _, wanted = run_block(form, outer, rows_of(initial, 2), Block(*short))
    assert largest_gap([*state.memory, *state.momentum], [*wanted.memory, *wanted.momentum]) < 1e-12
