"""Config of `launch/prepare.py`."""

from __future__ import annotations

import os

from pydantic import Field, field_validator

from llm.config.base import Config, Count
from llm.data.prepare import tables, text  # noqa: F401  (they register the sources)
from llm.data.prepare.source import Context, Holdout, SourceConfig
from llm.data.tokenizer.config import TokenizerConfig


class PrepareConfig(Config):
    """Raw text in, a folder of prepared data out.

    sources: where documents come from, in this order; one may be given without a list. out: folder to write.
    workers: processes; 0: one per CPU core. The result does not depend on it. seed: chooses held-out documents.
    overwrite: replace prepared data that are in `out` already and were made from another config or input.
    task_bytes: text that one task reads; piece_bytes: longer documents are encoded and stored in parts of this size
    (they stay one document); part_bytes: text after which a task's work is made safe on disk; max_record_bytes: longer
    records are rejected. These four bound the memory.
    """

    sources: list[SourceConfig] = Field(min_length=1)
    tokenizer: TokenizerConfig = TokenizerConfig(vocab_size=4096)
    holdout: Holdout = Holdout()
    out: str
    workers: int = Field(default=0, ge=0)
    seed: int = 0
    overwrite: bool = False
    task_bytes: Count = Field(default=4 << 20, ge=1024)
    piece_bytes: Count = Field(default=1 << 18, ge=64)
    part_bytes: Count = Field(default=32 << 20, ge=1024)
    max_record_bytes: Count = Field(default=64 << 20, ge=64)

    @field_validator("sources", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        return value if isinstance(value, list) else [value]

    @property
    def num_workers(self) -> int:
        """Processes to use."""
        return self.workers or len(os.sched_getaffinity(0))

    @property
    def context(self) -> Context:
        """What the sources need to know."""
        return Context(self.holdout, self.seed, self.task_bytes, self.piece_bytes, self.max_record_bytes)
