"""The small trainer of byte-level models: start values, parameter groups, and the experiments that use them."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import pytest
import torch

from evals import memoryformer, tokenformer_growth
from evals.byte_lm import Corpus, Recipe, decoder, fit
from llm.train.config import ParamGroupConfig
from llm.train.strategies.common import named_tensors

_RNG = torch.Generator().manual_seed(0)
CORPUS = Corpus(*(torch.randint(97, 110, (n,), dtype=torch.uint8, generator=_RNG) for n in (4000, 600)))
RECIPE = Recipe(steps=3, batch=2, seq_len=16, warmup=1)


def tiny() -> Any:
    return decoder({"type": "attention", "n_heads": 2}, d_model=16, n_layers=1, max_seq_len=16)


def test_starts_from_given_values() -> None:
    first = fit(tiny(), CORPUS, RECIPE, 0)
    tensors = {name: tensor.clone() for name, tensor in named_tensors(first.model).items()}
    again = fit(tiny(), CORPUS, Recipe(1, 2, 16, lr=0.0, warmup=1), 1, start=tensors)
    for name, tensor in named_tensors(again.model).items():
        assert torch.equal(tensor, tensors[name])


def test_groups_reach_their_parameters() -> None:
    still = fit(tiny(), CORPUS, RECIPE, 0, groups=[ParamGroupConfig(match=["embed.*"], lr_scale=0.0)])
    start = fit(tiny(), CORPUS, Recipe(0, 2, 16), 0)
    for name, tensor in named_tensors(still.model).items():
        assert torch.equal(tensor, named_tensors(start.model)[name]) == (name == "embed.weight")


def last_line(main: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str) -> Any:
    for module in (memoryformer, tokenformer_growth):
        monkeypatch.setattr(module, "library", lambda: CORPUS)
    monkeypatch.setattr(sys, "argv", ["evals", *words.split(), "--threads", "1", "--d-model", "16"])
    main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_growth_experiment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--steps 2 --more 1 --n-tokens 8 --layers 1 --heads 2 --seq-len 16 --batch 2"
    found = last_line(tokenformer_growth.main, monkeypatch, capsys, words)
    assert abs(found["facts"]["change_at_growth_zero_keys"]) < 1e-5
    assert len(found["results"]) == 7
    assert all(math.isfinite(row["after"]) for row in found["results"].values())


def test_memory_experiment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = last_line(memoryformer.main, monkeypatch, capsys, "--steps 2 --layers 1 --heads 2 --seq-len 16 --batch 2")
    assert set(found["results"]) == set(memoryformer.VARIANTS)
    dense, memory = (found["results"][name][0]["multiply_adds"] for name in ("dense", "memory, 8 bits"))
    assert (dense, memory) == (12 * 16 * 16, 2 * (4 * 16 + 20))
