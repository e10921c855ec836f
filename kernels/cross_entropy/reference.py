"""Cross-entropy with all logits held, gradients by autograd."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cross_entropy.spec import CROSS_ENTROPY, CrossEntropy, CrossEntropyForm, CrossEntropyQuery


def token_losses(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """(nll [N], lse [N]), differentiable, of logits [N, V] and labels [N]; fp32 (fp64 for fp64), zero where ignored."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    kept = labels != ignore_index
    lse = torch.logsumexp(wide, dim=-1)
    picked = wide.gather(-1, labels.where(kept, 0)[:, None])[:, 0]
    return (lse - picked).where(kept, 0.0), lse.where(kept, 0.0)


class ReferenceCrossEntropy:
    """Does everything but save memory: form.chunk is not looked at."""

    name = "reference"
    kind = "reference"

    def priority(self, query: CrossEntropyQuery) -> int:
        return 0

    def supports(self, query: CrossEntropyQuery) -> Literal[True] | str:
        return True

    def run(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        form: CrossEntropyForm,
        *,
        bias: Tensor | None = None,
        token_weights: Tensor | None = None,
    ) -> CrossEntropy:
        """See `kernels.cross_entropy.linear_cross_entropy`."""
        logits = F.linear(hidden, weight, bias)
        if form.softcap is not None:
            logits = form.softcap * torch.tanh(logits / form.softcap)
        nll, lse = token_losses(logits, labels, ignore_index=form.ignore_index)
        losses = nll + form.z_loss * lse.square() if form.z_loss else nll
        total = (losses if token_weights is None else losses * token_weights).sum()
        return CrossEntropy(total, nll.detach(), lse.detach())


REFERENCE = CROSS_ENTROPY.add(ReferenceCrossEntropy())
