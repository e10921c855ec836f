"""Choosing the next token: repetition penalty, temperature, top-k, top-p, min-p, then a draw.

Shapes: logits [B, V]. The filters act in that order, as in transformers, and give the same probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from llm.config.base import Config, Count
from llm.core.errors import UserError
from llm.generate.acceptance import accept_chosen, accept_sampled, behind
from llm.generate.draw import Stream, draw


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class Sampling(Config):
    """How to continue a prompt. The result is a function of (prompt, this), whatever else is in the batch.

    temperature: 0 is greedy. top_k: only the k likeliest tokens (None: all). top_p: the smallest set of likeliest
    tokens with at least this probability (Holtzman et al. 2020). min_p: only tokens at least min_p times as likely as
    the likeliest (Nguyen et al. 2024). repetition_penalty: logits of tokens in the prompt or the output so far are
    divided by it when positive, multiplied when negative (Keskar et al. 2019). stop: texts that end the output; they
    are not part of it. seed: None draws a new one. ignore_eos: go on behind the end-of-text token.
    """

    max_new_tokens: Count = Field(256, ge=1)
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=1)
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, allow_inf_nan=False)
    stop: Annotated[list[str], BeforeValidator(_as_list)] = []
    seed: int | None = Field(None, ge=0)
    ignore_eos: bool = False

    @model_validator(mode="after")
    def _nothing_ignored(self) -> Sampling:
        if self.temperature == 0:
            for name in ("top_k", "top_p", "min_p", "seed"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise UserError(
                        f"{name} has no effect with temperature=0 (greedy); remove it or raise the temperature"
                    )
        if "" in self.stop:
            raise UserError("stop holds an empty text, which would end every output at once; remove it")
        return self

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0

    def key(self) -> tuple[object, ...]:
        """What the probabilities depend on: rows with equal keys are filtered together."""
        return self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Apply a repetition penalty; seen [B, V] bool: tokens that the prompt or the output holds."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits [B, V] after temperature, top-k, top-p and min-p: -inf where a token is left out. Not for greedy."""
    assert not sampling.greedy
    out = logits / sampling.temperature if sampling.temperature != 1 else logits
    if sampling.top_k is not None and sampling.top_k < out.shape[-1]:
        smallest = out.topk(sampling.top_k, dim=-1).values[..., -1:]
        out = out.masked_fill(out < smallest, -torch.inf)
    if sampling.top_p < 1:
        ascending, order = out.sort(dim=-1)
        drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - sampling.top_p
        drop[..., -1] = False
        out = out.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)
    if sampling.min_p > 0:
        probs = out.softmax(dim=-1)
        out = out.masked_fill(probs < sampling.min_p * probs.amax(dim=-1, keepdim=True), -torch.inf)
    return out


class Sampler:
    """Draws the tokens of a batch; row b has its own settings and its own stream of random numbers.

    prompts: token ids of each row, for the repetition penalty; None: `seen` is set from outside.
    """

    def __init__(
        self,
        samplings: Sequence[Sampling],
        prompts: Sequence[Sequence[int]] | None,
        vocab_size: int,
        device: torch.device | str,
    ) -> None:
        self.samplings = list(samplings)
        self.streams = [Stream(s.seed) for s in samplings]
        self.device = device
        self.seen: Tensor | None = None
        if prompts is not None and any(s.repetition_penalty != 1 for s in samplings):
            self.seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
            for row, prompt in enumerate(prompts):
                self.seen[row, torch.as_tensor(list(prompt), dtype=torch.int64, device=device)] = True
        self._regroup()

    def _regroup(self) -> None:
        groups: dict[tuple[object, ...], list[int]] = {}
        for row, sampling in enumerate(self.samplings):
            groups.setdefault(sampling.key(), []).append(row)
        self.groups = [(self.samplings[rows[0]], rows) for rows in groups.values()]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order."""
        self.samplings = [self.samplings[row] for row in rows]
        self.streams = [self.streams[row] for row in rows]
        if self.seen is not None:
            self.seen = self.seen[torch.tensor(list(rows), dtype=torch.int64, device=self.device)]
        self._regroup()

    def extend(self, other: Sampler) -> None:
        """Go on with the rows of another sampler behind one's own."""
        if self.seen is not None or other.seen is not None:
            seen = next(s.seen for s in (self, other) if s.seen is not None)
            parts = [
                seen.new_zeros(len(s.samplings), seen.shape[1]) if s.seen is None else s.seen for s in (self, other)
            ]
            self.seen = torch.cat(parts)
        self.samplings += other.samplings
        self.streams += other.streams
        self._regroup()

    def __call__(self, logits: Tensor) -> Tensor:
        """Next ids [B] for logits [B, V]."""
        logits = logits.float()
        if len(self.groups) == 1:
            ids = self._pick(logits, *self.groups[0])
        else:
            ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
            for sampling, rows in self.groups:
                ids[rows] = self._pick(logits[rows], sampling, rows)
        if self.seen is not None:
            self.seen.scatter_(1, ids[:, None], True)
        return ids

    def draft(self, logits: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """(ids [B], the probabilities [B, V] that they were drawn from) for logits [B, V]. active [B] bool: rows whose
        token counts; the others use no random number."""
        logits = logits.float()
        ids = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        probs = torch.zeros_like(logits)
        wanted = active.tolist()
        for sampling, rows in self.groups:
            rows = [row for row in rows if wanted[row]]
            if not rows:
                continue
            processed = self._penalised(logits[rows], sampling, rows)
            if sampling.greedy:
                ids[rows] = processed.argmax(dim=-1)
                continue
            probs[rows] = filtered(processed, sampling).softmax(dim=-1)
            ids[rows] = draw(probs[rows], self._uniform(rows, 1)[:, 0].to(logits.device))
        if self.seen is not None:
            self.seen.scatter_(1, ids[:, None], self.seen.gather(1, ids[:, None]) | active[:, None])
        return ids, probs

    def choose(self, logits: Tensor, drafts: Tensor, rows: Sequence[int]) -> Tensor:
        """[R, N + 1] what the model itself takes at each place of drafts [R, N], were they right up to there, by its
        logits [R, N + 1, V]. rows [R]: whose settings and random numbers, which `use` uses up."""
        logits = logits.float()
        n = drafts.shape[1] + 1
        targets = torch.zeros(len(rows), n, dtype=torch.int64, device=logits.device)
        for sampling, own in ((sampling, set(group)) for sampling, group in self.groups):
            mine = [place for place, row in enumerate(rows) if row in own]
            if not mine:
                continue
            owners = [rows[place] for place in mine]
            processed = self._penalised(logits[mine], sampling, owners, drafts[mine])
            if sampling.greedy:
                targets[mine] = processed.argmax(dim=-1)
                continue
            p = filtered(processed.flatten(0, 1), sampling).softmax(dim=-1)
            uniform = torch.tensor([self.streams[row].peek(n) for row in owners], dtype=torch.float64)
            targets[mine] = draw(p, uniform.flatten().to(p.device)).view(-1, n)
        return targets

    def use(self, tokens: Tensor, counts: Tensor) -> None:
        """The first counts[b] of tokens [B, N] have been taken."""
        for sampling, stream, n in zip(self.samplings, self.streams, counts.tolist()):
            if not sampling.greedy:
                stream.take(n)
        self._mark(tokens, counts)

    def _mark(self, tokens: Tensor, counts: Tensor) -> None:
        if self.seen is not None:
            taken = torch.arange(tokens.shape[1], device=tokens.device) < counts[:, None]
            self.seen.scatter_(1, torch.where(taken, tokens, tokens[:, :1]), True)

    def accept(self, logits: Tensor, drafts: Tensor, counts: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """(accepted [B], next ids [B]) of drafts [B, N] that were drawn from q [B, N, V], of row b the first counts[b],
        by the model's logits [B, N + 1, V]."""
        logits = logits.float()
        accepted, ids = torch.zeros_like(counts), torch.zeros_like(counts)
        for sampling, rows in self.groups:
            n = max(int(counts[rows].max()), 0)
            part, mine, most = logits[rows][:, : n + 1], drafts[rows][:, :n], counts[rows]
            processed = self._penalised(part, sampling, rows, mine)
            if sampling.greedy:
                accepted[rows], ids[rows] = accept_chosen(processed.argmax(dim=-1), mine, most)
                continue
            p = filtered(processed.flatten(0, 1), sampling).softmax(dim=-1).view_as(processed)
            uniform = self._uniform(rows, n + 1, [int(c) + 1 for c in most.tolist()]).to(p.device)
            accepted[rows], ids[rows] = accept_sampled(p, q[rows][:, :n], mine, most, uniform)
        self._mark(behind(drafts, accepted, ids), accepted + 1)
        return accepted, ids

    def _uniform(self, rows: Sequence[int], n: int, counts: Sequence[int] | None = None) -> Tensor:
        """[R, n] random numbers, of each row as many as counts says (None: n), one of them in the last column."""
        drawn = []
        for i, row in enumerate(rows):
            own = self.streams[row].take(n if counts is None else counts[i])
            drawn.append([*own[:-1], *[0.0] * (n - len(own)), own[-1]])
        return torch.tensor(drawn, dtype=torch.float64)

    def _penalised(
        self, logits: Tensor, sampling: Sampling, rows: Sequence[int], following: Tensor | None = None
    ) -> Tensor:
        """Logits [R, V], or [R, N + 1, V] of places behind the output so far and the tokens `following` [R, N]."""
        if sampling.repetition_penalty == 1:
            return logits
        assert self.seen is not None
        seen = self.seen[list(rows)]
        if following is None:
            return penalise(logits, seen, sampling.repetition_penalty)
        each = torch.zeros_like(logits, dtype=torch.bool)
        each[:, 1:].scatter_(2, following[..., None], True)
        return penalise(logits, seen[:, None] | (each.cumsum(dim=1) > 0), sampling.repetition_penalty)

    def _pick(self, logits: Tensor, sampling: Sampling, rows: list[int]) -> Tensor:
        logits = self._penalised(logits, sampling, rows)
        if sampling.greedy:
            return logits.argmax(dim=-1)
        return draw(filtered(logits, sampling).softmax(dim=-1), self._uniform(rows, 1)[:, 0].to(logits.device))
