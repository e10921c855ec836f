"""Preparation: the result depends on config and input alone, whatever the number of workers, the parts, or kills."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from llm.core.errors import UserError
from llm.data.prepare import parts
from llm.data.prepare.config import PrepareConfig
from llm.data.prepare.run import prepare
from llm.data.prepare.source import TRAIN, VALID
from llm.data.store import TokenStore, open_split
from llm.data.tokenizer import load_tokenizer
from tests.unit.data.helpers import documents_of, hashes, prepare_files, reject_lines

TEXTS = [f"document {i}: " + "some words " * (i % 37) for i in range(60)]


class Killed(BaseException):
    """Stands for the end of the process."""


def corpus(folder: Path) -> dict[str, Any]:
    """A config with several sources, bad records, a long document and small tasks and parts."""
    raw = folder / "raw"
    raw.mkdir()
    for i, text in enumerate(TEXTS):
        (raw / f"{i:03d}.txt").write_text(text)
    (raw / "bad.txt").write_bytes(b"ok\n\xff")
    (raw / "long.txt").write_text("a long tale\n" * 2000)
    rows = [json.dumps({"text": f"record {i}"}) if i % 50 else "{broken" for i in range(400)]
    (folder / "r.jsonl").write_text("\n".join(rows))
    return {
        "sources": [{"type": "text", "paths": [str(raw)]}, {"type": "jsonl", "paths": [str(folder / "r.jsonl")]}],
        "tokenizer": {"kind": "bpe", "vocab_size": 300},
        "holdout": {"fraction": 0.2},
        "task_bytes": 3000,
        "piece_bytes": 700,
        "part_bytes": 1024,
        "workers": 1,
    }


def run(tree: dict[str, Any], out: Path, **changes: Any) -> dict[str, Any]:
    return prepare(PrepareConfig.model_validate(tree | {"out": str(out)} | changes), quiet=True)


def test_counts_hashes_and_files(tmp_path: Path) -> None:
    manifest = run(corpus(tmp_path), tmp_path / "out")
    out = tmp_path / "out"
    tokenizer = load_tokenizer(out)
    texts: list[str] = []
    for split in (TRAIN, VALID):
        store, entry = open_split(out, split), manifest["splits"][split]
        store.verify()
        decoded = [tokenizer.decode(store.document(i)) for i in range(len(store))]
        assert all(store.document(i)[-1] == tokenizer.eos_id for i in range(len(store)))
        assert entry["documents"] == len(store) and entry["tokens"] == store.n_tokens
        assert entry["bytes"] == sum(len(text.encode()) for text in decoded)
        assert tokenizer.token_bytes()[store.tokens].sum() == entry["bytes"]
        texts += decoded
        if split == VALID:
            assert (out / "valid.raw").read_text() == "".join(decoded)
    expected = TEXTS + ["a long tale\n" * 2000] + [f"record {i}" for i in range(400) if i % 50]
    assert sorted(texts) == sorted(expected)
    assert manifest["rejects"] == len(reject_lines(out)) == 9
    assert manifest["tokenizer"]["hash"] == tokenizer.hash
    assert set(manifest["files"]) == {"train.bin", "train.idx", "valid.bin", "valid.idx", "valid.raw", "rejects.jsonl"}
    assert not (out / ".work").exists()


def test_workers_and_parts_do_not_matter(tmp_path: Path) -> None:
    tree = corpus(tmp_path)
    run(tree, tmp_path / "one")
    run(tree, tmp_path / "two", workers=2)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    run(tree, tmp_path / "three", part_bytes=10**6)
    one, three = hashes(tmp_path / "one"), hashes(tmp_path / "three")
    assert {name for name in one if one[name] != three[name]} == {"manifest.json"}


def test_stopped_at_any_write_and_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops at each of many moments, between or within writes; the end is the same to the byte."""
    tree = corpus(tmp_path)
    run(tree, tmp_path / "straight")
    expected = hashes(tmp_path / "straight")
    real_fsync, real_replace = parts.os.fsync, parts.os.replace
    rng = random.Random(0)
    for trial in range(6):
        out = tmp_path / f"out{trial}"
        for _ in range(60):
            left = rng.randrange(1, 60)

            def tick() -> None:
                nonlocal left
                left -= 1
                if left == 0:
                    raise Killed

            def fsync(handle: int) -> None:
                tick()
                real_fsync(handle)

            def replace(source: Any, target: Any) -> None:
                tick()
                real_replace(source, target)
                tick()

            monkeypatch.setattr(parts.os, "fsync", fsync)
            monkeypatch.setattr(parts.os, "replace", replace)
            try:
                run(tree, out)
                break
            except Killed:
                continue
            finally:
                monkeypatch.undo()
        else:
            run(tree, out)
        assert hashes(out) == expected


def test_finished_parts_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a stop half way, the next run encodes only what was not there."""
    tree = corpus(tmp_path)
    written: list[int] = []
    real = parts.PartWriter.write

    def counting(self: parts.PartWriter, pieces: list[Any]) -> None:
        written.append(len(pieces))
        if stop_at is not None and len(written) == stop_at:
            raise Killed
        real(self, pieces)

    monkeypatch.setattr(parts.PartWriter, "write", counting)
    stop_at: int | None = None
    run(tree, tmp_path / "straight")
    whole, stop_at = sum(written), 3 * len(written) // 4
    written.clear()
    with pytest.raises(Killed):
        run(tree, tmp_path / "out")
    written.clear()
    stop_at = None
    run(tree, tmp_path / "out")
    assert 0 < sum(written) < 0.9 * whole
    assert hashes(tmp_path / "out") == hashes(tmp_path / "straight")


def test_second_run_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = corpus(tmp_path)
    first = run(tree, tmp_path / "out")
    monkeypatch.setattr("llm.data.prepare.run.run_task", lambda *_: pytest.fail("ran again"))
    assert run(tree, tmp_path / "out", workers=2) == first


def test_changed_config_or_input(tmp_path: Path) -> None:
    tree = corpus(tmp_path)
    run(tree, tmp_path / "out")
    with pytest.raises(UserError, match="another config or input"):
        run(tree, tmp_path / "out", seed=1)
    run(tree, tmp_path / "out", seed=1, overwrite=True)
    run(tree, tmp_path / "fresh", seed=1)
    differing = {name for name, value in hashes(tmp_path / "out").items() if value != hashes(tmp_path / "fresh")[name]}
    assert differing == {"manifest.json"}
    (tmp_path / "raw" / "000.txt").write_text("changed")
    with pytest.raises(UserError, match="another config or input"):
        run(tree, tmp_path / "out", seed=1)


def test_input_that_changes_during_a_stop_starts_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = corpus(tmp_path)
    real = parts.PartWriter.commit

    def stop(self: parts.PartWriter, **kwargs: Any) -> None:
        real(self, **kwargs)
        raise Killed

    monkeypatch.setattr(parts.PartWriter, "commit", stop)
    with pytest.raises(Killed):
        run(tree, tmp_path / "out")
    monkeypatch.undo()
    (tmp_path / "raw" / "000.txt").write_text("changed")
    run(tree, tmp_path / "out")
    run(tree, tmp_path / "straight")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "straight")


def test_lost_file_is_made_again(tmp_path: Path) -> None:
    tree = corpus(tmp_path)
    run(tree, tmp_path / "out")
    before = hashes(tmp_path / "out")
    (tmp_path / "out" / "train.bin").unlink()
    run(tree, tmp_path / "out")
    assert hashes(tmp_path / "out") == before


def test_tokenizer_is_trained_without_held_out_text(tmp_path: Path) -> None:
    word = "zyzzyva"
    manifest = prepare_files(
        tmp_path,
        ["plain words here " * 20, f"{word} " * 200],
        tokenizer={"kind": "bpe", "vocab_size": 300},
        holdout={"files": ["00001.txt"]},
    )
    assert manifest["splits"]["valid"]["documents"] == 1
    assert len(load_tokenizer(tmp_path / "out").encode(word)) == len(word)


def test_long_document_has_one_eos(tmp_path: Path) -> None:
    text = "words and words\n" * 300
    prepare_files(tmp_path, [text], piece_bytes=200, task_bytes=1024)
    store = TokenStore(tmp_path / "out" / "train")
    assert documents_of(store) == [text.encode()] and store.n_sequences > 10


def test_pieces_do_not_change_the_tokens(tmp_path: Path) -> None:
    """The cuts fall where the tokenizer splits anyway: real files, in pieces and whole, give the same tokens."""
    texts = [Path(parts.__file__).with_name(name).read_text() for name in ("run.py", "text.py", "parts.py")]
    for name, size in (("small", 256), ("large", 1 << 20)):
        prepare_files(tmp_path / name, texts, tokenizer={"kind": "bpe", "vocab_size": 700}, piece_bytes=size)
    small, large = (TokenStore(tmp_path / name / "out" / "train") for name in ("small", "large"))
    assert small.n_sequences > large.n_sequences == 3
    assert small.tokens.tolist() == large.tokens.tolist()


def test_everything_rejected(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"body": 1}\n{"body": 2}\n')
    sources = {"type": "jsonl", "paths": [str(tmp_path / "r.jsonl")]}
    with pytest.raises(
        UserError, match=r"no document is left: 2 records were rejected; the first: .* line 1: no field 'text'"
    ):
        prepare_files(tmp_path, [], sources=sources)


def test_two_at_once(tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".lock", "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is preparing"):
            prepare_files(tmp_path, ["text"])


def test_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "train.bin")

    monkeypatch.setattr(parts.PartWriter, "commit", full)
    with pytest.raises(UserError, match=r"cannot prepare .*No space left on device \(train\.bin\)"):
        prepare_files(tmp_path, ["text"])


@pytest.mark.parametrize(
    "tree",
    [
        {"sources": []},
        {"sources": {"type": "stdlib"}, "holdout": {"by": "position"}},
        {"sources": {"type": "text", "paths": ["a"], "separator": "x"}},
        {"sources": {"type": "text", "paths": ["a"], "max_document_bytes": 5}},
        {"sources": {"type": "jsonl", "path": ["a"]}},
        {"sources": {"type": "jsnl", "paths": ["a"]}},
    ],
)
def test_incoherent_configs(tree: dict[str, Any]) -> None:
    with pytest.raises((ValidationError, UserError)):
        PrepareConfig.model_validate({"out": "x", **tree})


@pytest.mark.data
def test_shakespeare_split_by_position(shared_data: Path, tmp_path: Path) -> None:
    text = (shared_data / "tinyshakespeare.txt").read_text()
    sources = {"type": "text", "paths": [str(shared_data / "tinyshakespeare.txt")]}
    holdout = {"by": "position", "fraction": 0.1}
    manifest = prepare_files(tmp_path, [], sources=sources, tokenizer={"kind": "chars"}, holdout=holdout)
    cut = int(len(text) * 0.9)
    assert manifest["tokenizer"]["vocab_size"] == 66
    tokenizer = load_tokenizer(tmp_path / "out")
    for split, part in ((TRAIN, text[:cut]), (VALID, text[cut:])):
        store = open_split(tmp_path / "out", split)
        assert len(store) == 1 and tokenizer.decode(store.document(0)) == part


@pytest.mark.data
def test_one_novel_held_out(shared_data: Path, tmp_path: Path) -> None:
    sources = {"type": "text", "paths": [str(shared_data / "books")]}
    manifest = prepare_files(
        tmp_path,
        [],
        sources=sources,
        tokenizer={"kind": "bpe", "vocab_size": 512, "sample_bytes": 300_000},
        holdout={"files": ["pride-and-prejudice.txt"]},
    )
    assert [manifest["splits"][split]["documents"] for split in (TRAIN, VALID)] == [9, 1]
    raw = (shared_data / "books" / "pride-and-prejudice.txt").read_bytes()
    assert (tmp_path / "out" / "valid.raw").read_bytes() == raw
    assert load_tokenizer(tmp_path / "out").decode_bytes(open_split(tmp_path / "out", VALID).document(0)) == raw
