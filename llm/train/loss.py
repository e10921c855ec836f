"""The training loss: a sum over valid tokens and their count, so that it can be divided once by the global count."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from llm.core.batch import IGNORE, Microbatch


@dataclass
class LossOut:
    """sum: what is trained on, summed over tokens (nats, with the z-loss). count: valid tokens.
    metrics: further sums over valid tokens; "loss" is the cross-entropy alone."""

    sum: Tensor
    count: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class LanguageModelLoss:
    """Next-token cross-entropy plus z_loss * logsumexp^2, both in fp32, on all hidden states that the model puts out,
    each with its weight; "loss" is that of the last ones alone.

    chunk: tokens whose logits are held at once; None: as many as the operator finds best.
    """

    def __init__(self, z_loss: float = 0.0, chunk: int | None = None) -> None:
        self.z_loss = z_loss
        self.chunk = chunk

    def __call__(self, model: Any, batch: Microbatch) -> LossOut:
        output = model(batch.tokens, batch.seq)
        labels = batch.labels.flatten()
        out = self._score(model, output.hidden, labels)
        total = out.total if output.weight == 1.0 else output.weight * out.total
        for hidden, weight in output.extra:
            total = total + weight * self._score(model, hidden, labels).total
        return LossOut(sum=total, count=(labels != IGNORE).sum(), metrics={"loss": out.nll.sum()})

    def _score(self, model: Any, hidden: Tensor, labels: Tensor) -> Any:
        return model.cross_entropy(hidden.flatten(0, 1), labels, z_loss=self.z_loss, chunk=self.chunk)
