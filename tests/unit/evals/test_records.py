"""Files of results: resumed after a kill, refused under other conditions; intervals against scipy's."""

from __future__ import annotations

from pathlib import Path

import pytest

from evals.heatmap import heat_map
from evals.records import Records, wilson_interval
from llm.core.errors import UserError


def test_a_killed_file_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "out" / "samples.jsonl"
    Records(path, {"seed": 1}).add([{"id": "a", "x": 1}, {"id": "b", "x": "h\u00e9\u2028"}])
    with open(path, "ab") as file:
        file.write('{"id": "c", "x": "h\u00e9'.encode()[:-1])
    again = Records(path, {"seed": 1})
    assert list(again.done) == ["a", "b"]
    again.add([{"id": "c", "x": 3}])
    assert Records(path, {"seed": 1}).done["c"] == {"id": "c", "x": 3}
    with pytest.raises(AssertionError):
        again.add([{"id": "a"}])


def test_other_conditions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    Records(path, {"seed": 1, "n": [1, 2]})
    Records(path, {"seed": 1, "n": (1, 2)})
    with pytest.raises(UserError, match="seed was 1, now it is 2"):
        Records(path, {"seed": 2, "n": [1, 2]})
    path.write_text("hello\n")
    with pytest.raises(UserError, match="no file of results"):
        Records(path, {"seed": 1})


def test_a_kill_within_the_first_line(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text('{"cond')
    Records(path, {"seed": 1}).add([{"id": "a"}])
    assert list(Records(path, {"seed": 1}).done) == ["a"]


@pytest.mark.parametrize(("right", "n"), [(0, 10), (3, 10), (10, 10), (49, 500)])
def test_intervals_are_scipys(right: int, n: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    theirs = stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(right, n, 1.959963984540054) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_a_heat_map_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert heat_map(tmp_path / "a" / "map.png", "title", ["1", "2"], ["x"], [[0.5, None]])
    assert (tmp_path / "a" / "map.png").read_bytes().startswith(b"\x89PNG")
