"""Decoding: drives a mixer's state and compares every output with `forward` over the tokens that count."""

from __future__ import annotations

import torch
from torch import Tensor

from llm.blocks.base import MixerConfig, TokenMixer
from llm.core.seq import SeqInfo
from tests.contracts.checks.harness import D_MODEL, EXACT, MAX_SEQ_LEN, assert_same, build_mixer, random, run


class Decoding:
    """B rows; `feed` gives each row some new tokens and checks what comes out.

    rows: per row the accepted inputs [n, D]; tentative: those of the open transaction. The reference is always
    `forward` on a row alone, hence whatever the state kept of rejected tokens, of padding or of other rows shows.
    """

    def __init__(
        self,
        mixer: TokenMixer,
        batch: int,
        *,
        n_tentative: int = 0,
        capacity: int = MAX_SEQ_LEN,
        label: str = "",
    ) -> None:
        self.mixer = mixer
        self.label = label
        self.state = mixer.new_state(batch, capacity, n_tentative=n_tentative, dtype=torch.float64, device="cpu")
        self.rows = [torch.empty(0, D_MODEL, dtype=torch.float64) for _ in range(batch)]
        self.tentative: list[Tensor] | None = None
        self.n_fed = 0

    def feed(self, counts: list[int], *, ragged: bool = False) -> None:
        """Give row b counts[b] tokens in one call; uneven counts are padded on the right with large values."""
        longest = max(counts)
        ragged = ragged or min(counts) != longest
        ends = self._check_end()
        self.n_fed += 1
        x = random(len(counts), longest, D_MODEL, seed=1000 + self.n_fed)
        seq = SeqInfo.contiguous(len(counts), longest, start=self.state.end())
        if ragged:
            valid = torch.arange(longest) < torch.tensor(counts)[:, None]
            x = torch.where(valid[..., None], x, 10 * x)
            seq = SeqInfo(seq.positions, valid=valid)
        with torch.no_grad():
            self.mixer.prepare(seq, x.dtype)
            call = self.mixer.step if longest == 1 and not ragged else self.mixer.prefill
            y = call(x, seq, self.state)
        for row, count in enumerate(counts):
            self._put(row, x[row, :count])
            if count:
                what = f"{self.label}: call {self.n_fed}, row {row}, {count} tokens after {ends[row]}"
                assert_same(y[row, :count], self._expected(row)[-count:], what, EXACT)
        self._check_end()

    def _check_end(self) -> list[int]:
        ends, found = self._ends(), self.state.end().tolist()
        assert found == ends, f"{self.label}: after call {self.n_fed} the state ends at {found}, expected {ends}"
        return ends

    def begin(self, n: int) -> None:
        """Open a transaction."""
        self.state.begin(n)
        self.tentative = [row[:0] for row in self.rows]

    def commit(self, accepted: list[int]) -> None:
        """Accept accepted[b] tokens of row b."""
        assert self.tentative is not None
        self.state.commit(torch.tensor(accepted))
        self.rows = [torch.cat([row, new[:n]]) for row, new, n in zip(self.rows, self.tentative, accepted)]
        self.tentative = None

    def abort(self) -> None:
        """Reject all."""
        self.state.abort()
        self.tentative = None

    def reorder(self, index: list[int]) -> None:
        """Row b becomes old row index[b]."""
        self.state.reorder(torch.tensor(index))
        self.rows = [self.rows[i] for i in index]
        if self.tentative is not None:
            self.tentative = [self.tentative[i] for i in index]

    def _put(self, row: int, x: Tensor) -> None:
        rows = self.rows if self.tentative is None else self.tentative
        rows[row] = torch.cat([rows[row], x])

    def _all(self, row: int) -> Tensor:
        return self.rows[row] if self.tentative is None else torch.cat([self.rows[row], self.tentative[row]])

    def _ends(self) -> list[int]:
        return [self._all(row).shape[0] for row in range(len(self.rows))]

    def _expected(self, row: int) -> Tensor:
        x = self._all(row)[None]
        with torch.no_grad():
            return run(self.mixer, x, SeqInfo.contiguous(1, x.shape[1]))[0]


def check_prefill_and_steps(config: MixerConfig) -> None:
    """forward == one prefill == steps == any mixture, to the last token."""
    mixer = build_mixer(config)
    for splits in ([17], [1] * 17, [1, 4, 1, 1, 7, 3], [9, 1, 1, 1, 5]):
        decoding = Decoding(mixer, 2, label=f"split {splits}")
        for length in splits:
            decoding.feed([length, length])


def check_ragged_prefill(config: MixerConfig) -> None:
    """Rows of different lengths, padded on the right: each equals itself alone, and padding advances nothing."""
    decoding = Decoding(build_mixer(config), 3, label="ragged prefill")
    for counts in ([5, 9, 1], [1, 1, 1], [3, 0, 11], [1, 0, 1], [2, 2, 2], [1, 1, 1]):
        decoding.feed(counts)


def check_commit(config: MixerConfig) -> None:
    """After begin, n tentative tokens and commit(k), for every k and row by row, the rest was never seen."""
    mixer = build_mixer(config)
    for n in (1, 4):
        for k in range(n + 1):
            for steps in (False, True):
                decoding = Decoding(mixer, 3, n_tentative=n, label=f"commit {k} of {n}{' in steps' if steps else ''}")
                decoding.feed([6, 6, 6])
                decoding.begin(n)
                for length in [1] * n if steps else [n]:
                    decoding.feed([length] * 3)
                decoding.commit([(k + row) % (n + 1) for row in range(3)])
                decoding.feed([1, 1, 1])
                decoding.feed([3, 3, 3])
    decoding = Decoding(mixer, 2, n_tentative=4, label="many transactions")
    for turn in range(8):
        decoding.begin(4)
        decoding.feed([1, 1])
        if turn % 3:
            decoding.feed([3, 3] if turn % 2 else [2, 2])
        written = [1, 1] if turn % 3 == 0 else [4, 4] if turn % 2 else [3, 3]
        decoding.commit([min(turn % 5, written[0]), min((turn + 2) % 4, written[1])])
    decoding.feed([2, 2])


def check_abort(config: MixerConfig) -> None:
    """After abort, nothing tentative was ever seen; also at the very start."""
    decoding = Decoding(build_mixer(config), 2, n_tentative=4, label="abort")
    for length in (4, 1):
        decoding.begin(4)
        decoding.feed([length, length])
        decoding.abort()
        decoding.feed([3, 3])
        decoding.feed([1, 1])


def check_reorder(config: MixerConfig) -> None:
    """Rows are moved, doubled and dropped, outside and inside a transaction."""
    decoding = Decoding(build_mixer(config), 3, n_tentative=3, label="reorder")
    decoding.feed([5, 5, 5])
    decoding.reorder([2, 0, 0, 1])
    decoding.feed([1] * 4)
    decoding.reorder([3, 1])
    decoding.feed([2, 2])
    decoding.begin(3)
    decoding.feed([2, 2])
    decoding.reorder([1, 0, 1])
    decoding.feed([1, 1, 1])
    decoding.commit([3, 3, 3])
    decoding.feed([1, 1, 1])


def check_export_restore(config: MixerConfig) -> None:
    """An exported state, through safetensors and into a state of another capacity, goes on as the first one."""
    from safetensors.torch import load, save

    mixer = build_mixer(config)
    decoding = Decoding(mixer, 2, label="export and restore")
    decoding.feed([11, 11])
    exported = decoding.state.export()
    frozen = {name: tensor.clone() for name, tensor in exported.items()}
    decoding.feed([4, 4])
    for name, tensor in exported.items():
        assert torch.equal(tensor, frozen[name]), f"{name} of an export changes when decoding goes on"
    loaded = load(save(exported))
    for n_tentative, capacity in ((0, MAX_SEQ_LEN), (3, MAX_SEQ_LEN - 17)):
        other = Decoding(mixer, 2, n_tentative=n_tentative, capacity=capacity, label="after restore")
        other.feed([2, 2])
        other.state.restore(loaded)
        other.rows = [row[:11] for row in decoding.rows]
        other.feed([1, 1])
        if n_tentative:
            other.begin(3)
            other.feed([3, 3])
            other.commit([3, 3])
        other.feed([2, 2])
