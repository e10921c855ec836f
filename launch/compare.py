"""usage: compare.py CONFIG.yaml [key=value ...] [--solve] [--report]

The bake-off: train every candidate with the same tokens in the same order, measure it, and write one table and plots.

  python launch/compare.py configs/bakeoff/stdlib.yaml
  python launch/compare.py configs/bakeoff/stdlib.yaml seeds=[0] jobs=2 run.train.tokens=100k
  python launch/compare.py configs/bakeoff/stdlib.yaml --solve

  --solve    print the widths and what they match, then stop; nothing is trained
  --report   make the table and plots again from the runs that are there

Each candidate is laid over a base run (`base`, `run`); `match` chooses widths so that parameters or FLOPs are equal.
The trainings are ordinary runs in runs/<name>/<candidate>-s<seed>. With `recall`, one block of each is also trained on
associative recall. The same command again goes on where it was: a finished run is not repeated, a killed one resumes. A
candidate that fails is reported and the others go on.
Results: runs/<name>/<name>.md, .json and .png, copied to `out=FOLDER` if given.
Exit codes: 0 done, 1 some candidate failed, 2 a mistake in the config, 75 stopped by SIGTERM or Ctrl-C: the trainings
have been saved, the same command goes on.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from launch._cli import run


def main(argv: list[str]) -> int:
    """Compare."""
    from evals.compare.config import CompareConfig
    from evals.compare.recall import recall_all
    from evals.compare.report import summarise, table, write
    from evals.compare.runs import found_run, locked, refuse_foreign, run_config, train_all
    from evals.compare.solve import solve
    from llm.config.load import load_config
    from llm.core.errors import UserError

    options = {argument for argument in argv if argument.startswith("-")}
    if unknown := sorted(options - {"--solve", "--report"}):
        raise UserError(f"unknown option {unknown[0]!r}; allowed: --solve, --report (see --help)")
    config = load_config(CompareConfig, [argument for argument in argv if argument not in options])
    candidates = solve(config, _vocab_size(config))
    for found in candidates:
        blocks = (found.cost.blocks + found.cost.wrappers).params
        line = (
            f"{found.name:<28} width {found.model.d_model:>5}  blocks {blocks:>12,}  all {found.cost.total.params:>12,}"
        )
        print(line + ("" if found.reached is None else f"  off by {found.mismatch:+.2%}"))
    if "--solve" in options:
        return 0
    folder = Path(config.runs_dir) / config.name
    recalled: dict[str, dict[str, Any]] = {}

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    pairs = [(found, seed) for seed in config.seeds for found in candidates]
    for found, seed in pairs:
        refuse_foreign(run_config(config, found, seed))
    if "--report" in options:
        runs = [found_run(config, found, seed) for found, seed in pairs]
        recalled = recall_all(config, candidates, log, train=False)
    else:
        try:
            with locked(folder):
                runs = train_all(config, candidates, log)
                recalled = recall_all(config, candidates, log, train=True)
        except KeyboardInterrupt:
            print("compare: stopped; the same command goes on", file=sys.stderr)
            return 75
    measured = {found.name: _measured(found, config, folder) for found in candidates}
    result = summarise(config, candidates, runs, measured, recalled)
    write(result, folder)
    if config.out is not None:
        write(result, Path(config.out))
    print(table(result))
    return 1 if any(found.error for found in runs) else 0


def _measured(found: Any, config: Any, folder: Path) -> dict[str, Any]:
    """Speed and state of a candidate, kept in a file so that a rerun need not measure it again."""
    import json

    from evals.compare.measure import measure
    from llm.config.load import config_hash

    path = folder / "measured" / f"{found.name}-{config_hash(found.model)}-{config_hash(config.measure)}.json"
    if not path.exists():
        print(f"measuring {found.name}", file=sys.stderr, flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(measure(found.model, config.measure)), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def _vocab_size(config: Any) -> int:
    """The vocabulary size of the prepared data."""
    from evals.compare.solve import base_tree
    from llm.config.load import validate
    from llm.data.config import DataConfig
    from llm.data.loader import Loader

    data = validate(DataConfig, base_tree(config).get("data") or {})
    return Loader(
        data, split="train", sequences_per_step=1, micro_batch_size=1, rank=0, world_size=1, seed=0
    ).vocab_size


if __name__ == "__main__":
    run(main, prog="compare", doc=__doc__)
