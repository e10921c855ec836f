"""Universal approximation with one layer, exactly; ListOps against its definition."""

from __future__ import annotations

import json
import math

import pytest
import torch

from evals import listops
from evals.wide_attention import (
    D,
    N,
    OneLayer,
    averaged,
    equivariant_target,
    fit,
    inputs,
    leakage,
    leakage_bound,
    ridge_error,
    target,
    written,
)


@pytest.mark.parametrize(("beta", "measured"), [(5.0, 3.8e-2), (10.0, 2.6e-4), (20.0, 1.2e-8), (40.0, 0.0)])
def test_leakage(beta: float, measured: float) -> None:
    """The written heads copy the whole sequence to every position, up to the bound and about as far as it allows."""
    found = leakage(inputs(6000, 99), beta)
    assert found <= leakage_bound(N, beta) + 1e-15
    assert found <= 2 * N * math.exp(-beta) + 1e-15
    assert found == pytest.approx(measured, rel=0.05, abs=1e-15)
    for n, d in ((2, 1), (7, 3)):
        x = 5 * torch.rand(50, n, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        assert leakage(x, beta) <= leakage_bound(n, beta, 5.0) + 1e-14


def test_error_falls_with_width_and_not_without_positions() -> None:
    spread = float(target(inputs(6000, 0)).std())
    assert spread == pytest.approx(0.69, abs=0.02)
    x, held_out = inputs(1500, 0), inputs(500, 500)
    copied, control = (
        [
            ridge_error((read(x), target(x)), (read(held_out), target(held_out)), width, seed=0)
            for width in (32, 64, 128, 256, 512)
        ]
        for read in (written, averaged)
    )
    assert all(b < a for a, b in zip(copied, copied[1:])), copied
    assert copied[-1] < 0.6 * spread
    assert all(error > 0.97 * spread for error in control), control


def test_equivariance_holds_without_positions_alone() -> None:
    x = inputs(64, 3)
    order = torch.tensor([2, 0, 3, 1])
    free = OneLayer(D, D, width=32).double()
    bound = OneLayer(D, D, width=32, positions=N).double()
    with torch.no_grad():
        assert float((free(x[:, order]) - free(x)[:, order]).abs().max()) < 1e-6
        assert float((bound(x[:, order]) - bound(x)[:, order]).abs().max()) > 1e-2
    torch.testing.assert_close(equivariant_target(x[:, order]), equivariant_target(x)[:, order])


def test_training_needs_positions_for_what_depends_on_them() -> None:
    spread = float(equivariant_target(inputs(2000, 0)).std())
    assert fit(OneLayer(D, D, width=64), equivariant_target, 80, seed=0, batch=64) < 0.4 * spread
    blind = fit(OneLayer(D, D, width=64), target, 40, seed=0, batch=64)
    assert blind > 0.97 * float(target(inputs(2000, 0)).std())
    assert fit(OneLayer(D, D, width=64, positions=N), target, 80, seed=0, batch=64) < 0.9 * blind


def value_of(tokens: list[int]) -> int:
    """A stack evaluator."""
    stack: list[list[int]] = [[]]
    for token in tokens:
        if token == listops.CLOSE:
            operator, *values = stack.pop()
            values.sort()
            n = len(values)
            middle = (values[(n - 1) // 2] + values[n // 2]) // 2
            stack[-1].append({10: values[0], 11: values[-1], 12: middle, 13: sum(values) % 10}[operator])
        elif token >= 10:
            stack.append([token])
        else:
            stack[-1].append(token)
    return stack[0][0]


def test_listops() -> None:
    options = {"max_depth": 4, "max_args": 5, "min_length": 10, "max_length": 60}
    rows = listops.samples(500, 0, **options)
    assert rows == listops.samples(500, 0, **options) != listops.samples(500, 1, **options)
    assert len({tuple(tokens) for tokens, _ in rows}) == 500
    for tokens, value in rows:
        assert 10 <= len(tokens) <= 60
        assert value_of(tokens) == value
        depth = deepest = arguments = 0
        for token in tokens:
            depth += (10 <= token < listops.CLOSE) - (token == listops.CLOSE)
            deepest = max(deepest, depth)
            arguments += token < 10
        n_operators = sum(10 <= token < listops.CLOSE for token in tokens)
        assert len(tokens) == arguments + 2 * n_operators
        assert deepest <= 3, "a list at depth 4 holds digits alone"
    assert len({value for _, value in rows}) == 10


def test_listops_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert listops.main(["--steps", "2", "--samples", "200", "--shapes", "2x2", "1x4", "--max-length", "40"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    weights = [result["shapes"][name]["weights"] for name in ("2x2", "1x4")]
    assert weights[0] - weights[1] == 2 * 128 * 256
    with pytest.raises(ValueError, match="layers x heads, such as 6x4"):
        listops.main(["--shapes", "6"])


def test_the_answer_reads_the_last_token_whatever_stands_behind() -> None:
    config = listops.build(1, 4, 40)
    model = config.build("cpu")
    from llm.core.init import initialise

    initialise(model, 0)
    rows = listops.samples(4, 0, max_depth=4, max_args=5, min_length=5, max_length=40)
    with torch.no_grad():
        together = listops.answer(model, *listops.batch_of(rows)[:2])
        for row, one in zip(together, rows):
            torch.testing.assert_close(listops.answer(model, *listops.batch_of([one])[:2])[0], row)
