"""Random orders that need no memory: a keyed bijection on 0..n-1, the same on every machine and version."""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 6


def key_of(*parts: object) -> int:
    """64-bit key of some numbers and names."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


class Permutation:
    """A pseudo-random permutation of 0..n-1: a Feistel network with cycle walking (Black & Rogaway 2002).

    `perm(indices)` maps an int array of any shape, each index in O(1).
    """

    def __init__(self, n: int, key: int) -> None:
        assert n >= 1
        self.n = n
        bits = max(2, (n - 1).bit_length())
        self._right_bits = np.uint64(bits // 2)
        self._right_mask = np.uint64((1 << (bits // 2)) - 1)
        self._left_mask = np.uint64((1 << (bits - bits // 2)) - 1)
        self._keys = [np.uint64(key_of(key, i)) for i in range(_ROUNDS)]

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Where each index goes, int64."""
        out = np.asarray(indices, dtype=np.uint64)
        shape = out.shape
        out = self._walk(out.reshape(-1))
        outside = np.flatnonzero(out >= self.n)
        while outside.size:
            out[outside] = self._walk(out[outside])
            outside = outside[out[outside] >= self.n]
        return out.astype(np.int64).reshape(shape)

    def _walk(self, x: np.ndarray) -> np.ndarray:
        left, right = x >> self._right_bits, x & self._right_mask
        for i in range(0, _ROUNDS, 2):
            left = left ^ (_mix(right ^ self._keys[i]) & self._left_mask)
            right = right ^ (_mix(left ^ self._keys[i + 1]) & self._right_mask)
        return (left << self._right_bits) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
