"""Choosing the next token: repetition penalty, temperature, top-k, top-p, min-p, then a draw.

Shapes: logits [B, V]. The filters act in that order, as in transformers, and give the same probabilities.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from llm.config.base import Config, Count
from llm.core.errors import UserError


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


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """[B] ids by inverse distribution function: probs [B, V], uniform [B] in [0, 1). Never an id of probability 0."""
    cdf = probs.double().cumsum(dim=-1)
    target = uniform.to(cdf)[:, None] * cdf[:, -1:]
    ids = torch.searchsorted(cdf, target, right=True).squeeze(1)
    last = probs.shape[-1] - 1 - (probs > 0).flip(-1).int().argmax(dim=-1)
    return torch.minimum(ids, last)


class Sampler:
    """Draws the tokens of a batch; row b has its own settings and its own stream of random numbers.

    prompts: token ids of each row, for the repetition penalty.
    """

    def __init__(
        self,
        samplings: Sequence[Sampling],
        prompts: Sequence[Sequence[int]],
        vocab_size: int,
        device: torch.device | str,
    ) -> None:
        self.samplings = list(samplings)
        self.streams = [random.Random(s.seed) for s in samplings]
        self.device = device
        self.seen: Tensor | None = None
        if any(s.repetition_penalty != 1 for s in samplings):
            self.seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
            for row, prompt in enumerate(prompts):
                self.seen[row, torch.as_tensor(list(prompt), device=device)] = True
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
            self.seen = self.seen[torch.as_tensor(list(rows), device=self.device)]
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

    def _pick(self, logits: Tensor, sampling: Sampling, rows: list[int]) -> Tensor:
        if sampling.repetition_penalty != 1:
            assert self.seen is not None
            seen = self.seen if len(rows) == len(self.seen) else self.seen[rows]
            logits = penalise(logits, seen, sampling.repetition_penalty)
        if sampling.greedy:
            return logits.argmax(dim=-1)
        uniform = torch.tensor([self.streams[row].random() for row in rows], dtype=torch.float64, device=logits.device)
        return draw(filtered(logits, sampling).softmax(dim=-1), uniform)
