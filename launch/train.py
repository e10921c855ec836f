"""usage: train.py CONFIG.yaml [key=value ...] [--check]

Train a model. The same command again resumes from the last good checkpoint of the run, `runs/<name>/`.

  python launch/train.py configs/run/quickstart.yaml
  python launch/train.py configs/run/quickstart.yaml name=second optim.lr=1e-3 train.steps=500
  torchrun --nproc-per-node 8 launch/train.py configs/run/quickstart.yaml parallel.strategy=fsdp2

  --check   build on the meta device, validate, open the data, write a probe file, estimate the memory and run one
            step of the largest shape, then stop; nothing is trained or saved

A run writes config.yaml (resolved), metrics.jsonl, checkpoints/step-NNNNNNNNN/ and report.html.
Exit codes: 0 done, 2 a mistake in config or input, 75 saved after SIGTERM, SIGINT or SIGUSR1 (run it again to go on).
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from launch._cli import EXIT_REQUEUE, run


def main(argv: list[str]) -> int:
    """Train, or check."""
    from llm.config.load import load_config
    from llm.core.errors import UserError
    from llm.train.config import RunConfig
    from llm.train.setup import build_trainer

    wants_check = "--check" in argv
    unknown = [argument for argument in argv if argument.startswith("-") and argument != "--check"]
    if unknown:
        raise UserError(
            f"unknown option {unknown[0]!r}; the only one is --check, config values are given as key=value (see --help)"
        )
    config = load_config(RunConfig, [argument for argument in argv if argument != "--check"])
    if wants_check:
        from llm.train.check import check_run

        check_run(config)
        return 0
    trainer = build_trainer(config)
    try:
        result = trainer.fit()
    finally:
        trainer.strategy.close()
    return EXIT_REQUEUE if result.reason == "signal" else 0


if __name__ == "__main__":
    run(main, prog="train", doc=__doc__)
