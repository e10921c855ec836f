"""Cost: sums, and whole models equal to what is counted."""

from __future__ import annotations

import pytest

from llm.core.cost import Cost, matmul_cost
from llm.models.zoo import VARIANTS
from tests.contracts.checks.harness import n_parameters, tiny_model


def test_costs_add_up() -> None:
    a = Cost(params=1, active_params=2, flops_per_token=3.0, attention_flops=1.0, state_bytes_per_seq=4)
    assert sum([a, a, Cost()]) == Cost(2, 4, 6.0, 2.0, 8)
    assert a + Cost() == a
    with pytest.raises(TypeError):
        1 + a  # type: ignore[operator]


def test_a_dense_layer() -> None:
    assert matmul_cost(3, 5) == Cost(params=15, active_params=15, flops_per_token=30.0)
    assert matmul_cost(3, 5, bias=True).params == 20


@pytest.mark.parametrize("changes", [{}, {"head": {"tied": False, "bias": True}}, {"embed": {"norm": "rms_norm"}}])
def test_a_small_model(changes: dict[str, object]) -> None:
    config = tiny_model({"type": "attention", "n_heads": 2}, "swiglu", **changes)
    assert config.cost().total.params == n_parameters(config.build("meta"))


def test_costs_grow_with_context_where_they_must() -> None:
    config = tiny_model({"type": "attention", "n_heads": 2}, "swiglu")
    short, long = config.cost(16, "decode").total, config.cost(64, "decode").total
    assert long.state_bytes_per_seq == 4 * short.state_bytes_per_seq
    assert long.attention_flops / short.attention_flops == pytest.approx(4.0, rel=0.06)
    assert long.flops_per_token - long.attention_flops == short.flops_per_token - short.attention_flops


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_named_variants_are_costed_as_they_are_built(name: str) -> None:
    from llm.models.config import ModelConfig

    config = ModelConfig.model_validate({"variant": name})
    assert config.cost().total.params == n_parameters(config.build("meta"))
