"""usage: python -m evals.synthetic TASK [preset=small] [key=value ...]

Train small models on a synthetic task and print one table and a last line of JSON.

  python -m evals.synthetic mqar preset=small
  python -m evals.synthetic mqar preset=small 'mixer=[attention, {type: attention, window: 16}]'
  python -m evals.synthetic needle preset=small 'train.lengths=[256,512]'
  python -m evals.synthetic regression task.d=5 task.noise=0.1 'seeds=[0,1,2]'

tasks:
{tasks}

keys:
  preset=small       minutes of one CPU core for each model; without it, the setting of the paper
  task.KEY=          difficulty of the task
  mixer=attention    a registered mixer, or a list: one row of the table for each; it takes the place of mixers that
                     the model gives by a bare name
  model.KEY=         the model around it (default: 2 layers, d_model 64, SwiGLU); model.wrappers=[...] adds wrappers
  train.KEY=         steps batch optimizer lr adam_lr warmup weight_decay clip_norm stop_at eval_every eval_examples
                     precision device, and lengths: longer sequences to which the trained model is put
  lrs=[]             learning rates to try, of which the best is shown (default: train.lr alone)
  seeds=[0]          to average over; every model of a seed sees the same examples
  num_threads=1      CPU threads

A mixer that must have n_heads and is given none gets d_model / 32. cpu s: processor time of training. state: bytes of
the decode state of one sequence at the task's length, in fp32.
Exit codes: 0 done, 2 a mistake in the arguments.
"""

from __future__ import annotations

import json

from evals.command import run_command
from evals.synthetic.base import TASKS
from evals.synthetic.run import load, run, table


def usage() -> str:
    """The text of --help."""
    tasks = "\n".join(f"  {e.name:<18} {e.about.equation if e.about else ''}" for e in TASKS.entries())
    return str(__doc__).replace("{tasks}", tasks).strip()


def main(argv: list[str]) -> int:
    """Run the command."""
    if {"-h", "--help"} & set(argv):
        print(usage())
        return 0
    record = run(load(argv))
    print(table(record))
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    run_command(main, "synthetic")
