"""Nested training (MatFormer): every step also trains the smaller widths of the feed-forward layers."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator
from torch import Tensor

from llm.blocks.channels.nested import (
    GRANULARITIES,
    NestedChannel,
    NestedConfig,
    Share,
    at_granularity,
    check_granularities,
    nested_of,
)
from llm.core.cost import Mode
from llm.core.errors import UserError
from llm.core.init import name_seed
from llm.core.progress import Progress
from llm.core.registry import About
from llm.core.seq import SeqInfo
from llm.core.state import DecodeState
from llm.models.wrappers.base import WRAPPERS, CostOf, Wrapper, WrapperConfig, bare_decoder

if TYPE_CHECKING:
    from llm.models.config import ModelConfig, ModelCost
    from llm.models.output import Output

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@WRAPPERS.register(
    "nested",
    # Near the whole width, which the contract on FLOPs runs, while the cost of training is the mean over draws.
    tiny=lambda: NestedTrainingConfig(probabilities=(0.02, 0.03, 0.05, 0.9)),
    paper="arXiv:2310.07707 (MatFormer)",
    status="experimental",
    tinies={
        "summed": lambda: NestedTrainingConfig(objective="summed"),
        "summed-weights": lambda: NestedTrainingConfig(
            objective="summed", granularities=(0.5, 1.0), weights=(0.5, 2.0)
        ),
    },
    about=About(
        equation="sampled: L(M_i), i drawn once per step; summed: Σ_i λ_i L(M_i), M_i with the first m_i hidden units",
        use="Around any decoder with dense feed-forward layers, also to continue a trained one, when several sizes are "
        "to be served, or a small slice is to draft for the whole.",
        weakness="The whole width learns less per unit of compute than a model trained alone; summed costs g forward "
        "passes and their activations.",
    ),
)
class NestedTrainingConfig(WrapperConfig):
    """Trains all granularities of the feed-forward layers together; in evaluation and decoding the whole width runs.

    Channels nested_mlp and nested_gated are used as they are, mlp, swiglu and geglu become nested without a new
    parameter, and others stay whole. objective: "sampled" draws one granularity per optimizer step for all layers,
    microbatches and ranks, a function of (seed, step); "summed" scores every granularity in every step.
    probabilities: of the draw, the smallest granularity first (None: uniform). weights: of the summed losses, likewise
    (None: 1 each; their sum scales the gradient). granularities: None for those of the nested channels, or 1/8, 1/4,
    1/2 and 1.
    """

    objective: Literal["sampled", "summed"] = "sampled"
    probabilities: tuple[Weight, ...] | None = None
    weights: tuple[Weight, ...] | None = None
    granularities: tuple[Share, ...] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _nothing_ignored(self) -> NestedTrainingConfig:
        for key, objective in (("probabilities", "sampled"), ("weights", "summed")):
            if getattr(self, key) is not None and self.objective != objective:
                raise UserError(f"nested: {key} has no effect with objective: {self.objective}; remove one of them")
        if self.granularities is not None:
            check_granularities(self.granularities)
        if self.probabilities is not None and abs(sum(self.probabilities) - 1) > 1e-6:
            raise UserError(f"nested: probabilities must sum to 1; given {list(self.probabilities)}")
        return self

    @classmethod
    def identity(cls) -> NestedTrainingConfig:
        return cls(granularities=(1.0,))

    def shares(self, model: ModelConfig) -> tuple[float, ...]:
        """The granularities of a model; UserError where its layers and this do not agree."""
        channels = {block.channel.granularities for block in model.blocks() if isinstance(block.channel, NestedConfig)}
        found = channels | ({self.granularities} if self.granularities is not None else set())
        if len(found) > 1:
            raise UserError(
                f"nested: the layers and the wrapper have different granularities, "
                f"{' and '.join(str(list(one)) for one in sorted(found))}; give the same everywhere"
            )
        return next(iter(found), GRANULARITIES)

    def factors(self, model: ModelConfig) -> tuple[float, ...]:
        """Probability or weight of each granularity; UserError when there are more or fewer of them."""
        n = len(self.shares(model))
        key = "probabilities" if self.objective == "sampled" else "weights"
        given: tuple[float, ...] | None = getattr(self, key)
        if given is None:
            return (1 / n if self.objective == "sampled" else 1.0,) * n
        if len(given) != n:
            raise UserError(f"nested: {len(given)} {key} for {n} granularities {list(self.shares(model))}")
        return given

    def wrap(self, inner: Any, model: ModelConfig) -> NestedTraining:
        decoder = bare_decoder(inner, "nested")
        if self.objective == "summed" and model.wrappers[-1] is not self:
            raise UserError(
                "nested: objective: summed scores several outputs, which no wrapper around it passes on; "
                "make it the only wrapper or set objective: sampled"
            )
        layers = nested_layers(model)
        if not layers:
            raise UserError(
                "nested: no layer of the model can be nested; give one of the channels "
                "nested_mlp, nested_gated, mlp, swiglu or geglu"
            )
        blocks = model.blocks()
        for layer, config in layers.items():
            block: Any = decoder.layers[layer]
            if not isinstance(block.channel, NestedChannel):
                block.channel = config.nest(block.channel, model.context(layer, blocks[layer]))
        return NestedTraining(decoder, self.objective, self.shares(model), self.factors(model))

    def cost(self, inner: CostOf, model: ModelConfig, seq_len: int, mode: Mode, *, state_dtype_bytes: int) -> ModelCost:
        """For training, FLOPs are the mean over draws, or the sum over all granularities with the head of each."""
        bare = inner(seq_len, mode)
        if mode != "train":
            return bare
        blocks = model.blocks()
        saved = 0.0
        for layer, config in nested_layers(model).items():
            ctx = model.context(layer, blocks[layer])
            if config.sliced(ctx):
                saved += config.cost(ctx.dims(state_dtype_bytes), seq_len, mode).flops_per_token
        whole = bare.blocks.flops_per_token
        each = [whole - (1 - share) * saved for share in self.shares(model)]
        if self.objective == "sampled":
            mean = sum(p * flops for p, flops in zip(self.factors(model), each))
            return replace(bare, blocks=replace(bare.blocks, flops_per_token=mean))
        context = len(each) * bare.blocks.attention_flops
        return replace(
            bare,
            blocks=replace(bare.blocks, flops_per_token=sum(each), attention_flops=context),
            head=replace(bare.head, flops_per_token=len(each) * bare.head.flops_per_token),
        )


def nested_layers(model: ModelConfig) -> dict[int, NestedConfig]:
    """Layer -> its nested feed-forward layer as it is built, which for mlp, swiglu and geglu is the wrapper's doing."""
    wrapper = next((one for one in model.wrappers if isinstance(one, NestedTrainingConfig)), None)
    found: dict[int, NestedConfig] = {}
    for layer, block in enumerate(model.blocks()):
        if isinstance(block.channel, NestedConfig):
            found[layer] = block.channel
        elif wrapper is not None:
            nested = nested_of(block.channel, wrapper.shares(model))
            if nested is not None:
                found[layer] = nested
    return found


def draw(probabilities: tuple[float, ...], seed: int, step: int) -> int:
    """The granularity of an optimizer step."""
    at = random.Random(name_seed(seed, f"nested granularity of step {step}")).random()
    total = 0.0
    for index, probability in enumerate(probabilities):
        total += probability
        if at < total:
            return index
    return max(index for index, probability in enumerate(probabilities) if probability > 0)


class NestedTraining(Wrapper):
    """drawn: index of this step's granularity; None before the first step, when the whole width runs."""

    def __init__(
        self, inner: Any, objective: Literal["sampled", "summed"], shares: tuple[float, ...], factors: tuple[float, ...]
    ) -> None:
        super().__init__(inner)
        self.objective = objective
        self.shares = shares
        self.factors = factors
        self.drawn: int | None = None

    def before_step(self, progress: Progress) -> None:
        """Draw the granularity of the step."""
        if self.objective == "sampled":
            self.drawn = draw(self.factors, progress.seed, progress.step)

    def forward(self, tokens: Tensor, seq: SeqInfo, *, state: DecodeState | None = None, carry: Any = None) -> Output:
        if self.training and state is None:
            if self.objective == "summed":
                return self._all(tokens, seq, carry)
            if self.drawn is not None:
                seq = at_granularity(seq, self.shares, self.drawn)
        return self.inner(tokens, seq, state=state, carry=carry)

    def _all(self, tokens: Tensor, seq: SeqInfo, carry: Any) -> Output:
        """The whole width's output, with the hidden states of the smaller ones beside it."""
        extra = []
        for index, weight in enumerate(self.factors):
            seq = at_granularity(seq, self.shares, index)
            output = self.inner(tokens, seq, carry=carry)
            extra.append((output.hidden, weight))
        _, weight = extra.pop()
        return replace(output, weight=weight, extra=tuple(extra))
