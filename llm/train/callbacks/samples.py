"""What the model writes as it learns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch

from llm.core.errors import UserError
from llm.train.callbacks.base import Callback, StepOut
from llm.train.callbacks.console import Console
from llm.train.callbacks.jsonl import JsonlWriter

if TYPE_CHECKING:
    from llm.train.trainer import Trainer


class Samples(Callback):
    """Continues log.sample_prompt every log.sample_every_steps steps and at the end; kept as `sample` records.

    Every rank generates the same text, since a sharded model needs all of them; rank 0 writes it down. The generator
    of the training run is left as it was, so sampling does not change what is learnt.
    """

    order: ClassVar[int] = 80

    def __init__(
        self, every: int, prompt: str, num_tokens: int, jsonl: JsonlWriter, console: Console | None = None
    ) -> None:
        self.every, self.prompt, self.num_tokens = every, prompt, num_tokens
        self.jsonl, self.console = jsonl, console
        self.last_step = -1

    def on_start(self, trainer: Trainer) -> None:
        if trainer.tokenizer is None:
            raise UserError("log.sample_every_steps needs a tokenizer, and there is none; remove it")
        try:
            trainer.tokenizer.encode(self.prompt)
        except UserError as error:
            raise UserError(f"log.sample_prompt {self.prompt!r} cannot be encoded: {error}") from error

    def on_step(self, trainer: Trainer, out: StepOut) -> None:
        if out.step % self.every == 0 or out.step == trainer.total_steps:
            self.sample(trainer)

    def sample(self, trainer: Trainer) -> None:
        """Generate once and record it."""
        from llm.generate.sampling import Sampling
        from llm.generate.text import generate_text

        devices = [trainer.strategy.device] if trainer.strategy.device.type == "cuda" else []
        sampling = Sampling(max_new_tokens=self.num_tokens, temperature=0.8, top_p=0.95, seed=trainer.run.seed)
        with torch.random.fork_rng(devices=devices), trainer.strategy.unsharded() as model, torch.no_grad():
            was_training = model.training
            model.eval()
            with trainer.strategy.autocast():
                text = generate_text(cast(Any, model), trainer.tokenizer, [self.prompt], sampling)[0]
            model.train(was_training)
        self.last_step = trainer.step
        if not trainer.is_main:
            return
        self.jsonl.write("sample", trainer, prompt=self.prompt, text=text)
        if self.console is not None:
            self.console.say(f"step {trainer.step:,} sample: {self.prompt + text!r}"[:300])
