"""CompareConfig: what is compared, and how equal the candidates are made."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from llm.config.base import Config, Count
from llm.core.errors import UserError

Matched = Literal["params", "active_params", "flops", "none"]


class Candidate(Config):
    """One candidate, laid over the base run. block: over every block of every layer group. model: over the model
    section, after `block`. optim: over the optimizer section. A mapping with another `type` replaces the one below.
    """

    block: dict[str, Any] = {}
    model: dict[str, Any] = {}
    optim: dict[str, Any] = {}


class MatchConfig(Config):
    """How candidates are made equal: `what` of the blocks (embedding and head left out) or of the whole model (`of`)
    comes as near to `target` as widths allow; target None: that of the first candidate as it is written.

    d_model moves in steps of `step`; then the hidden width of channel mixers that have a `d_hidden` moves by up to
    `hidden_freedom`, relative, in steps of 8. flops: those of a forward pass per token at the training length.
    """

    what: Matched = "params"
    of: Literal["blocks", "model"] = "blocks"
    target: Count | None = Field(None, ge=1)
    step: int = Field(16, ge=1)
    hidden_freedom: float = Field(0.35, ge=0, lt=1)


class MeasureConfig(Config):
    """What is measured after training, alone on the machine: throughput of forward and backward at `lengths` (rows of a
    batch: as many as make `batch_tokens`), and decoding one token after each of `contexts`. seconds: time spent on each
    figure, whose median is shown. Empty lists leave a measurement out."""

    lengths: list[int] = [256, 1024]
    batch_tokens: int = Field(2048, ge=1)
    contexts: list[int] = [256, 2048]
    seconds: float = Field(1.0, gt=0)
    num_threads: int = Field(1, ge=1)


class RecallConfig(Config):
    """Multi-query associative recall (evals/synthetic/mqar.py): one block of each candidate is trained for it at width
    d_model, behind a layer of attention over two tokens that all have. Of `lrs` (Muon) the best is taken; a training
    ends early at an accuracy of `stop_at`. Candidates with a wrapper have no figure."""

    d_model: int = Field(96, ge=1)
    length: int = Field(64, ge=4)
    n_pairs: list[int] = Field([4, 8, 16], min_length=1)
    vocab_size: int = Field(65, ge=5)
    steps: int = Field(600, ge=1)
    lrs: list[float] = Field([0.005], min_length=1)
    stop_at: float = Field(0.995, gt=0, le=1)
    eval_examples: int = Field(256, ge=1)
    seeds: list[int] = Field([0], min_length=1)


class CompareConfig(Config):
    """base: path of the run config on which all candidates build. run: sections laid over it (data, train, ...).

    jobs: trainings at once, each with `num_threads` threads. The first candidate is the baseline of the table.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    base: str
    run: dict[str, Any] = {}
    candidates: dict[str, Candidate] = Field(min_length=1)
    seeds: list[int] = Field([0, 1], min_length=1)
    match: MatchConfig = MatchConfig()
    measure: MeasureConfig = MeasureConfig()
    recall: RecallConfig | None = None
    jobs: int = Field(1, ge=1)
    num_threads: int = Field(1, ge=1)
    runs_dir: str = "runs"
    out: str | None = None

    @model_validator(mode="after")
    def _names(self) -> CompareConfig:
        for name in self.candidates:
            if not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
                raise UserError(f"candidate {name!r}: letters, digits, '.', '-' and '_' only, it names a folder")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds {self.seeds} holds one twice; give each once")
        return self
