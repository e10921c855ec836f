"""The keys of `evaluate retrieval`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from evals.retrieval import needles, others
from evals.retrieval.base import Task
from llm.config.base import Config, Count
from llm.core.errors import UserError, nearest
from llm.generate.quantize import Quantize

TASKS: dict[str, Task] = {**needles.TASKS, **others.TASKS}


def _as_list(value: object) -> object:
    return value if isinstance(value, list) else [value]


class RetrievalOptions(Config):
    """run: a run folder, a checkpoint or a Hugging Face folder. lengths: tokens of prompt and answer. samples: of each
    task and length. depths: where what is asked for stands, in turn, from 0 to 1; None: drawn for each sample. essays:
    UTF-8 texts; none: docstrings of the standard library. batch: samples that run together; chunk: tokens of prompts
    that are read at once."""

    run: str
    tasks: Annotated[list[str], BeforeValidator(_as_list)] = list(TASKS)
    lengths: Annotated[list[Count], BeforeValidator(_as_list)] = Field([4096], min_length=1)
    samples: Count = Field(100, ge=1)
    seed: int = 42
    depths: list[Annotated[float, Field(ge=0, le=1)]] | None = Field(None, min_length=1)
    essays: Annotated[list[str], BeforeValidator(_as_list)] = []
    batch: Count = Field(8, ge=1)
    chunk: Count = Field(1024, ge=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    quantize: Quantize = "none"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    tokenizer: str | None = None
    num_threads: int | None = Field(None, ge=1)
    out: str | None = None

    @model_validator(mode="after")
    def _known(self) -> RetrievalOptions:
        for name in self.tasks:
            if name not in TASKS:
                close = nearest(name, TASKS)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise UserError(f"tasks holds {name!r}{hint} Known: {', '.join(TASKS)}")
        return self

    def conditions(self) -> dict[str, Any]:
        """What a sample's result depends on, besides the model."""
        about = {"seed": self.seed, "depths": self.depths, "essays": self.essays, "precision": self.precision}
        return about if self.quantize == "none" else {**about, "quantize": self.quantize}
