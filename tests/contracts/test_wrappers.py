"""Every registered wrapper against its contracts, and around every registered mixer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm.blocks.base import MIXERS
from llm.core.errors import UserError
from llm.core.init import initialise
from llm.core.seq import SeqInfo
from llm.models.wrappers.base import WRAPPERS
from tests.contracts.checks.decoding import Decoding
from tests.contracts.checks.harness import VOCAB, assert_same, fill, n_parameters
from tests.contracts.checks.wrappers import WRAPPER_CHECKS, as_mixer, wrapped_model
from tests.contracts.generate import cases, run_case, run_exemptions

ENTRIES = WRAPPERS.entries()
PAIRS = [(wrapper.name, mixer.name) for wrapper in ENTRIES for mixer in MIXERS.entries()]


@pytest.mark.parametrize(("checks", "contract", "entry", "label"), cases(WRAPPER_CHECKS, ENTRIES))
def test_contract(checks: Any, contract: str, entry: Any, label: str) -> None:
    run_case(checks, contract, entry, label)


def test_exemptions() -> None:
    run_exemptions(WRAPPER_CHECKS, ENTRIES)


@pytest.mark.parametrize(("wrapper", "mixer"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_wraps_every_mixer(wrapper: str, mixer: str) -> None:
    """One training step, then decoding as forward does, also with rows that are at different places of their segments
    and with drafts; what does not fit says so when it is built."""
    config = wrapped_model(WRAPPERS.entry(wrapper).tiny(), MIXERS.entry(mixer).tiny())
    try:
        model = config.build("cpu")
    except UserError as refusal:
        pytest.skip(f"declared not to fit: {refusal}")
    assert config.cost(20).total.params == n_parameters(model)
    initialise(model, 0)
    tokens = torch.randint(0, VOCAB, (2, 21), generator=torch.Generator().manual_seed(0))
    output = model(tokens[:, :-1], SeqInfo.contiguous(2, 20))
    loss = torch.nn.functional.cross_entropy(model.head(output.hidden).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    fill(model).eval()
    with torch.no_grad():
        whole = model(tokens[:, :-1], SeqInfo.contiguous(2, 20)).hidden
        state = model.new_state(2, 20, dtype=torch.float64, device="cpu")
        parts = []
        for start, length in ((0, 11), (11, 1), (12, 1), (13, 7)):
            seq = SeqInfo.contiguous(2, length, start=start)
            parts.append(model(tokens[:, start : start + length], seq, state=state).hidden)
    assert_same(torch.cat(parts, dim=1), whole, "decoding against forward")
    decoding = Decoding(as_mixer(model), 2, n_tentative=4, label="rows at different places")
    decoding.feed([7, 4])
    decoding.feed([1, 1])
    decoding.begin(4)
    decoding.feed([3, 4])
    decoding.commit([1, 3])
    decoding.feed([4, 9])
