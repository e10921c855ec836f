"""usage: python -m evals.nested_experiment [--steps N] [--data DIR] [--work DIR] [--jobs N] [--tokens N] [--seed S]

Nested models against separately trained ones (MatFormer): a small language model over bytes of Python with a
feed-forward width of 96, 192, 384 or 768 (S, M, L, XL). Seven runs from configs/run/nested-0.6m.yaml:

  separate S, M, L, XL   each trained by itself for --steps (1000)
  summed                 nested, all four widths in every step
  sampled                nested, one width drawn for each step
  sampled, 2x steps      the same for twice the steps, still half of the compute of `summed`

and the separate XL cut to the smaller widths without nested training. Held-out loss in nats per byte, training compute,
and how often a slice predicts the token that the whole does. Three directions are judged on `summed`: S is at most 2%
worse than the separate S, the cut XL has at least twice its loss, and S agrees with XL by 0.05 more than the separate
models do.

--data: prepared bytes (default: the standard library, prepared in the work folder). --work: folder of the runs; what is
there already is not repeated, and an interrupted run goes on (default: runs/nested-experiment). --jobs: runs at a time,
one thread each (2). --tokens: held-out tokens (40000). All seven take about ten minutes on two CPU cores.

Prints a table and a last line of JSON; exit code 1 when a direction does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evals.command import run_command
from evals.consistency import windows
from evals.text import open_text
from llm.checkpoint import load_meta, load_model_tensors, resolve_checkpoint
from llm.checkpoint.hf.build import build_model
from llm.core.errors import UserError
from llm.core.seq import SeqInfo
from llm.generate.load import load_model
from llm.models.config import ModelConfig
from llm.models.nesting import at_widths

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "run" / "nested-0.6m.yaml"
WIDTHS = {"S": 96, "M": 192, "L": 384, "XL": 768}
MIXES = ([192, 384, 384], [300, 300, 300], [96, 384, 768], [768, 96, 96])
"""A gentle mixture, a width that was never trained, a steep one and a falling one."""
MARGIN, CUT, AGREEMENT = 1.02, 2.0, 0.05


def arms(steps: int) -> dict[str, list[str]]:
    """Name of a run -> its overrides."""
    channel = "model.layers.0.pattern.0.channel"
    found = {
        f"separate-{size}": ["model.wrappers=[]", f"{channel}={{type: mlp, d_hidden: {width}}}", f"train.steps={steps}"]
        for size, width in WIDTHS.items()
    }
    found["summed"] = ["model.wrappers=[{type: nested, objective: summed}]", f"train.steps={steps}"]
    found["sampled"] = [f"train.steps={steps}"]
    found["sampled-2x"] = [f"train.steps={2 * steps}"]
    return found


def command(script: str, arguments: list[str], log: Path) -> None:
    """Run a command as a user does, in one thread; UserError with the end of its output when it fails."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, str(ROOT / "launch" / script), *arguments]
    with log.open("w") as out:
        done = subprocess.run(words, env=env, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
    if done.returncode:
        last = "\n".join(log.read_text().splitlines()[-8:])
        raise UserError(f"{script} {' '.join(arguments)} ended with code {done.returncode}:\n{last}")


def prepare(work: Path) -> Path:
    """The bytes of the standard library."""
    data = work / "data"
    if not (data / "manifest.json").is_file():
        config = str(ROOT / "configs" / "prepare" / "stdlib-bytes.yaml")
        command("prepare.py", [config, f"out={data}", "workers=1", "overwrite=true"], work / "prepare.log")
    return data


def trained_steps(run: Path) -> int:
    """Steps of the last checkpoint of a run; 0 without one."""
    try:
        return int(load_meta(resolve_checkpoint(run))["step"])
    except UserError:
        return 0


def train(name: str, overrides: list[str], steps: int, work: Path, data: Path, seed: int) -> None:
    """Train a run to its end from wherever it is."""
    folder = work / f"{name}-{steps}-seed{seed}"
    began = time.monotonic()
    before = trained_steps(folder)
    if before < steps:
        places = [f"name={folder.name}", f"runs_dir={work}", f"data.path={data}", f"seed={seed}"]
        command("train.py", [str(CONFIG), *overrides, *places], work / f"{folder.name}.log")
    print(f"{name:<12} {steps} steps, {steps - before} of them now, {time.monotonic() - began:.0f} s", flush=True)


@torch.inference_mode()
def measure(model: Any, batches: list[tuple[Tensor, Tensor]], widths: list[int] | None) -> tuple[float, Tensor]:
    """(nats per token, likeliest token at each position [N])."""
    nats, best, n_tokens = 0.0, [], 0
    with at_widths(model, widths):
        for tokens, labels in batches:
            logits = model.head(model(tokens, SeqInfo.contiguous(*tokens.shape)).hidden).float().flatten(0, 1)
            nats += float(F.cross_entropy(logits, labels.flatten(), reduction="sum"))
            best.append(logits.argmax(-1))
            n_tokens += labels.numel()
    return nats / n_tokens, torch.cat(best)


def cut_without_training(run: Path) -> Any:
    """The separate XL as a nested model, whose slices nobody trained."""
    config = load_model(run).model.config
    block = config.blocks()[0]
    channel = {"type": "nested_mlp", "d_hidden": WIDTHS["XL"], "activation": "gelu"}
    nested: dict[str, Any] = {
        **config.to_dict(),
        "layers": [{"pattern": [block.replace(channel=channel)], "repeat": 3}],
    }
    return build_model(ModelConfig.model_validate(nested), load_model_tensors(resolve_checkpoint(run)))


def share(a: Tensor, b: Tensor) -> float:
    """Share of positions with equal tokens."""
    return float((a == b).double().mean())


def report(work: Path, data: Path, steps: int, n_tokens: int, seed: int) -> dict[str, Any]:
    """Measure all runs and print the table."""
    run = {name: work / f"{name}-{2 * steps if name.endswith('2x') else steps}-seed{seed}" for name in arms(steps)}
    models = {name: load_model(folder) for name, folder in run.items()}
    tokenizer = models["summed"].tokenizer
    texts = open_text([str(data)], tokenizer)
    batches = list(windows(texts.documents, tokenizer.start_id, 96, n_tokens, 8192))
    rows: dict[str, dict[str, Any]] = {}

    def compute(name: str) -> float:
        count = 2 * steps if name.endswith("2x") else steps
        return count * models[name].model.config.cost(96).total.flops_per_token

    base = compute("separate-XL")
    alone = {size: measure(models[f"separate-{size}"].model, batches, None) for size in WIDTHS}
    rows["separate"] = {
        **{size: loss for size, (loss, _) in alone.items()},
        "compute": sum(compute(f"separate-{size}") for size in WIDTHS) / base,
        "agreement": share(alone["S"][1], alone["XL"][1]),
    }
    cut = cut_without_training(run["separate-XL"])
    found = {size: measure(cut, batches, [width] * 3) for size, width in WIDTHS.items()}
    assert found["XL"][0] == alone["XL"][0]
    rows["XL cut"] = {
        **{size: loss for size, (loss, _) in found.items()}, "compute": 1.0,
        "agreement": share(found["S"][1], found["XL"][1]),
    }  # fmt: skip
    mixes: dict[str, dict[str, float]] = {}
    for name in ("summed", "sampled", "sampled-2x"):
        model = models[name].model
        found = {size: measure(model, batches, [width] * 3) for size, width in WIDTHS.items()}
        rows[name] = {
            **{size: loss for size, (loss, _) in found.items()}, "compute": compute(name) / base,
            "agreement": share(found["S"][1], found["XL"][1]),
        }  # fmt: skip
        mixes[name] = {str(mix): measure(model, batches, mix)[0] for mix in MIXES}
    print(f"\nheld-out nats per byte, {sum(labels.numel() for _, labels in batches):,} bytes; compute: of separate XL")
    print(f"{'':<12} {'S':>7} {'M':>7} {'L':>7} {'XL':>7} {'compute':>8} {'agreement S, XL':>16}")
    for name, row in rows.items():
        losses = " ".join(f"{row[size]:7.3f}" for size in WIDTHS)
        print(f"{name:<12} {losses} {row['compute']:8.2f} {row['agreement']:16.3f}")
    print("\n" + f"{'mixtures':<16} " + " ".join(f"{name:>11}" for name in mixes))
    for mix in map(str, MIXES):
        print(f"{mix:<16} " + " ".join(f"{losses[mix]:11.3f}" for losses in mixes.values()))
    separate, nested = rows["separate"], rows["summed"]
    held = {
        "summed S against separate S": (nested["S"] / separate["S"], nested["S"] <= MARGIN * separate["S"]),
        "XL cut to S against separate S": (
            rows["XL cut"]["S"] / separate["S"],
            rows["XL cut"]["S"] >= CUT * separate["S"],
        ),
        "agreement of S and XL, summed minus separate": (
            nested["agreement"] - separate["agreement"],
            nested["agreement"] >= separate["agreement"] + AGREEMENT,
        ),
    }
    print()
    for label, (value, good) in held.items():
        print(f"{label:<46} {value:6.3f}  {'holds' if good else 'DOES NOT HOLD'}")
    return {"rows": rows, "mixtures": mixes, "held": {label: good for label, (_, good) in held.items()}}


def main(argv: list[str]) -> int:
    """Run or go on with the experiment."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/nested-experiment"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    data = (given.data or prepare(work)).resolve()
    longest_first = sorted(arms(given.steps).items(), key=lambda arm: arm[0] not in ("summed", "sampled-2x"))
    with ThreadPoolExecutor(given.jobs) as pool:
        jobs = [
            pool.submit(
                train, name, overrides, 2 * given.steps if name.endswith("2x") else given.steps, work, data, given.seed
            )
            for name, overrides in longest_first
        ]
        for job in jobs:
            job.result()
    result = report(work, data, given.steps, given.tokens, given.seed)
    facts = {"tool": "nested_experiment", "steps": given.steps, "seed": given.seed, "torch": torch.__version__}
    facts |= {"python": platform.python_version(), "machine": platform.machine()}
    print(json.dumps(facts | result))
    return 0 if all(result["held"].values()) else 1


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        sys.exit(0)
    run_command(main, "nested_experiment")
