"""Growing by parameter tokens: equal outputs, the way back, optimizer state, and training that goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from llm.checkpoint import load_meta, load_model_tensors, load_optim_tensors, resolve_checkpoint
from llm.checkpoint.hf.build import build_model
from llm.core.errors import UserError
from llm.core.init import initialise
from llm.core.seq import SeqInfo
from llm.data.prepare.config import PrepareConfig
from llm.data.prepare.run import prepare
from llm.models.config import ModelConfig
from llm.models.growth import grow_optimizer, grow_tensors, grown_config
from llm.train.config import OptimConfig, RunConfig
from llm.train.optim import build_optimizer
from llm.train.setup import build_trainer
from llm.train.strategies.common import named_tensors
from tests.e2e.tiny import prepare_tree, run_tree, write_corpus
from tests.unit.train.trainer_parts import equal, weights


def small(n: int = 12, **settings: Any) -> ModelConfig:
    settings = {"n_tokens": n, "type": "pattention"} | settings
    block = {
        "mixer": {"type": "attention", "n_heads": 2},
        "channel": {**settings, "type": "token_ffn", "n_tokens": 4 * n},
    }
    return ModelConfig.model_validate(
        {
            "vocab_size": 17, "d_model": 16, "max_seq_len": 32, "layers": [{"pattern": [block], "repeat": 2}],
            "norm": {"type": "layer_norm", "affine": False, "bias": False}, "final_norm": "layer_norm",
            "linear": {"mixer.*": settings}, "init": {"std": 0.3},
        }
    )  # fmt: skip


def start(config: ModelConfig) -> dict[str, Tensor]:
    model = config.build("cpu")
    initialise(model, 0)
    return {name: tensor.clone() for name, tensor in named_tensors(model).items()}


def logits(config: ModelConfig, tensors: dict[str, Tensor]) -> Tensor:
    model = build_model(config, tensors)
    tokens = torch.randint(17, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.head(model(tokens, SeqInfo.contiguous(2, 20)).hidden)


@pytest.mark.parametrize("mode", ["l2_norm_gelu", "gelu_l2_norm"])
def test_outputs_are_equal_after_one_growth_and_after_two(mode: str) -> None:
    config = small(normalization=mode)
    tensors = start(config)
    before = logits(config, tensors)
    for n in (20, 33):
        config = grown_config(config, n)
        tensors = grow_tensors(config, tensors)
        assert tensors["layers.1.mixer.q.keys"].shape == (n, 16)
        assert tensors["layers.1.channel.tokens.values"].shape == (4 * n, 16)
        assert int(tensors["layers.1.mixer.q.tau2"]) == 12 and int(tensors["layers.1.channel.tokens.tau2"]) == 48
        assert float((logits(config, tensors) - before).abs().max() / before.abs().max()) < 1e-6
    again = logits(config, tensors)
    tensors["layers.0.mixer.q.keys"][-1] = torch.randn(16)
    assert float((logits(config, tensors) - again).abs().max()) > 1e-4, "the added tokens are in use"


@pytest.mark.parametrize(
    ("settings", "options"),
    [({}, {"tau": "sqrt_n"}), ({}, {"new_keys": "random"}), ({"normalization": "softmax"}, {})],
    ids=["sqrt_n", "random", "softmax"],
)
def test_outputs_change(settings: dict[str, Any], options: dict[str, Any]) -> None:
    config = small(**settings)
    tensors = start(config)
    more = grown_config(config, 20)
    grown = grow_tensors(more, tensors, **options)
    before = logits(config, tensors)
    assert float((logits(more, grown) - before).abs().max() / before.abs().max()) > 0.01
    if options.get("tau"):
        assert int(grown["layers.0.mixer.q.tau2"]) == 20 and int(grown["layers.0.channel.tokens.tau2"]) == 80


def test_slicing_the_new_tokens_off_gives_the_old_state_back() -> None:
    config = small()
    tensors = start(config)
    grown = grow_tensors(grown_config(config, 20), tensors)
    assert list(grown) == list(tensors)
    for name, old in tensors.items():
        assert torch.equal(grown[name][: len(old)] if old.dim() else grown[name], old), name


def test_new_values_are_no_copy_and_differ_by_growth_and_seed() -> None:
    config, more = small(), grown_config(small(), 24)
    tensors = start(config)
    name = "layers.0.mixer.v.values"
    grown = grow_tensors(more, tensors)[name]
    assert float(grown[12:].std()) == pytest.approx(float(grown[:12].std()), rel=0.4)
    assert not torch.equal(grown[12:], grown[:12])
    assert torch.equal(grow_tensors(more, tensors)[name], grown)
    assert not torch.equal(grow_tensors(more, tensors, seed=1)[name][12:], grown[12:])


def test_only_what_is_named_grows() -> None:
    config = small()
    assert grown_config(config, 20).layers[0].pattern[0].channel.n_tokens == 80  # type: ignore[union-attr]
    assert grown_config(config, 20, 48).layers[0].pattern[0].channel.n_tokens == 48  # type: ignore[union-attr]
    only_ffn = grown_config(config, ffn_tokens=60)
    assert only_ffn.linear == config.linear and only_ffn.layers[0].pattern[0].channel.n_tokens == 60  # type: ignore[union-attr]
    named = ModelConfig.model_validate({"variant": "tokenformer-owt-354m"})
    wanted = ModelConfig.model_validate({"variant": "tokenformer-owt-757m"})
    found = grown_config(named, 1792)
    assert found.variant is None and found.cost().total.params == wanted.cost().total.params == 756_156_416


def dense() -> ModelConfig:
    return ModelConfig.model_validate(
        {"vocab_size": 17, "d_model": 16, "layers": [{"pattern": [{"mixer": {"type": "attention", "n_heads": 2}}]}]}
    )


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: grown_config(small()), "give n_tokens"),
        (lambda: grown_config(dense(), 20), "no entry of model.linear is a pattention"),
        (lambda: grown_config(dense(), ffn_tokens=20), "no token_ffn channel"),
        (
            lambda: grown_config(small(13).replace(linear={"*": {"type": "pattention", "n_tokens": 15}}), 16),
            "whole ratio",
        ),
        (lambda: grow_tensors(grown_config(small(), 8), start(small())), "none is taken away"),
        (lambda: grow_tensors(dense(), start(small())), "it is of another model"),
        (lambda: grow_tensors(small(), start(dense())), "it is of another model"),
    ],
)
def test_mistakes_are_named(call: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        call()


@pytest.mark.parametrize(
    "optim",
    [{}, {"type": "muon"}, {"groups": [{"match": ["*.keys", "*.values"], "optimizer": "rowwise_adamw"}]}],
    ids=["adamw", "muon", "rowwise"],
)
def test_optimizer_state_of_old_rows_stays(optim: dict[str, Any]) -> None:
    config, more = small(), grown_config(small(), 20)
    tensors = start(config)
    state = build_optimizer(config.build("cpu"), OptimConfig.model_validate(optim)).state()
    for slots in state.values():
        for value in slots.values():
            value.copy_(torch.randn(value.shape))
    found = grow_optimizer(tensors, grow_tensors(more, tensors), state)
    fresh = build_optimizer(more.build("cpu"), OptimConfig.model_validate(optim)).state()
    for name, slots in fresh.items():
        assert set(found[name]) == set(slots)
        for key, value in slots.items():
            old, new = state[name][key], found[name][key]
            assert new.shape == value.shape, (name, key)
            assert torch.equal(new[: len(old)] if old.dim() else new, old)
            assert not old.dim() or not bool(new[len(old) :].any())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(run folder, its config tree) of six steps."""
    root = tmp_path_factory.mktemp("growth")
    prepare(PrepareConfig.model_validate(prepare_tree(write_corpus(root / "text"), root / "data")), quiet=True)
    tree = run_tree(root / "data", root / "runs", "small")
    tree["model"] = {k: v for k, v in small().to_dict().items() if k != "vocab_size"}
    tree["train"] |= {"steps": 6}
    build_trainer(RunConfig.model_validate(tree)).fit()
    return root / "runs" / "small", tree


def test_command_grows_a_run_that_goes_on(trained: Any, tmp_path: Path, cli: Callable[..., Any]) -> None:
    run, _ = trained
    done = cli("grow", run, tmp_path / "large", "n_tokens=24")
    assert done.code == 0, done.err
    said = json.loads(done.out.splitlines()[-1])
    assert said["logit_difference"] < 1e-5 and said["params"] > said["params_before"]
    step = resolve_checkpoint(tmp_path / "large")
    assert step.name == "step-000000006" and load_meta(step)["grown_from"]["n_tokens"] == 24
    assert load_optim_tensors(step)["layers.0.mixer.q.keys"]["exp_avg"].shape == (24, 16)

    tree = yaml.safe_load((tmp_path / "large" / "config.yaml").read_text())
    assert tree["name"] == "large" and tree["runs_dir"] == str(tmp_path)
    tree["train"]["steps"] = 9
    trainer = build_trainer(RunConfig.model_validate(tree))
    trainer._resume()
    assert trainer.step == 6 and trainer.tokens == 6 * 128
    state = trainer.strategy.state()
    old = load_optim_tensors(resolve_checkpoint(run))
    for name, slots in old.items():
        for key, value in slots.items():
            now = state.optim[name][key]
            assert torch.equal(now[: len(value)] if value.dim() else now, value), (name, key)
    loader = load_meta(resolve_checkpoint(run))["loader"]
    assert trainer.loader.state() == loader
    assert trainer.fit().step == 9
    assert int(trainer.strategy.state().model["layers.0.mixer.q.tau2"]) == 12


def test_grown_weights_start_a_run_of_their_own(trained: Any, tmp_path: Path, cli: Callable[..., Any]) -> None:
    run, tree = trained
    assert cli("grow", run, tmp_path / "large", "n_tokens=24", "ffn_tokens=100").code == 0
    grown = yaml.safe_load((tmp_path / "large" / "config.yaml").read_text())["model"]
    changes = {"name": "new", "runs_dir": str(tmp_path), "model": grown}
    new = build_trainer(
        RunConfig.model_validate(tree | changes | {"checkpoint": {"init_from": str(tmp_path / "large")}})
    )
    new._resume()
    assert new.step == 0
    assert equal(weights(new), load_model_tensors(resolve_checkpoint(tmp_path / "large")))


def test_command_refuses_what_is_not_exact(trained: Any, tmp_path: Path, cli: Callable[..., Any]) -> None:
    run, _ = trained
    done = cli("grow", run, tmp_path / "a", "n_tokens=24", "tau=sqrt_n")
    assert done.code == 2 and "accept it with exact=false" in done.err and not (tmp_path / "a").exists()
    assert cli("grow", run, tmp_path / "a", "n_tokens=24", "tau=sqrt_n", "exact=false").code == 0
    again = cli("grow", run, tmp_path / "a", "n_tokens=24")
    assert again.code == 2 and "exists and is not empty" in again.err
    assert "given 1 paths" in cli("grow", run, "n_tokens=24").err
    assert "did you mean 'n_tokens'" in cli("grow", run, tmp_path / "b", "n_token=24").err
