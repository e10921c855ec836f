"""`launch/prepare.py`'s work: plan, train the tokenizer, run the tasks in processes, merge, write the manifest."""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import platform
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from llm.core.errors import UserError
from llm.data.prepare.config import PrepareConfig
from llm.data.prepare.merge import Merge
from llm.data.prepare.parts import finished_parts, run_task, write_atomic
from llm.data.prepare.progress import Progress
from llm.data.prepare.source import SPLITS, TRAIN, Context, Piece, Task
from llm.data.store import MANIFEST, read_manifest
from llm.data.tokenizer import Tokenizer, build_tokenizer, load_tokenizer

WORK = ".work"
FORMAT = 1
_NOT_IN_IDENTITY = {"out", "workers", "overwrite"}


def prepare(config: PrepareConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Prepare data as `config` says and return the manifest. What a run that was killed had finished is kept.

    Raises UserError when an input is missing, all records are rejected, the disk is full, or `out` holds other data.
    """
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _locked(out):
            return _Run(config, out, quiet).run()
    except OSError as error:
        raise UserError(
            f"cannot prepare {out}: {error.strerror or error} ({error.filename or 'no file name'})"
        ) from error


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    with open(out / ".lock", "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is preparing {out}; wait for it or choose another out=") from error
        yield


class _Run:
    def __init__(self, config: PrepareConfig, out: Path, quiet: bool) -> None:
        self.config, self.out, self.quiet = config, out, quiet
        self.work = out / WORK

    def run(self) -> dict[str, Any]:
        context = self.config.context
        tasks = [(i, task) for i, source in enumerate(self.config.sources) for task in source.plan(context)]
        identity = self._identity(tasks)
        old = read_manifest(self.out, required=False)
        if old is not None:
            same = old.get("identity") == identity
            if same and self._complete(old):
                shutil.rmtree(self.work, ignore_errors=True)
                return old
            if not same and not self.config.overwrite:
                raise UserError(
                    f"{self.out} holds data prepared from another config or input; "
                    "choose another out= or overwrite=true"
                )
            (self.out / MANIFEST).unlink()
        self._open_work(identity)
        with Progress(sum(task["bytes"] for _, task in tasks), quiet=self.quiet) as progress:
            tokenizer = self._tokenizer(tasks, context, progress)
            self._run_tasks(tasks, progress)
            return self._merge(tasks, tokenizer, identity, progress)

    def _identity(self, tasks: list[tuple[int, Task]]) -> str:
        """Hash of all that the result depends on, save versions of software."""
        config = {name: value for name, value in self.config.to_dict().items() if name not in _NOT_IN_IDENTITY}
        inputs = [
            source.identity([task for i, task in tasks if i == number])
            for number, source in enumerate(self.config.sources)
        ]
        return hashlib.sha256(json.dumps([FORMAT, config, inputs], sort_keys=True).encode()).hexdigest()

    def _complete(self, manifest: dict[str, Any]) -> bool:
        """True when the files of a manifest are there with their sizes."""
        paths = {self.out / name: entry["size"] for name, entry in manifest["files"].items()}
        return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())

    def _open_work(self, identity: str) -> None:
        marker = self.work / "identity"
        if self.work.exists() and (not marker.exists() or marker.read_text() != identity):
            shutil.rmtree(self.work)
        if not self.work.exists():
            self.work.mkdir()
            write_atomic(marker, identity.encode())
        # Files of attempts that were not finished are of no use to anybody.
        named = {part.name[: -len(".json")] for part in self.work.glob("*.json")}
        kept = {json.loads((self.work / f"{name}.json").read_bytes())["attempt"] for name in named}
        for path in self.work.iterdir():
            stem = ".".join(path.name.split(".")[:2])
            if path.suffix in (".bin", ".seq", ".raw") and stem not in kept:
                path.unlink()

    def _tokenizer(self, tasks: list[tuple[int, Task]], context: Context, progress: Progress) -> Tokenizer:
        folder = self.out / "tokenizer"
        done = self.work / "tokenizer.hash"
        if done.exists():
            tokenizer = load_tokenizer(folder)
            if tokenizer.hash == done.read_text():
                return tokenizer
        progress.say("tokenizer")
        spec = self.config.tokenizer
        every = spec.kind == "chars"
        tokenizer = build_tokenizer(spec, self._sample(tasks, context, None if every else spec.sample_bytes, every))
        shutil.rmtree(folder, ignore_errors=True)
        tokenizer.save(folder)
        write_atomic(done, tokenizer.hash.encode())
        return load_tokenizer(folder)

    def _sample(
        self, tasks: list[tuple[int, Task]], context: Context, budget: int | None, every: bool
    ) -> Iterator[str]:
        """Text to train a tokenizer on: the beginning of each task; no held-out document unless `every`."""
        quota = None if budget is None else max(1, -(-budget // max(1, len(tasks))))
        left = budget
        for i, task in tasks:
            taken = 0
            for item in self.config.sources[i].read(task, context):
                if not isinstance(item, Piece) or not (every or item.split == TRAIN):
                    continue
                yield item.text
                taken += item.n_bytes
                if quota is not None and taken >= quota:
                    break
            if left is not None:
                left -= taken
                if left <= 0:
                    return

    def _run_tasks(self, tasks: list[tuple[int, Task]], progress: Progress) -> None:
        todo: list[int] = []
        for number in range(len(tasks)):
            parts = finished_parts(self.work, number)
            if not parts or not parts[-1]["final"]:
                todo.append(number)
            for part in parts:
                totals = [part["splits"][split]["totals"] for split in SPLITS]
                progress.advance(
                    sum(t["bytes"] for t in totals), sum(t["documents"] for t in totals), len(part["rejects"])
                )
        progress.say("tokenize")
        n_workers = min(self.config.num_workers, len(todo))
        if n_workers <= 1:
            worker = _Worker(self.config)
            for number in todo:
                for step in worker.steps(number, *tasks[number]):
                    progress.advance(*step)
            return
        self._run_pool(todo, tasks, n_workers, progress)

    def _run_pool(self, todo: list[int], tasks: list[tuple[int, Task]], n_workers: int, progress: Progress) -> None:
        spawn = multiprocessing.get_context("spawn")
        counters = spawn.Array("q", 3)
        # A worker takes its environment when it starts: each has one thread, the processes are what runs in parallel.
        before = os.environ.get("TOKENIZERS_PARALLELISM")
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        pool = ProcessPoolExecutor(
            n_workers, spawn, initializer=_start_worker, initargs=(self.config, os.getpid(), counters)
        )
        shown = [0, 0, 0]
        try:
            queue = iter(todo)
            running: set[Future[None]] = set()
            while True:
                while len(running) < 2 * n_workers and (number := next(queue, None)) is not None:
                    running.add(pool.submit(_work, number, *tasks[number]))
                if not running:
                    break
                done, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                now = [int(counters[i]) for i in range(3)]
                progress.advance(*(n - s for n, s in zip(now, shown)))
                shown = now
                for future in done:
                    future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process died (out of memory, or killed); "
                "run the same command again to go on, with fewer workers="
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            if before is None:
                del os.environ["TOKENIZERS_PARALLELISM"]
            else:
                os.environ["TOKENIZERS_PARALLELISM"] = before

    def _merge(
        self, tasks: list[tuple[int, Task]], tokenizer: Tokenizer, identity: str, progress: Progress
    ) -> dict[str, Any]:
        merge = Merge(self.work, self.out, len(tasks), tokenizer.vocab_size)
        documents = sum(totals.documents for totals in merge.totals.values())
        if not documents:
            parts = (part for number in range(len(tasks)) for part in finished_parts(self.work, number))
            first = next((reject for part in parts for reject in part["rejects"]), None)
            hint = f"; the first: {first[0]} line {first[1]}: {first[2]}" if first else ""
            raise UserError(f"no document is left: {merge.rejects} records were rejected{hint}")
        progress.start_merge(
            sum(t.tokens * merge.dtype.itemsize for t in merge.totals.values()) + merge.totals["valid"].bytes
        )
        files = merge.run(progress.advance_merge)
        manifest = {
            "format": FORMAT,
            "identity": identity,
            "config": {name: value for name, value in self.config.to_dict().items() if name not in ("out", "workers")},
            "splits": {split: vars(totals) for split, totals in merge.totals.items()},
            "rejects": merge.rejects,
            "dtype": merge.dtype.name,
            "tokenizer": {
                "kind": tokenizer.kind,
                "vocab_size": tokenizer.vocab_size,
                "eos_id": tokenizer.eos_id,
                "bos_id": tokenizer.bos_id,
                "hash": tokenizer.hash,
            },
            "files": files,
            "versions": _versions(),
        }
        write_atomic(self.out / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode(), work=self.work)
        shutil.rmtree(self.work, ignore_errors=True)
        return manifest


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("numpy", "tokenizers", "sentencepiece", "pyarrow", "datasets"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


class _Worker:
    """Runs tasks; lives in a process of its own, or in the main one when there is only one worker."""

    def __init__(self, config: PrepareConfig) -> None:
        self.config = config
        self.context = config.context
        self.tokenizer = load_tokenizer(Path(config.out) / "tokenizer")

    def steps(self, number: int, source: int, task: Task) -> Iterator[tuple[int, int, int]]:
        """Do a task; yields progress."""
        work = Path(self.config.out) / WORK
        part_bytes = self.config.part_bytes
        return run_task(work, number, task, self.config.sources[source], self.context, self.tokenizer, part_bytes)


_worker: _Worker | None = None
_counters: Any = None


def _start_worker(config: PrepareConfig, parent: int, counters: Any) -> None:
    global _worker, _counters
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    _worker, _counters = _Worker(config), counters


def _follow(parent: int) -> None:
    """End this process when its parent is gone, even if that was killed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _work(number: int, source: int, task: Task) -> None:
    assert _worker is not None
    for step in _worker.steps(number, source, task):
        with _counters.get_lock():
            for i, amount in enumerate(step):
                _counters[i] += amount
