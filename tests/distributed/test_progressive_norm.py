"""Running statistics of PRepBN are those of the whole batch under every strategy, the same on all ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.harness import run_ranks
from tests.distributed.steps import tiny_model, tiny_run, train_and_state

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("parallel", [{"strategy": "ddp"}, {"strategy": "fsdp2"}], ids=["ddp", "fsdp2"])
def test_running_statistics_over_ranks(parallel: dict[str, Any]) -> None:
    model = tiny_model().replace(norm={"type": "prep_bn"})
    alone = train_and_state(0, tiny_run(), model, 4).model
    ranks = [state.model for state in run_ranks(train_and_state, 2, tiny_run(parallel=parallel), model, 4)]
    names = [name for name in alone if "running" in name]
    assert len(names) == 2 * 5
    for name in names:
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        torch.testing.assert_close(ranks[0][name], alone[name], rtol=1e-4, atol=1e-5)
        assert not torch.equal(alone[name], torch.full_like(alone[name], float(alone[name][0]))), name
