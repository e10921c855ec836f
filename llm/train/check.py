"""`train.py --check`: everything that can fail before the queue, without training or saving anything."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from llm.core.errors import UserError
from llm.parallel.mesh import find_place
from llm.train.config import RunConfig
from llm.train.estimate import estimate_memory
from llm.train.setup import build_trainer


def probe_writable(folder: Path) -> None:
    """Write, sync and remove a small file in `folder`, which is made if need be."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as file:
            file.write(b"probe")
            file.flush()
            os.fsync(file.fileno())
        probe.unlink()
    except OSError as error:
        raise UserError(f"runs_dir {folder} cannot be written to ({error.strerror}); give another runs_dir") from error


def check_run(run: RunConfig) -> None:
    """Validate a run and do one whole step of its largest shape; prints what was found, raises UserError otherwise."""
    run_dir = Path(run.runs_dir) / run.name
    if find_place(run.train.device).rank == 0:
        existed = run_dir.exists()
        probe_writable(run_dir)
        if not existed:
            run_dir.rmdir()
    with tempfile.TemporaryDirectory(prefix="manyformer-check-") as scratch:
        quiet = run.log.replace(progress=False, tensorboard=False, wandb=False, report=False)
        trainer = build_trainer(
            run.replace(runs_dir=scratch, log=quiet, checkpoint=run.checkpoint.replace(resume="never"))
        )
        try:
            started = time.perf_counter()
            out, decision, _ = trainer.train_step(next(iter(trainer.loader)))
            seconds = time.perf_counter() - started
            if trainer.is_main:
                cost = trainer.run.model.cost(run.data.seq_len).total
                print(f"config      ok: {trainer.total_steps} steps, {trainer.total_tokens:,} tokens")
                print(f"model       ok: {cost.params:,} parameters ({cost.active_params:,} active)")
                print(f"compute     {3 * cost.flops_per_token:,.0f} FLOPs per trained token")
                estimate = estimate_memory(trainer.run, run.train.activation_checkpointing, trainer.strategy.world_size)
                print(f"memory      {estimate.total / 2**20:,.0f} MiB per rank at the peak of a step (estimated)")
                print(f"data        ok: fingerprint {trainer.loader.fingerprint()[:12]}")
                print(f"runs folder ok: {run_dir}")
                print(f"dry step    {'ok' if decision == 'ok' else decision}: loss {out.loss:.4f}, {seconds:.1f} s")
        finally:
            trainer.strategy.close()
