"""Random orders and mixtures: pure functions of the index, true to their shares and limits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.core.errors import UserError
from llm.data.mixture import Mixture, row_shares
from llm.data.permute import Permutation, key_of


@settings(max_examples=80)
@given(n=st.integers(1, 3000), key=st.integers(0, 2**63))
def test_permutation_is_one(n: int, key: int) -> None:
    perm = Permutation(n, key)
    out = perm(np.arange(n))
    assert sorted(out.tolist()) == list(range(n))
    assert perm(np.array([n - 1]))[0] == out[-1]


def test_permutation_looks_random() -> None:
    n = 20
    first = np.array([Permutation(n, key)(np.arange(n)) for key in range(4000)])
    counts = np.stack([np.bincount(first[:, i], minlength=n) for i in range(n)])
    chi2 = ((counts - 200) ** 2 / 200).sum(axis=1)
    assert chi2.max() < 60, "19 degrees of freedom: 60 has probability 4e-6"
    big = Permutation(10**6, 3)(np.arange(10**6)).astype(float)
    assert abs(np.corrcoef(np.arange(10**6), big)[0, 1]) < 0.005
    assert abs(np.corrcoef(big[:-1], big[1:])[0, 1]) < 0.005


def test_permutation_never_changes() -> None:
    """Runs that were saved go on only if these stay as they are."""
    assert Permutation(10, 7)(np.arange(10)).tolist() == [2, 3, 4, 1, 0, 7, 6, 9, 8, 5]
    assert key_of("data", 0) == 11119179451468615178


def test_shares_hold_at_every_moment() -> None:
    shares = [0.5, 0.3, 0.15, 0.05]
    source, row = Mixture(shares, [None] * 4).rows(np.arange(20_000))
    for s, share in enumerate(shares):
        mine = source == s
        assert (row[mine] == np.arange(mine.sum())).all()
        running = np.cumsum(mine)
        assert np.abs(running - share * np.arange(1, 20_001)).max() < 3


def test_very_small_share() -> None:
    source, _ = Mixture([1.0, 1e-4], [None, None]).rows(np.arange(100_000))
    assert (source == 1).sum() == 10


@settings(max_examples=60)
@given(
    weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=6),
    limits=st.lists(st.one_of(st.none(), st.integers(1, 3000)), min_size=6, max_size=6),
    chunk=st.integers(1, 5000),
)
def test_any_mixture(weights: list[float], limits: list[int | None], chunk: int) -> None:
    """Each row of each source comes once and in order; limits hold; the answer does not depend on how one asks."""
    limits = limits[: len(weights)]
    mixture = Mixture(weights, limits)
    n = 6000 if mixture.total is None else min(6000, mixture.total)
    source, row = mixture.rows(np.arange(n))
    for s, limit in enumerate(limits):
        mine = row[source == s]
        assert (mine == np.arange(len(mine))).all()
        assert limit is None or len(mine) <= limit
    again = Mixture(weights, limits)
    for low in range(0, n, chunk):
        part = again.rows(np.arange(low, min(n, low + chunk)))
        assert (part[0] == source[low : low + chunk]).all() and (part[1] == row[low : low + chunk]).all()


def test_share_of_a_source_that_is_used_up_goes_to_the_others() -> None:
    source, _ = Mixture([0.5, 0.25, 0.25], [100, None, None]).rows(np.arange(10_000))
    assert (source[:200] == 0).sum() in (99, 100) and (source == 0).sum() == 100
    rest = source[400:]
    assert abs((rest == 1).mean() - 0.5) < 0.01


def test_end_of_all_data() -> None:
    mixture = Mixture([0.7, 0.3], [10, 25])
    assert mixture.total == 35
    source, _ = mixture.rows(np.arange(35))
    assert np.bincount(source).tolist() == [10, 25]
    with pytest.raises(UserError, match="used up"):
        mixture.rows(np.array([35]))


def test_row_shares() -> None:
    """Two sources of equal weight: rows of the one hold 10 tokens and 5 documents, of the other 5 tokens and 1."""
    tokens = row_shares([1, 1], [100, 50], [10, 10], [50, 10], "tokens")
    assert tokens[1] / tokens[0] == pytest.approx(2)
    documents = row_shares([1, 1], [100, 50], [10, 10], [50, 10], "documents")
    assert documents[1] / documents[0] == pytest.approx(5)
