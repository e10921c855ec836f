"""What a callback is, and what the trainer tells it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from llm.core.batch import StepBatch

if TYPE_CHECKING:
    from llm.checkpoint.checkpointer import CheckpointInfo
    from llm.train.trainer import Trainer


@dataclass(frozen=True)
class StepOut:
    """One finished optimizer step, in host numbers that are equal on every rank.

    step: steps done, this one included. tokens: input tokens seen since the run began. loss: mean over the valid labels
    of the step, nats. metrics: named extras such as auxiliary losses. grad_norm: before clipping. lr: learning rate
    used. skipped: the update was left out. n_valid: scored labels of the step. seconds: wall time of the step.
    """

    step: int
    tokens: int
    loss: float
    grad_norm: float
    lr: float
    n_valid: int
    seconds: float
    skipped: bool = False
    metrics: dict[str, float] = field(default_factory=dict)


class Callback:
    """Something that happens beside the loop. Hooks run on every rank, lowest `order` first.

    A hook that only one rank needs returns early on the others, and never communicates unless all ranks do.
    """

    order: ClassVar[int] = 100

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step, after a checkpoint was loaded (trainer.step > 0 then)."""

    def on_batch(self, trainer: Trainer, batch: StepBatch) -> None:
        """A step's data has arrived."""

    def before_optim(self, trainer: Trainer, grad_norm: Tensor) -> None:
        """Gradients are complete and clipped; `grad_norm` is a device scalar (before clipping)."""

    def on_step(self, trainer: Trainer, out: StepOut) -> None:
        """An optimizer step is done."""

    def on_eval(self, trainer: Trainer, result: dict[str, float]) -> None:
        """A validation is done: step, tokens, loss, perplexity, bits_per_byte, bits_per_token, num_tokens."""

    def on_saved(self, trainer: Trainer, info: CheckpointInfo) -> None:
        """A checkpoint is committed."""

    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        """The loop ends by `error`, which is raised again afterwards."""

    def on_end(self, trainer: Trainer) -> None:
        """The loop has ended without an error."""

    def state(self) -> dict[str, Any]:
        """What is saved with the run: plain JSON data."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
