"""Token stores: Megatron's format both ways, and damage that is found when a store is opened."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llm.core.errors import UserError
from llm.data.store import TokenStore, open_split, read_manifest, token_dtype, write_store
from tests.unit.data.helpers import documents_of, prepare_files

DOCUMENTS = [[1, 2, 3], [4], list(range(50)), [7, 7]]


def test_dtype() -> None:
    assert token_dtype(65535) == np.uint16
    assert token_dtype(65536) == np.int32


@pytest.mark.parametrize("vocab_size", [100, 70_000])
def test_round_trip(tmp_path: Path, vocab_size: int) -> None:
    write_store(tmp_path / "s", DOCUMENTS, vocab_size)
    store = TokenStore(tmp_path / "s")
    assert [store.document(i).tolist() for i in range(len(store))] == DOCUMENTS
    assert store.lengths.tolist() == [3, 1, 50, 2] and store.n_tokens == 56
    with pytest.raises(IndexError):
        store.document(4)


@pytest.mark.parametrize("vocab_size", [100, 70_000])
def test_megatron_writes_the_same_bytes_and_reads_ours(tmp_path: Path, vocab_size: int) -> None:
    torch = pytest.importorskip("torch")
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    write_store(tmp_path / "ours", DOCUMENTS, vocab_size)
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=token_dtype(vocab_size).type)
    for document in DOCUMENTS:
        builder.add_item(torch.tensor(document))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
    theirs = indexed.IndexedDataset(str(tmp_path / "ours"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == DOCUMENTS


def test_megatron_document_of_several_sequences_is_one_document(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.int32)
    builder.add_item(torch.tensor([1, 2]))
    builder.add_item(torch.tensor([3]))
    builder.end_document()
    builder.add_document(torch.tensor([4, 5, 6]), [2, 1])
    builder.finalize(str(tmp_path / "m.idx"))
    store = TokenStore(tmp_path / "m")
    assert [store.document(i).tolist() for i in range(len(store))] == [[1, 2, 3], [4, 5, 6]]
    assert store.n_sequences == 4


def test_megatron_reads_prepared_data(tmp_path: Path) -> None:
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    long = "word " * 400
    prepare_files(tmp_path, ["alpha", long, "omega"], piece_bytes=256)
    theirs = indexed.IndexedDataset(str(tmp_path / "out" / "train"))
    edges = theirs.document_indices
    texts = [np.concatenate([theirs[i] for i in range(a, b)]) for a, b in zip(edges[:-1], edges[1:])]
    assert [bytes(text[:-1].astype(np.uint8)).decode() for text in texts] == ["alpha", long, "omega"]
    assert len(theirs) > 3


def test_damage_is_named(tmp_path: Path) -> None:
    prefix = tmp_path / "s"
    write_store(prefix, DOCUMENTS, 100)
    bin_path, idx_path = tmp_path / "s.bin", tmp_path / "s.idx"
    good_bin, good_idx = bin_path.read_bytes(), idx_path.read_bytes()

    def fails(match: str) -> None:
        with pytest.raises(UserError, match=match) as caught:
            TokenStore(prefix)
        assert "\n" not in str(caught.value)
        bin_path.write_bytes(good_bin)
        idx_path.write_bytes(good_idx)

    bin_path.write_bytes(good_bin[:-2])
    fails("truncated")
    idx_path.write_bytes(good_idx[:-1])
    fails("truncated")
    idx_path.write_bytes(good_idx[:20])
    fails("not a Megatron index")
    idx_path.write_bytes(b"X" + good_idx[1:])
    fails("not a Megatron index")
    idx_path.write_bytes(good_idx[:17] + b"\x63" + good_idx[18:])
    fails("dtype code 99")
    idx_path.write_bytes(good_idx[:-8] + b"\x09" + good_idx[-7:])
    fails("document table is damaged")
    bin_path.unlink()
    fails("no such file")
    TokenStore(prefix)


def test_verify_finds_a_flipped_byte(tmp_path: Path) -> None:
    prepare_files(tmp_path, ["some text", "more text"])
    open_split(tmp_path / "out", "train").verify()
    path = tmp_path / "out" / "train.bin"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"train\.bin differs from its sha256"):
        open_split(tmp_path / "out", "train").verify()


def test_manifest_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read_manifest(tmp_path / "absent")
    with pytest.raises(UserError, match=r"run launch/prepare\.py first"):
        read_manifest(tmp_path)
    (tmp_path / ".work").mkdir()
    with pytest.raises(UserError, match="did not finish"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match="not a manifest"):
        read_manifest(tmp_path)


def test_split_that_is_not_there(tmp_path: Path) -> None:
    prepare_files(tmp_path, ["text"])
    with pytest.raises(UserError, match=r"no documents in split 'valid' \(there are: train\)"):
        open_split(tmp_path / "out", "valid")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    manifest["splits"]["train"]["tokens"] += 1
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="manifest.json says"):
        open_split(tmp_path / "out", "train")


def test_documents_of_prepared_data(tmp_path: Path) -> None:
    prepare_files(tmp_path, ["one", "zwei", "trois"])
    assert documents_of(open_split(tmp_path / "out", "train")) == [b"one", b"zwei", b"trois"]
