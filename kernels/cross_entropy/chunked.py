"""Cross-entropy by chunks of tokens: logits of one chunk are held, and gradients are computed while they are there.

The total's gradient is a scalar, so the gradients of hidden states and weights are known up to that factor in the
forward pass: no logits are kept or computed twice.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from kernels.cross_entropy.spec import CROSS_ENTROPY, CrossEntropy, CrossEntropyForm, CrossEntropyQuery


class ChunkedCrossEntropy:
    """Memory for logits: form.chunk rows (by default as many as make about 64 MiB of fp32, at least 256)."""

    name = "chunked"
    kind = "torch"

    def priority(self, query: CrossEntropyQuery) -> int:
        return 50

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
        dtype = hidden.dtype
        if torch.is_autocast_enabled(hidden.device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(hidden.device.type)
        with torch.autocast(hidden.device.type, enabled=False):
            return CrossEntropy(
                *_Chunked.apply(hidden, weight, bias, labels, token_weights, form, dtype, torch.is_grad_enabled())
            )


def default_chunk(n_vocab: int) -> int:
    """Rows of fp32 logits in about 64 MiB."""
    return max(256, (1 << 24) // n_vocab)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        token_weights: Tensor | None,
        form: CrossEntropyForm,
        dtype: torch.dtype,
        grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        n_tokens, device = hidden.shape[0], hidden.device
        want_hidden, want_weight, want_bias = (grad and needed for needed in ctx.needs_input_grad[:3])
        h, w = hidden.to(dtype), weight.to(dtype)
        b = None if bias is None else bias.to(dtype)
        nll = torch.empty(n_tokens, dtype=wide, device=device)
        lse = torch.empty(n_tokens, dtype=wide, device=device)
        d_hidden = torch.empty_like(h) if want_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=wide, device=device) if want_weight else None
        d_bias = torch.zeros(weight.shape[0], dtype=wide, device=device) if want_bias else None
        kept = labels != form.ignore_index
        picks = labels.where(kept, 0)[:, None]
        scale = kept.to(wide) if token_weights is None else kept.to(wide) * token_weights
        chunk = form.chunk or default_chunk(weight.shape[0])
        for start in range(0, n_tokens, chunk):
            rows = slice(start, min(start + chunk, n_tokens))
            logits = torch.nn.functional.linear(h[rows], w, b).to(wide)
            slope = None
            if form.softcap is not None:
                bent = torch.tanh(logits / form.softcap)
                slope = 1 - bent.square()
                logits = bent.mul_(form.softcap)
            log_p = torch.log_softmax(logits, dim=-1)
            lse[rows] = logits[:, 0] - log_p[:, 0]
            nll[rows] = -log_p.gather(-1, picks[rows])[:, 0]
            if not (want_hidden or want_weight or want_bias):
                continue
            factor = scale[rows]
            spread = factor * (1 + 2 * form.z_loss * lse[rows]) if form.z_loss else factor
            d_logits = log_p.exp_().mul_(spread[:, None])
            d_logits.scatter_add_(-1, picks[rows], -factor[:, None])
            if slope is not None:
                d_logits.mul_(slope)
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            narrow = d_logits.to(dtype)
            if d_hidden is not None:
                torch.mm(narrow, w, out=d_hidden[rows])
            if d_weight is not None:
                d_weight += torch.mm(narrow.t(), h[rows])
        nll, lse = nll.where(kept, 0.0), lse.where(kept, 0.0)
        total = (scale * (nll + form.z_loss * lse.square() if form.z_loss else nll)).sum()
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(nll, lse)
        ctx.set_materialize_grads(False)
        return total, nll, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if grad is None:
            return (None,) * 8
        scaled = [
            None if d is None else (d * grad.to(d.dtype)).to(dtype) for d, dtype in zip(ctx.saved_tensors, ctx.dtypes)
        ]
        return (*scaled, None, None, None, None, None)


CHUNKED = CROSS_ENTROPY.add(ChunkedCrossEntropy())
