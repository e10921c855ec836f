"""Which data a run reads, how sources are mixed, and how documents become rows."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from llm.config.base import Config, Count


class DataSource(Config):
    """One folder of prepared data, or the prefix of a Megatron store (the path without .bin and .idx).

    weight: share of the mixture, relative to the others. max_epochs: once a source has been read so often, its share
    goes to the others; None: no limit.
    """

    path: str
    weight: float = Field(default=1.0, gt=0)
    max_epochs: float | None = Field(default=None, gt=0)


class DataConfig(Config):
    """Prepared data, and how it becomes rows of `seq_len` tokens.

    path: one folder; or sources: several with weights. tokenizer: folder of the tokenizer, for Megatron stores alone;
    prepared folders bring their own.
    packing: concat: all documents in a row, cut every seq_len tokens; best_fit: documents are cut only where they are
    longer than a row, and fill rows by best-fit decreasing; pad: one document, or part of a long one, per row.
    isolate: documents that share a row do not see one another and positions restart with each.
    mixture_unit: whether weights count tokens or documents. shuffle: documents and rows in a new order each epoch.
    best_fit_window: documents that are packed together. prefetch: steps built ahead by a thread, 0: none.
    verify: compare the files with their sha256 when they are opened.
    """

    path: str | None = None
    sources: list[DataSource] = []
    tokenizer: str | None = None
    seq_len: Count = Field(default=1024, ge=1)
    packing: Literal["concat", "best_fit", "pad"] = "concat"
    isolate: bool = True
    mixture_unit: Literal["tokens", "documents"] = "tokens"
    shuffle: bool = True
    best_fit_window: Count = Field(default=65536, ge=1)
    prefetch: int = Field(default=2, ge=0)
    verify: bool = False

    @model_validator(mode="after")
    def _coherent(self) -> DataConfig:
        if (self.path is None) == (not self.sources):
            raise ValueError(
                "give either path (one folder of prepared data) or sources (several), not both and not neither"
            )
        if self.packing != "best_fit" and "best_fit_window" in self.model_fields_set and self.best_fit_window != 65536:
            raise ValueError(
                f"best_fit_window would be ignored with packing {self.packing!r}; leave it out or set packing=best_fit"
            )
        return self

    @property
    def all_sources(self) -> list[DataSource]:
        """The sources, also where a single path was given."""
        return [DataSource(path=self.path)] if self.path is not None else self.sources
