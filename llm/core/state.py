"""Decode state: what a model remembers of a sequence, as typed objects with transactions.

Protocol. Outside a transaction everything that `prefill` or `step` writes is committed at once. `begin(n)` opens a
transaction of at most n tentative tokens; `commit(accepted)` keeps the first accepted[b] of those written since, row by
row, and forgets the rest; `abort()` forgets them all. A state that has been rolled back equals one that never saw the
rejected tokens.

| kind | holds | rolls back by |
|---|---|---|
| KVState | all keys and values | moving the length |
| PagedKVState | the same in pages of a pool, which rows and other states can share | moving the length |
| WindowState | sinks and a ring of window + n_tentative keys and values | moving the length |
| ConvState | the last width - 1 + n_tentative inputs | shifting |
| RecurrentState | tensors that every token changes | copies after each tentative token, or replay of factors |
| EmptyState | nothing | nothing |
| CompositeState | states by key | each part |
| SegmentState | the inner state of the current segment, and what is carried from one to the next | each lane |

`counts` [B] says everywhere how many of a chunk's T tokens are real, row by row; the rest is padding on the right.
"""

from __future__ import annotations

from llm.core.states.attention import KVState, WindowState
from llm.core.states.base import CompositeState, DecodeState, EmptyState, valid_counts
from llm.core.states.key_values import KeyValueState
from llm.core.states.paged import PagedKVState, PagePool, Pages
from llm.core.states.recurrent import ConvState, RecurrentState, choose_policy
from llm.core.states.segment import SegmentState

__all__ = [
    "CompositeState",
    "ConvState",
    "DecodeState",
    "EmptyState",
    "KVState",
    "KeyValueState",
    "PagePool",
    "PagedKVState",
    "Pages",
    "RecurrentState",
    "SegmentState",
    "WindowState",
    "choose_policy",
    "valid_counts",
]
