"""usage: estimate.py CONFIG.yaml [key=value ...] [world_size=N] [--json]

What a training run would cost, without its hardware or its data: parameters, FLOPs per token, decode state, and the
memory of one rank by part for each kind of activation checkpointing.

  python launch/estimate.py configs/run/quickstart.yaml
  python launch/estimate.py configs/run/quickstart.yaml parallel.strategy=fsdp2 world_size=8 train.micro_batch_size=4
  python launch/estimate.py configs/run/quickstart.yaml --json

  world_size=N   number of processes (default 1)
  --json         one JSON object instead of tables

Memory is what tensors hold at the peak of a step, found by running one step on tensors without data; kernels' own
scratch space and the allocator's fragmentation come on top (5 to 15 percent on CUDA is usual). torch.compile mostly
needs less than this.
Exit codes: 0 done, 2 a mistake in the config.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from launch._cli import run


def main(argv: list[str]) -> int:
    """Print the estimate of a config."""
    import json

    from llm.config.load import load_config
    from llm.core.errors import UserError
    from llm.train.config import RunConfig
    from llm.train.estimate import estimate

    as_json = "--json" in argv
    world_size, rest = 1, []
    for argument in argv:
        if argument.startswith("world_size="):
            text = argument.partition("=")[2]
            if not text.isdecimal() or int(text) < 1:
                raise UserError(f"world_size must be a whole number from 1, given {text!r}; write e.g. world_size=8")
            world_size = int(text)
        elif argument != "--json":
            rest.append(argument)
    config = load_config(RunConfig, rest)
    if config.model.vocab_size is None:
        config = config.replace(model=config.model.replace(vocab_size=_vocab_size(config)))
    found = estimate(config, world_size)
    if as_json:
        print(json.dumps(found))
    else:
        _print(found)
    return 0


def _vocab_size(config: Any) -> int:
    """The vocabulary size of the prepared data, when it is there."""
    from llm.core.errors import UserError
    from llm.data.loader import Loader

    try:
        loader = Loader(
            config.data, split="train", sequences_per_step=1, micro_batch_size=1, rank=0, world_size=1, seed=0
        )
    except UserError as error:
        raise UserError(
            f"model.vocab_size is not given and cannot be taken from the data ({error}); set model.vocab_size=N"
        ) from error
    return loader.vocab_size


def _print(found: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    facts.add_column(style="dim")
    facts.add_column(justify="right")
    for label, value in (
        ("parameters", f"{found['parameters']:,}"),
        ("active parameters per token", f"{found['active_parameters']:,}"),
        (f"forward FLOPs per token at {found['seq_len']:,}", f"{found['forward_flops_per_token']:,.0f}"),
        ("  of which depend on the context", f"{found['attention_flops_per_token']:,.0f}"),
        ("training FLOPs per token", f"{found['training_flops_per_token']:,.0f}"),
        ("training FLOPs of the run", f"{found['training_flops']:.3e}"),
        ("tokens of the run", f"{found['tokens']:,}"),
        (f"decode state of one sequence of {found['seq_len']:,}", _size(found["decode_state_bytes_per_sequence"])),
    ):
        facts.add_row(label, value)
    console.print(f"[bold]{found['name']}[/]")
    console.print(facts)
    memory = found["memory_per_rank"]
    ranks = f"{found['world_size']} rank{'s' if found['world_size'] > 1 else ''}"
    table = Table(
        title=f"memory per rank: {found['strategy']} on {ranks}, {found['precision']}, "
        f"{found['micro_batch_size']} sequences at a time",
        title_justify="left", box=box.SIMPLE_HEAD,
    )  # fmt: skip
    table.add_column("activation checkpointing")
    for mode in memory:
        chosen = mode == found["activation_checkpointing"]
        table.add_column(f"{mode} (chosen)" if chosen else mode, justify="right", style="bold" if chosen else None)
    rows = list(next(iter(memory.values())))
    for part in rows:
        if part not in ("total", "host") and not any(column[part] for column in memory.values()):
            continue
        label = "total on the host" if part == "host" else part
        sizes = [_size(column.get(part, 0)) for column in memory.values()]
        table.add_row(label, *sizes, style="bold" if part == "total" else None)
    console.print(table)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"


if __name__ == "__main__":
    run(main, prog="estimate", doc=__doc__)
