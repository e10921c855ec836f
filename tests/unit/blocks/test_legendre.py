"""The Legendre memory: its matrices, its three forms, what can be read out of it, and that casting leaves it alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from llm.blocks.legendre import (
    LegendreMemory,
    advance,
    chunked,
    convolved,
    discretise,
    recurrent,
    spectrum,
    system_tables,
)
from llm.core.init import initialise
from llm.core.seq import SeqInfo

F64 = torch.float64


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def continuous(order: int, window: float) -> tuple[Tensor, Tensor]:
    """The system as it is published, entry by entry."""
    system = torch.zeros(order, order, dtype=F64)
    for i in range(order):
        for j in range(order):
            system[i, j] = (2 * i + 1) / window * (-1.0 if i < j else (-1.0) ** (i - j + 1))
    return system, torch.tensor([(2 * i + 1) / window * (-1.0) ** i for i in range(order)], dtype=F64)


@pytest.mark.parametrize(("order", "window"), [(6, 9.0), (16, 128.0), (32, 64.0)])
def test_discretisation_solves_the_differential_equation(order: int, window: float) -> None:
    """Against fourth-order Runge-Kutta over a step in which the input is held."""
    system, drive = continuous(order, window)
    transition, step = discretise(order, window)
    n = 1500
    m = torch.cat([torch.eye(order, dtype=F64), torch.zeros(order, 1, dtype=F64)], dim=1)
    held = torch.cat([torch.zeros(order, order, dtype=F64), drive[:, None]], dim=1)

    def slope(m: Tensor) -> Tensor:
        return system @ m + held

    for _ in range(n):
        a = slope(m)
        b = slope(m + a / (2 * n))
        c = slope(m + b / (2 * n))
        d = slope(m + c / n)
        m = m + (a + 2 * b + 2 * c + d) / (6 * n)
    torch.testing.assert_close(m[:, :order], transition, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(m[:, order], step, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("order", "window"), [(16, 128.0), (64, 784.0)])
def test_discretisation_equals_scipy(order: int, window: float) -> None:
    signal = pytest.importorskip("scipy.signal")
    system, drive = continuous(order, window)
    theirs = signal.cont2discrete(
        (system.numpy(), drive[:, None].numpy(), torch.eye(order).numpy(), torch.zeros(order, 1).numpy()), 1.0, "zoh"
    )
    transition, step = discretise(order, window)
    torch.testing.assert_close(transition, torch.from_numpy(theirs[0]), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(step, torch.from_numpy(theirs[1])[:, 0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("order", "window", "radius"), [(16, 128, 0.951), (256, 128, 0.861), (256, 2048, 0.991)])
def test_spectral_radius_is_below_one(order: int, window: int, radius: float) -> None:
    """The published systems forget."""
    found = float(torch.linalg.eigvals(discretise(order, float(window))[0]).abs().max())
    assert found == pytest.approx(radius, abs=5e-4)


@pytest.mark.parametrize(("order", "window", "most"), [(16, 128, 0.05), (64, 784, 0.01)])
def test_a_delayed_input_is_read_out(order: int, window: int, most: float) -> None:
    """A sinusoid of period 0.8 windows, at 50 delays: u(t - r window) = sum_i P_i(2r - 1) m_i(t)."""
    t = torch.arange(3 * window, dtype=F64)
    u = (2 * math.pi * t / (0.8 * window)).sin()
    m = chunked(u[None, :, None, None], system_tables(order, (float(window),), 16, 8, False))[0, :, 0, 0]
    delays = torch.linspace(0, 1, 50, dtype=F64)
    legendre = [torch.ones_like(delays), 2 * delays - 1]
    for i in range(1, order - 1):
        legendre.append(((2 * i + 1) * (2 * delays - 1) * legendre[i] - i * legendre[i - 1]) / (i + 1))
    decoded = m[2 * window :] @ torch.stack(legendre)
    wanted = (2 * math.pi * (t[2 * window :, None] - delays * window) / (0.8 * window)).sin()
    assert float((decoded - wanted).square().mean().sqrt()) < most


CASES = [(6, (9.0,), 4, 37), (6, (9.0, 40.0), 4, 64), (16, (64.0,), 16, 15), (4, (5.0,), 1, 9), (32, (512.0,), 16, 130)]


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize(("order", "windows", "chunk", "length"), CASES)
def test_all_forms_agree(order: int, windows: tuple[float, ...], chunk: int, length: int, unit: bool) -> None:
    tables = system_tables(order, windows, chunk, 2, unit)
    u = randn(2, length, len(windows), 3)
    wanted = recurrent(u, tables)
    for found in (chunked(u, tables), convolved(u, spectrum(length, tables))):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    cut = length // 3
    found = chunked(u[:, cut:], tables, None, wanted[:, cut - 1])
    torch.testing.assert_close(found, wanted[:, cut:], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(advance(u[:, cut], wanted[:, cut - 1], tables), wanted[:, cut], rtol=1e-12, atol=1e-12)


def test_the_published_cell_in_fp32() -> None:
    """Order 256, window 128, 128 frames: within 1e-5 of one another and of float64."""
    exact = system_tables(256, (128.0,), 16, 3, False)
    tables = {name: table.float() for name, table in exact.items()}
    u = randn(2, 128, 1, 1).relu()
    wanted = recurrent(u, exact)
    forms = {
        "recurrent": recurrent(u.float(), tables),
        "chunked": chunked(u.float(), tables),
        "fft": convolved(u.float(), spectrum(128, exact).to(torch.complex64)),
    }
    for name, found in forms.items():
        assert float((found - wanted).abs().max()) < 1e-5, name


@pytest.mark.parametrize(
    "lengths", [[[5, 1, 31], [37]], [[1] * 37, [4, 4, 29]], [[36, 1], [1, 36]], [[16, 21], [20, 17]]]
)
def test_packed_documents_equal_themselves_alone(lengths: list[list[int]]) -> None:
    """Values, and no gradient over a boundary; an infinite input stays in its own document."""
    tables = system_tables(6, (9.0, 30.0), 4, 2, False)
    u = randn(2, 37, 2, 3).requires_grad_()
    seq = SeqInfo.from_lengths(lengths, 37)
    found = chunked(u, tables, seq.positions)
    rows = []
    for row, documents in enumerate(lengths):
        rows.append(torch.cat([recurrent(d[None], tables) for d in u[row].split(documents)], dim=1))
    torch.testing.assert_close(found, torch.cat(rows), rtol=1e-12, atol=1e-12)
    first = lengths[0][0]
    if first < 37:
        (grad,) = torch.autograd.grad(found[0, first:].sum(), u)
        assert not grad[0, :first].any() and grad[0, first:].any()
        spoiled = u.detach().clone()
        spoiled[0, :first] = float("inf")
        torch.testing.assert_close(chunked(spoiled, tables, seq.positions)[0, first:], found[0, first:].detach())


def test_unit_coefficients_have_unit_size_under_white_noise() -> None:
    unit, plain = (system_tables(8, (200.0, 20.0), 16, 8, flag) for flag in (True, False))
    response = chunked(torch.eye(3000, 1, dtype=F64)[None, :, None].expand(1, -1, 2, 1), unit)[0, :, :, 0]
    torch.testing.assert_close(response.square().sum(0), torch.ones(2, 8, dtype=F64), rtol=1e-6, atol=1e-6)
    u = randn(1, 90, 2, 3)
    ratio = chunked(u, plain) / chunked(u, unit)
    torch.testing.assert_close(ratio, ratio[:, :1, :, :1].expand_as(ratio), rtol=1e-6, atol=1e-9)


def test_the_recurrence_is_stable() -> None:
    """Four windows of unit inputs: bounded, and fp32 stays near float64."""
    exact = system_tables(64, (128.0,), 16, 4, False)
    u = torch.ones(1, 512, 1, 1, dtype=F64)
    m = recurrent(u, exact)
    low = recurrent(u.float(), {name: table.float() for name, table in exact.items()})
    assert float(m.abs().max()) < 1.1
    torch.testing.assert_close(m[0, -1, 0, 0, :2], torch.tensor([1.0, 0.0], dtype=F64), atol=1e-3, rtol=0)
    assert float((low - m).abs().max()) < 2e-5


def test_casting_a_model_leaves_the_matrices_in_float64() -> None:
    memory = LegendreMemory(6, (9.0,), chunk=4, max_len=64)
    initialise(memory, 0)
    before = {name: b.clone() for name, b in memory.named_buffers()}
    memory.to(torch.bfloat16).half().float()
    for name, buffer in memory.named_buffers():
        assert buffer.dtype == F64 and torch.equal(buffer, before[name]), name
    assert not memory.state_dict()
    meta = LegendreMemory(6, (9.0,), chunk=4, max_len=64).to("meta").bfloat16().to_empty(device="cpu")
    initialise(meta, 0)
    assert all(torch.equal(b, before[name]) for name, b in meta.named_buffers())


def test_tables_are_converted_once_per_forward() -> None:
    memories = [LegendreMemory(6, (9.0,), chunk=4, max_len=64) for _ in range(2)]
    for memory in memories:
        initialise(memory, 0)
    seq = SeqInfo.contiguous(1, 12)
    for memory in memories:
        memory.prepare(seq, torch.float32, fft=True)
    made = {key: id(value) for key, value in seq.derived.items()}
    assert len(made) == 2
    for memory in memories:
        memory(randn(1, 12, 1, 1, dtype=torch.float32), seq, fft=True)
        memory(randn(1, 12, 1, 1, dtype=torch.float32), seq)
    assert made == {key: id(value) for key, value in seq.derived.items()}


def test_longer_than_the_model_was_built_for() -> None:
    memory = LegendreMemory(6, (9.0,), chunk=2, max_len=4)
    initialise(memory, 0)
    u = randn(1, 200, 1, 2)
    wanted = recurrent(u, system_tables(6, (9.0,), 2, 1, False))
    torch.testing.assert_close(memory(u, SeqInfo.contiguous(1, 200)), wanted, rtol=1e-12, atol=1e-12)
