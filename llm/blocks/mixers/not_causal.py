"""Published attentions that have no exact causal form, and what to take instead."""

from __future__ import annotations

from llm.blocks.base import MIXERS

MIXERS.refuse(
    "linformer",
    "it mixes the keys of all positions of a sequence of fixed length into a few, later positions among them, so a "
    "causal model cannot use it; take longformer, performer or linear_transformer",
)
MIXERS.refuse(
    "nystromformer",
    "its landmarks are means over segments of the whole sequence, later tokens among them, and a pseudo-inverse "
    "couples all of them, so a causal model cannot use it; take performer or longformer",
)
MIXERS.refuse(
    "sinkhorn",
    "it sorts the blocks of the whole sequence by a doubly stochastic matrix, which later blocks change, so a causal "
    "model cannot use it; take reformer or longformer",
)
