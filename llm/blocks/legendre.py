"""Legendre memory: a fixed linear system whose state holds the last `window` inputs as Legendre coefficients.

m_t = A m_{t-1} + B u_t for each channel u; u(t - r window) = sum_i P_i(2r - 1) m_t[i] approximately, r in [0, 1]
(Voelker et al. 2019). Three forms of the same sum: one token at a time, chunks with a state passed between them, and a
convolution by FFT. Shapes: B rows, T tokens, W windows with n channels each, order q, chunks of C tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.core.init import Init, computed
from llm.core.seq import SeqInfo

Tables = dict[str, Tensor]


def discretise(order: int, window: float) -> tuple[Tensor, Tensor]:
    """(A [q, q], B [q]) in float64 on the CPU: the continuous system with its input held over each step of length 1."""
    index = torch.arange(order, dtype=torch.float64, device="cpu")
    row, column = index[:, None], index
    scale = (2 * row + 1) / window
    parity = 1.0 - 2.0 * ((row - column + 1) % 2)
    system = scale * torch.where(row < column, -1.0, parity)
    drive = scale * (1.0 - 2.0 * (row % 2))
    # exp([[A, B], [0, 0]]) = [[exp A, integral of exp(A s) B], [0, 1]]
    joined = F.pad(torch.cat([system, drive], dim=1), (0, 0, 0, 1))
    step = torch.linalg.matrix_exp(joined)
    return step[:order, :order].contiguous(), step[:order, order].contiguous()


@functools.lru_cache(maxsize=8)
def system_tables(order: int, windows: tuple[float, ...], chunk: int, n_hops: int, unit: bool) -> Tables:
    """What the forms need, in float64 on the CPU.

    transition A [W, q, q], drive B [W, q]; powers A^1..A^C [W, C, q, q]; response A^0 B..A^(C-1) B [W, C, q]; hops
    A^(C 2^l) [l, W, q, q]. unit: each coefficient in units of its standard deviation under white noise.
    """
    parts = [discretise(order, window) for window in windows]
    transition, drive = (torch.stack(part) for part in zip(*parts))
    if unit:
        size = _sizes(transition, drive)
        transition = transition * size[:, None, :] / size[:, :, None]
        drive = drive / size
    powers = transition[:, None]
    while powers.shape[1] < chunk:
        powers = torch.cat([powers, powers @ powers[:, -1:]], dim=1)[:, :chunk]
    earlier = torch.cat([drive[:, None], (powers[:, : chunk - 1] @ drive[:, None, :, None])[..., 0]], dim=1)
    hops = [powers[:, -1]]
    while len(hops) < n_hops:
        hops.append(hops[-1] @ hops[-1])
    return {
        "transition": transition,
        "drive": drive,
        "powers": powers.contiguous(),
        "response": earlier.contiguous(),
        "hops": torch.stack(hops),
    }


def _sizes(transition: Tensor, drive: Tensor) -> Tensor:
    """[W, q]: standard deviations in the steady state under white noise, sum_k A^k B B^T (A^k)^T, by doubling."""
    covariance = drive[:, :, None] * drive[:, None, :]
    power = transition
    for _ in range(64):
        covariance = covariance + power @ covariance @ power.mT
        power = power @ power
    return covariance.diagonal(dim1=1, dim2=2).sqrt()


def recurrent(u: Tensor, tables: Tables, state: Tensor | None = None) -> Tensor:
    """One token at a time: u [B, T, W, n], state [B, W, n, q] -> m [B, T, W, n, q]. The definition, for tests."""
    m = u.new_zeros(*u[:, 0].shape, tables["drive"].shape[-1]) if state is None else state
    out = []
    for t in range(u.shape[1]):
        m = advance(u[:, t], m, tables)
        out.append(m)
    return torch.stack(out, dim=1)


def advance(u: Tensor, m: Tensor, tables: Tables) -> Tensor:
    """One step: u [B, W, n], m [B, W, n, q] -> the next m."""
    return torch.matmul(m, tables["transition"].mT) + u[..., None] * tables["drive"][:, None]


def chunked(u: Tensor, tables: Tables, positions: Tensor | None = None, state: Tensor | None = None) -> Tensor:
    """Chunks: u [B, T, W, n], state [B, W, n, q] -> m [B, T, W, n, q].

    positions [B, T]: place of each token in its document, where a row holds several; a state is then read by tokens of
    the first document alone. Within a chunk a product with the response; between chunks a scan of log2(T / C) products.
    """
    length, size = u.shape[1], tables["response"].shape[1]
    size = min(size, length)
    n_chunks = -(-length // size)
    u = F.pad(u, (0, 0, 0, 0, 0, n_chunks * size - length)).unflatten(1, (n_chunks, size))
    # age j of the window at token i is the input of token i - j; what lies before the chunk comes with the state
    inputs = F.pad(u, (0, 0, 0, 0, size - 1, 0)).unfold(2, size, 1).flip(-1)
    reached = None
    if positions is not None:
        places = F.pad(positions, (0, n_chunks * size - length)).unflatten(1, (n_chunks, size))
        offsets = torch.arange(size, device=u.device)
        inputs = torch.where((offsets <= places[..., None])[:, :, :, None, None], inputs, 0.0)
        reached = places > offsets
    within = torch.einsum("bkiwnj,wjq->bkiwnq", inputs, tables["response"][:, :size])
    before = _states_before(within[:, :, -1], tables, None if reached is None else reached[:, :, -1], state)
    if before is not None:
        carried = torch.einsum("bkwnp,wiqp->bkiwnq", before, tables["powers"][:, :size])
        within = within + (carried if reached is None else torch.where(_over(reached, carried), carried, 0.0))
    return within.flatten(1, 2)[:, :length]


def _states_before(ends: Tensor, tables: Tables, unbroken: Tensor | None, state: Tensor | None) -> Tensor | None:
    """[B, K, W, n, q]: the state before each chunk; ends: what each chunk alone has left at its last token; unbroken
    [B, K]: whether that token's document started before the chunk. None where all are zero."""
    n_chunks = ends.shape[1]
    if n_chunks == 1:
        return None if state is None else state[:, None]
    first = torch.zeros_like(ends[:, :1]) if state is None else state[:, None]
    states = torch.cat([first, ends[:, :-1]], dim=1)
    passes = None if unbroken is None else torch.cat([torch.zeros_like(unbroken[:, :1]), unbroken[:, :-1]], dim=1)
    hops = list(tables["hops"].unbind(0))
    shift = 1
    for level in range((n_chunks - 1).bit_length()):
        if level == len(hops):
            hops.append(hops[-1] @ hops[-1])
        moved = torch.matmul(states[:, :-shift], hops[level].mT)
        if passes is not None:
            moved = torch.where(_over(passes[:, shift:], moved), moved, 0.0)
            passes = passes & F.pad(passes[:, :-shift], (shift, 0))
        states = states + F.pad(moved, (0,) * 6 + (shift, 0))
        shift *= 2
    return states


def _over(mask: Tensor, like: Tensor) -> Tensor:
    return mask.reshape(mask.shape + (1,) * (like.dim() - mask.dim()))


def spectrum(length: int, tables: Tables) -> Tensor:
    """[F, W, 1, q]: the response over `length` tokens, transformed for a convolution without wrap-around."""
    response = tables["response"]
    impulse = F.pad(response.new_ones(1, 1, response.shape[0], 1), (0, 0, 0, 0, 0, length - 1))
    return torch.fft.rfft(chunked(impulse, tables)[0], n=2 * length, dim=0)


def convolved(u: Tensor, spectrum: Tensor) -> Tensor:
    """By FFT: u [B, T, W, n] of one document per row -> m [B, T, W, n, q]."""
    length = u.shape[1]
    product = torch.fft.rfft(u, n=2 * length, dim=1)[..., None] * spectrum
    return torch.fft.irfft(product, n=2 * length, dim=1)[:, :length]


class LegendreMemory(nn.Module):
    """The memory of n_windows * n channels: u [B, T, W, n] -> m [B, T, W, n, q].

    Its matrices are buffers in float64 which stay so when the model is cast: a power of A rounded to 16 bits forgets
    too early or never. They are converted once per forward for all layers of the same kind, and the arithmetic runs in
    at least fp32.
    """

    transition: Tensor
    drive: Tensor
    powers: Tensor
    response: Tensor
    hops: Tensor

    def __init__(self, order: int, windows: tuple[float, ...], *, chunk: int, max_len: int, unit: bool = False) -> None:
        super().__init__()
        self.order, self.windows, self.chunk, self.unit = order, windows, chunk, unit
        self.n_hops = max(1, math.ceil(max_len / chunk - 1).bit_length())
        self.key = f"legendre/{order}/{windows}/{chunk}/{self.n_hops}/{unit}"
        n = len(windows)
        shapes = {
            "transition": (n, order, order),
            "drive": (n, order),
            "powers": (n, chunk, order, order),
            "response": (n, chunk, order),
            "hops": (self.n_hops, n, order, order),
        }
        for name, shape in shapes.items():
            self.register_buffer(name, torch.empty(shape, dtype=torch.float64), persistent=False)

    def init_spec(self) -> dict[str, Init]:
        def make(name: str) -> Callable[[], Tensor]:
            return lambda: system_tables(self.order, self.windows, self.chunk, self.n_hops, self.unit)[name]

        return {name: computed(make(name)) for name in self._buffers}

    def _apply(self, fn: Any, recurse: bool = True) -> LegendreMemory:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = self._buffers[name]
            assert tensor is not None and moved is not None
            if moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self

    def prepare(self, seq: SeqInfo, dtype: torch.dtype, *, fft: bool = False) -> None:
        """Put the tables in the dtype of the arithmetic into `seq.derived`, and the spectrum where it will be used."""
        wide = torch.promote_types(dtype, torch.float32)
        self._tables(seq, wide)
        if fft:
            self._spectrum(seq, wide)

    def _tables(self, seq: SeqInfo, wide: torch.dtype) -> Tables:
        names = ("transition", "drive") if seq.positions.shape[1] == 1 else tuple(self._buffers)
        key = f"{self.key}/{wide}/{len(names)}"
        found = seq.derived.get(key)
        if found is None:
            found = seq.derived[key] = {name: self.get_buffer(name).to(wide) for name in names}
        return found

    def _spectrum(self, seq: SeqInfo, wide: torch.dtype) -> Tensor:
        key = f"{self.key}/{wide}/fft"
        found = seq.derived.get(key)
        if found is None:
            exact = {name: self.get_buffer(name) for name in self._buffers}
            made = spectrum(seq.positions.shape[1], exact)
            found = seq.derived[key] = made.to(torch.promote_types(wide, torch.complex64))
        return found

    def forward(self, u: Tensor, seq: SeqInfo, *, fft: bool = False) -> Tensor:
        """Whole documents; `fft` asks for the convolution, which packed rows do not allow."""
        with torch.autocast(u.device.type, enabled=False):
            u = u.to(torch.promote_types(u.dtype, torch.float32))
            if fft:
                assert not seq.packed, "documents of a packed row would run into one another"
                return convolved(u, self._spectrum(seq, u.dtype))
            if u.shape[1] == 1:
                return u[..., None] * self._tables(seq, u.dtype)["drive"][:, None]
            return chunked(u, self._tables(seq, u.dtype), seq.positions if seq.packed else None)

    def extend(self, u: Tensor, seq: SeqInfo, state: Tensor) -> Tensor:
        """The tokens after those in `state` [B, W, n, q]."""
        with torch.autocast(u.device.type, enabled=False):
            u = u.to(state.dtype)
            if u.shape[1] == 1:
                return advance(u[:, 0], state, self._tables(seq, u.dtype))[:, None]
            return chunked(u, self._tables(seq, u.dtype), None, state)


def memory_flops(order: int, n_channels: int, chunk: int, length: int, *, stateful: bool) -> float:
    """FLOPs of one token in `chunked`, mean over `length` tokens."""
    size = min(chunk, length)
    n_chunks = -(-length // size)
    tokens = n_chunks * size / length
    within = 2.0 * size * order
    carried = 2.0 * order**2 if n_chunks > 1 or stateful else 0.0
    scan = 0.0
    for level in range((n_chunks - 1).bit_length()):
        scan += 2.0 * order**2 * (n_chunks - 2**level) / length
    return n_channels * ((within + carried) * tokens + scan)
