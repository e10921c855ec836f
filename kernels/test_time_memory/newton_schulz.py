"""Newton-Schulz iterations: the nearest orthogonal matrix, approximately, from matrix products alone."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Table = Literal["quintic", "polar_express", "lact"]

_QUINTIC = (3.4445, -4.7750, 2.0315)

TABLES: dict[str, tuple[tuple[float, float, float], ...]] = {
    "polar_express": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
    "lact": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
}
"""Coefficients (a, b, c) that change from step to step; "quintic" repeats the same ones and may take any number."""

_MARGIN = {"polar_express": 1.02}
"""Factor on the norm that is divided by, for tables that diverge just above 1."""


def newton_schulz(s: Tensor, steps: int = 5, table: Table = "quintic") -> Tensor:
    """s [..., m, n] -> the same singular vectors, singular values brought near 1 (zero stays zero).

    The quintic does not converge to 1: values in [0.01, 1] of the normalised matrix come to lie in [0.68, 1.14].
    """
    coefficients = (_QUINTIC,) * steps if table == "quintic" else TABLES[table][:steps]
    assert len(coefficients) == steps, f"{table} has {len(coefficients)} steps, not {steps}"
    norm = _MARGIN.get(table, 1.0) * torch.linalg.vector_norm(s, dim=(-2, -1), keepdim=True)
    x = s / (norm + 1e-7)
    tall = s.shape[-2] > s.shape[-1]
    if tall:
        x = x.mT
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def newton_schulz_flops(m: int, n: int, steps: int) -> float:
    """Of one matrix [m, n]."""
    m, n = min(m, n), max(m, n)
    return steps * (4.0 * m * m * n + 2.0 * m**3)
