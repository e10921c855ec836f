"""python -m evals.harness.compare_with_hf [run=RUN] [key=value ...]: our adapter beside lm-eval's own `hf` model.

The run is exported to Hugging Face's layout. lm-eval scores the export with transformers and the run itself with our
adapter, on the same three local tasks (`evals/harness/local_tasks.py`) with the same batch size, in turns. Prints all
scores, the largest difference of a log-likelihood over samples, how many outputs are equal, and the seconds within the
calls of each kind. Exit code 1 when scores differ. Without run=, a model of Llama's shape with random weights and a
byte-level BPE of the standard library is made.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from evals.command import run_command
from evals.harness.local_tasks import TASKS, read_library, write_tasks
from evals.harness.run import import_lm_eval
from llm.checkpoint import Checkpointer, TrainState
from llm.checkpoint.hf.export import ExportOptions, export_hf
from llm.config.base import Config, Count
from llm.config.load import load_config
from llm.config.yaml_io import dump_yaml
from llm.core.errors import UserError
from llm.core.init import clean_name, initialise
from llm.data.tokenizer.backend import train_bpe
from llm.generate.load import load_model
from llm.models.config import ModelConfig

CALLS = ("loglikelihood", "loglikelihood_rolling", "generate_until")


class CompareOptions(Config):
    """run: None for a random model of d_model, n_layers, vocab_size, max_seq_len. n: samples of each task. text_chars:
    of each text of the perplexity. rounds: times that both take turns; the shortest time counts."""

    run: str | None = None
    n: Count = Field(32, ge=1)
    text_chars: Count = Field(1500, ge=16)
    batch_size: Count = Field(8, ge=1)
    rounds: Count = Field(1, ge=1)
    num_threads: Count = Field(1, ge=1)
    seed: int = 0
    d_model: Count = Field(512, ge=8)
    n_layers: Count = Field(8, ge=1)
    n_heads: Count = Field(8, ge=1)
    vocab_size: Count = Field(4096, ge=257)
    max_seq_len: Count = Field(512, ge=32)


def write_llama_run(folder: Path, options: CompareOptions) -> Path:
    """A run folder with a random model of Llama's shape."""
    block = {
        "mixer": {"type": "attention", "n_heads": options.n_heads, "n_kv_heads": max(1, options.n_heads // 2)},
        "channel": "swiglu",
    }
    config = ModelConfig.model_validate(
        {
            "vocab_size": options.vocab_size,
            "d_model": options.d_model,
            "max_seq_len": options.max_seq_len,
            "layers": [{"pattern": [block], "repeat": options.n_layers}],
            "init": {"std": 0.08},
        }
    )
    model = config.build("cpu")
    initialise(model, options.seed)
    tensors = {clean_name(name): p.detach() for name, p in model.named_parameters()}
    tree = {"schema_version": 1, "name": folder.name, "model": config.to_dict()}
    checkpointer = Checkpointer(folder / "checkpoints", asynchronous=False, config_yaml=dump_yaml(tree))
    checkpointer.save(TrainState(model=tensors, meta={"tokens": 0}), step=1, tokens=0, kind="final", wait=True)
    train_bpe(read_library(), options.vocab_size).save(folder / "tokenizer")
    return folder


def compare(options: CompareOptions, folder: Path) -> dict[str, Any]:
    """Scores, differences and seconds of both; files go to `folder`."""
    torch.set_num_threads(options.num_threads)
    evaluator, tasks = import_lm_eval()
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UserError(f"lm-eval's hf model is not installed ({error}): pip install accelerate") from error
    from evals.harness.model import ManyformerLM

    run = Path(options.run) if options.run is not None else write_llama_run(folder / "run", options)
    loaded = load_model(run)
    tensors = {name: tensor.detach() for name, tensor in loaded.model.state_dict().items()}
    export_hf(loaded.model.config, tensors, loaded.tokenizer, folder / "hf", ExportOptions())
    manager = tasks.TaskManager(
        include_path=str(write_tasks(folder / "tasks", n=options.n, text_chars=options.text_chars)),
        include_defaults=False,
    )
    models = {
        "hf": HFLM(pretrained=str(folder / "hf"), device="cpu", dtype="float32", batch_size=options.batch_size),
        "ours": ManyformerLM(str(run), device="cpu", batch_size=options.batch_size),
    }
    seconds = {name: dict.fromkeys(CALLS, math.inf) for name in models}
    found: dict[str, Any] = {}
    for _ in range(options.rounds):
        for name, model in models.items():
            spent = _timed(model)
            found[name] = evaluator.simple_evaluate(
                model, tasks=list(TASKS), task_manager=manager, log_samples=True, bootstrap_iters=0
            )
            for call in CALLS:
                delattr(model, call)
                seconds[name][call] = min(seconds[name][call], spent[call])
    difference, n_equal, n_outputs = _differences(found["hf"]["samples"], found["ours"]["samples"])
    return {
        "n_params": sum(p.numel() for p in loaded.model.parameters()),
        "scores": {name: _scores(result["results"]) for name, result in found.items()},
        "logprob_difference": difference,
        "equal_outputs": [n_equal, n_outputs],
        "seconds": seconds,
    }


def _timed(model: Any) -> dict[str, float]:
    """Replace the calls of a model by ones that add up their seconds."""
    spent = dict.fromkeys(CALLS, 0.0)

    def wrap(call: str) -> Any:
        inner = getattr(model, call)

        def timed(requests: Any, **settings: Any) -> Any:
            began = time.perf_counter()
            answers = inner(requests, **settings)
            spent[call] += time.perf_counter() - began
            return answers

        return timed

    for call in CALLS:
        setattr(model, call, wrap(call))
    return spent


def _scores(results: dict[str, Any]) -> dict[str, float]:
    """ "task metric" -> value."""
    return {
        f"{task} {name.split(',')[0]}": float(value)
        for task, own in results.items()
        for name, value in own.items()
        if isinstance(value, (int, float)) and "stderr" not in name and name != "sample_len"
    }


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> tuple[float, int, int]:
    """(largest difference of log-likelihoods over the larger of 1 and its size, equal outputs, outputs)."""
    largest, n_equal, n_outputs = 0.0, 0, 0
    for task, rows in theirs.items():
        for a, b in zip(rows, ours[task], strict=True):
            assert a["doc_id"] == b["doc_id"]
            for (x, *_), (y, *_) in zip(a["resps"], b["resps"], strict=True):
                if isinstance(x, str):
                    n_outputs += 1
                    n_equal += x == y
                    continue
                x, y = (x[0], y[0]) if isinstance(x, (tuple, list)) else (x, y)
                largest = max(largest, abs(float(x) - float(y)) / max(1.0, abs(float(x))))
    return largest, n_equal, n_outputs


def main(argv: list[str]) -> int:
    """Print the comparison."""
    try:
        options = load_config(CompareOptions, argv)
        with tempfile.TemporaryDirectory(prefix="manyformer-harness-") as folder:
            result = compare(options, Path(folder))
    except UserError as error:
        print(f"compare_with_hf: {error}", file=sys.stderr)
        return 2
    print(f"{result['n_params']:,} parameters, batch {options.batch_size}, {options.num_threads} threads, fp32")
    print("| score | lm-eval's hf | ours |\n|---|---|---|")
    theirs, ours = result["scores"]["hf"], result["scores"]["ours"]
    for name, value in theirs.items():
        print(f"| {name} | {value:.6f} | {ours[name]:.6f} |")
    n_equal, n_outputs = result["equal_outputs"]
    print(f"\nlargest relative difference of a log-likelihood {result['logprob_difference']:.1e}; ", end="")
    print(f"equal outputs {n_equal} of {n_outputs}\n")
    print("| call | lm-eval's hf, s | ours, s | ratio |\n|---|---|---|---|")
    for call in CALLS:
        a, b = (result["seconds"][name][call] for name in ("hf", "ours"))
        print(f"| {call} | {a:.2f} | {b:.2f} | {a / b:.2f} |")
    same = all(math.isclose(value, ours[name], rel_tol=1e-4) for name, value in theirs.items())
    return 0 if same and n_equal == n_outputs else 1


if __name__ == "__main__":
    run_command(main, "compare_with_hf")
