"""A run under tasks of lm-evaluation-harness: options, results, table."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from llm.config.base import Config, Count
from llm.core.errors import UserError
from llm.generate.quantize import Quantize


def _as_list(value: object) -> object:
    return value if isinstance(value, list) else [value]


class HarnessOptions(Config):
    """run: a run folder, a checkpoint or a Hugging Face folder. tasks: names of lm-eval, or of YAML files below
    include_path. offline: no task may fetch anything. The rest as of the model (`evals/harness/model.py`) and of
    lm-eval."""

    run: str
    tasks: Annotated[list[str], BeforeValidator(_as_list)] = Field(min_length=1)
    include_path: str | None = None
    limit: float | None = Field(None, gt=0)
    num_fewshot: int | None = Field(None, ge=0)
    gen_kwargs: dict[str, Any] = {}
    offline: bool = False
    tokenizer: str | None = None
    max_length: Count | None = Field(None, ge=2)
    batch_size: Count | Literal["auto"] = "auto"
    batch_tokens: Count = Field(16384, ge=1)
    chunk: Count = Field(1024, ge=1)
    add_bos_token: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    quantize: Quantize = "none"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    num_threads: int | None = Field(None, ge=1)
    out: str | None = None


def import_lm_eval() -> Any:
    """lm_eval with our model registered; UserError where it is not installed."""
    try:
        import lm_eval.models  # noqa: F401
        from lm_eval import evaluator, tasks
    except ImportError as error:
        raise UserError(f"the harness needs lm-eval ({error}): pip install 'manyformer[eval]'") from error
    import evals.harness.model  # noqa: F401

    return evaluator, tasks


def run_harness(options: HarnessOptions) -> dict[str, Any]:
    """Evaluate, print lm-eval's table on stderr, write the results; returns them without the samples (rank 0; {} on the
    others)."""
    if options.offline:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    evaluator, tasks = import_lm_eval()
    from lm_eval.utils import make_table

    from evals.harness.model import ManyformerLM

    if options.include_path is not None and not Path(options.include_path).is_dir():
        raise UserError(f"include_path is {options.include_path!r}, which is no folder; name one with YAML tasks")
    manager, names = _find_tasks(tasks, options)
    own = (
        "tokenizer", "max_length", "batch_size", "batch_tokens", "chunk", "add_bos_token", "precision", "quantize",
        "device", "seed", "num_threads",
    )  # fmt: skip
    model = ManyformerLM(options.run, **{name: getattr(options, name) for name in own})
    limit = int(options.limit) if options.limit is not None and options.limit >= 1 else options.limit
    found = evaluator.simple_evaluate(
        model,
        tasks=names,
        task_manager=manager,
        limit=limit,
        num_fewshot=options.num_fewshot,
        gen_kwargs=options.gen_kwargs or None,
        random_seed=options.seed,
        log_samples=True,
    )
    # Counts of all processes.
    cut = model.gather_object({**model.n_truncated, "tokens": model.n_truncated_tokens})
    if found is None or cut is None:
        return {}
    truncated = {name: sum(part[name] for part in cut) for name in cut[0]}
    samples = found.pop("samples", {})
    result = json.loads(json.dumps(found, default=str))
    result |= {"model": options.run, "truncated": truncated, "world_size": model.world_size}
    result["conditions"] = model.get_model_info() | {"tasks": names, "limit": limit}
    print(make_table(found), file=sys.stderr)
    n_cut = truncated["loglikelihood"] + truncated["generate_until"]
    if n_cut:
        print(
            f"{n_cut} requests were longer than {model.max_length} tokens and lost {truncated['tokens']} on the left",
            file=sys.stderr,
        )
    _write(options, result, samples)
    return result


def _find_tasks(tasks: Any, options: HarnessOptions) -> tuple[Any, list[str]]:
    """(lm-eval's manager, names of the tasks). lm-eval's own tasks, which take seconds to list, are looked at when some
    are not below include_path."""
    for defaults in (False, True) if options.include_path is not None else (True,):
        manager = tasks.TaskManager(include_path=options.include_path, include_defaults=defaults)
        found = {name: manager.match_tasks([name]) for name in options.tasks}
        if all(found.values()):
            return manager, list(dict.fromkeys(task for own in found.values() for task in own))
    missing = next(name for name, own in found.items() if not own)
    raise UserError(f"lm-eval has no task {missing!r}; python -m evals.harness ls tasks lists all")


def _write(options: HarnessOptions, result: dict[str, Any], samples: dict[str, Any]) -> None:
    """results.json and samples-TASK.jsonl."""
    path = Path(options.run)
    if path.parent.name == "checkpoints":
        path = path.parent.parent
    folder = Path(options.out) if options.out is not None else path / "harness"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        for task, rows in samples.items():
            lines = "".join(json.dumps(row, default=str, ensure_ascii=False) + "\n" for row in rows)
            name = re.sub(r"[^\w.-]", "_", task)
            (folder / f"samples-{name}.jsonl").write_text(lines, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the results to {folder}: {error.strerror or error}") from error
    print(f"wrote {folder}", file=sys.stderr)
