"""Loader: the same stream in any world, exact resume, every token scored once, packed documents as they are alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from llm.core.batch import IGNORE, StepBatch
from llm.core.errors import UserError
from llm.data.config import DataConfig, DataSource
from llm.data.loader import Loader
from llm.data.sources import open_sources
from llm.data.store import write_store
from llm.data.tokenizer import load_tokenizer
from tests.unit.data.helpers import EOS, prepare_files

PACKINGS = ["concat", "best_fit", "pad"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    texts = ["".join(chr(c) for c in rng.integers(97, 123, size=rng.integers(1, 120))) for _ in range(120)]
    base = tmp_path_factory.mktemp("prepared")
    prepare_files(base, texts, holdout={"fraction": 0.25})
    return base / "out"


def make(
    folder: Path,
    *,
    split: str = "train",
    n: int = 8,
    micro: int = 2,
    config: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Loader:
    data = DataConfig.model_validate({"path": str(folder), "seq_len": 32} | (config or {}))
    return Loader(data, split=split, sequences_per_step=n, micro_batch_size=micro, **kwargs)


def take(loader: Loader, steps: int) -> list[StepBatch]:
    batches = []
    for batch in loader:
        batches.append(batch)
        if len(batches) == steps:
            break
    return batches


def rows(batches: list[StepBatch]) -> list[tuple[list[int], list[int], list[int]]]:
    """(tokens, labels, positions) of each row, in order."""
    out = []
    for batch in batches:
        for m in batch.microbatches:
            out += list(zip(m.tokens.tolist(), m.labels.tolist(), m.seq.positions.tolist()))
    return out


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("isolate", [True, False])
def test_same_stream_in_any_world(folder: Path, packing: str, isolate: bool) -> None:
    config = {"packing": packing, "isolate": isolate}
    whole = take(make(folder, config=config), 12)
    for world in (2, 4, 8):
        parts = [take(make(folder, config=config, rank=rank, world_size=world, micro=3), 12) for rank in range(world)]
        for k, batch in enumerate(whole):
            assert rows([batch]) == [row for rank in range(world) for row in rows([parts[rank][k]])]
            assert all(parts[rank][k].num_tokens == batch.num_tokens == 8 * 32 for rank in range(world))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("prefetch", [0, 3])
def test_resume_equals_straight(folder: Path, packing: str, prefetch: int) -> None:
    config = {"packing": packing, "prefetch": prefetch}
    straight = take(make(folder, config=config), 40)
    first = make(folder, config=config)
    for _ in zip(first, range(14)):
        pass
    before = make(folder, config=config)
    take(before, 14)
    state = json.loads(json.dumps(before.state()))
    assert state["sample"] == 14 * 8
    for world in (1, 2):
        after = [make(folder, config=config, rank=rank, world_size=world) for rank in range(world)]
        for loader in after:
            loader.load(state)
        parts = [take(loader, 26) for loader in after]
        for k in range(26):
            assert rows([straight[14 + k]]) == [row for part in parts for row in rows([part[k]])]


def test_state_is_that_of_the_batch_in_hand(folder: Path) -> None:
    """Batches that were built ahead do not count."""
    loader = make(folder, config={"prefetch": 4})
    for k, _ in enumerate(loader, start=1):
        assert loader.state()["sample"] == 8 * k
        if k == 5:
            break


def test_a_step_may_change_its_size_on_resume(folder: Path) -> None:
    straight = rows(take(make(folder, n=8), 6))
    loader = make(folder, n=8)
    take(loader, 2)
    bigger = make(folder, n=16)
    bigger.load(loader.state())
    assert rows(take(bigger, 2)) == straight[16:48]


def labels_of(batches: list[StepBatch]) -> list[int]:
    return sorted(label for row in rows(batches) for label in row[1] if label != IGNORE)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_single_pass_scores_every_token_once(folder: Path, packing: str, world: int) -> None:
    config = {"packing": packing}
    store = open_sources(DataConfig(path=str(folder)), "valid")[0].store
    loaders = [
        make(folder, split="valid", n=6, micro=2, config=config, rank=rank, world_size=world) for rank in range(world)
    ]
    parts = [list(loader) for loader in loaders]
    assert len({len(part) for part in parts}) == 1 and len(parts[0]) == len(loaders[0])
    assert all(len(batch.microbatches) == len(part[0].microbatches) for part in parts for batch in part)
    assert labels_of([batch for part in parts for batch in part]) == sorted(store.tokens.tolist())
    assert sum(batch.num_tokens for batch in parts[0]) == loaders[0].num_rows * 32


@pytest.mark.parametrize("packing", PACKINGS)
def test_an_epoch_scores_every_token_once(folder: Path, packing: str) -> None:
    loader = make(folder, n=1, micro=1, config={"packing": packing})
    store = open_sources(DataConfig(path=str(folder)), "train")[0].store
    both = rows(take(loader, 2 * loader.num_rows))
    for epoch in (both[: loader.num_rows], both[loader.num_rows :]):
        assert sorted(x for row in epoch for x in row[1] if x != IGNORE) == sorted(store.tokens.tolist())
    assert both[: loader.num_rows] != both[loader.num_rows :]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("split", ["train", "valid"])
def test_inputs_and_labels_of_isolated_documents(folder: Path, packing: str, split: str) -> None:
    """Within a document each label is the next input; the first input is the start token, the last label is eos."""
    store = open_sources(DataConfig(path=str(folder)), split)[0].store
    whole = {bytes(store.document(i)[:-1].astype(np.uint8)) for i in range(len(store))}
    steps = 30 if split == "train" else 1000
    for batch in take(make(folder, split=split, config={"packing": packing, "prefetch": 0}), steps):
        for m in batch.microbatches:
            seq = m.seq
            if packing == "pad":
                assert seq.cu_seqlens is None
                bounds = torch.arange(0, m.tokens.numel() + 1, 32)
            else:
                assert seq.cu_seqlens is not None and seq.max_seqlen is not None
                bounds = seq.cu_seqlens.long()
                sizes = bounds.diff()
                assert seq.cu_seqlens.dtype == torch.int32 and (sizes > 0).all() and seq.max_seqlen >= sizes.max()
                assert bounds[0] == 0 and bounds[-1] == m.tokens.numel()
                starts = torch.zeros(m.tokens.numel(), dtype=torch.bool)
                starts[bounds[:-1]] = True
                assert torch.equal(seq.starts().flatten(), starts)
                assert set((bounds[:-1] // 32).tolist()) == set(range(len(m.tokens)))
            tokens, labels = m.tokens.flatten(), m.labels.flatten()
            for low, high in zip(bounds[:-1].tolist(), bounds[1:].tolist()):
                scored = labels[low:high] != IGNORE
                n = int(scored.sum())
                assert scored[:n].all()
                if n == 0:
                    continue
                assert torch.equal(tokens[low + 1 : low + n], labels[low : low + n - 1])
                assert (labels[low : low + n - 1] != EOS).all()
                assert (tokens[low + 1 : low + n] != EOS).all()
                text = bytes(labels[low : low + n][labels[low : low + n] != EOS].tolist())
                if tokens[low] == EOS:
                    assert any(known.startswith(text) for known in whole)
                if tokens[low] == EOS and labels[low + n - 1] == EOS:
                    assert text in whole


def test_packed_loss_equals_separate_loss(folder: Path) -> None:
    """With a model that looks at all earlier tokens of a document, packed documents give the sum of their losses."""
    table = torch.randn(257, 257, dtype=torch.float64)

    def loss_of(tokens: torch.Tensor, labels: torch.Tensor, starts: torch.Tensor) -> float:
        total, state = 0.0, torch.zeros(257, dtype=torch.float64)
        for token, label, start in zip(tokens.tolist(), labels.tolist(), starts.tolist()):
            state = (torch.zeros_like(state) if start else 0.5 * state) + table[token]
            if label != IGNORE:
                total += float(torch.nn.functional.cross_entropy(state, torch.tensor(label)))
        return total

    config = {"packing": "best_fit", "seq_len": 128}
    packed = sum(
        loss_of(m.tokens.flatten(), m.labels.flatten(), m.seq.starts().flatten())
        for batch in make(folder, split="valid", config=config)
        for m in batch.microbatches
    )
    store = open_sources(DataConfig(path=str(folder)), "valid")[0].store
    alone = 0.0
    for i in range(len(store)):
        document = torch.from_numpy(store.document(i).astype(np.int64))
        starts = torch.zeros(len(document), dtype=torch.bool)
        starts[0] = True
        alone += loss_of(torch.cat([torch.tensor([EOS]), document[:-1]]), document, starts)
    assert packed == pytest.approx(alone, rel=1e-10)


def test_without_isolation_rows_are_one_stretch(folder: Path) -> None:
    m = take(make(folder, config={"isolate": False}), 1)[0].microbatches[0]
    assert m.seq.cu_seqlens is None and m.seq.positions.tolist() == [list(range(32))] * 2


def test_documents_of_several_sources_mix_by_weight(tmp_path: Path) -> None:
    for name, char, n in (("a", "a", 40), ("b", "b", 100), ("c", "c", 300)):
        prepare_files(tmp_path / name, [char * n] * 60)
    sources = [
        {"path": str(tmp_path / "a" / "out"), "weight": 0.6, "max_epochs": 2},
        {"path": str(tmp_path / "b" / "out"), "weight": 0.3},
        {"path": str(tmp_path / "c" / "out"), "weight": 0.1},
    ]
    loader = make(tmp_path, config={"path": None, "sources": sources})
    count: dict[int, int] = {}
    for row in rows(take(loader, 20)):
        for label in row[1]:
            count[label] = count.get(label, 0) + 1
    total = sum(count.get(ord(char), 0) for char in "abc")
    assert count[ord("a")] / total == pytest.approx(0.6, abs=0.03)
    assert count[ord("b")] / total == pytest.approx(0.3, abs=0.03)
    seen = rows(take(loader, 150))
    assert sum(row[1].count(ord("a")) for row in seen) + count[ord("a")] <= 2 * 60 * 40
    late = [label for row in seen[-400:] for label in row[1]]
    assert late.count(ord("a")) == 0
    assert late.count(ord("b")) / (late.count(ord("b")) + late.count(ord("c"))) == pytest.approx(0.75, abs=0.03)


def test_mixture_by_documents(tmp_path: Path) -> None:
    prepare_files(tmp_path / "a", ["a" * 10] * 400)
    prepare_files(tmp_path / "b", ["b" * 100] * 100)
    sources = [{"path": str(tmp_path / name / "out")} for name in "ab"]
    config = {"path": None, "sources": sources, "mixture_unit": "documents", "packing": "best_fit", "seq_len": 128}
    seen = [label for row in rows(take(make(tmp_path, config=config), 20)) for label in row[1]]
    assert seen.count(ord("a")) / 10 == pytest.approx(seen.count(ord("b")) / 100, rel=0.1)


def test_sources_that_end(tmp_path: Path) -> None:
    prepare_files(tmp_path, ["x" * 300])
    sources = [{"path": str(tmp_path / "out"), "max_epochs": 1}]
    loader = make(tmp_path, config={"path": None, "sources": sources}, n=4)
    with pytest.raises(UserError, match="every source has reached its max_epochs after 10 rows"):
        list(loader)
    assert loader.state()["sample"] == 8


def test_fingerprint_guards_resume(folder: Path, tmp_path: Path) -> None:
    state = make(folder).state()
    other = tmp_path / "o"
    prepare_files(other, ["something else " * 30])
    for loader in (
        make(folder, seed=1),
        make(folder, config={"seq_len": 31}),
        make(folder, config={"packing": "pad"}),
        make(other / "out"),
    ):
        with pytest.raises(UserError, match="the data differ from those the checkpoint was made with"):
            loader.load(state)
    make(folder, config={"prefetch": 0}, n=2, micro=1).load(state)


def test_seeds_differ_and_shuffle_can_be_off(folder: Path) -> None:
    assert rows(take(make(folder), 3)) != rows(take(make(folder, seed=1), 3))
    store = open_sources(DataConfig(path=str(folder)), "train")[0].store
    plain = rows(take(make(folder, config={"shuffle": False}), 3))
    assert [label for row in plain for label in row[1]] == store.tokens[: 3 * 8 * 32].tolist()


def test_single_pass_is_a_fair_sample_and_the_same_for_every_seed(folder: Path) -> None:
    first, second = make(folder, split="valid"), make(folder, split="valid", seed=9)
    assert rows(list(first)) == rows(list(second))
    plain = open_sources(DataConfig(path=str(folder)), "valid")[0].store.tokens[:32].tolist()
    assert rows(list(make(folder, split="valid", limit=1)))[0][1] != plain


def test_training_split_in_a_single_pass(folder: Path) -> None:
    store = open_sources(DataConfig(path=str(folder)), "train")[0].store
    assert labels_of(list(make(folder, repeat=False))) == sorted(store.tokens.tolist())


def test_bos_stands_before_documents(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = make(folder, config={"prefetch": 0})
    monkeypatch.setattr(type(loader.tokenizer), "bos_id", 7)
    m = take(loader, 1)[0].microbatches[0]
    assert (m.tokens == 7).any() and (m.labels != 7).all()


def test_mistakes(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="8 sequences cannot be shared evenly by 3 processes"):
        make(folder, world_size=3)
    with pytest.raises(UserError, match=r"data\.seq_len 100000 is more than the \d+ tokens"):
        make(folder, config={"seq_len": 100_000})
    with pytest.raises(UserError, match="no prepared data at"):
        make(tmp_path / "absent")
    with pytest.raises(UserError, match="no documents in split 'test'"):
        make(folder, split="test")
    with pytest.raises(UserError, match="would be ignored"):
        make(folder, config={"tokenizer": "x"})
    for tree in (
        {},
        {"path": "a", "sources": [{"path": "b"}]},
        {"path": "a", "best_fit_window": 5},
        {"path": "a", "packing": "greedy"},
    ):
        with pytest.raises(ValidationError):
            DataConfig.model_validate(tree)


def test_tokenizer_that_does_not_fit(folder: Path, tmp_path: Path) -> None:
    prepare_files(tmp_path, ["abc " * 100], tokenizer={"kind": "chars"})
    sources = [DataSource(path=str(folder)).to_dict(), DataSource(path=str(tmp_path / "out")).to_dict()]
    with pytest.raises(UserError, match="prepared with another tokenizer"):
        make(folder, config={"path": None, "sources": sources})
    load_tokenizer(folder).save(tmp_path / "out" / "tokenizer")
    with pytest.raises(UserError, match="is not the tokenizer these data were made with"):
        make(tmp_path / "out")


def test_bare_megatron_store(folder: Path, tmp_path: Path) -> None:
    write_store(tmp_path / "m_text_document", [np.append(np.arange(50), EOS)] * 10, 257)
    config = {"path": str(tmp_path / "m_text_document"), "tokenizer": str(folder)}
    loader = make(folder, config=config)
    assert not loader.has_split("valid") and len(take(loader, 3)) == 3
    with pytest.raises(UserError, match="no split 'valid'"):
        make(folder, split="valid", config=config)
    with pytest.raises(UserError, match="name the folder of its tokenizer"):
        make(folder, config={"path": config["path"]})


def test_an_error_in_the_thread_reaches_the_caller(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = make(folder, config={"prefetch": 2})
    monkeypatch.setattr(loader, "step", lambda sample: (_ for _ in ()).throw(RuntimeError("boom")))
    with pytest.raises(RuntimeError, match="boom"):
        next(iter(loader))


def test_verify(folder: Path) -> None:
    make(folder, config={"verify": True})
