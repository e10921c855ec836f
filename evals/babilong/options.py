"""What is evaluated, and how."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from evals.babilong.background import BackgroundConfig
from evals.babilong.forms import Form
from evals.babilong.prompts import PromptConfig
from evals.babilong.story import NAMES
from llm.config.base import Config, Count
from llm.core.errors import UserError, unknown_name
from llm.generate.quantize import Quantize


def _listed(value: object) -> object:
    return value if isinstance(value, list) else [value]


class BabilongOptions(Config):
    """The keys of `evaluate babilong`; see its help."""

    run: str
    tasks: Annotated[list[str], BeforeValidator(_listed)] = ["qa1", "qa2", "qa3", "qa4", "qa5"]
    lengths: Annotated[list[Count], BeforeValidator(_listed)] = Field([0, 1000, 2000, 4000], min_length=1)
    form: Form = "prompt"
    samples: Count = Field(100, ge=1)
    seed: int = Field(0, ge=0)
    reserve: int | None = Field(None, ge=0)
    windows: int = Field(1, ge=1)
    facts: str | None = None
    background: BackgroundConfig = BackgroundConfig()
    prompts: PromptConfig = PromptConfig()
    precision: Literal["fp32", "bf16"] | None = None
    quantize: Quantize = "none"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    tokenizer: str | None = None
    batch: int = Field(8, ge=1)
    chunk: Count = Field(1024, ge=1)
    out: str | None = None
    num_threads: int | None = Field(None, ge=1)

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: list[str]) -> list[str]:
        for task in tasks:
            if task not in NAMES:
                raise UserError(unknown_name("task", task, NAMES))
        return sorted(set(tasks), key=NAMES.index)

    @field_validator("lengths")
    @classmethod
    def _ascending(cls, lengths: list[int]) -> list[int]:
        return sorted(set(lengths))

    @model_validator(mode="after")
    def _fits(self) -> BabilongOptions:
        if self.form == "finetuned" and self.prompts != PromptConfig():
            raise UserError("prompts has no effect with form=finetuned; leave it out")
        for length in self.lengths:
            if 0 < length <= self.reserved:
                raise UserError(
                    f"a length of {length} tokens leaves nothing beside reserve={self.reserved}; give 0 (the facts "
                    "alone), a greater length or a smaller reserve"
                )
        return self

    @property
    def reserved(self) -> int:
        """Tokens of a length that are kept for what stands around the context."""
        return self.reserve if self.reserve is not None else {"prompt": 300, "finetuned": 20}[self.form]

    def window(self, number: int) -> tuple[float, float]:
        """The part of the background in which window `number` puts the facts."""
        return number / self.windows, (number + 1) / self.windows

    def conditions(self) -> dict[str, object]:
        """All that one sample's result depends on, besides the model, the background's text and the task."""
        return {
            "form": self.form,
            "seed": self.seed,
            "reserve": self.reserved,
            "windows": self.windows,
            "facts": self.facts or "simulated",
            "background": self.background.to_dict(),
            "prompts": self.prompts.to_dict() if self.form == "prompt" else None,
        }
