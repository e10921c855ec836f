"""Compilation per block, and the plans of parts."""

from __future__ import annotations

import pytest
import torch

from llm.core.errors import UserError
from llm.parallel.compile import compile_blocks, require_compiler
from llm.parallel.plan import ParallelPlan, fp32_modules, model_plan, plan_for
from tests.distributed.steps import losses_and_norms, tiny_model, tiny_run


def test_no_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="train.compile=true needs a C\\+\\+ compiler"):
        require_compiler(torch.device("cpu"))


def test_names_stay_when_compiled() -> None:
    plain, compiled = tiny_model().build("meta"), tiny_model().build("meta")
    compile_blocks(compiled, torch.device("cpu"))
    assert list(plain.state_dict()) == list(compiled.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_compiled_losses_are_those_of_eager(mode: str) -> None:
    train = {"compile": True, "activation_checkpointing": mode}
    eager = losses_and_norms(0, tiny_run(), tiny_model(), 3, 2)
    compiled = losses_and_norms(0, tiny_run(train=train), tiny_model(), 3, 2)
    torch._dynamo.reset()
    assert compiled[0] == pytest.approx(eager[0], rel=1e-5)
    assert compiled[1] == pytest.approx(eager[1], rel=1e-5)


def test_plan_of_a_model_is_that_of_its_parts() -> None:
    dense = tiny_model().build("meta")
    assert model_plan(dense) == ParallelPlan()
    assert fp32_modules(dense) == []
    moe = tiny_model(channel={"type": "moe", "n_experts": 4, "d_hidden": 16}).build("meta")
    assert "*.router.*" in model_plan(moe).fp32_params
    routers = [layer.channel.router for layer in moe.layers]  # type: ignore[union-attr]
    assert fp32_modules(moe) == routers


def test_a_second_plan_raises() -> None:
    from llm.blocks.channels.moe import MoEConfig

    with pytest.raises(ValueError, match="two parallel plans"):
        plan_for(MoEConfig)(lambda config: ParallelPlan())
