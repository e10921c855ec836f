"""The trainer: load -> step -> callbacks -> agree. It knows a loader, a model and a loss, and nothing of tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm.checkpoint import Checkpointer, TrainState, load_model_tensors, resolve_checkpoint
from llm.config.load import dump_config
from llm.core import aux_loss
from llm.core.batch import IGNORE, Microbatch, StepBatch
from llm.core.errors import UserError
from llm.core.init import copy_full
from llm.core.progress import Progress, before_step
from llm.models.config import ModelCost
from llm.train.anomaly import AnomalyJudge
from llm.train.callbacks.base import Callback, StepOut
from llm.train.config import RunConfig
from llm.train.loss import LossOut
from llm.train.optim.schedule import lr_factor
from llm.train.strategies.base import NamedState, Strategy

Loss = Callable[[Any, Microbatch], LossOut]


@dataclass
class Parts:
    """What a trainer is made of; every part can be replaced in a test.

    loader: endless StepBatches with state(), load() and fingerprint(). validation: makes a fresh single pass, or None.
    token_bytes: [V] UTF-8 bytes that each token stands for, for bits per byte, or None.
    signal_requested: name of a signal that asked the run to save and stop, or None.
    """

    strategy: Strategy
    loader: Any
    loss: Loss
    checkpointer: Checkpointer
    callbacks: list[Callback]
    validation: Callable[[], Iterable[StepBatch]] | None = None
    token_bytes: Tensor | None = None
    tokenizer: Any = None
    model_cost: ModelCost | None = None
    signal_requested: Callable[[], bool] = field(default=lambda: False)
    config_hash: str = ""
    git_revision: str = ""


@dataclass(frozen=True)
class Result:
    """How a run ended. reason: "done", "signal" or "stop: ..." (a callback asked)."""

    step: int
    tokens: int
    reason: str
    last_eval: dict[str, float] | None = None


class Trainer:
    """Runs one training run from wherever its last good checkpoint left it to its end."""

    def __init__(self, run: RunConfig, parts: Parts) -> None:
        self.run = run
        self.parts = parts
        self.strategy = parts.strategy
        self.loader = parts.loader
        self.tokenizer = parts.tokenizer
        self.model_cost = parts.model_cost
        self.callbacks = sorted(parts.callbacks, key=lambda callback: callback.order)
        self.anomaly = AnomalyJudge(run.train.anomaly)
        self.run_dir = Path(run.runs_dir) / run.name
        self.step = 0
        self.tokens = 0
        self.total_steps = run.train.total_steps
        self.total_tokens = self.total_steps * run.train.batch_tokens
        self.last_eval: dict[str, float] | None = None
        self.resumed_from: Path | None = None
        self._stop_reason: str | None = None
        self._saved_step = -1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.strategy.rank == 0

    def request_stop(self, reason: str) -> None:
        """Ask for an orderly end after this step; any rank may ask, all agree."""
        self._stop_reason = reason

    def fit(self) -> Result:
        """Train to the end, to a signal or to a stop; the state is saved in each of these cases."""
        self._resume()
        if self.is_main:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            dump_config(self.run, self.run_dir / "config.yaml")
            if self.tokenizer is not None:
                self.tokenizer.save(self.run_dir / "tokenizer")
        try:
            self._call("on_start")
            reason = self._loop(iter(self.loader))
            if reason == "done" and self.run.eval.at_end and (self.last_eval or {}).get("step") != self.step:
                reason = self._evaluate() or reason
            if self._saved_step != self.step:
                self._save("preempt" if reason == "signal" else "final", wait=True)
            self.parts.checkpointer.wait()
            self._report_saved()
            self._call("on_end")
        except BaseException as error:
            for callback in self.callbacks:
                callback.on_error(self, error)
            raise
        return Result(self.step, self.tokens, reason, self.last_eval)

    def _loop(self, batches: Any) -> str:
        while self.step < self.total_steps:
            started = time.perf_counter()
            batch = next(batches)
            for callback in self.callbacks:
                callback.on_batch(self, batch)
            out, decision, stop = self.train_step(batch)
            if decision == "rollback":
                self._rollback()
                batches = iter(self.loader)
                continue
            out = replace(out, seconds=time.perf_counter() - started)
            for callback in self.callbacks:
                callback.on_step(self, out)
            if decision == "stop":
                self.parts.checkpointer.wait()
                raise UserError(self.anomaly.explain(out.step))
            if stop:
                return stop
            if self._due(self.run.eval.every_steps, self.run.eval.every_tokens) and (stop := self._evaluate()):
                return stop
            marked = self._due(self.run.checkpoint.keep_every_steps, None)
            due = marked or self._due(self.run.checkpoint.every_steps, self.run.checkpoint.every_tokens)
            if due and self.step < self.total_steps:
                self._save("keep" if marked else "regular")
            self._report_saved()
        return "done"

    def train_step(self, batch: StepBatch) -> tuple[StepOut, str, str | None]:
        """One optimizer step. Returns what happened, the anomaly decision, and why to stop (agreed over ranks)."""
        strategy = self.strategy
        before_step(strategy.model, Progress(self.step, self.total_steps, self.run.seed))
        microbatches = [microbatch.to(strategy.device) for microbatch in batch.microbatches]
        counts = [(microbatch.labels != IGNORE).sum() for microbatch in microbatches]
        denominator = strategy.all_reduce(torch.stack(counts).sum().float()).clamp(min=1)
        sums: dict[str, Tensor] = {}
        aux_values: dict[str, Tensor] = {}
        for index, (microbatch, count) in enumerate(zip(microbatches, counts, strict=True)):
            with strategy.accumulate(last=index == len(microbatches) - 1):
                with strategy.autocast():
                    out = self.parts.loss(strategy.model, microbatch)
                with aux_loss.scale(count / denominator):
                    strategy.backward(out.sum / denominator)
            for name, value in out.metrics.items():
                sums[name] = sums.get(name, 0.0) + value.detach().float()  # type: ignore[assignment]
            for name, value in aux_loss.take_values().items():
                aux_values[name] = aux_values.get(name, 0.0) + value.float() * count  # type: ignore[assignment]
        grad_norm = strategy.clip(self.run.optim.clip_norm)
        for callback in self.callbacks:
            callback.before_optim(self, grad_norm)
        sums |= aux_values
        signalled, asked = float(self.parts.signal_requested()), float(self._stop_reason is not None)
        flags = torch.tensor([signalled, asked], device=strategy.device)
        totals = strategy.all_reduce(torch.cat([torch.stack(list(sums.values())), flags]))
        *values, grad_norm_value, n_valid = torch.cat(
            [totals, grad_norm.float().reshape(1).to(strategy.device), denominator.reshape(1)]
        ).tolist()
        *metric_sums, signalled, asked = values
        metrics = {name: value / n_valid for name, value in zip(sums, metric_sums, strict=True)}
        loss = metrics.pop("loss")
        decision = self.anomaly.judge(loss, grad_norm_value)
        factor = lr_factor(self.run.schedule, self.tokens, self.total_tokens, self.run.train.batch_tokens)
        # Also before a rollback, for it clears the gradients.
        strategy.step(factor, skip=decision != "ok")
        if decision != "rollback":
            self.step += 1
            self.tokens += batch.num_tokens
        stepped = StepOut(
            step=self.step, tokens=self.tokens, loss=loss, metrics=metrics, grad_norm=grad_norm_value,
            lr=self.run.optim.lr * factor, skipped=decision != "ok", n_valid=int(n_valid), seconds=0.0,
        )  # fmt: skip
        stop = "signal" if signalled else (f"stop: {self._stop_reason or 'asked by another rank'}" if asked else None)
        return stepped, decision, stop

    @torch.no_grad()
    def evaluate(self) -> dict[str, float] | None:
        """Loss, perplexity, bits per token and per byte of the held-out split, every token weighted alike; None when a
        signal came meanwhile."""
        assert self.parts.validation is not None
        strategy = self.strategy
        totals = torch.zeros(3, dtype=torch.float64, device=strategy.device)
        token_bytes = None if self.parts.token_bytes is None else self.parts.token_bytes.to(strategy.device)
        with strategy.unsharded() as model:
            was_training = model.training
            model.eval()
            for number, batch in enumerate(self.parts.validation()):
                seen = number * strategy.world_size
                if self.run.eval.batches is not None and seen >= self.run.eval.batches:
                    break
                if self._signalled():
                    model.train(was_training)
                    aux_loss.take_values()
                    return None
                for microbatch in batch.microbatches:
                    moved = microbatch.to(strategy.device)
                    with strategy.autocast():
                        out = self.parts.loss(model, moved)
                    labels = moved.labels[moved.labels != IGNORE]
                    totals[0] += out.metrics["loss"].double()
                    totals[1] += labels.numel()
                    if token_bytes is not None:
                        totals[2] += token_bytes[labels].sum()
            model.train(was_training)
        aux_loss.take_values()
        loss_sum, count, num_bytes = strategy.all_reduce(totals).tolist()
        if count == 0:
            raise UserError(
                "the held-out split has no tokens to score; prepare the data with a held-out part "
                "or set eval.at_end=false"
            )
        loss = loss_sum / count
        result = {"step": self.step, "tokens": self.tokens, "loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        result |= {"bits_per_token": loss / math.log(2), "num_tokens": int(count)}
        if num_bytes:
            result["bits_per_byte"] = loss_sum / math.log(2) / num_bytes
        return result

    def _evaluate(self) -> str | None:
        """Evaluate and tell the callbacks; the reason to stop, if one came up."""
        if self.parts.validation is None:
            return None
        result = self.evaluate()
        if result is None:
            return "signal"
        self.last_eval = result
        for callback in self.callbacks:
            callback.on_eval(self, result)
        return None

    def _signalled(self) -> bool:
        """Whether a signal asked any rank to stop; a host sync, for use outside of training steps."""
        flag = torch.tensor([float(self.parts.signal_requested())], device=self.strategy.device)
        return bool(self.strategy.all_reduce(flag).item())

    def _due(self, every_steps: int | None, every_tokens: int | None) -> bool:
        if every_steps and self.step % every_steps == 0:
            return True
        before = self.tokens - self.run.train.batch_tokens
        return bool(every_tokens and self.tokens // every_tokens > before // every_tokens)

    def _call(self, hook: str) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self)

    def _train_state(self) -> TrainState:
        named = self.strategy.state()
        rng = {"torch": torch.get_rng_state()}
        if self.strategy.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.strategy.device)
        meta = {
            "step": self.step,
            "tokens": self.tokens,
            "loader": self.loader.state(),
            "fingerprint": self.loader.fingerprint(),
            "anomaly": self.anomaly.state(),
            "callbacks": {type(callback).__name__: callback.state() for callback in self.callbacks},
            "last_eval": self.last_eval,
            "config_hash": self.parts.config_hash,
            "git_revision": self.parts.git_revision,
        }
        return TrainState(model=named.model, optim=named.optim, meta=meta, rng=rng)

    def _save(self, kind: Any, *, wait: bool = False) -> None:
        self.parts.checkpointer.save(self._train_state(), step=self.step, tokens=self.tokens, kind=kind, wait=wait)
        self._saved_step = self.step

    def _report_saved(self) -> None:
        for info in self.parts.checkpointer.poll():
            for callback in self.callbacks:
                callback.on_saved(self, info)

    def _resume(self) -> None:
        found = self.parts.checkpointer.latest_good() if self.run.checkpoint.resume == "auto" else None
        if found is not None:
            self._load(found)
            self.resumed_from = found.path
        elif self.run.checkpoint.init_from is not None:
            self._load_weights(Path(self.run.checkpoint.init_from))

    def _load(self, info: Any, *, keep_data_position: bool = False) -> None:
        state = self._train_state()
        meta = self.parts.checkpointer.load(info, state)
        self.strategy.load(NamedState(state.model, state.optim))
        if meta["fingerprint"] != self.loader.fingerprint():
            raise UserError(
                f"the data is not what {info.path} was trained on (fingerprint {meta['fingerprint'][:12]}, now "
                f"{self.loader.fingerprint()[:12]}); restore the data, or give the run another name"
            )
        if not keep_data_position:
            self.loader.load(meta["loader"])
        self.step, self.tokens, self.last_eval = meta["step"], meta["tokens"], meta["last_eval"]
        self._saved_step = self.step
        self.anomaly.load(meta["anomaly"])
        for callback in self.callbacks:
            callback.load(meta["callbacks"].get(type(callback).__name__, {}))
        torch.set_rng_state(state.rng["torch"])
        if "cuda" in state.rng:
            torch.cuda.set_rng_state(state.rng["cuda"], self.strategy.device)

    def _load_weights(self, path: Path) -> None:
        """Start from the weights of another run or checkpoint; optimizer, data and step counter start anew. What a
        wrapper adds to the decoder may be missing, and then keeps its start values."""
        tensors = load_model_tensors(resolve_checkpoint(path))
        named = self.strategy.state()
        model: Any = self.strategy.model
        added = model.added_names() if hasattr(model, "added_names") else set()
        tensors |= {name: named.model[name] for name in added if name not in tensors and name in named.model}
        wrong = [
            name
            for name in {*tensors, *named.model}
            if name not in tensors or name not in named.model or tensors[name].shape != named.model[name].shape
        ]
        if wrong:
            raise UserError(
                f"checkpoint.init_from {path} is not of this model: "
                f"{len(wrong)} parameters are missing, unknown or of another "
                f"shape, such as {min(wrong)}; give a run of the same model section"
            )
        for name, target in named.model.items():
            if tensors[name] is not target:
                copy_full(target, tensors[name])
        self.strategy.load(named)

    def _rollback(self) -> None:
        """Back to the last good checkpoint; the data that brought the anomaly is passed over."""
        self.parts.checkpointer.wait()
        found = self.parts.checkpointer.latest_good()
        if found is None:
            raise UserError(
                f"{self.anomaly.explain(self.step + 1)}; there is no checkpoint to roll back to: "
                "set checkpoint.every_steps"
            )
        counters = self.anomaly.counters()
        self._load(found, keep_data_position=True)
        self.anomaly.restore_counters(counters)
