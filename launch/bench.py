"""usage: bench.py train [key=value ...] [--peer transformers]
       bench.py generate run=RUN text=FILE [key=value ...] [--peer transformers]

Measure the speed of training, or of generation; prints one JSON line for each shape (or batch size) and implementation,
with its conditions.

  python launch/bench.py train                                    the shapes that fit this machine
  python launch/bench.py train shapes=[llama-124m] --peer transformers
  python launch/bench.py train shapes=[llama-360m,llama-1.3b] seq_len=2048 batch=8
  python launch/bench.py train shapes=tiny compile=false          a minute on a CPU

Shapes: tiny, llama-124m, llama-360m, llama-1.3b (vocabulary 50,304, tied).
Keys: shapes seq_len batch micro_batch_size steps warmup precision compile activation_checkpointing loss_chunk device
      checkpoint verify peer tolerance seed; or a YAML file with them.

  python launch/bench.py generate run=runs/quickstart text=README.md batch=[1,8] --peer transformers
  python launch/bench.py generate run=runs/quickstart text=README.md precision=[fp32,bf16] quantize=[int8]
  python launch/bench.py generate run=runs/nested-0.6m text=README.md drafters=[slice:1/8,lookup] draft_tokens=[1,2,4,8]

generate: greedy decoding of pieces of a text by all implementations in turns; "times_plain" is the speed relative to
plain decoding, "same_tokens" whether the output is that of plain decoding.
Keys: run text n_prompts prompt_tokens new_tokens batch rounds precision quantize compile peer drafters draft_tokens
      num_threads device

train: the whole trainer is timed: loader, loss, optimizer, metrics and, unless checkpoint=false, one background save.
"correct" is true when all losses are finite and the first ones equal those of the plain path (fp32, eager, reference
kernels). mfu counts causal attention half, as it is executed, against the dense bf16 peak; it is 0 on hardware whose
peak is not known.
Exit codes: 0 all correct, 1 a shape of train failed or was wrong, 2 a mistake in the arguments.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from launch._cli import run


def main(argv: list[str]) -> int:
    """Measure and print."""
    from llm.config.load import load_config
    from llm.core.errors import UserError
    from llm.train.bench import BenchConfig, bench_train, to_line

    if not argv or argv[0] not in ("train", "generate"):
        given = argv[0] if argv else "nothing"
        raise UserError(f"what to measure must come first: given {given!r} (allowed: train, generate)")
    if argv[0] == "generate":
        from evals.generation_speed import GenerateBenchConfig, bench_generate

        for record in bench_generate(load_config(GenerateBenchConfig, _peer_as_key(argv[1:]))):
            print(to_line(record), flush=True)
        return 0
    config = load_config(BenchConfig, _peer_as_key(argv[1:]))
    all_correct = True
    for record in bench_train(config):
        print(to_line(record), flush=True)
        all_correct = all_correct and bool(record["correct"])
    return 0 if all_correct else 1


def _peer_as_key(argv: list[str]) -> list[str]:
    """`--peer NAME` written as the key it is."""
    from llm.core.errors import UserError

    rest = list(argv)
    if "--peer" in rest:
        at = rest.index("--peer")
        if at + 1 == len(rest):
            raise UserError("--peer needs a name (allowed: none, transformers)")
        rest[at : at + 2] = [f"peer={rest[at + 1]}"]
    return rest


if __name__ == "__main__":
    run(main, prog="bench", doc=__doc__)
