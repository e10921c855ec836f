"""The compiled step of decoding gives the tokens of the plain one, with few graphs, or says that it cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm.blocks.base import CHANNELS, MIXERS
from llm.core.errors import UserError
from llm.core.registry import Entry
from llm.generate.decode_step import CompiledStep
from llm.generate.draft_length import DraftLength
from llm.generate.drafters import ModelDrafter, SelfDrafter
from llm.generate.engine import Engine
from llm.generate.sampling import Sampling
from llm.models.nesting import at_widths, whole_widths
from tests.contracts.checks.harness import fill, tiny_model
from tests.contracts.test_speculative import CASES, PROMPTS, Foreteller, build, parameters

REFUSED = {
    "memory_as_context": "how far each row has come in its segment is looked at on the host",
    "armt": "rows pass the ends of their segments apart, which the host decides",
    "rmt": "rows pass the ends of their segments apart, which the host decides",
    "fit": "rows pass the ends of their groups apart, which the host decides",
}
"""What cannot be compiled, and why."""

FAST = ("attention", "mamba2", "conv_embed")


def check(kind: str, label: str, entry: Entry[Any], backend: str, n_tokens: int, *, with_drafts: bool = True) -> None:
    torch.compiler.reset()
    model = build(kind, label, entry)
    greedy = Sampling(temperature=0, max_new_tokens=n_tokens)
    plain = [completion.tokens for completion in Engine(model).generate(PROMPTS, greedy)]
    engine = Engine(model)
    engine.step = CompiledStep(model, backend=backend)
    if entry.name in REFUSED:
        with pytest.raises(UserError, match="compile: the step of this model cannot be compiled"):
            engine.generate(PROMPTS, greedy)
        return
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    assert [completion.tokens for completion in engine.generate(PROMPTS, greedy)] == plain
    assert graphs["unique_graphs"] <= 2, graphs
    if not with_drafts:
        return
    drafting = Engine(model, drafter=Foreteller(plain), draft_length=DraftLength(3), max_batch=3)
    drafting.step = CompiledStep(model, [3], backend=backend)
    assert [completion.tokens for completion in drafting.generate(PROMPTS, greedy)] == plain
    assert 0 < drafting.speculation.n_accepted < drafting.speculation.n_drafted
    assert graphs["unique_graphs"] <= 8, graphs


@pytest.mark.parametrize(("kind", "label", "entry"), parameters([case for case in CASES if case[1] in FAST]))
def test_equals_the_plain_step(kind: str, label: str, entry: Entry[Any]) -> None:
    check(kind, label, entry, "eager", 80, with_drafts=label == "attention")


def test_models_that_differ_in_a_constant_do_not_share_a_graph() -> None:
    greedy = Sampling(temperature=0, max_new_tokens=12)
    found = []
    for scale in (0.1, 2.0):
        mixer = MIXERS.entry("attention").tiny().replace(scale=scale)
        model = fill(tiny_model(mixer, max_seq_len=300).build("cpu")).eval()
        engine = Engine(model)
        engine.step = CompiledStep(model, backend="eager")
        plain, compiled = (
            [completion.tokens for completion in each.generate(PROMPTS, greedy)] for each in (Engine(model), engine)
        )
        assert compiled == plain
        found.append(plain)
    assert found[0] != found[1]


@pytest.mark.parametrize("kind", [pytest.param("model", marks=pytest.mark.slow), "slice"])
def test_drafters_have_compiled_steps_of_their_own(kind: str) -> None:
    torch.compiler.reset()
    mixer, channel = MIXERS.entry("attention").tiny(), CHANNELS.entry("nested_gated").tiny()
    model = fill(tiny_model(mixer, channel, max_seq_len=300).build("cpu")).eval()
    part = [width // 2 for width in whole_widths(model.config)]
    drafter = SelfDrafter(model, lambda: at_widths(model, part), "half") if kind == "slice" else ModelDrafter(model)
    greedy = Sampling(temperature=0, max_new_tokens=30)
    plain = Engine(model).generate(PROMPTS, greedy)
    found = []
    for compiled in (False, True):
        engine = Engine(model, drafter=drafter, draft_length=DraftLength(3))
        if compiled:
            engine.step = CompiledStep(model, [3], backend="eager")
            drafter.step = CompiledStep(drafter.model, [1], backend="eager")
        assert engine.generate(PROMPTS, greedy) == plain
        found.append(engine.speculation)
    assert found[0] == found[1] and found[0].n_accepted > 0


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "label", "entry"), parameters(CASES))
def test_every_part(kind: str, label: str, entry: Entry[Any]) -> None:
    check(kind, label, entry, "eager", 12, with_drafts=label == entry.name)


@pytest.mark.slow
def test_code_for_this_machine() -> None:
    [case] = [case for case in CASES if case[1] == "attention"]
    check(*case, "inductor", 80)
