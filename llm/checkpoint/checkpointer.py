"""Checkpointer: transactional, asynchronous, sharded saves; loads at any world size."""

from __future__ import annotations

import errno
import json
import logging
import secrets
import shutil
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from llm.checkpoint import folders
from llm.checkpoint.faults import reach
from llm.checkpoint.manifest import NAME as MANIFEST
from llm.checkpoint.manifest import Damaged, Manifest, TensorEntry, find_damage, read_manifest
from llm.checkpoint.ranks import Ranks
from llm.checkpoint.restore import check_fit, fill_rng, rng_file
from llm.checkpoint.sharded import SaveLayouts, Staging, live_files, read_into
from llm.checkpoint.state import KINDS, PARTS, CheckpointInfo, Kind, TrainState, flatten
from llm.checkpoint.storage import FileEntry, sync_folder, write_tensors, write_text
from llm.core.errors import UserError

log = logging.getLogger("llm.checkpoint")

Infos = list[CheckpointInfo]
Replies = list[Any]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass
class _Save:
    """One save in flight. files: this rank's host tensors by file and key. outcome: agreed by all ranks."""

    step: int
    tokens: int
    kind: str
    token: str
    files: dict[str, dict[str, Tensor]]
    tensors: dict[str, TensorEntry]
    meta: str
    thread: threading.Thread | None = None
    finished: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None
    info: CheckpointInfo | None = None

    def nbytes(self) -> int:
        """Bytes of tensor data that this rank writes."""
        return sum(t.numel() * t.element_size() for tensors in self.files.values() for t in tensors.values())


class Checkpointer:
    """Saves to and loads from `root` (runs/<name>/checkpoints).

    Rank and world size are those of torch.distributed, if it is initialised. The constructor, `save`, `poll`, `wait`,
    `latest_good` and `load` are collectives: every rank calls them, in the same order. A process that ends while a
    save is in flight first finishes it.
    keep: how many unmarked checkpoints are kept (at least two). asynchronous: files are written by a thread from
    host copies made inside `save`. config_yaml: the resolved config, stored with each checkpoint.
    """

    def __init__(self, root: Path, *, keep: int = 2, asynchronous: bool = True, config_yaml: str = "") -> None:
        if keep < 2:
            raise UserError(f"checkpoint.keep is {keep}; at least 2 are kept, so that a damaged one has a predecessor")
        self.root = Path(root)
        self.keep = keep
        self.asynchronous = asynchronous
        self.config_yaml = config_yaml
        self._ranks = Ranks()
        self._layouts = SaveLayouts(self._ranks)
        self._staging = Staging()
        self._flight: _Save | None = None
        self._news: Infos = []
        self._damaged: set[Path] = set()
        self._raise_any(self._ranks.gather(self._attempt(self._open) if self._ranks.rank == 0 else None))

    def save(self, state: TrainState, *, step: int, tokens: int, kind: Kind, wait: bool = False) -> None:
        """Save the state as it is now; training may change it as soon as this returns.

        At most one save is in flight: a second waits for the first. wait: return when it is committed. Raises
        UserError for a full disk or another refusal of the file system, of this save or of the one before; before a
        `preempt` or `final` save the earlier one's error is only logged, for the new one takes its place.
        """
        assert kind in KINDS, kind
        try:
            self.wait()
        except UserError as error:
            if kind not in ("preempt", "final"):
                raise
            log.error("%s", error)
        layout, planner = self._layouts.of(flatten(state))
        files = live_files(layout, planner, self._ranks.rank)
        if state.rng:
            files[rng_file(self._ranks.rank)] = dict(state.rng)
        background = self.asynchronous and not wait
        if background:
            files = self._staging.copy(files)
        meta = json.dumps(state.meta, indent=1) + "\n"
        token = self._ranks.share(secrets.token_hex(4))
        save = _Save(step, tokens, kind, token, files, layout.tensors, meta)
        self._flight = save
        if background:
            save.thread = threading.Thread(target=self._run, args=(save,), name="checkpoint")
            save.thread.start()
        else:
            self._run(save)
            self._land()

    def poll(self) -> Infos:
        """Checkpoints committed since the last call, on every rank alike. To be called once a step by all ranks; costs
        nothing while no save is in flight. Raises the error of a save that failed on any rank."""
        if self._flight is not None and self._ranks.all_true(self._flight.finished.is_set()):
            self._land()
        news, self._news = self._news, []
        return news

    def wait(self) -> None:
        """Wait for the save in flight, if any; raises its error."""
        if self._flight is not None:
            self._flight.finished.wait()
            self._land()

    def list(self) -> Infos:
        """Committed checkpoints, oldest first: manifest and file sizes are checked, contents are not."""
        return folders.committed(self.root)

    def latest_good(self) -> CheckpointInfo | None:
        """The newest checkpoint whose files all match their hashes; None when there are none at all.

        What is wrong with a damaged one is logged as an error before the one before it is tried. When none is good,
        UserError: starting over is for a person to decide. The ranks share the reading.
        """
        names = self._ranks.share([path.name for path in reversed(folders.step_folders(self.root))])
        newest = ""
        for name in names:
            folder = self.root / name
            problems = self._verify(folder)
            if not problems:
                return folders.info_of(folder, read_manifest(folder))
            self._damaged.add(folder)
            newest = newest or problems[0]
            if self._ranks.rank == 0:
                log.error("checkpoint %s is damaged and not used: %s", folder, "; ".join(problems))
        if names:
            raise UserError(
                f"none of the {len(names)} checkpoints in {self.root} is intact (newest: {newest}); "
                "restore one from a backup, or move the folder away to start over"
            )
        return None

    def load(
        self, ref: Path | CheckpointInfo, state: TrainState, *, parts: frozenset[str] = PARTS, strict: bool = True
    ) -> dict[str, Any]:
        """Fill the tensors of `state` in place, resharding as needed, and return the saved meta.

        strict: the names of the chosen parts must be the same on both sides; otherwise only those in both are filled.
        UserError when the checkpoint is damaged or does not fit.
        """
        assert parts <= PARTS, parts
        folder = ref.path if isinstance(ref, CheckpointInfo) else Path(ref)
        problems = self._verify(folder)
        if problems:
            raise Damaged(f"checkpoint {folder} is damaged: {'; '.join(problems)}")
        manifest = read_manifest(folder)
        flat = flatten(state, parts)
        elsewhere = set().union(*self._ranks.gather(set(flat)))
        flat, mistake = check_fit(folder, manifest, flat, elsewhere, parts, strict)
        self._raise_any(self._ranks.gather(mistake))
        read_into(folder, manifest, flat)
        if "rng" in parts:
            fill_rng(folder, manifest, self._ranks.rank, state.rng)
        return json.loads((folder / "meta.json").read_text())

    def _open(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        for line in folders.clean(self.root):
            log.warning("%s: %s", self.root, line)

    def _verify(self, folder: Path) -> Sequence[str]:
        """Everything wrong with a checkpoint; each rank reads a share of the files."""
        try:
            manifest = read_manifest(folder)
            mine = sorted(manifest.files)[self._ranks.rank :: self._ranks.world_size]
            found = find_damage(folder, manifest, hashes=True, only=tuple(mine))
        except Damaged as error:
            found = [str(error)]
        return sorted({problem for problems in self._ranks.gather(found) for problem in problems})

    def _land(self) -> None:
        """Take in the outcome of the finished save."""
        save, self._flight = self._flight, None
        assert save is not None
        if save.thread is not None:
            save.thread.join()
        if save.error is not None:
            raise save.error
        assert save.info is not None
        self._damaged.discard(save.info.path)
        self._news.append(save.info)

    def _run(self, save: _Save) -> None:
        """Write and commit; leaves the outcome in `save`. In the saving thread, unless the save is synchronous."""
        try:
            save.info = self._write(save)
        except Exception as error:  # reported by the next poll, save or wait
            save.error = error
        finally:
            save.files = {}
            save.finished.set()

    def _write(self, save: _Save) -> CheckpointInfo:
        """The transaction. Every stage ends with all ranks knowing of any rank's failure."""
        rank = self._ranks.rank
        final = self.root / folders.folder_name(save.step)
        temporary = self.root / f"{final.name}.tmp-{save.token}"
        needed = sum(self._ranks.gather(save.nbytes(), background=True))
        steps: Sequence[tuple[bool, Callable[[], Any]]] = [
            (rank == 0, lambda: self._make_folder(temporary, needed)),
            (True, lambda: self._write_tensors(save, temporary)),
        ]
        outputs: Replies = []
        for mine, act in steps:
            outputs = self._together(mine, act, save, temporary, needed)
        files = {name: entry for output in outputs for name, entry in output.items()}
        manifest = Manifest(save.step, save.tokens, save.kind, self._ranks.world_size, save.tensors, files)
        self._together(rank == 0, lambda: self._finish(save, manifest, temporary, final), save, temporary, needed)
        return CheckpointInfo(final, save.step, save.tokens, save.kind, True)

    def _together(self, mine: bool, act: Callable[[], Any], save: _Save, temporary: Path, needed: int) -> Replies:
        """Run `act` where `mine`, and return every rank's result; when it fails on any rank, the temporary folder is
        removed and the error raised on all of them."""
        result: Any = None
        error: tuple[type[Exception], str] | None = None
        if mine:
            try:
                result = act()
            except OSError as refusal:
                error = (UserError, self._explain(refusal, save, needed))
            except Exception:
                error = (RuntimeError, f"checkpoint of step {save.step} failed\n{traceback.format_exc()}")
        replies = self._ranks.gather((result, error), background=True)
        failures = [error for _, error in replies if error is not None]
        if failures:
            if self._ranks.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            kind, text = failures[0]
            raise kind(text)
        return [result for result, _ in replies]

    def _make_folder(self, temporary: Path, needed: int) -> None:
        reach("begin")
        if shutil.disk_usage(self.root).free < needed:
            raise OSError(errno.ENOSPC, "No space left on device")
        for part in ("model", "optim", "rng"):
            (temporary / part).mkdir(parents=True)
        reach("folder-made")

    def _write_tensors(self, save: _Save, temporary: Path) -> dict[str, FileEntry]:
        written = {name: write_tensors(temporary / name, tensors) for name, tensors in sorted(save.files.items())}
        reach("tensors-written")
        return written

    def _finish(self, save: _Save, manifest: Manifest, temporary: Path, final: Path) -> None:
        """On rank 0, when every rank's tensors are on the disk: the small files, the manifest, the commit."""
        manifest.files["meta.json"] = write_text(temporary / "meta.json", save.meta)
        manifest.files["config.yaml"] = write_text(temporary / "config.yaml", self.config_yaml)
        reach("meta-written")
        for part in ("model", "optim", "rng"):
            sync_folder(temporary / part)
        write_text(temporary / MANIFEST, manifest.dumps())
        sync_folder(temporary)
        reach("manifest-written")
        folders.commit(temporary, final, save.token)
        try:
            for path in folders.set_aside(final, save.token):
                log.warning("%s was left behind by a run that went back to step %d; it is set aside", path, save.step)
            folders.retire(self.root, self.keep, save.token, self._damaged - {final})
        except OSError as error:
            log.warning("an old checkpoint in %s could not be deleted: %s", self.root, error)
        reach("done")

    def _explain(self, error: OSError, save: _Save, needed: int) -> str:
        """One line for a person."""
        head = f"checkpoint of step {save.step} was not saved"
        tail = "earlier checkpoints are untouched"
        if error.errno in _FULL:
            free = shutil.disk_usage(self.root).free if self.root.exists() else 0
            return (
                f"{head}: no space left for {self.root} ({needed:,} bytes needed, {free:,} free); {tail}; "
                "free some space or lower checkpoint.keep"
            )
        return f"{head}: {error.strerror or error} ({error.filename or self.root}); {tail}"

    @staticmethod
    def _attempt(act: Callable[[], None]) -> str | None:
        try:
            act()
        except OSError as error:
            return f"checkpoint folder {error.filename}: {error.strerror}; choose another runs_dir or give access to it"
        return None

    @staticmethod
    def _raise_any(mistakes: Sequence[str | None]) -> None:
        """Raise the first rank's mistake on every rank."""
        for mistake in mistakes:
            if mistake is not None:
                raise UserError(mistake)
