"""The delta rule token by token."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kernels.delta_rule.spec import DELTA_RULE, DeltaRuleQuery


class ReferenceDeltaRule:
    """In fp32, or fp64 for fp64 inputs."""

    name = "reference"
    kind = "reference"

    def priority(self, query: DeltaRuleQuery) -> int:
        return 0

    def supports(self, query: DeltaRuleQuery) -> Literal[True] | str:
        return True

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        log_decay: Tensor | None = None,
        starts: Tensor | None = None,
        state: Tensor | None = None,
        valid: Tensor | None = None,
        chunk: int = 64,
    ) -> tuple[Tensor, Tensor]:
        """(y [B, T, H, V] in the dtype of v, state [B, H, K, V])."""
        wide = torch.promote_types(q.dtype, torch.float32)
        (batch, length, groups, d_key), (heads, d_value) = q.shape, v.shape[2:]
        q, k = (x.to(wide).repeat_interleave(heads // groups, dim=2) for x in (q, k))
        s = q.new_zeros(batch, heads, d_key, d_value) if state is None else state.to(wide)
        decay = q.new_ones(heads) if log_decay is None else log_decay.to(wide).exp()
        decay = decay.expand(batch, length, heads)[..., None, None]
        beta = beta.to(wide)[..., None]
        outputs = []
        with torch.autocast(q.device.type, enabled=False):
            for t in range(length):
                before = s if starts is None else torch.where(starts[:, t, None, None, None], 0.0, s)
                before = decay[:, t] * before
                u = beta[:, t] * (v[:, t].to(wide) - torch.einsum("bhk,bhkv->bhv", k[:, t], before))
                after = before + k[:, t, :, :, None] * u[:, :, None, :]
                outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], after))
                s = after if valid is None else torch.where(valid[:, t, None, None, None], after, s)
        return torch.stack(outputs, dim=1).to(v.dtype), s


REFERENCE = DELTA_RULE.add(ReferenceDeltaRule())
