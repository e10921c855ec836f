"""Memory as context, as gate and as layer against loops over tokens; what hybrids refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.test_time_memory import Tokens, recall, run_reference
from kernels.test_time_memory.sequence import each_tensor
from llm.blocks.base import POSITIONS
from llm.blocks.mixers.memory_as_context import MemoryAsContextConfig
from llm.blocks.mixers.memory_hybrids import HybridConfig, MemoryAsGateConfig, MemoryAsLayerConfig
from llm.core.errors import UserError
from llm.core.seq import SeqInfo
from tests.unit.blocks.helpers import context, ready

D, CHUNK, N_HEADS = 16, 4, 2


def mixer(n_persistent: int = 2, **memory: Any) -> Any:
    tree = {"memory": {"preset": "titans", "n_heads": 2, "chunk": CHUNK, "expansion": 2} | memory, "n_heads": N_HEADS}
    config = MemoryAsContextConfig.model_validate(tree | {"n_persistent": n_persistent})
    return ready(config.build(context(d_model=D, position_config=POSITIONS.get("none")())))


def tokens(n: int, seed: int = 0) -> Tensor:
    return torch.randn(1, n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def token_loop(m: Any, x: Tensor) -> Tensor:
    """Everything as the text says it: one token after another, keys in explicit lists."""
    core, memory = m.memory.core, m.memory
    outer = core.outer(torch.float64)
    start = core.initial(torch.float64, "cpu")
    before = tuple(w[None] for w in start)
    seen: list[Tensor] = []
    keys: list[Tensor] = []
    near: list[Tensor] = []
    for t in range(x.shape[1]):
        token = x[:, t]
        if t % CHUNK == 0:
            keys = [] if m.persistent is None else [p[None] for p in m.persistent]
            if t:
                before = run_reference(core.form, outer, start, read(m, torch.cat(near, dim=1)))[1]
        q = F.normalize(F.silu(memory.q(token)).unflatten(-1, (2, -1)), dim=-1, eps=1e-6)
        r = recall(core.form, before, outer.lift(q[:, :, None]), outer.norm)[:, :, 0] + q
        keys += [token, m.retrieved_norm(r.flatten(1))]
        seen = [m.k(key).unflatten(-1, (N_HEADS, -1)) for key in keys]
        values = [m.v(key).unflatten(-1, (N_HEADS, -1)) for key in keys]
        query = m.q(token).unflatten(-1, (N_HEADS, -1))
        scores = torch.stack([(query * k).sum(-1) for k in seen]) / (D / N_HEADS) ** 0.5
        a = (scores.softmax(0)[..., None] * torch.stack(values)).sum(0).flatten(1)
        near.append(a[:, None])
    a = torch.cat(near, dim=1)
    far = m.memory(a, SeqInfo.contiguous(1, x.shape[1]))
    return m.out(m.attention_norm(a) * torch.sigmoid(m.memory_norm(far)))


def read(m: Any, a: Tensor) -> Tokens:
    """What the memory is given of attention's outputs."""
    q, k, v = m.memory._project(a, SeqInfo.contiguous(1, a.shape[1]), None)
    return each_tensor(Tokens(q, k, m.memory.core.targets(k, v), m.memory.gates(a)), lambda y: y.transpose(1, 2))


@pytest.mark.parametrize(
    "memory", [{}, {"window": 3}, {"preset": "omeganet", "phi": "id", "window": 2, "conv": 0}], ids=["titans", "w", "o"]
)
@pytest.mark.parametrize("n_persistent", [0, 2])
def test_memory_as_context_is_the_loop_over_tokens(memory: dict[str, Any], n_persistent: int) -> None:
    m = mixer(n_persistent, **memory)
    x = tokens(14)
    with torch.no_grad():
        found = m(x, SeqInfo.contiguous(1, 14))
    assert torch.allclose(found, token_loop(m, x), atol=1e-9)


def test_a_segment_sees_the_past_through_the_memory_alone() -> None:
    """With a memory that nothing is written to, each segment is as if it stood alone."""
    m = mixer(window=1)
    with torch.no_grad():
        m.memory.gates.bias.bias.zero_()
        m.memory.gates.linear.weight.zero_()
    x = tokens(12)
    index = list(m.memory.gates.sections).index("eta")
    with torch.no_grad():
        m.memory.gates.bias.bias[:, index] = -60.0
        alpha = list(m.memory.gates.sections).index("alpha")
        m.memory.gates.bias.bias[:, alpha] = 60.0
        whole = m(x, SeqInfo.contiguous(1, 12))
        changed = x.clone()
        changed[:, :4] = tokens(4, seed=1)
        # The convolution's taps reach three tokens over the border, in what is read from the memory.
        assert torch.allclose(m(changed, SeqInfo.contiguous(1, 12))[:, 7:], whole[:, 7:], atol=1e-12)
        m.memory.gates.bias.bias[:, index] = 3.0
        assert not torch.allclose(m(changed, SeqInfo.contiguous(1, 12))[:, 7:], m(x, SeqInfo.contiguous(1, 12))[:, 7:])


@pytest.mark.parametrize(
    ("memory", "match"),
    [({"chunk": 1}, "a chunk above 1"), ({"preset": "linear_attention", "chunk": 8}, "bias: l2 or memory: mlp")],
)
def test_a_memory_without_segments_is_refused(memory: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        mixer(**memory)


def test_hybrids_refuse_heads_of_another_width() -> None:
    with pytest.raises(UserError, match="must be d_model 16 wide together, not 8"):
        mixer(d_head=4)
    with pytest.raises(ValueError, match="attention needs a window"):
        MemoryAsGateConfig.model_validate(
            {"memory": {"preset": "titans", "n_heads": 2}, "attention": {"type": "attention", "n_heads": 2}}
        )


def hybrid(kind: type[HybridConfig], n_persistent: int) -> Any:
    memory = {"preset": "titans", "n_heads": 2, "chunk": CHUNK, "expansion": 2}
    attention = {"type": "attention", "n_heads": N_HEADS, "window": 3, "n_persistent": n_persistent}
    config = kind.model_validate({"memory": memory, "attention": attention})
    return ready(config.build(context(d_model=D, position_config=POSITIONS.get("none")())))


def window_loop(a: Any, x: Tensor) -> Tensor:
    """Attention over persistent tokens and the last three, one token after another, without the output projection."""
    ys = []
    for t in range(x.shape[1]):
        keys = torch.cat([*([] if a.persistent is None else [a.persistent[None]]), x[:, max(0, t - 2) : t + 1]], dim=1)
        k, v = (f(keys).unflatten(-1, (N_HEADS, -1)) for f in (a.k, a.v))
        q = a.q(x[:, t]).unflatten(-1, (N_HEADS, -1))
        weights = (torch.einsum("bhd,bshd->bhs", q, k) / (D / N_HEADS) ** 0.5).softmax(-1)
        ys.append(torch.einsum("bhs,bshd->bhd", weights, v).flatten(1))
    return torch.stack(ys, dim=1)


@pytest.mark.parametrize("n_persistent", [0, 2])
@pytest.mark.parametrize("kind", [MemoryAsGateConfig, MemoryAsLayerConfig])
def test_hybrids_are_the_loop_over_tokens(kind: type[HybridConfig], n_persistent: int) -> None:
    """Memory one token at a time through its state, attention one query at a time over explicit keys."""
    m = hybrid(kind, n_persistent)
    x = tokens(11)
    with torch.no_grad():
        found = m(x, SeqInfo.contiguous(1, 11))
        state = m.memory.new_state(1, 11, dtype=torch.float64, device="cpu")
        far = []
        for t in range(11):
            far.append(m.memory.prefill(x[:, t : t + 1], SeqInfo.contiguous(1, 1, start=t), state))
        far = torch.cat(far, dim=1)
        if kind is MemoryAsGateConfig:
            wanted = m.out(m.attention_norm(window_loop(m.attention, x)) * torch.sigmoid(m.memory_norm(far)))
        else:
            wanted = m.attention.out(window_loop(m.attention, m.memory_norm(far)))
    assert torch.allclose(found, wanted, atol=1e-9)
