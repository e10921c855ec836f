"""Facts hidden in other text: exact lengths, order, windows, splits, and samples that are never held whole."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from evals.babilong.background import Background, BackgroundConfig, open_background, sentences
from evals.babilong.sampler import Sampler, for_tests
from evals.babilong.story import NAMES
from llm.core.errors import UserError
from llm.data.prepare.text import TextSource
from llm.data.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer

WORDS = (
    "river stone lamp under never green walked quietly towards an old bridge when it rained and nobody spoke".split()
)


def prose(n_sentences: int, seed: int = 0) -> str:
    rng = Random(seed)
    lines = [" ".join(rng.choices(WORDS, k=rng.randint(8, 30))).capitalize() + "." for _ in range(n_sentences)]
    return " ".join(lines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("books")
    for number in range(3):
        (folder / f"{number}.txt").write_text(prose(400, number))
    return folder


@pytest.fixture(scope="module", params=["bytes", "chars", "bpe"])
def tokenizer(request: pytest.FixtureRequest, folder: Path) -> Tokenizer:
    texts = [path.read_text() for path in folder.glob("*.txt")] + [chr(c) for c in range(32, 127)]
    config: dict[str, Any] = {"kind": request.param}
    if request.param == "bpe":
        config["vocab_size"] = 400
    return build_tokenizer(TokenizerConfig(**config), texts)


@pytest.fixture(scope="module")
def background(folder: Path, tokenizer: Tokenizer) -> Background:
    return open_background(BackgroundConfig(source=TextSource(paths=[str(folder)])), tokenizer)


def test_sentences_leave_out_the_two_at_the_ends() -> None:
    text = 'is cut. One here! "Is this two?" she said. Three\nis here.\n\nFour has no end'
    assert list(sentences(text)) == ["One here!", '"Is this two?"', "she said.", "Three\nis here."]
    assert list(sentences(f"a. {'x' * 2000}. b. c")) == ["b."]


def test_background_names_nothing_of_the_tasks(tmp_path: Path, tokenizer: Tokenizer) -> None:
    river = "A river ran by it. "
    text = "Cut. " + f"Nobody went to the Kitchen that day at all. Two apples lay on the table then. {river}" * 5
    (tmp_path / "a.txt").write_text(text + "Cut")
    source = TextSource(paths=[str(tmp_path)])
    found = open_background(BackgroundConfig(source=source, min_tokens=1), tokenizer)
    assert tokenizer.decode(found.ids) == " A river ran by it." * 5
    assert found.n_filtered == 10
    everything = open_background(BackgroundConfig(source=source, min_tokens=1, filter=False), tokenizer)
    assert len(everything.starts) == 1 + 15 and everything.n_filtered == 0
    with pytest.raises(UserError, match="holds no sentence"):
        open_background(BackgroundConfig(source=source, min_tokens=500), tokenizer)


def test_the_background_has_sentences_of_the_asked_lengths(folder: Path, tokenizer: Tokenizer) -> None:
    config = BackgroundConfig(source=TextSource(paths=[str(folder)]))
    low, high = np.quantile(np.diff(open_background(config, tokenizer).starts), [0.25, 0.75]).astype(int).tolist()
    config = config.replace(min_tokens=low, max_tokens=high)
    sizes = np.diff(open_background(config, tokenizer).starts)
    assert sizes.min() == low and sizes.max() == high
    small = open_background(config.replace(max_bytes=1000), tokenizer)
    assert len(small.books) == 2, "one document at least, and no more than max_bytes of them"


@pytest.mark.parametrize("n_context", [1000, 1777, 5000])
@pytest.mark.parametrize("task", ["qa1", "qa4", "qa8", "qa15"])
def test_length_is_exact_and_facts_are_in_order(
    task: str, n_context: int, tokenizer: Tokenizer, background: Background
) -> None:
    sampler = Sampler(task, n_context, tokenizer, background)
    for index in range(5):
        hidden = sampler[index]
        ids = np.concatenate(list(hidden.chunks(1 << 20)))
        assert len(ids) == n_context == hidden.n_tokens
        assert hidden.n_background > 0
        text, at = tokenizer.decode(ids), 0
        for fact in hidden.sample.facts:
            found = text.find(fact, at)
            assert found >= 0, (fact, text)
            at = found + len(fact)


def test_cut_does_not_matter(tokenizer: Tokenizer, background: Background) -> None:
    hidden = Sampler("qa2", 3000, tokenizer, background)[0]
    whole = np.concatenate(list(hidden.chunks(1 << 20)))
    for size in (1, 7, 512, 3000):
        chunks = list(hidden.chunks(size))
        assert all(len(chunk) == size for chunk in chunks[:-1]) and 0 < len(chunks[-1]) <= size
        np.testing.assert_array_equal(np.concatenate(chunks), whole)


@pytest.mark.parametrize("task", NAMES)
def test_without_background_there_are_the_facts_alone(task: str, tokenizer: Tokenizer) -> None:
    hidden = Sampler(task, 0, tokenizer, None)[3]
    text = tokenizer.decode(np.concatenate(list(hidden.chunks(64))))
    assert text == "".join(f" {fact}" for fact in hidden.sample.facts)


def test_a_fact_in_a_slot_stands_before_that_sentence(tokenizer: Tokenizer, background: Background) -> None:
    hidden = Sampler("qa1", 4000, tokenizer, background)[1]
    n_before, seen = 0, []
    for _, fact in hidden.pieces():
        if fact is None:
            n_before += 1
        else:
            seen.append(n_before)
    assert tuple(seen) == hidden.slots == tuple(sorted(hidden.slots))
    assert n_before == sum(end - first for first, end in hidden.passages)


def test_slots_are_uniform_and_drawn_with_replacement(tokenizer: Tokenizer, background: Background) -> None:
    sampler = Sampler("qa4", 1000, tokenizer, background)
    shares, same = [], 0
    for index in range(300):
        hidden = sampler[index]
        n = sum(end - first for first, end in hidden.passages)
        shares += [slot / n for slot in hidden.slots]
        same += len({*hidden.slots}) < len(hidden.slots)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.05)
    assert np.std(shares) == pytest.approx(12**-0.5, abs=0.06), "of a uniform distribution"
    assert same > 0 and min(shares) == 0 and max(shares) == 1


@pytest.mark.parametrize("window", [(0.0, 0.2), (0.4, 0.6), (0.8, 1.0)])
def test_facts_lie_in_the_window(window: tuple[float, float], tokenizer: Tokenizer, background: Background) -> None:
    sampler = Sampler("qa1", 4000, tokenizer, background, window=window)
    for index in range(20):
        hidden = sampler[index]
        n = sum(end - first for first, end in hidden.passages)
        assert all(int(window[0] * n) <= slot <= int(window[1] * n) for slot in hidden.slots)
        assert all(window[0] - 0.15 < depth < window[1] + 0.15 for depth in hidden.depths)
    with pytest.raises(UserError, match="must lie within 0 to 1"):
        Sampler("qa1", 4000, tokenizer, background, window=(0.5, 0.2))


def test_same_seed_same_samples_and_no_facts_are_shared_by_the_splits(
    tokenizer: Tokenizer, background: Background
) -> None:
    def make(split: Any, seed: int) -> list[tuple[tuple[str, ...], bytes]]:
        sampler = Sampler("qa4", 1000, tokenizer, background, split=split, seed=seed)
        return [(s.sample.facts, next(s.chunks(1000)).tobytes()) for s in map(sampler.__getitem__, range(150))]

    test, train = make("test", 0), make("train", 0)
    assert make("test", 0) == test
    assert make("test", 1) != test and len({ids for _, ids in test}) == 150
    seen = {facts for facts, _ in train} | {facts for facts, _ in make("train", 1)}
    assert not seen & {facts for facts, _ in test}
    assert all(map(for_tests, (facts for facts, _ in test))) and not any(map(for_tests, seen))


def test_what_does_not_fit_is_left_out_or_named(tokenizer: Tokenizer, background: Background) -> None:
    for index in range(10):
        assert len(Sampler("qa3", 1000, tokenizer, background)[index].sample.facts) <= 125
    with pytest.raises(UserError, match="give a greater length"):
        Sampler("qa20", 8, tokenizer, background)[0]


def test_real_facts(shared_data: Path, tokenizer: Tokenizer, background: Background) -> None:
    sampler = Sampler("qa1", 1000, tokenizer, background, facts=str(shared_data / "babi"))
    assert len(sampler) == 1000
    ids = {sampler[index].sample.id for index in range(50)}
    assert len(ids) == 50 and all(name.startswith("qa1/real/") for name in ids)
    with pytest.raises(UserError, match="1000 real samples"):
        sampler[1000]
    with pytest.raises(UserError, match="are for tests"):
        Sampler("qa1", 1000, tokenizer, background, facts="x", split="train")


def test_ten_million_tokens_are_never_held(tokenizer: Tokenizer, background: Background) -> None:
    if tokenizer.kind != "bytes":
        pytest.skip("once is enough")
    n = 10_000_000
    tracemalloc.start()
    hidden = Sampler("qa1", n, tokenizer, background)[0]
    n_seen = sum(len(chunk) for chunk in hidden.chunks(65536))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n_seen == n
    assert peak < 4e6, "40 MB of ids, were it whole"
