"""Log-probabilities of continuations: contexts read once give what whole texts give, whatever the mixer and batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from evals.harness.scoring import Scorer
from llm.blocks.base import MIXERS as KNOWN
from llm.core.init import initialise
from llm.core.seq import SeqInfo
from llm.models.config import ModelConfig
from llm.models.wrappers.base import WRAPPERS

MIXERS: dict[str, dict[str, Any]] = {
    "attention": {"type": "attention", "n_heads": 4, "n_kv_heads": 2},
    "window": {"type": "attention", "n_heads": 4, "window": 5},
    "gated_delta_net": {"type": "gated_delta_net"},
    "mamba2": {"type": "mamba2"},
}


def build(mixer: dict[str, Any], wrappers: list[dict[str, Any]] | None = None) -> Any:
    if mixer["type"] in ("gated_delta_net", "mamba2"):
        mixer = KNOWN.entry(mixer["type"]).tiny().to_dict()
    tree = {
        "vocab_size": 61,
        "d_model": 32,
        "max_seq_len": 64,
        "layers": [{"pattern": [{"mixer": mixer, "channel": "swiglu"}], "repeat": 2}],
        "init": {"std": 0.3},
        "wrappers": wrappers or [],
    }
    model = ModelConfig.model_validate(tree).build("cpu")
    initialise(model, 0)
    return model.eval()


def pairs(seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Contexts with one, several and one-token continuations, mixed up."""
    rng = torch.Generator().manual_seed(seed)

    def draw(n: int) -> list[int]:
        return torch.randint(61, (n,), generator=rng).tolist()

    found = [(draw(n), draw(m)) for n, m in ((3, 4), (20, 1), (30, 12))]
    for n, lengths in ((17, (1, 1, 1)), (9, (5, 1, 8, 2)), (25, (3, 3)), (2, (4, 4))):
        context = draw(n)
        found += [(context, draw(m)) for m in lengths]
    order = torch.randperm(len(found), generator=rng).tolist()
    return [found[i] for i in order]


@torch.no_grad()
def by_hand(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    tokens = torch.tensor([context + continuation])
    logits = model.head(model(tokens, SeqInfo.contiguous(1, tokens.shape[1])).hidden)[0].double()
    logprobs = logits.log_softmax(-1)[len(context) - 1 : -1]
    wanted = torch.tensor(continuation)
    return float(logprobs.gather(1, wanted[:, None]).sum()), bool((logprobs.argmax(-1) == wanted).all())


@pytest.mark.parametrize("name", MIXERS)
def test_every_way_of_reading_gives_the_same(name: str) -> None:
    model, asked = build(MIXERS[name]), pairs()
    expected = [by_hand(model, *pair) for pair in asked]
    for settings in ({}, {"share": False}, {"max_rows": 2, "chunk": 4}, {"batch_tokens": 60}):
        done: list[int] = []
        found = Scorer(model, **settings)(asked, done.append)
        assert [score.logprob for score in found] == pytest.approx([x for x, _ in expected], abs=2e-4)
        assert [score.greedy for score in found] == [greedy for _, greedy in expected]
        assert sum(done) == len(asked)


def test_recurrent_memory_with_segments() -> None:
    model = build(MIXERS["attention"], [WRAPPERS.entry("rmt").tiny().to_dict()])
    asked = pairs()
    expected = [by_hand(model, *pair)[0] for pair in asked]
    assert [score.logprob for score in Scorer(model)(asked)] == pytest.approx(expected, abs=2e-4)


def test_a_shared_context_is_read_once() -> None:
    context = list(range(40))
    asked = [(context, [1]), (context, [2, 3]), (context, [4, 5, 6])]
    for share, expected in ((True, 40 + 0 + 1 + 2), (False, 3 * 40 + 0 + 1 + 2)):
        scorer = Scorer(build(MIXERS["attention"]), share=share)
        scorer(asked)
        assert scorer.n_read == expected


def test_the_likeliest_continuation_is_greedy() -> None:
    model = build(MIXERS["attention"])
    context = list(range(12))
    grown = list(context)
    with torch.no_grad():
        for _ in range(4):
            seq = SeqInfo.contiguous(1, len(grown))
            grown.append(int(model.head(model(torch.tensor([grown]), seq).hidden[0, -1]).argmax()))
    best = grown[12:]
    other = [*best[:3], (best[3] + 1) % 61]
    assert [score.greedy for score in Scorer(model)([(context, best), (context, other)])] == [True, False]
