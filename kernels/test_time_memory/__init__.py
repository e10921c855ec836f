"""Test-time memory: a small network per head, whose weights an inner optimiser trains while a sequence is read.

`run_document`, `run_packed` and `run_rows` are closed forms over blocks of tokens; `run_reference` is their oracle.
"""

from kernels.test_time_memory.block import Block, Gates, MemoryState, Outer, run_block
from kernels.test_time_memory.features import FeatureMap, Features, n_features
from kernels.test_time_memory.network import Form, LayerNorm, Weights, recall
from kernels.test_time_memory.newton_schulz import newton_schulz, newton_schulz_flops
from kernels.test_time_memory.reference import run_reference
from kernels.test_time_memory.sequence import Past, Tokens, run_document, run_packed, run_rows

__all__ = [
    "Block",
    "FeatureMap",
    "Features",
    "Form",
    "Gates",
    "LayerNorm",
    "MemoryState",
    "Outer",
    "Past",
    "Tokens",
    "Weights",
    "n_features",
    "newton_schulz",
    "newton_schulz_flops",
    "recall",
    "run_block",
    "run_document",
    "run_packed",
    "run_reference",
    "run_rows",
]
