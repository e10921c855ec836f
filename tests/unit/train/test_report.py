"""The report and its charts."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llm.core.errors import UserError
from llm.train import report
from llm.train.callbacks.jsonl import JsonlWriter
from llm.train.charts import Series, chart, downsample, log_ticks, smooth, ticks
from llm.train.report import write_report
from tests.unit.train.helpers import do_step, stand_in


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run with something of every kind."""
    trainer, writer = stand_in(tmp_path), JsonlWriter()
    writer.on_start(trainer)
    for step in range(1, 11):
        bad: dict[str, Any] = {"judged": (math.nan, 1.0), "skipped": True, "loss": math.nan} if step == 6 else {}
        metrics = {"tokens_per_second": 256.0, "mfu": 0.41, "memory_gib": 1.5}
        do_step(trainer, [writer], step, metrics=metrics, **bad)
        if step % 5 == 0:
            loss = 5.0 / step
            writer.on_eval(
                trainer,
                {
                    "step": step,
                    "tokens": 128 * step,
                    "loss": loss,
                    "perplexity": math.exp(loss),
                    "bits_per_byte": 2.5 / step,
                    "num_tokens": 640,
                },
            )
    writer.on_saved(trainer, SimpleNamespace(step=10, tokens=1280, path=tmp_path / "step-000000010", kind="final"))
    writer.write("sample", trainer, prompt="def ", text="<script>alert(1)</script>")
    writer.on_end(trainer)
    (tmp_path / "small" / "config.yaml").write_text("name: small\nvalue: <b>\n")
    return tmp_path / "small"


def test_report_is_one_file_that_tells_the_run(run_dir: Path) -> None:
    pytest.importorskip("jinja2")
    path = write_report(run_dir)
    page = path.read_text()
    assert path == run_dir / "report.html"
    for text in (
        "small",
        "done",
        "0.5000",
        "0.2500",
        "41.0%",
        "1.50 GiB",
        "loss is nan",
        "step-000000010",
        "value: &lt;b&gt;",
    ):
        assert text in page, text
    assert "<script" not in page
    assert not re.search(r"""(src|href)\s*=|url\(|@import|https?://(?!www\.w3\.org)""", page), (
        "it must need no other file"
    )
    for svg in re.findall(r"<svg.*?</svg>", page, re.S):
        assert "nan" not in svg
        ET.fromstring(svg)
    assert page.count("<svg") >= 5


def test_png_is_a_picture(run_dir: Path) -> None:
    pytest.importorskip("matplotlib")
    write_report(run_dir)
    png = (run_dir / "loss.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(png[16:20], "big") == 1200


def test_missing_packages_leave_a_plain_report_and_say_so(run_dir: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(report, "_has", lambda package: False)
    path = write_report(run_dir)
    assert path.name == "report.txt"
    assert not (run_dir / "loss.png").exists()
    text = path.read_text()
    assert "held-out bits per byte" in text
    assert "loss is nan" in text
    printed = capsys.readouterr().err
    assert "pip install matplotlib" in printed
    assert "pip install jinja2" in printed


def test_report_of_a_run_that_has_only_begun(tmp_path: Path) -> None:
    trainer, writer = stand_in(tmp_path), JsonlWriter()
    writer.on_start(trainer)
    page = write_report(tmp_path / "small").read_text()
    assert "running, or killed" in page
    assert "No step has been recorded yet" in page


def test_report_of_a_failed_run_names_the_error(tmp_path: Path) -> None:
    trainer, writer = stand_in(tmp_path), JsonlWriter()
    writer.on_start(trainer)
    do_step(trainer, [writer], 1)
    writer.on_error(trainer, RuntimeError("out of memory"))
    assert "RuntimeError: out of memory" in write_report(tmp_path / "small").read_text()


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        write_report(tmp_path)


def test_smooth_is_a_centred_mean() -> None:
    points = [(float(x), float(x * x)) for x in range(6)]
    assert smooth(points, 3) == [(0.0, 0.0), (1.0, 5 / 3), (2.0, 14 / 3), (3.0, 29 / 3), (4.0, 50 / 3), (5.0, 25.0)]
    assert smooth([(0.0, math.nan), (1.0, 2.0)], 1) == [(1.0, 2.0)]


def test_downsample_keeps_the_mean_and_the_order() -> None:
    points = [(float(x), float(x)) for x in range(10_000)]
    fewer = downsample(points, 100)
    assert len(fewer) == 100
    assert fewer == sorted(fewer)
    assert sum(y for _, y in fewer) / 100 == pytest.approx(4999.5)


def test_ticks_are_round() -> None:
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(2.2, 9.4) == [4, 6, 8]
    assert ticks(3, 3) == [3]
    assert log_ticks(0.3, 30) == [0.5, 1, 2, 5, 10, 20]
    assert log_ticks(1e-4, 1e4) == [1e-4, 1e-3, 1e-2, 0.1, 1, 10, 100, 1e3, 1e4]


def test_charts_survive_odd_data() -> None:
    assert chart([Series("none", [])], title="t", x_label="x") == ""
    assert chart([Series("nan", [(0.0, math.nan)])], title="t", x_label="x") == ""
    for points in ([(1.0, 1.0)], [(1.0, 0.0), (2.0, 0.0)], [(0.0, -1.0), (1.0, 5.0)]):
        ET.fromstring(chart([Series("a & b", points), Series("c", points, 1, "dots")], title="<t>", x_label="x"))
    ET.fromstring(chart([Series("log", [(0.0, 0.0), (1.0, 3.0)])], title="t", x_label="x", log_y=True))
