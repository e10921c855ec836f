"""The experiments on loops and on recurrent memories: solvers, tables, and that models train and are put to lengths."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from evals import in_context, remember
from evals.synthetic.regression import Regression


def test_newton_squares_the_residual() -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((3, 6, 9))
    s = a @ a.transpose(0, 2, 1) / 9 + 0.3 * np.eye(6)
    residuals = [np.eye(6) - s @ in_context.newton_inverse(s, n) for n in range(12)]
    for before, after in zip(residuals, residuals[1:]):
        np.testing.assert_allclose(after, before @ before, atol=1e-9)
    np.testing.assert_allclose(in_context.newton_inverse(s, 25), np.linalg.inv(s), atol=1e-9)


def test_gradient_descent_contracts_to_least_squares() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((4, 20, 3)), rng.standard_normal((4, 3))
    y = (x @ w[..., None])[..., 0]
    eigenvalues = np.linalg.eigvalsh(x.transpose(0, 2, 1) @ x)
    factor = 1 - eigenvalues[:, 0] / eigenvalues[:, -1]
    errors = [np.linalg.norm(in_context.gradient_descent(x, y, n) - w, axis=1) for n in range(20)]
    for before, after in zip(errors, errors[1:]):
        assert (after <= factor * before + 1e-12).all()


def test_solvers_on_the_task() -> None:
    task = Regression(d=3, n_points=20, d_representation=5)
    found = in_context.solvers(task, task.examples(0, "valid", 0, 50).inputs, [1, 5, 40])
    for errors in found.values():
        assert errors["1"] > errors["5"] > errors["40"]
    assert found["Newton"]["40"] < 1e-9 < found["gradient descent"]["40"]


def _last_line(text: str) -> dict[str, Any]:
    return json.loads(text.splitlines()[-1])


def test_in_context_command(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--steps", "4", "--batch", "4", "--examples", "8", "--d-model", "16", "--heads", "2", "--loops", "3"]
    argv += ["--models", "standard", "looped", "algoformer", "algoformer-last", "--points", "6", "--window", "2"]
    assert in_context.main(argv) == 0
    out = capsys.readouterr().out
    record = _last_line(out)
    assert [row["model"] for row in record["rows"]] == argv[argv.index("--models") + 1 : argv.index("--points")]
    standard, looped, algoformer, _ = record["rows"]
    assert standard["parameters"] == algoformer["parameters"]
    assert standard["parameters"] - looped["parameters"] == 2 * (12 * 16**2 + 13 * 16)
    assert not standard["by_loops"] and list(looped["by_loops"]) == ["1", "2", "3", "6", "12"]
    assert "Newton, as many steps" in out and "ridge" in out


def test_remember_command(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--models", "rmt", "rmt-r", "armt", "none", "whole", "--stages", "2", "3", "--test", "2", "5"]
    assert remember.main([*argv, "--steps", "2", "--batch", "4", "--examples", "8", "--d-model", "16"]) == 0
    record = _last_line(capsys.readouterr().out)
    rows = {row["model"]: row for row in record["rows"]}
    assert list(rows) == ["rmt", "rmt-r", "armt", "none", "whole"]
    assert all(list(row["stages"]) == ["2", "3"] and list(row["test"]) == ["2", "5"] for row in rows.values())
    assert rows["rmt"]["parameters"] - rows["none"]["parameters"] == 4 * 16
    assert rows["armt"]["parameters"] - rows["rmt"]["parameters"] == 2 * (2 * 16 * 16 + 16 * 16 + 16 + 1)
    with pytest.raises(SystemExit):
        remember.parse(["--pairs", "2", "--stages", "2"])


@pytest.mark.slow
def test_an_associative_memory_learns_to_remember() -> None:
    row = remember.train(
        remember.parse(["--stages", "2", "3", "--test", "6", "--steps", "75", "--examples", "64", "--lr", "0.004"]),
        "armt",
    )
    assert row["stages"]["3"] > 0.95 and row["test"]["6"] > 0.5
