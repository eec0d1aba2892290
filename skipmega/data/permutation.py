"""Shuffled orders of any length that need no memory."""

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
_MASK = (1 << 64) - 1
_TURN = 0x9E3779B97F4A7C15  # SplitMix64's step


class Permutation:
    """A pseudo-random order of ``0 .. size - 1`` whose entries are computed one by one.

    A Feistel network over pairs of residues: adding to one half what is hashed from the other can be undone,
    so no number comes twice. The pairs are the numbers below the least product of two nearly equal factors
    that is not below ``size``; the few beyond ``size`` are sent through again until they are below it.

    Args:
        size: at least 1.
        key: orders of other keys have nothing to do with this one.
    """

    def __init__(self, size: int, *key: int | str) -> None:
        assert size >= 1
        self.size = size
        self._left = math.isqrt(size - 1) + 1
        self._right = -(-size // self._left)
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = [int.from_bytes(digest[at : at + 8], "big") for at in range(0, len(digest), 8)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        """The number at place ``index``."""
        if not 0 <= index < self.size:
            raise IndexError(f"place {index} of {self.size}")
        while True:
            index = self._pass(index)
            if index < self.size:
                return index

    def _pass(self, number: int) -> int:
        left, right = divmod(number, self._right)
        for first, second in zip(self._keys[::2], self._keys[1::2], strict=True):
            left = (left + _mix(right ^ first)) % self._left
            right = (right + _mix(left ^ second)) % self._right
        return left * self._right + right


def scattered(count: int, *key: int | str) -> NDArray[np.uint64]:
    """64 bits for each of 0 .. count - 1 that look random, of other keys others; [count]."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    with np.errstate(over="ignore"):
        value = np.arange(count, dtype=np.uint64) * np.uint64(_TURN) + np.uint64(
            int.from_bytes(digest, "big")
        )
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))


def _mix(value: int) -> int:
    """64 bits that look random, of 64 bits (the finalizer of SplitMix64, Steele et al. 2014)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
