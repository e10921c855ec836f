"""Which parameter gets which optimizer, learning rate and weight decay."""

from __future__ import annotations

from typing import Any

import pytest

from llm.core.errors import UserError
from llm.train.config import OptimConfig
from llm.train.optim.groups import ParamRule, param_rules

SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (61, 32),
    "layers.0.mixer.q.weight": (32, 32),
    "layers.0.mixer.q.bias": (32,),
    "layers.0.channel.gate": (4, 16, 32),
    "layers.0.mixer.conv.weight": (32, 1, 4),
    "layers.0.residual.mixer_norm.weight": (32,),
    "final_norm.weight": (32,),
    "unembed.weight": (61, 32),
}


def rules(**settings: Any) -> dict[str, ParamRule]:
    return param_rules(SHAPES, ("layers.0.",), OptimConfig.model_validate(settings))


def test_weight_decay_spares_vectors_and_embeddings() -> None:
    decayed = {name for name, rule in rules(weight_decay=0.1).items() if rule.weight_decay}
    assert decayed == {
        "layers.0.mixer.q.weight", "layers.0.channel.gate", "layers.0.mixer.conv.weight", "unembed.weight",
    }  # fmt: skip


def test_muon_drives_matrices_in_blocks_alone() -> None:
    found = rules(type="muon", lr=0.02, adam_lr=0.001)
    assert {name for name, rule in found.items() if rule.kind == "muon"} == {
        "layers.0.mixer.q.weight", "layers.0.channel.gate",
    }  # fmt: skip
    assert {rule.lr for rule in found.values() if rule.kind == "muon"} == {0.02}
    assert {rule.lr for rule in found.values() if rule.kind == "adamw"} == {0.001}


def test_one_learning_rate_serves_both_by_default() -> None:
    assert {rule.lr for rule in rules(type="muon", lr=0.02).values()} == {0.02}


def test_first_matching_group_wins() -> None:
    groups = [
        {"match": ["*.q.*"], "lr_scale": 0.5, "weight_decay": 0.0},
        {"match": ["layers.*"], "lr_scale": 2.0},
    ]
    found = rules(lr=0.1, groups=groups)
    assert found["layers.0.mixer.q.weight"] == ParamRule("adamw", 0.05, 0.0)
    assert found["layers.0.channel.gate"] == ParamRule("adamw", 0.2, 0.1)
    assert found["final_norm.weight"] == ParamRule("adamw", 0.1, 0.0)


def test_group_may_choose_the_optimizer() -> None:
    found = rules(type="muon", groups=[{"match": ["layers.0.channel.*"], "optimizer": "adamw"}])
    assert found["layers.0.channel.gate"].kind == "adamw"
    found = rules(type="muon", groups=[{"match": ["unembed.weight"], "optimizer": "muon"}])
    assert found["unembed.weight"].kind == "muon"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"groups": [{"match": ["layers.0.mixer.w*"]}]}, r"groups\[0\].*'layers.0.mixer.w\*' matches no parameter"),
        ({"groups": [{"match": ["embed.wieght"]}]}, "looks like it: embed.weight"),
        ({"groups": [{"match": ["*"]}, {"match": ["embed.*"]}]}, r"groups\[1\].*no effect"),
        ({"groups": [{"match": ["unembed.*"], "optimizer": "muon"}]}, "needs optim.type=muon"),
        ({"type": "muon", "groups": [{"match": ["final_norm.*"], "optimizer": "muon"}]}, "matrices only"),
    ],
)
def test_mistakes_are_named(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        rules(**settings)
