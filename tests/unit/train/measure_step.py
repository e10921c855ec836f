"""Run as a script: train a step of a config for real on the CPU and print the growth of the peak resident set.

argv: the RunConfig as JSON. The strategy, loss and optimizer are the run's own.
"""

from __future__ import annotations

import json
import resource
import sys

import torch

from llm.core.batch import Microbatch
from llm.core.seq import SeqInfo
from llm.parallel.mesh import Place
from llm.train.config import RunConfig
from llm.train.loss import LanguageModelLoss
from llm.train.strategies.single import SingleStrategy


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def peak() -> int:
    """Bytes at the most. Not getrusage's figure, which a process inherits from the one that started it."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def run_steps(run: RunConfig, n: int) -> None:
    strategy = SingleStrategy(Place(rank=0, world_size=1, local_rank=0, device=torch.device("cpu")))
    strategy.setup(run.model.build("meta"), run, run.seed)
    loss = LanguageModelLoss(run.train.z_loss, run.train.loss_chunk)
    sequences = run.train.batch_tokens // run.data.seq_len
    shape = (run.train.micro_batch_size, run.data.seq_len)
    for _ in range(n):
        for _ in range(sequences // run.train.micro_batch_size):
            tokens = torch.randint(run.model.required_vocab_size(), shape)
            with strategy.autocast():
                out = loss(strategy.model, Microbatch(tokens, tokens, SeqInfo.contiguous(*shape)))
            strategy.backward(out.sum / sequences)
            del out, tokens
        strategy.clip(run.optim.clip_norm)
        strategy.step(1.0, skip=False)


def main() -> None:
    torch.set_num_threads(1)
    torch.backends.mkldnn.set_flags(True)
    run = RunConfig.model_validate(json.loads(sys.argv[1]))
    tiny = json.loads(sys.argv[1])
    tiny["data"]["seq_len"], tiny["train"]["micro_batch_size"] = 64, 1
    tiny["train"]["batch_tokens"], tiny["model"]["vocab_size"], tiny["model"]["d_model"] = 64, 64, 64
    run_steps(RunConfig.model_validate(tiny), 1)
    before = resident()
    run_steps(run, 1)
    print(peak() - before)


if __name__ == "__main__":
    main()
