"""A small config tree with every kind of field, for the tests of this folder."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from llm.config.base import Config, Count, Tagged
from llm.core.registry import Registry


class Mixer(Tagged):
    registry: ClassVar[Registry] = Registry("mixer")


@Mixer.registry.register("attention", tiny=lambda: Attention(), paper="none")
class Attention(Mixer):
    n_heads: int = Field(2, gt=0)
    backend: Literal["sdpa", "flex"] = "sdpa"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.n_heads == 7:
            raise ValueError("n_heads 7 does not divide d_model 64")
        return self


@Mixer.registry.register("conv", tiny=lambda: Conv(), paper="none", aliases=("convolution",))
class Conv(Mixer):
    width: int = 4
    inner: Mixer | None = None


class Group(Config):
    mixer: Mixer
    repeat: int = 1


class Model(Config):
    layers: list[Group]
    tied: dict[str, str] = {}


class Optim(Config):
    lr: float = 1e-3
    weight_decay: float = 0.0
    tokens: Count = 1000
    steps: int | Literal["auto"] = "auto"
    betas: tuple[float, float] = (0.9, 0.95)
    note: str = ""
    stop: float | None = None
    fused: bool = True


class Root(Config):
    schema_version: int = 1
    model: Model
    optim: Optim = Optim()
