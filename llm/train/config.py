"""RunConfig: everything a training run is, in one typed and closed tree."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from llm.config.base import Config, Count
from llm.core.errors import UserError
from llm.data.config import DataConfig
from llm.models.config import ModelConfig


class ParamGroupConfig(Config):
    """Settings for parameters whose dotted name matches one of `match` (globs); the first matching group wins.

    optimizer: rowwise_adamw is for look-up tables: one second moment per row, and rows without a gradient stay as they
    are.
    """

    match: list[str] = Field(min_length=1)
    lr_scale: float = Field(1.0, ge=0)
    weight_decay: float | None = Field(None, ge=0)
    optimizer: Literal["adamw", "muon", "rowwise_adamw"] | None = None


class OptimConfig(Config):
    """Optimizer. `muon` drives matrices inside the blocks by orthogonalised momentum at `lr` and everything else
    (embedding, head, vectors) by AdamW at `adam_lr`; `adamw` drives all at `lr`.

    Weight decay is decoupled and by default spares vectors (norms, biases) and embeddings.
    """

    type: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(3e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    clip_norm: float | None = Field(1.0, gt=0)
    adam_lr: float | None = Field(None, gt=0)
    momentum: float = Field(0.95, ge=0, lt=1)
    nesterov: bool = True
    ns_steps: int = Field(5, ge=1)
    groups: list[ParamGroupConfig] = []

    @model_validator(mode="after")
    def _muon_only(self) -> OptimConfig:
        if self.type != "muon":
            fields = type(self).model_fields
            only = self.model_fields_set & {"adam_lr", "momentum", "nesterov", "ns_steps"}
            ignored = sorted(key for key in only if getattr(self, key) != fields[key].default)
            if ignored:
                raise UserError(
                    f"optim.{ignored[0]} has no effect with optim.type={self.type}; remove it or set optim.type=muon"
                )
        return self


class ScheduleConfig(Config):
    """Learning-rate factor as a function of tokens seen. Give warm-up and decay in tokens, or as fractions of the run.

    wsd: constant after warm-up, then decay over the last `decay`; cosine and linear decay over the whole run.
    """

    type: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup_tokens: Count | None = Field(None, ge=0)
    warmup_fraction: float | None = Field(None, ge=0, le=1)
    decay_tokens: Count | None = Field(None, ge=0)
    decay_fraction: float | None = Field(None, ge=0, le=1)
    min_ratio: float = Field(0.1, ge=0, le=1)
    decay_shape: Literal["linear", "sqrt", "cosine"] = "linear"

    @model_validator(mode="after")
    def _nothing_ignored(self) -> ScheduleConfig:
        for part in ("warmup", "decay"):
            if getattr(self, f"{part}_tokens") is not None and getattr(self, f"{part}_fraction") is not None:
                raise UserError(f"give one of schedule.{part}_tokens and schedule.{part}_fraction, not both")
        only = {
            "decay_tokens": ("wsd",),
            "decay_fraction": ("wsd",),
            "decay_shape": ("wsd",),
            "min_ratio": ("wsd", "cosine", "linear"),
        }
        for key, types in only.items():
            if (
                key in self.model_fields_set
                and self.type not in types
                and getattr(self, key) != type(self).model_fields[key].default
            ):
                raise UserError(
                    f"schedule.{key} has no effect with schedule.type={self.type}; "
                    f"remove it or set schedule.type={' or '.join(types)}"
                )
        return self


class AnomalyConfig(Config):
    """What to do when a loss or gradient norm is not finite, or a spike: above mean + sigma * std of the last `window`
    steps. skip: leave the step out; stop: save nothing and end; rollback: go back to the last good checkpoint and pass
    over the offending data. More than `max_skips` in a row stop the run."""

    policy: Literal["skip", "stop", "rollback"] = "skip"
    sigma: float | None = Field(None, gt=0)
    window: int = Field(128, ge=8)
    max_skips: int = Field(10, ge=1)


class TrainConfig(Config):
    """Length, batch and numerics of a run. It ends with `steps` or `tokens`, whichever is reached first.

    batch_tokens: input tokens of one optimizer step over all ranks; gradient accumulation follows from it.
    micro_batch_size: sequences per rank and forward pass. z_loss: weight of the squared log-partition.
    loss_chunk: tokens whose logits are held at once (None: the operator's choice).
    """

    steps: Count | None = Field(None, ge=1)
    tokens: Count | None = Field(None, ge=1)
    batch_tokens: Count = Field(ge=1)
    micro_batch_size: int = Field(8, ge=1)
    precision: Literal["fp32", "bf16"] = "bf16"
    compile: bool = False
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    z_loss: float = Field(0.0, ge=0)
    loss_chunk: Count | None = Field(None, ge=1)
    log_every: int = Field(10, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = False
    num_threads: int | None = Field(None, ge=1)
    anomaly: AnomalyConfig = AnomalyConfig()

    @model_validator(mode="after")
    def _has_end(self) -> TrainConfig:
        if self.steps is None and self.tokens is None:
            raise UserError("a run needs an end: give train.steps, train.tokens or both (the first reached counts)")
        return self

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        by_tokens = None if self.tokens is None else -(-self.tokens // self.batch_tokens)
        return min(limit for limit in (self.steps, by_tokens) if limit is not None)


class ParallelConfig(Config):
    """How the run is spread. fsdp2 with replicate > 1 is HSDP: `replicate` groups that each shard over
    world_size / replicate ranks. zero_stage: for deepspeed."""

    strategy: Literal["single", "ddp", "fsdp2", "deepspeed"] = "single"
    replicate: int = Field(1, ge=1)
    zero_stage: Literal[1, 2, 3] = 2
    reshard_after_forward: bool = True
    cpu_offload: bool = False

    @model_validator(mode="after")
    def _no_dead_keys(self) -> ParallelConfig:
        only = {
            "replicate": "fsdp2",
            "reshard_after_forward": "fsdp2",
            "cpu_offload": "fsdp2",
            "zero_stage": "deepspeed",
        }
        for key, strategy in only.items():
            if (
                key in self.model_fields_set
                and self.strategy != strategy
                and getattr(self, key) != type(self).model_fields[key].default
            ):
                raise UserError(
                    f"parallel.{key} has no effect with parallel.strategy={self.strategy}; "
                    f"remove it or set parallel.strategy={strategy}"
                )
        return self


class CheckpointConfig(Config):
    """every_steps or every_tokens: how often to save (None: only at the end). keep: newest ones kept besides those
    marked to keep; keep_every_steps: marks. asynchronous: write in the background. resume: what a rerun of the same
    name does."""

    every_steps: Count | None = Field(None, ge=1)
    every_tokens: Count | None = Field(None, ge=1)
    keep: int = Field(2, ge=2)
    keep_every_steps: Count | None = Field(None, ge=1)
    asynchronous: bool = True
    resume: Literal["auto", "never"] = "auto"
    init_from: str | None = None


class EvalConfig(Config):
    """Validation in the loop on the held-out split: every so many steps or tokens, over `batches` microbatches of
    `micro_batch_size` rows over all ranks (None: the whole split); always at the end when enabled."""

    every_steps: Count | None = Field(None, ge=1)
    every_tokens: Count | None = Field(None, ge=1)
    batches: int | None = Field(None, ge=1)
    at_end: bool = True


class LogConfig(Config):
    """Sinks beyond console and metrics.jsonl, and diagnostics. profile_steps: [first, last] of a profiler trace."""

    progress: bool = True
    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str = "manyformer"
    report: bool = True
    profile_steps: tuple[int, int] | None = None
    memory_snapshot: bool = False
    sample_every_steps: Count | None = Field(None, ge=1)
    sample_prompt: str = "def "
    sample_tokens: int = Field(64, ge=1)


class RunConfig(Config):
    """The root of a run's config file."""

    schema_version: int = 1
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0)
    runs_dir: str = "runs"
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
