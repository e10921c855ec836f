"""Wrapped models in whole runs: they start from a bare decoder's weights, and say how their data must be packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llm.core.errors import UserError
from llm.core.seq import SeqInfo
from llm.data.prepare.config import PrepareConfig
from llm.data.prepare.run import prepare
from llm.generate import Engine, Sampling
from llm.models.config import ModelConfig
from llm.train.config import RunConfig
from llm.train.setup import build_trainer
from llm.train.trainer import Trainer
from tests.contracts.checks.harness import fill
from tests.e2e.tiny import prepare_tree, run_tree, write_corpus
from tests.unit.train.trainer_parts import weights

WRAPPERS: dict[str, dict[str, Any]] = {
    "rmt": {"type": "rmt", "n_memory": 2, "segment": 6, "curriculum": [1, 3]},
    "armt": {"type": "armt", "n_memory": 2, "segment": 6, "d_memory": 4, "bptt_segments": 2},
    "fit": {"type": "fit", "group": 6},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("wrapped")
    tree = prepare_tree(write_corpus(root / "text"), root / "data")
    prepare(PrepareConfig.model_validate(tree), quiet=True)
    return root / "data"


def _trainer(folder: Path, runs: Path, /, **changes: Any) -> Trainer:
    tree = run_tree(folder, runs)
    for section, values in changes.items():
        tree[section] = tree.get(section, {}) | values
    return build_trainer(RunConfig.model_validate(tree))


def test_a_wrapped_run_starts_from_a_bare_one(data: Path, tmp_path: Path) -> None:
    first = _trainer(data, tmp_path / "bare", train={"steps": 2})
    first.fit()
    origin = weights(first)
    for name, wrapper in WRAPPERS.items():
        runs = tmp_path / name
        changes: dict[str, Any] = {"model": {"wrappers": [wrapper]}, "data": {"packing": "pad"}, "train": {"steps": 2}}
        start = weights(_trainer(data, runs / "anew", **changes))
        second = _trainer(data, runs, **changes, checkpoint={"init_from": str(first.run_dir)})
        second._resume()
        found = weights(second)
        assert all(torch.equal(found[key], tensor) for key, tensor in origin.items())
        assert all(torch.equal(found[key], start[key]) for key in set(found) - set(origin))
        assert bool(set(found) - set(origin)) == (name != "fit")
        second.fit()
        assert second.step == 2
    with pytest.raises(UserError, match="is not of this model"):
        other = _trainer(data, tmp_path / "other", checkpoint={"init_from": str(second.run_dir)}, model={"d_model": 32})
        other._resume()


def test_a_run_with_packed_documents_names_the_setting(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="RMT cannot keep documents .* 'concat'; set data.packing=pad"):
        _trainer(data, tmp_path, model={"wrappers": [WRAPPERS["rmt"]]}, data={"packing": "concat"})
    _trainer(data, tmp_path, model={"wrappers": [WRAPPERS["rmt"]]}, data={"packing": "concat", "isolate": False})


@pytest.mark.parametrize(
    "wrapper",
    [
        {"type": "rmt", "n_memory": 2, "segment": 6, "retrieval": True},
        WRAPPERS["armt"],
        {"type": "fit", "stages": "(1)1(1)", "group": 5, "n_latents": 2, "n_heads": 2},
        {"type": "loop", "n_loops": 3, "tolerance": 0.3},
    ],
    ids=lambda wrapper: wrapper["type"],
)
def test_the_engine_writes_what_forward_says(wrapper: dict[str, Any]) -> None:
    """Prompts of different lengths together, read in chunks: the likeliest token is that of a forward pass."""
    block = {"mixer": {"type": "attention", "n_heads": 2}, "channel": "swiglu"}
    tree = {"vocab_size": 24, "d_model": 16, "max_seq_len": 64, "layers": [{"pattern": [block], "repeat": 2}]}
    model: Any = fill(ModelConfig.model_validate(tree | {"wrappers": [wrapper]}).build("cpu")).eval()
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3], [2, 7, 1, 8, 2, 8, 1]]
    engine = Engine(model, prefill_chunk=4)
    for prompt, completion in zip(prompts, engine.generate(prompts, Sampling(temperature=0.0, max_new_tokens=15))):
        tokens = list(prompt)
        for token in completion.tokens:
            seq_tokens = torch.tensor([tokens])
            with torch.no_grad():
                logits = model.head(model(seq_tokens, SeqInfo.contiguous(*seq_tokens.shape)).hidden)
            assert int(logits[0, -1].argmax()) == token
            tokens.append(token)
        assert len(completion.tokens) == 15


def test_segments_take_a_model_beyond_its_learned_positions(data: Path, tmp_path: Path) -> None:
    """Training rows and contexts may be longer than model.max_seq_len where positions begin anew in each segment."""
    changes: dict[str, Any] = {
        "model": {"max_seq_len": 12, "position": {"type": "learned"}, "wrappers": [WRAPPERS["rmt"]]},
        "data": {"packing": "pad"},
        "train": {"steps": 1},
    }
    trainer = _trainer(data, tmp_path, **changes)
    trainer.fit()
    model: Any = trainer.strategy.model
    completion = Engine(model.eval(), context=40).generate([[1, 2, 3]], Sampling(temperature=0.0, max_new_tokens=30))
    assert len(completion[0].tokens) == 30
    changes["model"]["wrappers"] = []
    with pytest.raises(UserError, match="is beyond model.max_seq_len 12"):
        _trainer(data, tmp_path, **changes)
    config = ModelConfig.model_validate(
        {"vocab_size": 8, "d_model": 4, "layers": [{"pattern": [{"channel": "swiglu"}]}]}
    )
    assert config.max_context is None and config.replace(position="learned").max_context == 1024
    grouped = {"type": "fit", "stages": "(1)", "group": 4}
    assert config.replace(position="learned", wrappers=[grouped]).max_context is None
