"""TensorBoard and Weights & Biases, for those who have them."""

from __future__ import annotations

import importlib.util
import math
import os
from typing import TYPE_CHECKING, Any, ClassVar

from llm.core.errors import UserError
from llm.train.callbacks.base import Callback, StepOut

if TYPE_CHECKING:
    from llm.train.trainer import Trainer


def require(package: str, key: str) -> None:
    """UserError when the optional package that `key` asks for is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{key}=true needs the package {package}, which is not installed: pip install {package}, or set {key}=false"
        )


def scalars(out: StepOut) -> dict[str, float]:
    """What a step shows, by name; values that are not finite are left out."""
    values = {"loss": out.loss, "grad_norm": out.grad_norm, "lr": out.lr, "tokens": out.tokens, "seconds": out.seconds}
    return {name: float(value) for name, value in (values | out.metrics).items() if math.isfinite(value)}


class TensorBoard(Callback):
    """Scalars under run_dir/tensorboard, every train.log_every steps. A resumed run hides what it takes back."""

    order: ClassVar[int] = 70

    def __init__(self) -> None:
        self.writer: Any = None

    def on_start(self, trainer: Trainer) -> None:
        require("tensorboard", "log.tensorboard")
        if not trainer.is_main:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(
            str(trainer.run_dir / "tensorboard"), purge_step=trainer.step + 1 if trainer.step else None
        )

    def on_step(self, trainer: Trainer, out: StepOut) -> None:
        if self.writer is None or out.step % trainer.run.train.log_every:
            return
        for name, value in scalars(out).items():
            self.writer.add_scalar(f"train/{name}", value, out.step)

    def on_eval(self, trainer: Trainer, result: dict[str, float]) -> None:
        if self.writer is not None:
            for name in ("loss", "perplexity", "bits_per_byte", "bits_per_token"):
                if name in result:
                    self.writer.add_scalar(f"eval/{name}", result[name], trainer.step)
            self.writer.flush()

    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        self.on_end(trainer)

    def on_end(self, trainer: Trainer) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None


class WeightsAndBiases(Callback):
    """The same scalars to W&B from rank 0; its run id is saved with the run, so that a resumed run goes on in place.
    WANDB_MODE=offline works without a network."""

    order: ClassVar[int] = 71

    def __init__(self) -> None:
        self.run: Any = None
        self.run_id: str | None = None

    def on_start(self, trainer: Trainer) -> None:
        require("wandb", "log.wandb")
        if not trainer.is_main:
            return
        import wandb

        self.run = wandb.init(
            project=trainer.run.log.wandb_project,
            name=trainer.run.name,
            id=self.run_id,
            resume="allow",
            dir=os.fspath(trainer.run_dir),
            config=trainer.run.to_dict(),
        )
        self.run_id = self.run.id

    def on_step(self, trainer: Trainer, out: StepOut) -> None:
        if self.run is not None and out.step % trainer.run.train.log_every == 0:
            self.run.log({f"train/{name}": value for name, value in scalars(out).items()}, step=out.step)

    def on_eval(self, trainer: Trainer, result: dict[str, float]) -> None:
        if self.run is not None:
            values = {f"eval/{name}": value for name, value in result.items() if name not in ("step", "tokens")}
            self.run.log(values, step=trainer.step)

    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        self._finish(1)

    def on_end(self, trainer: Trainer) -> None:
        self._finish(0)

    def _finish(self, exit_code: int) -> None:
        if self.run is not None:
            self.run.finish(exit_code=exit_code)
            self.run = None

    def state(self) -> dict[str, Any]:
        return {"run_id": self.run_id}

    def load(self, state: dict[str, Any]) -> None:
        self.run_id = state.get("run_id")
