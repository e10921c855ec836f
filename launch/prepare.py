"""usage: prepare CONFIG.yaml [key=value ...]

Turn raw text into a folder of prepared data: a tokenizer, token shards in Megatron's indexed format for the splits
train and valid, a manifest, and the file of rejected records. Killed at any moment, the same command goes on.

  python launch/prepare.py configs/prepare/stdlib.yaml out=data/stdlib workers=2
  python launch/prepare.py configs/prepare/text.yaml 'sources.0.paths=[corpus/]' out=data/mine

docs/data.md explains sources, tokenizers and held-out splits.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from launch._cli import run
from llm.config.load import load_config
from llm.data.prepare.config import PrepareConfig
from llm.data.prepare.run import prepare
from llm.data.prepare.summary import summary


def main(argv: list[str]) -> int:
    """Run one preparation and print what came out."""
    config = load_config(PrepareConfig, argv)
    start = time.monotonic()
    manifest = prepare(config)
    print(summary(manifest, config.out, time.monotonic() - start))
    return 0


if __name__ == "__main__":
    run(main, prog="prepare", doc=__doc__)
