"""The short convolution against torch's depthwise one, packing, decoding and cost."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm.blocks.short_conv import ShortConvolution, short_conv_cost
from llm.core.seq import SeqInfo
from tests.unit.blocks.helpers import ready

B, T, C = 2, 13, 6


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def conv1d(x: Tensor, module: ShortConvolution) -> Tensor:
    x = F.pad(x.transpose(1, 2), (module.width - 1, 0))
    y = F.conv1d(x, module.weight, module.bias, groups=module.channels).transpose(1, 2)
    return F.silu(y) if module.activation == "silu" else y


@pytest.mark.parametrize(("width", "activation", "bias"), [(1, None, False), (4, "silu", True), (3, None, True)])
def test_equals_torch_with_its_gradients(width: int, activation: str | None, bias: bool) -> None:
    module = ready(ShortConvolution(C, width, activation=activation, bias=bias))  # type: ignore[arg-type]
    x = random(B, T, C).requires_grad_()
    leaves = [x, *module.parameters()]
    upstream = random(B, T, C).flip(1)
    found, wanted = module(x, SeqInfo.contiguous(B, T)), conv1d(x, module)
    torch.testing.assert_close(found, wanted)
    for a, b in zip(torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(wanted, leaves, upstream)):
        torch.testing.assert_close(a, b)


def test_packed_documents_are_apart() -> None:
    module = ready(ShortConvolution(C, 4, bias=True))
    x = random(2, T, C).requires_grad_()
    lengths = [[1, 2, 7, 3], [9, 4]]
    packed = module(x, SeqInfo.from_lengths(lengths, T))
    alone = torch.stack(
        [torch.cat([conv1d(d[None], module)[0] for d in x[row].split(lengths[row])]) for row in range(2)]
    )
    torch.testing.assert_close(packed, alone)
    leaves = [x, *module.parameters()]
    for a, b in zip(torch.autograd.grad(packed.sum(), leaves), torch.autograd.grad(alone.sum(), leaves)):
        torch.testing.assert_close(a, b)


def test_a_bad_value_stays_in_its_document() -> None:
    module = ready(ShortConvolution(C, 4))
    x = random(1, T, C)
    x[:, 5] = float("nan")
    assert torch.isfinite(module(x, SeqInfo.from_lengths([[6, 7]], T))[:, 6:]).all()


def test_extend_in_parts_with_ragged_rows() -> None:
    module = ready(ShortConvolution(C, 4, bias=True))
    x = random(B, T, C)
    whole = module(x, SeqInfo.contiguous(B, T))
    state = module.new_state(B, dtype=torch.float64, device="cpu")
    done = [0, 0]
    for counts in ([2, 5], [1, 1], [0, 4], [8, 2]):
        longest = max(counts)
        valid = torch.arange(longest) < torch.tensor(counts)[:, None]
        chunk = torch.full((B, longest, C), 1e3, dtype=torch.float64)
        for row, n in enumerate(counts):
            chunk[row, :n] = x[row, done[row] : done[row] + n]
        positions = SeqInfo.contiguous(B, longest, start=state.end()).positions
        y = module.extend(chunk, SeqInfo(positions, valid=valid), state)
        for row, n in enumerate(counts):
            torch.testing.assert_close(y[row, :n], whole[row, done[row] : done[row] + n])
            done[row] += n
    assert state.length.tolist() == done == [11, 12]


def test_rejected_tokens_are_forgotten() -> None:
    module = ready(ShortConvolution(C, 4))
    x = random(B, T, C)
    state = module.new_state(B, n_tentative=3, dtype=torch.float64, device="cpu")
    module.extend(x[:, :6], SeqInfo.contiguous(B, 6), state)
    state.begin(3)
    module.extend(x[:, 6:9], SeqInfo.contiguous(B, 3, start=6), state)
    state.commit(torch.tensor([1, 3]))
    y = module.extend(x[:, 9:10], SeqInfo.contiguous(B, 1, start=state.end()), state)
    kept = torch.cat([x[:1, :7], x[:1, 9:10]], dim=1)
    torch.testing.assert_close(y[0, -1], module(kept, SeqInfo.contiguous(1, 8))[0, -1])
    torch.testing.assert_close(y[1, -1], module(x[1:, :10], SeqInfo.contiguous(1, 10))[0, -1])


@pytest.mark.parametrize("bias", [False, True])
def test_cost(bias: bool) -> None:
    module = ShortConvolution(C, 4, bias=bias)
    cost = short_conv_cost(C, 4, bias, 2)
    assert cost.params == sum(p.numel() for p in module.parameters())
    assert cost.state_bytes_per_seq == module.new_state(1, dtype=torch.bfloat16, device="cpu").nbytes()


def test_bf16_is_summed_in_fp32() -> None:
    module = ready(ShortConvolution(C, 4, bias=True), torch.bfloat16)
    x = random(B, T, C).bfloat16()
    y = module(x, SeqInfo.contiguous(B, T))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, module.float()(x.float(), SeqInfo.contiguous(B, T)).bfloat16())


def test_compiles_whole() -> None:
    module = ready(ShortConvolution(C, 4), torch.float32)
    seq = SeqInfo.from_lengths([[5, 8], [13]], T)
    x = random(B, T, C).float()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, seq), module(x, seq))
