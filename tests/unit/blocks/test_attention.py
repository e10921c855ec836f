"""Attention against that of published models with the same weights, costs, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kernels import dispatch
from llm.blocks.linears.dense import project
from llm.blocks.mixers.attention import Attention, AttentionConfig
from llm.blocks.norms import RMSNormConfig
from llm.blocks.positions import AlibiConfig, NoPositionConfig
from llm.blocks.rope import RopeConfig
from llm.core.errors import UserError
from llm.core.seq import SeqInfo
from llm.core.state import KVState, WindowState
from tests.unit.blocks.helpers import context, default_dtype, ready

B, T, D = 2, 13, 32


def causal_mask(length: int = T) -> Tensor:
    return torch.zeros(1, 1, length, length, dtype=torch.float64).masked_fill(
        torch.ones(length, length).triu(1).bool(), float("-inf")
    )


def copy(ours: Attention, theirs: Any, names: dict[str, str]) -> None:
    with torch.no_grad():
        for mine, other in names.items():
            ours.get_parameter(mine).copy_(theirs.get_parameter(other))


def check_equal(ours: Attention, run_theirs: Any) -> None:
    """Outputs and input gradients."""
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(B, T, D, dtype=torch.float64)
    found, wanted = ours(x, SeqInfo.contiguous(B, T)), run_theirs(x)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    grads = [torch.autograd.grad(out, x, upstream)[0] for out in (found, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)


def test_equals_llama() -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaConfig, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=D,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
        max_position_embeddings=64,
    )
    with default_dtype(torch.float64):
        theirs = LlamaAttention(config, 0)
    ours = AttentionConfig(n_heads=4, n_kv_heads=2).build(context()).double()
    copy(
        ours,
        theirs,
        {
            f"{a}.weight": f"{b}.weight"
            for a, b in zip(("q", "k", "v", "out"), ("q_proj", "k_proj", "v_proj", "o_proj"))
        },
    )
    tables = LlamaRotaryEmbedding(config)(torch.zeros(1, dtype=torch.float64), SeqInfo.contiguous(B, T).positions)
    check_equal(ours, lambda x: theirs(x, position_embeddings=tables, attention_mask=causal_mask())[0])


def test_equals_qwen3() -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3Config, Qwen3RotaryEmbedding

    config = Qwen3Config(
        hidden_size=D,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        attn_implementation="eager",
        rms_norm_eps=1e-6,
    )
    with default_dtype(torch.float64):
        theirs = Qwen3Attention(config, 0)
    torch.nn.init.normal_(theirs.q_norm.weight)
    theta = config.rope_parameters["rope_theta"]
    ours = AttentionConfig(n_heads=4, n_kv_heads=2, d_head=12, qk_norm=RMSNormConfig(eps=1e-6))
    ours = ours.build(context(position_config=RopeConfig(theta=theta))).double()
    names = {
        f"{a}.weight": f"{b}.weight" for a, b in zip(("q", "k", "v", "out"), ("q_proj", "k_proj", "v_proj", "o_proj"))
    }
    copy(ours, theirs, names | {"q_norm.weight": "q_norm.weight", "k_norm.weight": "k_norm.weight"})
    tables = Qwen3RotaryEmbedding(config)(torch.zeros(1, dtype=torch.float64), SeqInfo.contiguous(B, T).positions)
    # transformers normalises and rotates in fp32 here
    x = torch.randn(B, T, D, dtype=torch.float64)
    wanted = theirs(x, position_embeddings=tables, attention_mask=causal_mask())[0]
    torch.testing.assert_close(ours(x, SeqInfo.contiguous(B, T)), wanted, rtol=1e-5, atol=1e-6)


def test_equals_gpt2() -> None:
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2Config

    with default_dtype(torch.float64):
        theirs = GPT2Attention(GPT2Config(n_embd=D, n_head=4, attn_implementation="eager"), layer_idx=0).eval()
    torch.nn.init.normal_(theirs.c_attn.bias)
    ours = AttentionConfig(n_heads=4, bias=True).build(context(position_config=NoPositionConfig())).double()
    with torch.no_grad():
        for i, part in enumerate((ours.q, ours.k, ours.v)):
            part.weight.copy_(theirs.c_attn.weight[:, i * D : (i + 1) * D].T)
            part.bias.copy_(theirs.c_attn.bias[i * D : (i + 1) * D])
        ours.out.weight.copy_(theirs.c_proj.weight.T)
        ours.out.bias.copy_(theirs.c_proj.bias)
    check_equal(ours, lambda x: theirs(x, attention_mask=causal_mask())[0])


def test_equals_gpt_neox() -> None:
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention, GPTNeoXConfig, GPTNeoXRotaryEmbedding

    config = GPTNeoXConfig(
        hidden_size=D, num_attention_heads=4, rotary_pct=0.25, attn_implementation="eager", max_position_embeddings=64
    )
    with default_dtype(torch.float64):
        theirs = GPTNeoXAttention(config, layer_idx=0).eval()
    torch.nn.init.normal_(theirs.query_key_value.bias)
    ours = AttentionConfig(n_heads=4, bias=True).build(context(position_config=RopeConfig(fraction=0.25))).double()
    with torch.no_grad():
        weight = theirs.query_key_value.weight.view(4, 3, D // 4, D)
        bias = theirs.query_key_value.bias.view(4, 3, D // 4)
        for i, part in enumerate((ours.q, ours.k, ours.v)):
            part.weight.copy_(weight[:, i].flatten(0, 1))
            part.bias.copy_(bias[:, i].flatten())
        ours.out.weight.copy_(theirs.dense.weight)
        ours.out.bias.copy_(theirs.dense.bias)
    tables = GPTNeoXRotaryEmbedding(config)(torch.zeros(1, dtype=torch.float64), SeqInfo.contiguous(B, T).positions)
    check_equal(ours, lambda x: theirs(x, attention_mask=causal_mask(), position_embeddings=tables)[0])


@pytest.mark.parametrize("position", [RopeConfig(), AlibiConfig(), NoPositionConfig()])
@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
@pytest.mark.parametrize("window", [None, 4])
def test_packed_equals_separate(position: Any, backend: str, window: int | None) -> None:
    """Values and parameter gradients, in rows longer than a block of queries."""
    config = AttentionConfig(n_heads=4, n_kv_heads=2, backend=backend, window=window, n_sinks=2 if window else 0)  # type: ignore[arg-type]
    mixer = ready(config.build(context(max_seq_len=256, position_config=position)))
    lengths = [[5, 64, 1, 60], [130]]
    x = torch.randn(2, 130, D, dtype=torch.float64)
    packed = mixer(x, SeqInfo.from_lengths(lengths, 130))
    alone = []
    for row, row_lengths in enumerate(lengths):
        for part in x[row : row + 1].split(row_lengths, dim=1):
            alone.append(mixer(part, SeqInfo.contiguous(1, part.shape[1]))[0])
    separate = torch.cat(alone).view(2, 130, D)
    torch.testing.assert_close(packed, separate)
    upstream = torch.randn_like(packed)
    parameters = list(mixer.parameters())
    for a, b in zip(
        torch.autograd.grad(packed, parameters, upstream), torch.autograd.grad(separate, parameters, upstream)
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("n_sinks", [0, 2])
def test_prefill_longer_than_the_ring_is_exact(n_sinks: int) -> None:
    mixer = ready(AttentionConfig(n_heads=2, window=5, n_sinks=n_sinks).build(context()))
    x = torch.randn(2, 40, D, dtype=torch.float64)
    wanted = mixer(x, SeqInfo.contiguous(2, 40))
    state = mixer.new_state(2, 40, dtype=torch.float64, device="cpu")
    assert isinstance(state, WindowState)
    parts, start = [], 0
    for n in (17, 1, 3, 19):
        parts.append(mixer.prefill(x[:, start : start + n], SeqInfo.contiguous(2, n, start=start), state))
        start += n
    torch.testing.assert_close(torch.cat(parts, 1), wanted)


def test_short_capacity_needs_no_ring() -> None:
    mixer = AttentionConfig(n_heads=2, window=50).build(context())
    assert isinstance(mixer.new_state(1, 40, dtype=torch.float32, device="cpu"), KVState)


@pytest.mark.parametrize(
    "config", [AttentionConfig(n_heads=4, n_kv_heads=2), AttentionConfig(n_heads=2, window=5, n_sinks=2)]
)
def test_cost_equals_count(config: AttentionConfig) -> None:
    mixer = config.build(context())
    dims = context().dims(state_dtype_bytes=4)
    for length in (3, 6, 24):
        cost = config.cost(dims, length, "train")
        assert cost.params == sum(p.numel() for p in mixer.parameters())
        seen = sum(
            1
            for q in range(length)
            for k in range(q + 1)
            if config.window is None or q - k < config.window or k < config.n_sinks
        )
        n_heads, _, d_head = config.resolved(D)
        assert cost.attention_flops * length == pytest.approx(4 * n_heads * d_head * seen)
        with FlopCounterMode(display=False) as counter:
            project(torch.randn(1, length, D), mixer.q, mixer.k, mixer.v)
            mixer.out(torch.randn(1, length, n_heads * d_head))
        assert (cost.flops_per_token - cost.attention_flops) * length == counter.get_total_flops()
        state = mixer.new_state(1, length, dtype=torch.float32, device="cpu")
        assert state.nbytes() == config.cost(dims, length, "decode").state_bytes_per_seq


def test_fused_projection_equals_separate() -> None:
    mixer = ready(AttentionConfig(n_heads=4, n_kv_heads=2, bias=True).build(context()))
    x = torch.randn(2, 3, D, dtype=torch.float64)
    for found, linear in zip(project(x, mixer.q, mixer.k, mixer.v), (mixer.q, mixer.k, mixer.v)):
        torch.testing.assert_close(found, linear(x))


def test_masks_are_made_once_per_forward() -> None:
    """Layers of the same form share what `prepare` puts into the sequence description."""
    first, second = (AttentionConfig(n_heads=2).build(context()).double() for _ in range(2))
    other = AttentionConfig(n_heads=2, window=3).build(context()).double()
    seq = SeqInfo.from_lengths([[5, 8]], T)
    for mixer in (first, second, other):
        mixer.prepare(seq, torch.float64)
    made = {key: id(value) for key, value in seq.derived.items()}
    assert len(made) == 3  # the rotary tables, and a mask for each of the two forms
    for mixer in (first, second, other):
        mixer(torch.randn(1, T, D, dtype=torch.float64), seq)
    assert made == {key: id(value) for key, value in seq.derived.items()}


def test_autocast_keeps_one_dtype_throughout() -> None:
    mixer = ready(AttentionConfig(n_heads=2, qk_norm=RMSNormConfig()).build(context()), torch.float32)
    x = torch.randn(1, T, D)
    with torch.autocast("cpu", torch.bfloat16):
        seq = SeqInfo.contiguous(1, T)
        mixer.prepare(seq, x.dtype)
        found = mixer(x, seq)
    assert found.dtype == torch.bfloat16 and len(seq.derived) == 2
    torch.testing.assert_close(found.float(), mixer(x, SeqInfo.contiguous(1, T)), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"n_heads": 3}, "d_model 32 is not divisible by n_heads 3"),
        ({"n_heads": 4, "n_kv_heads": 3}, "not divisible by n_kv_heads 3"),
        ({"n_heads": 4, "n_sinks": 2}, "n_sinks has no effect without a window"),
        ({"n_heads": 4, "softcap": 2.0, "backend": "sdpa"}, "soft-cap"),
        ({"n_heads": 4, "window": 4, "n_sinks": 1, "backend": "flash"}, "flash"),
    ],
)
def test_refused_at_build(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionConfig(**config).build(context())


def test_refused_on_this_device() -> None:
    mixer = AttentionConfig(n_heads=2, backend="flex").build(context())
    with pytest.raises(UserError, match="no gradients on a CPU"):
        mixer.prepare(SeqInfo.contiguous(1, 4), torch.float32)
    with torch.no_grad():
        assert mixer.implementation(torch.device("cpu"), torch.float32, "causal").name == "flex"


def test_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = AttentionConfig(n_heads=2).build(context())
    monkeypatch.setenv(dispatch.ENVIRONMENT, "attention=sdpa")
    assert mixer.implementation(torch.device("cpu"), torch.float32, "causal").name == "sdpa"
