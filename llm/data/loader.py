"""Loader: the batches of each optimizer step, the same in any world, resumable by a single number."""

from __future__ import annotations

import hashlib
import json
import queue
import threading
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch

from llm.core.batch import IGNORE, Microbatch, StepBatch
from llm.core.errors import UserError
from llm.core.seq import SeqInfo, next_power_of_two
from llm.data.config import DataConfig
from llm.data.mixture import Mixture, row_shares
from llm.data.packing import Packer, Segments, make_packer
from llm.data.permute import Permutation, key_of
from llm.data.sources import OpenSource, has_split, open_sources
from llm.data.tokenizer import Tokenizer


class Loader:
    """Iterates over StepBatch: without end for training, once over every row otherwise.

    Row i of the run is a pure function of (seed, config, i). Step k holds rows [k * n, (k + 1) * n), n =
    sequences_per_step; a rank takes its n / world_size of them, in microbatches of micro_batch_size rows, the last of
    which may be smaller. In a single pass, rows beyond the last are empty (all labels IGNORE), so that every rank has
    as many microbatches and every token is scored once over all ranks; the order is a fixed shuffle, hence the first
    steps are a fair sample. repeat: None means split == "train". limit: steps at most.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        split: str,
        sequences_per_step: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        repeat: bool | None = None,
        limit: int | None = None,
    ) -> None:
        if sequences_per_step < 1 or micro_batch_size < 1:
            raise UserError(
                f"sequences_per_step {sequences_per_step} and micro_batch_size {micro_batch_size} must be at least 1"
            )
        if sequences_per_step % world_size:
            raise UserError(
                f"a step of {sequences_per_step} sequences cannot be shared evenly by {world_size} processes; "
                f"make it a multiple of {world_size}"
            )
        self.config, self.split = config, split
        self.sequences_per_step, self.micro_batch_size = sequences_per_step, micro_batch_size
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.repeat = split == "train" if repeat is None else repeat
        self.limit = limit
        self._sources: list[OpenSource] = open_sources(config, split)
        self.tokenizer: Tokenizer = self._sources[0].tokenizer
        self.vocab_size: int = self.tokenizer.vocab_size
        self._key = key_of("data", seed) if self.repeat and config.shuffle else None
        self._packers: list[Packer] = []
        for number, source in enumerate(self._sources):
            key = None if self._key is None else key_of(self._key, number)
            if self.repeat and source.store.n_tokens < config.seq_len:
                raise UserError(
                    f"data.seq_len {config.seq_len} is more than the {source.store.n_tokens} tokens of "
                    f"{source.store.prefix}; lower seq_len or prepare more text"
                )
            self._packers.append(make_packer(config, source.store, key))
        self._rows = np.array([packer.num_rows for packer in self._packers], dtype=np.int64)
        self._mixture = self._mix() if self.repeat else None
        self._sample = 0

    def _mix(self) -> Mixture:
        specs = self.config.all_sources
        rows = self._rows.tolist()
        shares = row_shares(
            [spec.weight for spec in specs],
            [packer.num_pairs for packer in self._packers],
            rows,
            [packer.store.n_documents for packer in self._packers],
            self.config.mixture_unit,
        )
        limits = [None if s.max_epochs is None else max(1, int(s.max_epochs * n)) for s, n in zip(specs, rows)]
        return Mixture(shares, limits)

    def has_split(self, split: str) -> bool:
        """True when every source has documents in this split."""
        return has_split(self.config, split)

    @property
    def num_rows(self) -> int:
        """Rows of one epoch over all sources."""
        return int(self._rows.sum())

    @property
    def num_labels(self) -> int:
        """Tokens that one epoch over all sources scores."""
        return sum(packer.num_pairs for packer in self._packers)

    def __len__(self) -> int:
        """Steps of a single pass."""
        if self.repeat:
            raise TypeError("a training loader has no length")
        steps = -(-self.num_rows // self.sequences_per_step)
        return steps if self.limit is None else min(steps, self.limit)

    @cached_property
    def _fingerprint(self) -> str:
        config = self.config.to_dict()
        for name in ("path", "prefetch", "verify", "tokenizer"):
            del config[name]
        config["sources"] = [[spec.weight, spec.max_epochs] for spec in self.config.all_sources]
        stores = [source.store.fingerprint for source in self._sources]
        text = json.dumps([config, stores, self.tokenizer.hash, self.split, self.seed, self.repeat], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def fingerprint(self) -> str:
        """Hash of the stores, mixture, packing, tokenizer and seed: what the order of rows depends on."""
        return self._fingerprint

    def state(self) -> dict[str, Any]:
        """Where the next step begins: plain data that says nothing of ranks or batch sizes."""
        return {"sample": self._sample, "fingerprint": self.fingerprint()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state; iterators made before are to be thrown away. UserError when the data differ."""
        if state.get("fingerprint") != self.fingerprint():
            raise UserError(
                "the data differ from those the checkpoint was made with (prepared files, mixture, packing, seq_len, "
                f"tokenizer or seed): fingerprint {str(state.get('fingerprint'))[:12]} was saved, "
                f"{self.fingerprint()[:12]} is here; restore the data config, or start a new run"
            )
        self._sample = int(state["sample"])

    def __iter__(self) -> Iterator[StepBatch]:
        if self.config.prefetch:
            yield from self._ahead()
            return
        for sample, batch in self._steps(self._sample):
            self._sample = sample
            yield batch

    def _steps(self, sample: int) -> Iterator[tuple[int, StepBatch]]:
        """(global row at which the step after it begins, batch) from a global row on."""
        n, steps = self.sequences_per_step, 0
        while (self.repeat or sample < self.num_rows) and (self.limit is None or steps < self.limit):
            yield sample + n, self.step(sample)
            sample, steps = sample + n, steps + 1

    def _ahead(self) -> Iterator[StepBatch]:
        """The same as `_steps`, built by a thread that keeps a few ready."""
        ready: queue.Queue[Any] = queue.Queue(maxsize=self.config.prefetch)
        stop = threading.Event()

        def put(item: Any) -> None:
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.2)
                    return
                except queue.Full:
                    continue

        def work(sample: int) -> None:
            try:
                for item in self._steps(sample):
                    put(item)
                    if stop.is_set():
                        return
                put(None)
            except BaseException as error:
                put(error)

        thread = threading.Thread(target=work, args=(self._sample,), daemon=True, name="loader")
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                self._sample, batch = item
                yield batch
        finally:
            stop.set()
            thread.join()  # a thread inside torch when the interpreter ends would abort the process

    def step(self, sample: int) -> StepBatch:
        """This rank's part of the step that begins at global row `sample`."""
        share = self.sequences_per_step // self.world_size
        low = sample + self.rank * share
        edges = [*range(low, low + share, self.micro_batch_size), low + share]
        microbatches = [self._microbatch(np.arange(a, b)) for a, b in zip(edges[:-1], edges[1:])]
        n_rows = self.sequences_per_step if self.repeat else min(self.sequences_per_step, self.num_rows - sample)
        return StepBatch(microbatches, n_rows * self.config.seq_len)

    def _locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, row counted over its epochs) of global rows; source -1 beyond the end of a single pass."""
        if self._mixture is not None:
            return self._mixture.rows(indices)
        inside = indices < self.num_rows
        order = Permutation(self.num_rows, key_of("single pass"))(indices[inside])
        ends = np.cumsum(self._rows)
        source = np.full(len(indices), -1, dtype=np.int64)
        row = np.zeros(len(indices), dtype=np.int64)
        source[inside] = np.searchsorted(ends, order, side="right")
        row[inside] = order - (ends - self._rows)[source[inside]]
        return source, row

    def _microbatch(self, indices: np.ndarray) -> Microbatch:
        """The batch of some global rows."""
        n, length = len(indices), self.config.seq_len
        out = _Rows(n, length, self.tokenizer, isolate=self.config.isolate and self.config.packing != "pad")
        source, row = self._locate(indices)
        for s in range(len(self._packers)):
            mine = np.flatnonzero(source == s)
            epochs = row[mine] // self._rows[s]
            for epoch in np.unique(epochs):
                here = mine[epochs == epoch]
                within = row[here] % self._rows[s]
                if self._key is not None:
                    within = Permutation(int(self._rows[s]), key_of(self._key, s, "rows", int(epoch)))(within)
                found = self._packers[s].segments(int(epoch), within)
                out.add(here, found, self._sources[s].store.tokens, self._sources[s].store.offsets)
        return out.finish()


class _Rows:
    """Collects segments into the tensors of a microbatch of n rows."""

    def __init__(self, n: int, length: int, tokenizer: Tokenizer, *, isolate: bool) -> None:
        self.n, self.length, self.isolate = n, length, isolate
        self.start_id = tokenizer.start_id
        self.tokens = np.full(n * length, tokenizer.eos_id, dtype=np.int64)
        self.labels = np.full(n * length, IGNORE, dtype=np.int64)
        self.filled = np.zeros(n, dtype=np.int64)
        self.starts: list[np.ndarray] = []

    def add(self, rows: np.ndarray, segments: Segments, tokens: np.ndarray, offsets: np.ndarray) -> None:
        """Write the segments of rows `rows` [n] (segments.row counts within them)."""
        row, document, start, length = segments
        ends = np.cumsum(length)
        before = ends - length
        new_row = np.append(True, row[1:] != row[:-1])
        column = before - np.repeat(before[new_row], np.diff(np.append(np.flatnonzero(new_row), len(row))))
        at = rows[row] * self.length + column
        within = np.arange(int(ends[-1])) - np.repeat(before, length)
        target = np.repeat(at, length) + within
        origin = np.repeat(offsets[document] + start, length) + within
        self.labels[target] = tokens[origin]
        self.tokens[target] = tokens[np.maximum(origin - 1, 0)]
        self.tokens[at[start == 0]] = self.start_id
        np.add.at(self.filled, rows[row], length)
        self.starts.append(at)

    def finish(self) -> Microbatch:
        """The microbatch; what is left of a row is padding, a document of its own where documents are isolated."""
        shape = (self.n, self.length)
        tokens, labels = torch.from_numpy(self.tokens).view(shape), torch.from_numpy(self.labels).view(shape)
        if not self.isolate:
            seq = SeqInfo.contiguous(self.n, self.length)
            return _pinned(Microbatch(tokens, labels, SeqInfo(seq.positions.contiguous())))
        padding = (np.arange(self.n) * self.length + self.filled)[self.filled < self.length]
        starts = np.sort(np.concatenate([*self.starts, padding]))
        bounds = np.append(starts, self.n * self.length)
        sizes = np.diff(bounds)
        positions = np.arange(self.n * self.length) - np.repeat(starts, sizes)
        seq = SeqInfo(
            positions=torch.from_numpy(positions).view(shape),
            cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
            max_seqlen=next_power_of_two(int(sizes.max())),
        )
        return _pinned(Microbatch(tokens, labels, seq))


def _pinned(batch: Microbatch) -> Microbatch:
    """In page-locked memory where there is a GPU, so that copies to it need not wait."""
    if not torch.cuda.is_available():
        return batch
    seq = batch.seq
    cu_seqlens = None if seq.cu_seqlens is None else seq.cu_seqlens.pin_memory()
    pinned = SeqInfo(seq.positions.pin_memory(), cu_seqlens, seq.max_seqlen)
    return Microbatch(batch.tokens.pin_memory(), batch.labels.pin_memory(), pinned)
