"""Speculative decoding: the rules keep the model's law, drafters keep their books."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm.core.errors import UserError
from llm.core.init import initialise
from llm.core.seq import SeqInfo
from llm.generate.acceptance import accept_chosen, accept_sampled, best_branches
from llm.generate.draft_length import DraftLength, expected_tokens
from llm.generate.drafters import LookupDrafter, ModelDrafter, NgramIndex, SelfDrafter
from llm.generate.engine import Engine
from llm.generate.sampling import Sampler, Sampling, filtered
from llm.models.config import ModelConfig
from llm.models.nesting import at_widths

VOCAB = 8
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7, 1], [7, 7, 7], [3, 1, 4, 1, 5, 2, 6]]


def build(seed: int = 0, *, scale: float = 0.5, **changes: Any) -> Any:
    block = {"mixer": {"type": "attention", "n_heads": 2}, "channel": {"type": "swiglu", "d_hidden": 32}}
    block = block | changes.pop("block", {})
    tree = {"vocab_size": VOCAB, "d_model": 16, "max_seq_len": 128, "layers": [{"pattern": [block], "repeat": 2}]}
    model = ModelConfig.model_validate({**tree, "init": {"std": scale}, **changes}).build("cpu")
    initialise(model, seed)
    return model.double().eval()


def grid(n: int) -> Tensor:
    """Midpoints of n equal parts of [0, 1)."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def enumerated(p: list[list[float]], q: list[float]) -> Tensor:
    """[V] exact law of the first token after one draft, by going through all random numbers on a grid that contains
    every place where the outcome changes."""
    n = 840
    law = torch.zeros(3, dtype=torch.float64)
    first, last = (x.flatten() for x in torch.meshgrid(grid(n), grid(n), indexing="ij"))
    probs = torch.tensor(p, dtype=torch.float64).expand(n * n, 2, 3)
    for token, weight in enumerate(q):
        if weight == 0:
            continue
        drafts = torch.full((n * n, 1), token)
        given_q = torch.tensor(q, dtype=torch.float64).expand(n * n, 1, 3)
        counts = torch.ones(n * n, dtype=torch.int64)
        accepted, ids = accept_sampled(probs, given_q, drafts, counts, torch.stack([first, last], dim=1))
        out = torch.where(accepted == 1, drafts[:, 0], ids)
        law += weight * torch.bincount(out, minlength=3) / (n * n)
    return law


@pytest.mark.parametrize(
    "q",
    [[1 / 2, 1 / 4, 1 / 4], [1 / 4, 1 / 2, 1 / 4], [0.0, 1.0, 0.0], [1 / 3, 1 / 3, 1 / 3], [0.5, 0.3, 0.2]],
)
def test_the_rule_keeps_the_law_exactly(q: list[float]) -> None:
    p = [0.5, 0.3, 0.2]
    assert torch.allclose(enumerated([p, p], q), torch.tensor(p, dtype=torch.float64), atol=1e-12)


class Fixed:
    """Gives the next of some numbers."""

    def __init__(self, numbers: Sequence[float]) -> None:
        self.numbers = numbers

    def peek(self, n: int) -> list[float]:
        return list(self.numbers[:n])


@pytest.mark.parametrize("branches", [[[0]], [[1], [2]], [[2, 0], [0, 1], [0, 2]], [[1, 1], [1, 0], [1, 2]]])
def test_branches_keep_the_law_exactly(branches: list[list[int]]) -> None:
    """[V, V] the law of two tokens, by going through all pairs of random numbers on a grid of the probabilities."""
    first = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    second = torch.tensor([[0.1, 0.6, 0.3], [0.4, 0.4, 0.2], [0.9, 0.0, 0.1]], dtype=torch.float64)
    n = max(map(len, branches))
    drafts = torch.tensor([branch + [0] * (n - len(branch)) for branch in branches])
    counts = torch.tensor([len(branch) for branch in branches])
    p = torch.stack([torch.stack([first, second[branch[0]], first][: n + 1]) for branch in branches])
    law = torch.zeros(3, 3, dtype=torch.float64)
    size = 10
    for u, v in itertools.product(grid(size).tolist(), repeat=2):
        sampler = Sampler([Sampling(temperature=1, seed=0)], None, 3, "cpu")
        sampler.streams = [Fixed([u, v, 0.5])]  # type: ignore[list-item]
        accepted, ids = accept_chosen(sampler.choose(p.log(), drafts, [0] * len(branches)), drafts, counts)
        best = int(best_branches(accepted, torch.zeros_like(accepted), 1))
        said = [*drafts[best, : accepted[best]].tolist(), int(ids[best])]
        if len(said) > 1:
            law[said[0], said[1]] += 1 / size**2
        else:
            law[said[0]] += second[said[0]] / size**2
    assert torch.allclose(law, first[:, None] * second, atol=1e-6)


def test_the_best_branch_of_each_row() -> None:
    found = best_branches(torch.tensor([0, 2, 2, 0, 0, 1]), torch.tensor([0, 0, 0, 1, 2, 2]), 3)
    assert found.tolist() == [1, 3, 5]


def test_limits_of_the_rule() -> None:
    p = torch.tensor([[[0.5, 0.5, 0.0, 0.0]] * 3]).expand(64, 3, 4)
    drafts, counts = torch.tensor([[0, 1]]).expand(64, 2), torch.full((64,), 2)
    uniform = torch.rand(64, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    accepted, _ = accept_sampled(p, p[:, :2], drafts, counts, uniform)
    assert (accepted == 2).all()
    q = torch.tensor([[[0.0, 0.0, 0.5, 0.5]] * 2]).expand(64, 2, 4)
    accepted, ids = accept_sampled(p, q, torch.tensor([[2, 3]]).expand(64, 2), counts, uniform)
    assert (accepted == 0).all()
    assert set(ids.tolist()) == {0, 1}
    accepted, ids = accept_sampled(p[:, :1], q[:, :0], drafts[:, :0], torch.zeros_like(counts), uniform[:, :1])
    assert (accepted == 0).all()


def test_the_rule_for_what_nobody_drew() -> None:
    targets = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3], [4, 2, 3]])
    drafts = torch.tensor([[1, 2], [1, 2], [1, 9], [1, 2]])
    accepted, ids = accept_chosen(targets, drafts, torch.tensor([2, 1, 2, 2]))
    assert accepted.tolist() == [2, 1, 1, 0]
    assert ids.tolist() == [3, 2, 2, 4]


@torch.no_grad()
def law_of_two(model: Any, prompt: list[int], sampling: Sampling) -> Tensor:
    """[V, V] exact probabilities of the first two tokens."""

    def after(ids: list[int]) -> Tensor:
        logits = model.head(model(torch.tensor([ids]), SeqInfo.contiguous(1, len(ids))).hidden[:, -1]).float()
        return filtered(logits, sampling).softmax(-1)[0].double()

    first = after(prompt)
    return torch.stack([first[token] * after([*prompt, token]) for token in range(VOCAB)])


@pytest.mark.parametrize("kind", ["model", "lookup", "lookup-tree", "slice"])
def test_sampled_outputs_have_the_models_law(kind: str) -> None:
    nested = {"block": {"channel": {"type": "nested_gated", "d_hidden": 32}}} if kind == "slice" else {}
    model = build(scale=0.8, **nested)
    prompt = [1, 2, 3, 1, 2]
    sampling = Sampling(temperature=0.9, top_k=6, max_new_tokens=3)
    drafter = {
        "model": lambda: ModelDrafter(build(1, scale=0.8)),
        "lookup": LookupDrafter,
        "lookup-tree": lambda: LookupDrafter(n_branches=3),
        "slice": lambda: SelfDrafter(model, lambda: at_widths(model, [8, 8]), "slice"),
    }[kind]()
    engine = Engine(model, drafter=drafter, draft_length=DraftLength(2), max_batch=1000)
    n = 6000
    found = engine.generate([prompt] * n, [sampling.replace(seed=seed) for seed in range(n)])
    assert 0.02 < engine.speculation.acceptance < 0.98
    counts = torch.zeros(VOCAB, VOCAB)
    # The first token comes from the prompt; the second and third have been drafted.
    for completion in found:
        counts[completion.tokens[0], completion.tokens[1]] += 1
    expected = (law_of_two(model, prompt, sampling) * n).flatten()
    observed = counts.flatten().double()
    assert observed[expected == 0].sum() == 0
    common = expected >= 5
    rest = [observed[~common].sum(), expected[~common].sum()]
    wanted, seen = torch.cat([expected[common], rest[1][None]]), torch.cat([observed[common], rest[0][None]])
    chi_square = ((seen - wanted).square() / wanted.clamp(min=1.0)).sum()
    assert torch.special.gammaincc(torch.tensor((len(wanted) - 1) / 2).double(), chi_square / 2) > 1e-3


@pytest.mark.parametrize("mixer", ["attention", "retention", "delta_net"])
@pytest.mark.parametrize("most", [1, 4, 8])
def test_a_slice_of_the_model_drafts_on_its_state(mixer: str, most: int) -> None:
    block = {"mixer": {"type": mixer, "n_heads": 2}, "channel": {"type": "nested_gated", "d_hidden": 32}}
    model = build(block=block)
    greedy = Sampling(temperature=0, max_new_tokens=40)
    plain = [c.tokens for c in Engine(model).generate(PROMPTS, greedy)]
    drafter = SelfDrafter(model, lambda: at_widths(model, [16, 16]), "slice")
    engine = Engine(model, drafter=drafter, draft_length=DraftLength(most))
    assert [c.tokens for c in engine.generate(PROMPTS, greedy)] == plain
    assert 0 < engine.speculation.n_accepted


def test_fewer_loops_draft() -> None:
    model = build(wrappers=[{"type": "loop", "n_loops": 3, "inject": "add"}])
    greedy = Sampling(temperature=0, max_new_tokens=40)
    plain = [c.tokens for c in Engine(model).generate(PROMPTS, greedy)]
    engine = Engine(model, drafter=SelfDrafter(model, lambda: model.loops(1), "loops"))
    assert [c.tokens for c in engine.generate(PROMPTS, greedy)] == plain
    assert 0 < engine.speculation.n_accepted


def test_drafting_with_the_whole_model_is_never_refused() -> None:
    model = build()
    sampling = Sampling(temperature=0.9, seed=3, max_new_tokens=30, repetition_penalty=1.2)
    for drafter in (ModelDrafter(model), SelfDrafter(model, lambda: at_widths(model, None), "whole")):
        engine = Engine(model, drafter=drafter)
        engine.generate(PROMPTS, sampling)
        assert engine.speculation.acceptance == 1.0


@pytest.mark.parametrize("mixer", ["attention", "retention", "delta_net"])
@pytest.mark.parametrize("n_branches", [1, 2, 5])
@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.9, "seed": 4, "repetition_penalty": 1.2}])
def test_lookup_takes_the_tokens_of_plain_decoding(mixer: str, n_branches: int, sampling: dict[str, Any]) -> None:
    """Also where they are drawn, since each place has its own random number."""
    model = build(block={"mixer": {"type": mixer, "n_heads": 2}})
    settings = Sampling(max_new_tokens=60, **sampling)
    plain = Engine(model).generate(PROMPTS, settings)
    engine = Engine(model, drafter=LookupDrafter(n_branches=n_branches), draft_length=DraftLength(3), max_batch=3)
    assert engine.generate(PROMPTS, settings) == plain
    assert engine.speculation.n_accepted > 0


def test_branches_are_kept_more_often() -> None:
    model = build()
    kept = []
    for n_branches in (1, 4):
        engine = Engine(model, drafter=LookupDrafter(n_branches=n_branches), draft_length=DraftLength(2))
        engine.generate(PROMPTS, Sampling(max_new_tokens=100, temperature=0.7, seed=0))
        kept.append(engine.speculation.tokens_per_forward)
    assert kept[1] > kept[0]


def test_without_drafts_the_random_stream_is_that_of_plain_decoding() -> None:
    class Silent(LookupDrafter):
        def propose(self, pending: Tensor, counts: Tensor, state: Any, sampler: Any) -> Any:
            return super().propose(pending, torch.zeros_like(counts), state, sampler)

    model = build()
    sampling = Sampling(temperature=0.9, top_p=0.9, seed=5, max_new_tokens=30)
    assert Engine(model, drafter=Silent()).generate(PROMPTS, sampling) == Engine(model).generate(PROMPTS, sampling)


def test_the_end_of_a_text_within_a_draft() -> None:
    model = build()
    greedy = Sampling(temperature=0, max_new_tokens=40)
    plain = Engine(model).generate(PROMPTS, greedy)
    eos = plain[1].tokens[5]
    with_end = Engine(model, eos_id=eos).generate(PROMPTS, greedy)
    assert any(c.finish == "eos" for c in with_end)
    for drafter in (ModelDrafter(model), LookupDrafter()):
        assert Engine(model, eos_id=eos, drafter=drafter).generate(PROMPTS, greedy) == with_end
    short = Engine(model, drafter=ModelDrafter(model), context=12).generate(PROMPTS, greedy)
    assert short == Engine(model, context=12).generate(PROMPTS, greedy)


def test_a_drafter_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match="drafts with a vocabulary of 9"):
        Engine(build(), drafter=ModelDrafter(build(vocab_size=9)))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 4), st.integers(1, 6))
@settings(max_examples=200, deadline=None)
def test_lookup_equals_brute_force(tokens: list[int], n_max: int, most: int) -> None:
    index = NgramIndex(tokens[:1], n_max)
    for token in tokens[1:]:
        index.append(token)
    wanted: list[int] = []
    for n in range(min(n_max, len(tokens)), 0, -1):
        tail = tokens[len(tokens) - n :]
        ends = [end for end in range(n, len(tokens)) if tokens[end - n : end] == tail]
        if ends:
            wanted = tokens[ends[-1] : ends[-1] + most]
            break
    assert index.continuations(most) == ([wanted] if wanted else [])


def test_branches_are_different_texts_best_first() -> None:
    index = NgramIndex([1, 2, 5, 0, 1, 2, 6, 0, 3, 2, 7, 0, 1, 2, 5, 0, 1, 2], 2)
    assert index.continuations(2, 4) == [[5, 0], [6, 0], [7, 0]]
    assert index.continuations(2, 2) == [[5, 0], [6, 0]]
    assert index.continuations(1, 4) == [[5], [6], [7]]
    assert index.continuations(0, 4) == []


def test_expected_tokens_against_simulation() -> None:
    rng = random.Random(0)
    for acceptance, n in itertools.product((0.3, 0.8), (1, 4)):
        rounds = [1 + next((i for i in range(n) if rng.random() >= acceptance), n) for _ in range(40_000)]
        assert sum(rounds) / len(rounds) == pytest.approx(expected_tokens(acceptance, n), rel=0.01)
    assert expected_tokens(1.0, 3) == 4


@pytest.mark.parametrize(
    ("acceptance", "cost", "best"), [(0.9, 0.05, 13), (0.8, 0.2, 4), (0.5, 0.2, 1), (0.5, 0.58, 0)]
)
def test_the_length_is_the_best_one(acceptance: float, cost: float, best: int) -> None:
    """The optima of the usual formula, from times as they would be measured."""
    length = DraftLength(16, adaptive=True)
    length.start(1)
    for n in (4, 1, 2):
        assert length.next() == n
        length.observe([n], [0], cost * n, 1.0)
    length.acceptance = [acceptance]
    assert length.next() == best


def test_acceptance_is_learned() -> None:
    length = DraftLength(8, adaptive=True)
    length.start(2)
    rng = random.Random(0)
    for _ in range(400):
        kept = [next((i for i in range(4) if rng.random() >= a), 4) for a in (0.9, 0.2)]
        length.observe([4, 4], kept, 0.1, 1.0)
    assert length.acceptance[0] == pytest.approx(0.9, abs=0.12)
    assert length.acceptance[1] == pytest.approx(0.2, abs=0.2)
    length.keep([1])
    assert len(length.acceptance) == 1
    with pytest.raises(UserError, match="draft at least 1"):
        DraftLength(0)


@pytest.mark.parametrize("context", [128, 3])
def test_warming_up_teaches_nothing(context: int) -> None:
    """Neither counts nor costs, which would be the compiler's, and no context is too short for it."""
    model = build()
    engine = Engine(model, drafter=ModelDrafter(model), draft_length=DraftLength(4, adaptive=True), context=context)
    engine.step.widths = (1, 3, 5)
    engine.warm_up()
    assert engine.speculation.n_drafted == 0 and engine.draft_length.n_rounds == 0
    assert engine.draft_length.draft_seconds == 0
