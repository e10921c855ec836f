"""Sampling: filters equal those of transformers, draws follow the probabilities, mistakes are named."""

from __future__ import annotations

import pytest
import torch

from llm.core.errors import UserError
from llm.generate.sampling import Sampler, Sampling, draw, filtered, penalise

SETTINGS = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 5},
    {"top_k": 1},
    {"top_p": 0.9},
    {"top_p": 0.3, "temperature": 2.0},
    {"top_p": 1e-6},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 0.8, "top_k": 500},
]


def reference(logits: torch.Tensor, seen: torch.Tensor, settings: dict[str, float]) -> torch.Tensor:
    logits_process = pytest.importorskip("transformers.generation.logits_process")
    steps = []
    if settings.get("repetition_penalty", 1) != 1:
        steps.append(logits_process.RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"]))
    if settings.get("temperature", 1) != 1:
        steps.append(logits_process.TemperatureLogitsWarper(settings["temperature"]))
    if "top_k" in settings:
        steps.append(logits_process.TopKLogitsWarper(settings["top_k"]))
    if "top_p" in settings:
        steps.append(logits_process.TopPLogitsWarper(settings["top_p"]))
    if "min_p" in settings:
        steps.append(logits_process.MinPLogitsWarper(settings["min_p"]))
    for step in steps:
        logits = step(seen, logits)
    return logits


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_filters_equal_transformers(settings: dict[str, float]) -> None:
    logits = torch.randn(7, 101) * 3
    expected = reference(logits, torch.zeros(7, 0, dtype=torch.int64), settings)
    torch.testing.assert_close(filtered(logits, Sampling(**settings)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("penalty", [0.5, 1.2, 3.0])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    logits = torch.randn(3, 50) * 3
    ids = torch.randint(0, 50, (3, 20))
    expected = reference(logits.clone(), ids, {"repetition_penalty": penalty})
    seen = torch.zeros(3, 50, dtype=torch.bool).scatter(1, ids, True)
    torch.testing.assert_close(penalise(logits, seen, penalty), expected, rtol=0, atol=0)


def test_the_sampler_penalises_prompt_and_output() -> None:
    logits = torch.tensor([[2.0, 1.9, 1.8, 0.0]])
    sampler = Sampler([Sampling(temperature=0, repetition_penalty=1.5)], [[0]], 4, "cpu")
    assert [int(sampler(logits)) for _ in range(4)] == [1, 2, 0, 0]


def test_draw_is_the_inverse_distribution_function() -> None:
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    for uniform, expected in [(0.0, 1), (0.2499, 1), (0.25, 3), (0.9999999999, 3)]:
        assert int(draw(probs, torch.tensor([uniform], dtype=torch.float64))) == expected


def test_draws_follow_the_probabilities() -> None:
    n = 4000
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(n, 4)
    sampler = Sampler([Sampling(seed=i) for i in range(n)], [[0]] * n, 4, "cpu")
    counts = torch.bincount(sampler(logits), minlength=4) / n
    torch.testing.assert_close(counts, torch.tensor([0.1, 0.2, 0.3, 0.4]), rtol=0, atol=0.03)


def test_rows_with_their_own_settings_equal_each_alone() -> None:
    logits = torch.randn(4, 30)
    samplings = [
        Sampling(temperature=0),
        Sampling(seed=1, top_k=3),
        Sampling(seed=2, repetition_penalty=2.0),
        Sampling(seed=1, top_k=3),
    ]
    prompts = [[1], [2], [3, 4], [5]]
    together = Sampler(samplings, prompts, 30, "cpu")
    rows = [Sampler([s], [p], 30, "cpu") for s, p in zip(samplings, prompts, strict=True)]
    for step in range(5):
        alone = [int(one(logits[i : i + 1] + step)) for i, one in enumerate(rows)]
        assert together(logits + step).tolist() == alone


def test_kept_rows_keep_their_random_streams() -> None:
    logits = torch.randn(1, 30).expand(3, 30)
    samplings = [Sampling(seed=i, repetition_penalty=1.1) for i in range(3)]
    whole, cut = (Sampler(samplings, [[0], [1], [2]], 30, "cpu") for _ in range(2))
    whole(logits), cut(logits)
    cut.keep([2, 0])
    expected = whole(logits)
    assert cut(logits[:2]).tolist() == [int(expected[2]), int(expected[0])]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0, "top_k": 5}, "top_k has no effect with temperature=0"),
        ({"temperature": 0, "seed": 5}, "seed has no effect"),
        ({"stop": [""]}, "empty text"),
    ],
)
def test_ignored_values_are_errors(settings: dict[str, object], message: str) -> None:
    with pytest.raises((UserError, ValueError), match=message):
        Sampling(**settings)
