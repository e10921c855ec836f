"""From a comparison to run configs: candidates laid over the base, their widths chosen so that they match."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.compare.config import Candidate, CompareConfig, MatchConfig
from llm.config.load import merge, read_tree, resolve, validate
from llm.core.errors import UserError
from llm.models.config import ModelConfig, ModelCost
from llm.train.config import RunConfig

HIDDEN_STEP = 8
SLACK = 0.01
"""A mismatch below this is as good as none: the width nearest to the one written is taken then."""


@dataclass(frozen=True)
class Matched:
    """A candidate's run section with its widths. reached, target: what was matched (None: nothing was)."""

    name: str
    tree: dict[str, Any]
    model: ModelConfig
    cost: ModelCost
    reached: float | None
    target: float | None

    @property
    def mismatch(self) -> float:
        """Relative to the target."""
        return 0.0 if self.reached is None or not self.target else self.reached / self.target - 1


def base_tree(config: CompareConfig) -> dict[str, Any]:
    """The sections of the base run, with `run` laid over them."""
    return merge(resolve(read_tree(Path(config.base), "RunConfig")), copy.deepcopy(config.run))


def candidate_tree(config: CompareConfig, candidate: Candidate, vocab_size: int) -> dict[str, Any]:
    """The sections of a candidate's run, at the widths as written."""
    tree = base_tree(config)
    for group in tree["model"]["layers"]:
        group["pattern"] = [merge(block, copy.deepcopy(candidate.block)) for block in group["pattern"]]
    tree["model"] = merge(tree["model"], copy.deepcopy(candidate.model))
    tree["model"].setdefault("vocab_size", vocab_size)
    tree["optim"] = merge(tree.get("optim", {}), copy.deepcopy(candidate.optim))
    return tree


def figure(cost: ModelCost, match: MatchConfig) -> float:
    """What is matched, of one model."""
    part = cost.total if match.of == "model" else cost.blocks + cost.wrappers
    return float(
        {"params": part.params, "active_params": part.active_params, "flops": part.flops_per_token}[match.what]
    )


def solve(config: CompareConfig, vocab_size: int) -> list[Matched]:
    """All candidates at their widths. UserError names the candidate that cannot be built."""
    found: list[Matched] = []
    target: float | None = None
    for name, candidate in config.candidates.items():
        tree = candidate_tree(config, candidate, vocab_size)
        try:
            seq_len = validate(RunConfig, tree).data.seq_len
            as_written = validate(ModelConfig, tree["model"])
            if config.match.what == "none":
                found.append(Matched(name, tree, as_written, as_written.cost(seq_len), None, None))
                continue
            if target is None:
                target = float(config.match.target or figure(as_written.cost(seq_len), config.match))
            model = _nearest(as_written, config.match, target, seq_len)
        except UserError as error:
            raise UserError(f"candidate {name}: {error}") from error
        tree["model"] = merge(tree["model"], {"d_model": model.d_model, "layers": model.to_dict()["layers"]})
        cost = model.cost(seq_len)
        found.append(Matched(name, tree, model, cost, figure(cost, config.match), target))
    return found


def _nearest(model: ModelConfig, match: MatchConfig, target: float, seq_len: int) -> ModelConfig:
    """The model at the widths whose figure comes nearest to the target."""

    def off(candidate: ModelConfig) -> float:
        return abs(figure(candidate.cost(seq_len), match) / target - 1)

    if off(model) <= SLACK:
        return model
    tried: list[tuple[float, int, ModelConfig]] = []
    for d_model in _widths(model, match, target, seq_len):
        wide = at_width(model, d_model)
        if wide is None:
            continue
        best = _tuned(wide, match, target, seq_len)
        error = off(best)
        tried.append((max(error, SLACK), abs(d_model - model.d_model), best))
    if not tried:
        raise UserError(
            f"no width in steps of {match.step} can be built with these heads; set match.step to a multiple of the "
            "number of heads"
        )
    return min(tried, key=lambda found: found[:2])[2]


def _widths(model: ModelConfig, match: MatchConfig, target: float, seq_len: int) -> list[int]:
    """Legal widths around the one that meets the target; the figure grows with the width."""
    widths = list(range(match.step, 8 * model.d_model + 1, match.step))
    low, high = 0, len(widths) - 1
    while low < high:
        middle = (low + high) // 2
        wide = next((w for w in (at_width(model, width) for width in widths[middle:]) if w is not None), None)
        if wide is None or figure(wide.cost(seq_len), match) >= target:
            high = middle
        else:
            low = middle + 1
    return widths[max(0, low - 4) : low + 5]


def at_width(model: ModelConfig, d_model: int) -> ModelConfig | None:
    """The model at another width, or None where that cannot be built."""
    tree = model.to_dict() | {"d_model": d_model}
    ratio = d_model / model.d_model
    for group in tree["layers"]:
        for block in group["pattern"]:
            channel = block.get("channel")
            if channel and channel.get("d_hidden") is not None:
                channel["d_hidden"] = max(HIDDEN_STEP, round(channel["d_hidden"] * ratio / HIDDEN_STEP) * HIDDEN_STEP)
    try:
        wide = validate(ModelConfig, tree)
        wide.build("meta")
    except UserError:
        return None
    return wide


def _tuned(model: ModelConfig, match: MatchConfig, target: float, seq_len: int) -> ModelConfig:
    """The model with the hidden width of its channel mixers moved towards the target, within what is allowed."""
    nominal = [_hidden(block.channel, model.d_model) for block in model.blocks()]
    if not any(nominal) or match.hidden_freedom == 0:
        return model
    best, best_error = model, abs(figure(model.cost(seq_len), match) / target - 1)
    low, high = 1 - match.hidden_freedom, 1 + match.hidden_freedom
    for _ in range(12):
        scale = (low + high) / 2
        scaled = _with_hidden(model, scale)
        if scaled is None:
            return best
        value = figure(scaled.cost(seq_len), match)
        if abs(value / target - 1) < best_error:
            best, best_error = scaled, abs(value / target - 1)
        low, high = (scale, high) if value < target else (low, scale)
    return best


def _hidden(channel: Any, d_model: int) -> int | None:
    """The hidden width of a channel mixer that has one."""
    if channel is None or "d_hidden" not in type(channel).model_fields:
        return None
    width = getattr(channel, "width", None)
    return channel.d_hidden or (width(d_model) if width is not None else None)


def _with_hidden(model: ModelConfig, scale: float) -> ModelConfig | None:
    tree = model.to_dict()
    blocks = iter(model.blocks())
    for group in tree["layers"]:
        for _ in range(group["repeat"]):
            for block in group["pattern"]:
                hidden = _hidden(next(blocks).channel, model.d_model)
                if hidden is not None:
                    block["channel"]["d_hidden"] = max(HIDDEN_STEP, round(hidden * scale / HIDDEN_STEP) * HIDDEN_STEP)
    try:
        return validate(ModelConfig, tree)
    except UserError:
        return None
