"""Sources: every document once, whatever the size of tasks; rejects with their lines; held-out documents."""

from __future__ import annotations

import gzip
import json
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.core.errors import UserError
from llm.data.prepare.source import Holdout, Reject, SourceConfig, safe_cut, split_text
from llm.data.prepare.tables import DatasetsSource, JsonlSource, ParquetSource
from llm.data.prepare.text import StdlibSource, TextSource
from tests.unit.data.helpers import make_context, prepare_files, read_all, reject_lines

PROSE = "".join(f"Sentence {i} of some words, é“x”.\n" + ("\n" if i % 4 == 0 else "") for i in range(400))


def texts_of(source: SourceConfig, **context: Any) -> list[str]:
    return [text for _, text in read_all(source, make_context(**context))[0]]


@pytest.mark.parametrize("piece_bytes", [64, 500, 10**6])
@pytest.mark.parametrize("task_bytes", [100, 1024, 10**6])
def test_a_file_stays_one_document(tmp_path: Path, task_bytes: int, piece_bytes: int) -> None:
    (tmp_path / "a.txt").write_text(PROSE, encoding="utf-8")
    (tmp_path / "b.txt").write_text("x" * 5000 + "é" * 3000, encoding="utf-8")
    found = texts_of(TextSource(paths=[str(tmp_path)]), task_bytes=task_bytes, piece_bytes=piece_bytes)
    assert found == [PROSE, "x" * 5000 + "é" * 3000]


@pytest.mark.parametrize("task_bytes", [100, 777, 10**6])
@pytest.mark.parametrize(
    ("document", "separator", "expected"),
    [
        ("line", None, [line for line in PROSE.split("\n") if line]),
        ("paragraph", None, [part for part in PROSE.split("\n\n") if part.strip()]),
        ("separator", "of some", PROSE.split("of some")),
        ("separator", "\n\n", [part for part in PROSE.split("\n\n") if part.strip()]),
    ],
)
def test_records_do_not_depend_on_tasks(
    tmp_path: Path, document: Any, separator: str | None, expected: list[str], task_bytes: int
) -> None:
    (tmp_path / "a.txt").write_text(PROSE, encoding="utf-8")
    source = TextSource(paths=[str(tmp_path / "a.txt")], document=document, separator=separator)
    assert [text.strip("\n") for text in texts_of(source, task_bytes=task_bytes)] == [
        text.strip("\n") for text in expected
    ]


def test_windows_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\n\r\n\r\nthree\r\n")
    assert texts_of(TextSource(paths=[str(tmp_path)], document="line")) == ["one", "two", "three"]
    assert texts_of(TextSource(paths=[str(tmp_path)], document="paragraph")) == ["one\r\ntwo", "three"]
    assert texts_of(TextSource(paths=[str(tmp_path)])) == ["one\r\ntwo\r\n\r\n\r\nthree\r\n"]


@settings(max_examples=150)
@given(
    lines=st.lists(st.text(alphabet="ab é", max_size=12), min_size=1, max_size=30),
    paragraphs=st.booleans(),
    task_bytes=st.integers(5, 60),
    end=st.booleans(),
)
def test_any_lines_and_paragraphs(
    tmp_path_factory: Any, lines: list[str], paragraphs: bool, task_bytes: int, end: bool
) -> None:
    folder = tmp_path_factory.mktemp("h")
    (folder / "a.txt").write_text("\n".join(lines) + ("\n" if end else ""), encoding="utf-8")
    expected: list[str] = []
    fresh = True
    for line in lines:
        if line.strip() and paragraphs and not fresh:
            expected[-1] += f"\n{line}"
        elif line.strip():
            expected.append(line)
        fresh = not line.strip()
    source = TextSource(paths=[str(folder)], document="paragraph" if paragraphs else "line")
    found = texts_of(source, task_bytes=task_bytes)
    assert [text.strip(" \n") for text in found] == [text.strip(" \n") for text in expected]


def test_max_document_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(PROSE, encoding="utf-8")
    for task_bytes in (2048, 10**6):
        source = TextSource(paths=[str(tmp_path)], max_document_bytes=1024)
        found = texts_of(source, task_bytes=task_bytes, piece_bytes=300)
        assert "".join(found) == PROSE
        assert len(found) > 10 and max(len(text.encode()) for text in found) <= 1024


def test_bad_text_is_rejected_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"fine\nfine\n\xff bad\n")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "good.txt").write_bytes(b"good")
    documents, rejects = read_all(TextSource(paths=[str(tmp_path)]), make_context())
    assert documents == [("train", "good")]
    assert [(Path(r.file).name, r.line) for r in rejects] == [("bad.txt", 3), ("empty.txt", 1)]
    assert "invalid UTF-8" in rejects[0].reason and rejects[1].reason == "empty"


def test_large_bad_file_is_rejected_whole(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"fine line\n" * 1000 + b"\xc3\n" + b"fine line\n" * 1000)
    (tmp_path / "good.txt").write_bytes(b"good")
    documents, rejects = read_all(TextSource(paths=[str(tmp_path)]), make_context(task_bytes=1024))
    assert documents == [("train", "good")]
    assert [(reject.line, reject.reason.split(":")[0]) for reject in rejects] == [(1001, "invalid UTF-8")]


def test_reject_lines_are_counted_over_tasks(tmp_path: Path) -> None:
    """A file that many tasks share: the lines in rejects.jsonl count from its beginning."""
    lines = [b'{"text": "record %d"}' % i for i in range(500)]
    bad = {
        3: b"{broken",
        77: b'{"other": 1}',
        78: b'{"text": 5}',
        200: b"",
        321: b'{"text": "\xff"}',
        499: b'{"text": "  "}',
    }
    for line, data in bad.items():
        lines[line] = data
    (tmp_path / "r.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    sources = {"type": "jsonl", "paths": [str(tmp_path / "r.jsonl")]}
    manifest = prepare_files(tmp_path, [], sources=sources, task_bytes=1024, part_bytes=1024)
    assert manifest["splits"]["train"]["documents"] == 494 and manifest["rejects"] == 6
    records = reject_lines(tmp_path / "out")
    assert [record["line"] for record in records] == [line + 1 for line in sorted(bad)]
    reasons = [record["reason"].split(":")[0] for record in records]
    assert reasons == [
        "broken JSON",
        "no field 'text'",
        "field 'text' is int, not text",
        "empty",
        "invalid UTF-8",
        "empty",
    ]


def test_reject_lines_of_text_lines(tmp_path: Path) -> None:
    lines = [b"line %d" % i for i in range(300)]
    lines[5], lines[250] = b"\xff", b"x" * 3000
    (tmp_path / "t.txt").write_bytes(b"\n".join(lines))
    sources = {"type": "text", "paths": [str(tmp_path / "t.txt")], "document": "line"}
    manifest = prepare_files(tmp_path, [], sources=sources, task_bytes=1024, max_record_bytes=2000)
    assert manifest["splits"]["train"]["documents"] == 298
    assert [record["line"] for record in reject_lines(tmp_path / "out")] == [6, 251]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl(tmp_path: Path, suffix: str) -> None:
    records = [{"meta": {"body": f"text {i} é"}} for i in range(200)]
    data = "\n".join(map(json.dumps, records)).encode()
    if suffix == ".gz":
        data = gzip.compress(data)
    elif suffix == ".zst":
        data = pytest.importorskip("zstandard").compress(data)
    path = tmp_path / f"r.jsonl{suffix}"
    path.write_bytes(data)
    source = JsonlSource(paths=[str(path)], field="meta.body")
    assert texts_of(source, task_bytes=512) == [record["meta"]["body"] for record in records]
    if suffix:
        path.write_bytes(data[: len(data) // 2])
        _, rejects = read_all(source, make_context())
        assert rejects and "damaged compression" in rejects[-1].reason


def test_jsonl_faults(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(
        b'{"text": "\\ud800"}\n[1]\n{"text": "' + b"x" * 9000 + b'"}\n{"text": "ok"}\nnull\n' + b"[" * 3000
    )
    documents, rejects = read_all(JsonlSource(paths=[str(path)]), make_context(task_bytes=10**6))
    assert [text for _, text in documents] == ["ok"]
    assert [reject.line for reject in rejects] == [1, 2, 3, 5, 6]
    assert "surrogate" in rejects[0].reason and "longer than" in rejects[2].reason


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"row {i}" if i not in (7, 30) else None for i in range(40)]
    texts[12] = ""
    parquet.write_table(arrow.table({"n": list(range(40)), "text": texts}), tmp_path / "t.parquet", row_group_size=16)
    documents, rejects = read_all(ParquetSource(paths=[str(tmp_path)]), make_context())
    assert [text for _, text in documents] == [text for text in texts if text]
    assert [reject.line for reject in rejects] == [8, 13, 31]
    with pytest.raises(UserError, match="no column 'txt'; did you mean 'text'"):
        ParquetSource(paths=[str(tmp_path)], field="txt").plan(make_context())
    (tmp_path / "bad.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot read the parquet file"):
        ParquetSource(paths=[str(tmp_path)]).plan(make_context())


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets(tmp_path: Path, streaming: bool) -> None:
    datasets = pytest.importorskip("datasets")
    texts = [f"row {i}" for i in range(50)]
    datasets.Dataset.from_dict({"text": [*texts, None]}).save_to_disk(tmp_path / "d")
    source = DatasetsSource(
        path=str(tmp_path / "d"), streaming=streaming, **({} if streaming else {"rows_per_task": 20})
    )
    documents, rejects = read_all(source, make_context())
    assert [text for _, text in documents] == texts
    assert [(reject.line, reject.reason) for reject in rejects] == [(51, "field 'text' is NoneType, not text")]
    few = DatasetsSource(path=str(tmp_path / "d"), streaming=streaming, max_documents=7)
    assert texts_of(few) == texts[:7]
    with pytest.raises(UserError, match="no column 'body'"):
        DatasetsSource(path=str(tmp_path / "d"), field="body").plan(make_context())
    with pytest.raises(UserError, match="cannot open the data set"):
        DatasetsSource(path=str(tmp_path / "absent")).plan(make_context())


def test_stdlib() -> None:
    """Real files: a few folders of the standard library itself."""
    context = make_context(task_bytes=1 << 20, holdout=Holdout(fraction=0.2))
    source = StdlibSource()
    tasks = source.plan(context)
    names = [file[1] for task in tasks for file in task["files"]]
    assert names == sorted(set(names)) and "json/decoder.py" in names
    assert not any("site-packages" in name or not name.endswith(".py") for name in names)
    held = [name for name in names if context.split(name, name) == "valid"]
    assert 0.1 < len(held) / len(names) < 0.3
    root = Path(sysconfig.get_paths()["stdlib"])
    task = next(task for task in tasks if any(file[1] == "json/decoder.py" for file in task["files"]))
    text = "".join(item.text for item in source.read(task, context) if not isinstance(item, Reject))  # type: ignore[union-attr]
    assert (root / "json/decoder.py").read_text(encoding="utf-8") in text


class TestHoldout:
    def test_hash_is_of_the_text(self, tmp_path: Path) -> None:
        lines = [f"line {i}" for i in range(500)]
        (tmp_path / "a.txt").write_text("\n".join(lines))
        (tmp_path / "b.txt").write_text("\n".join(reversed(lines)))
        source = TextSource(paths=[str(tmp_path)], document="line")
        documents, _ = read_all(source, make_context(holdout=Holdout(fraction=0.1)))
        held = {text for split, text in documents if split == "valid"}
        assert 20 < len(held) < 90
        assert not held & {text for split, text in documents if split == "train"}
        other, _ = read_all(source, make_context(holdout=Holdout(fraction=0.1), seed=1))
        assert {text for split, text in other if split == "valid"} != held

    def test_named_files(self, tmp_path: Path) -> None:
        for name in ("novel", "held", "third"):
            (tmp_path / f"{name}.txt").write_text(name)
        source = TextSource(paths=[str(tmp_path)])
        documents, _ = read_all(source, make_context(holdout=Holdout(files=["held.*"])))
        assert documents == [("valid", "held"), ("train", "novel"), ("train", "third")]
        with pytest.raises(UserError, match="match none of the 3 text files"):
            source.plan(make_context(holdout=Holdout(files=["absent.txt"])))

    @pytest.mark.parametrize("task_bytes", [64, 10**6])
    def test_position_counts_characters(self, tmp_path: Path, task_bytes: int) -> None:
        text = "é日a\n" * 250
        (tmp_path / "a.txt").write_text(text[:300], encoding="utf-8")
        (tmp_path / "b.txt").write_text(text[300:], encoding="utf-8")
        holdout = Holdout(by="position", fraction=0.1)
        documents, _ = read_all(TextSource(paths=[str(tmp_path)]), make_context(holdout=holdout, task_bytes=task_bytes))
        assert documents == [("train", text[:300]), ("train", text[300:900]), ("valid", text[900:])]


@settings(max_examples=200)
@given(text=st.text(min_size=1, max_size=300), size=st.integers(8, 64))
def test_split_text_loses_nothing(text: str, size: int) -> None:
    n_bytes = len(text.encode())
    pieces = list(split_text(text, n_bytes, "train", make_context(piece_bytes=size)))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.first for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(piece.n_bytes <= size for piece in pieces)


def test_safe_cut_prefers_line_ends_behind_words() -> None:
    assert safe_cut(b"some words\nand more.\nlast word") == 10
    assert safe_cut(b"some words and") == 10
    assert safe_cut("ééé".encode()[:-1]) == 4
    assert safe_cut(b"xxxx") == 4


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    for source in (TextSource(paths=[str(tmp_path / "no*.txt")]), JsonlSource(paths=[str(tmp_path / "absent")])):
        with pytest.raises(UserError, match="there is no such file or folder"):
            source.plan(make_context())
