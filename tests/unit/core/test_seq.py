"""SeqInfo: positions, documents and boundaries."""

from __future__ import annotations

import pytest
import torch

from llm.core.seq import SeqInfo, next_power_of_two


def test_contiguous() -> None:
    seq = SeqInfo.contiguous(2, 3)
    assert seq.positions.tolist() == [[0, 1, 2], [0, 1, 2]] and not seq.packed
    assert SeqInfo.contiguous(2, 2, start=torch.tensor([4, 0])).positions.tolist() == [[4, 5], [0, 1]]
    assert SeqInfo.contiguous(1, 2, start=7).positions.tolist() == [[7, 8]]
    assert seq.positions.dtype == torch.int64


def test_packed_documents() -> None:
    seq = SeqInfo.from_lengths([[2, 1, 2], [5]], 5)
    assert seq.packed
    assert seq.positions.tolist() == [[0, 1, 0, 0, 1], [0, 1, 2, 3, 4]]
    assert seq.cu_seqlens is not None and seq.cu_seqlens.tolist() == [0, 2, 3, 5, 10]
    assert seq.cu_seqlens.dtype == torch.int32
    assert seq.max_seqlen == 8
    assert seq.document_ids().tolist() == [[1, 1, 2, 3, 3], [1, 1, 1, 1, 1]]
    assert seq.starts().tolist() == [[True, False, True, True, False], [True] + [False] * 4]


def test_lengths_that_do_not_fill_a_row_are_refused() -> None:
    with pytest.raises(ValueError, match="row 1 has documents of 4 tokens in all, expected 5"):
        SeqInfo.from_lengths([[5], [1, 3]], 5)


def test_moving_drops_what_was_derived() -> None:
    seq = SeqInfo.from_lengths([[3]], 3)
    seq.derived["table"] = 1
    moved = seq.to("cpu")
    assert moved.derived == {} and seq.derived == {"table": 1}
    assert moved.max_seqlen == 4 and moved.cu_seqlens is not None and moved.valid is None


def test_descriptions_are_compared_by_identity() -> None:
    seq = SeqInfo.contiguous(1, 2)
    assert seq == seq and seq != SeqInfo.contiguous(1, 2) and len({seq, seq}) == 1


def test_next_power_of_two() -> None:
    assert [next_power_of_two(n) for n in (1, 2, 3, 4, 5, 1023, 1024, 1025)] == [1, 2, 4, 4, 8, 1024, 1024, 2048]


def test_a_changing_number_of_documents_compiles_once() -> None:
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    reads = torch.compile(lambda x, seq: x + seq.cu_seqlens[-1], fullgraph=True, backend=backend)
    for lengths in ([[1, 7]], [[2, 2, 4]], [[1] * 8], [[8]]):
        assert reads(torch.zeros(1), SeqInfo.from_lengths(lengths, 8)).item() == 8
    torch._dynamo.reset()
    assert graphs == 1
