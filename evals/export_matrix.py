"""python -m evals.export_matrix [python=PATH] [NAME ...]: every registered part, exported, run by transformers alone.

Each variant of each mixer, channel, linear, norm, position, residual style and wrapper stands in a small model of
random weights. The model is exported; one process that does not see this project loads all folders, computes logits at
once and through the cache, generates 64 tokens from prompts of unequal length padded on the left, and saves the model
again, which is loaded again and imported back. python: the interpreter of another environment for that process, which
needs torch, transformers and safetensors. Prints a table in Markdown; exit code 1 if anything differs.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from evals.command import run_command
from llm.blocks.base import CHANNELS, LINEARS, MIXERS, NORMS, POSITIONS, RESIDUALS
from llm.checkpoint.hf import build_model, load_hf
from llm.checkpoint.hf.export import write_json
from llm.checkpoint.hf.parity import check_tokens, logits_of, stepped_logits_of
from llm.checkpoint.hf.remote.bundle import write_bundle
from llm.checkpoint.hf.remote.elsewhere import run
from llm.checkpoint.hf.remote.export import STEPS, planned, remote_config
from llm.checkpoint.hf.weights import write_sharded
from llm.core.init import init_specs, initialise
from llm.generate import Engine, Sampling
from llm.models.config import ModelConfig
from llm.models.wrappers.base import WRAPPERS

KINDS: dict[str, Any] = {
    "mixer": MIXERS,
    "channel": CHANNELS,
    "linear": LINEARS,
    "norm": NORMS,
    "position": POSITIONS,
    "residual": RESIDUALS,
    "wrapper": WRAPPERS,
}
N_NEW = 64
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2]]


@dataclass
class Row:
    """One part. relative, cached: largest difference of logits over the largest logit, at once and token by token.
    generated: tokens that are the same as our engine's, of `n_tokens`. saved, back: whether the model saved again
    gives the same logits and its tensors come back to the bit. error: what went wrong, if anything."""

    kind: str
    name: str
    relative: float = float("nan")
    cached: float = float("nan")
    generated: int = 0
    n_tokens: int = 0
    saved: bool = False
    back: bool = False
    error: str | None = None

    @property
    def good(self) -> bool:
        """Whether everything is as it should be."""
        near = self.relative <= 1e-5 and self.cached <= 1e-5
        return self.error is None and near and self.generated == self.n_tokens > 0 and self.saved and self.back

    def line(self) -> str:
        """A row of the table."""
        found = [f"{self.relative:.1e}", f"{self.cached:.1e}", f"{self.generated}/{self.n_tokens}"]
        found += ["yes" if self.saved else "NO", "yes" if self.back else "NO"]
        return f"| {self.kind} | {self.name} | {' | '.join(found)} | {self.error or ''} |"


def cases(*, main_only: bool = False) -> dict[tuple[str, str], ModelConfig]:
    """(kind, label of a variant) -> a small model with it."""
    found = {}
    for kind, registry in KINDS.items():
        for entry in registry.entries():
            variants = {entry.name: entry.tiny} if main_only else entry.variants()
            for label, make in variants.items():
                found[kind, label] = small_model(kind, make())
    return found


def small_model(kind: str, part: Any) -> ModelConfig:
    """A decoder of two layers and width 32 with one part of the kind; softmax attention and SwiGLU elsewhere."""
    block: dict[str, Any] = {"mixer": MIXERS.entry("attention").tiny(), "channel": CHANNELS.entry("swiglu").tiny()}
    fields: dict[str, Any] = {"vocab_size": 29, "d_model": 32, "max_seq_len": 128}
    if kind in ("mixer", "channel", "residual"):
        block[kind] = part
    elif kind == "linear":
        fields["linear"] = {"*": part}
    elif kind == "wrapper":
        fields["wrappers"] = [part]
    else:
        fields[kind] = part
    return ModelConfig.model_validate(fields | {"layers": [{"pattern": [block], "repeat": 2}]})


def weights(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Start values by name, with some noise on what starts constant."""
    model = config.build("cpu")
    initialise(model, seed)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng), alpha=0.05)
    return {name: tensor.detach().clone() for name, tensor, _ in init_specs(model)}


def matrix(
    chosen: dict[tuple[str, str], ModelConfig], folder: Path, python: str | None = None
) -> tuple[list[Row], list[str]]:
    """(a row for each model, watched packages that the other process imported)."""
    jobs: list[dict[str, Any]] = []
    rows = [Row(kind, label) for kind, label in chosen]
    held: list[tuple[ModelConfig, dict[str, Tensor]]] = []
    for number, config in enumerate(chosen.values()):
        tensors = weights(config)
        held.append((config, tensors))
        out = folder / f"export-{number}"
        out.mkdir(parents=True)
        write_sharded(out, list(planned(config, tensors)), torch.float32, 10**9)
        write_bundle(config, out)
        write_json(out / "config.json", remote_config(config) | {"dtype": "float32"})
        save_file({"tokens": check_tokens(29, 48)}, out / "tokens.safetensors.given")
        jobs.append(
            {
                "folder": str(out),
                "tokens": str(out / "tokens.safetensors.given"),
                "logits": str(folder / f"logits-{number}.safetensors"),
                "steps": STEPS,
                "prompts": PROMPTS,
                "n_new": N_NEW,
                "save_to": str(folder / f"again-{number}"),
            }
        )
    results, foreign = run(jobs, python)
    for row, job, (config, tensors), result in zip(rows, jobs, held, results, strict=True):
        if "error" in result:
            row.error = result["error"]
            print(result["trace"], file=sys.stderr)
            continue
        _compare(row, job, config, tensors, result)
    return rows, foreign


def _compare(row: Row, job: dict[str, Any], config: ModelConfig, tensors: dict[str, Tensor], result: Any) -> None:
    model = build_model(config, tensors)
    mine = logits_of(model, check_tokens(29, 48))
    theirs = load_file(job["logits"])
    row.relative = float((theirs["logits"] - mine).abs().max() / mine.abs().max())
    stepped = stepped_logits_of(model, check_tokens(29, 48), STEPS)
    row.cached = float((theirs["cached"] - stepped).abs().max() / stepped.abs().max())
    sampling = Sampling(temperature=0, max_new_tokens=N_NEW)
    wanted = [completion.tokens for completion in Engine(model).generate(PROMPTS, sampling)]
    pairs = [(a, b) for ours, got in zip(wanted, result["generated"], strict=True) for a, b in zip(ours, got)]
    row.n_tokens = N_NEW * len(PROMPTS)
    row.generated = sum(a == b for a, b in pairs)
    row.saved = result["saved_equal"]
    again, back = load_hf(job["save_to"])
    row.back = again == config and all(torch.equal(tensor, tensors[name]) for name, tensor in back.items())


def table(rows: Iterable[Row]) -> str:
    """All rows in Markdown."""
    names = ["kind", "part", "logits", "through the cache", "same tokens", "saved again", "back to the bit", ""]
    head = f"| {' | '.join(names)} |\n{'|---' * len(names)}|"
    return "\n".join([head, *(row.line() for row in rows)])


def main(argv: list[str]) -> int:
    """Run the command."""
    torch.set_num_threads(1)
    other = [word for word in argv if word.startswith("python=")]
    names = [word for word in argv if word not in other]
    chosen = {key: config for key, config in cases().items() if not names or key[1].split("-")[0] in names}
    with tempfile.TemporaryDirectory(prefix="export-matrix-") as folder:
        rows, foreign = matrix(chosen, Path(folder), other[-1].removeprefix("python=") if other else None)
    print(table(rows))
    good = sum(row.good for row in rows)
    print(
        f"\n{good} of {len(rows)} as they should be; of pydantic, omegaconf and triton the process imported: {foreign}"
    )
    return 0 if good == len(rows) else 1


if __name__ == "__main__":
    run_command(main, "export_matrix")
