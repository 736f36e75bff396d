"""Counter-based random numbers: each is a function of a key and a counter, so there is no state to save or share.

Draw i of key k is output i of the SplitMix64 generator (Steele, Lea, Flood 2014) seeded with k. All arithmetic is
modulo 2^64, on uint64 arrays.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_ALL = (1 << 64) - 1


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer: a bijection whose every output bit depends on all input bits. Overwrites `x`."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x ^= x >> np.uint64(shift)
        x *= np.uint64(factor)
    x ^= x >> np.uint64(31)
    return x


def key_of(*parts: int) -> int:
    """Combines several numbers, in this order, into one key."""
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        key = mix(key + np.uint64((part + 1) * _GOLDEN & _ALL))
    return int(key[0])


def draws(key: int | np.ndarray, counters: np.ndarray) -> np.ndarray:
    """The draws with numbers `counters` of `key`, or each of its own key; uint64, uniform over all 2^64 values."""
    x = counters.astype(np.uint64)  # a copy, as `mix` overwrites it
    x += np.uint64(1)
    x *= np.uint64(_GOLDEN)
    x += key if isinstance(key, np.ndarray) else np.uint64(key)
    return mix(x)


class Permutation:
    """A random permutation of the numbers below n. Any part of it is computed alone; nothing is stored.

    A Feistel network on the next power of two, iterated until the result is below n (cycle walking, Black and Rogaway
    2002). As an array, a billion examples would take 8 GB in each process of a machine.
    """

    ROUNDS = 8

    def __init__(self, n: int, key: int) -> None:
        self._n = n
        bits = max(2, (n - 1).bit_length())
        self._low = np.uint64(bits // 2)  # bits of the right half
        self._masks = [np.uint64((1 << bits // 2) - 1), np.uint64((1 << bits - bits // 2) - 1)]
        self._keys = [key_of(key, r) for r in range(self.ROUNDS)]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """The numbers at these positions, int64."""
        x = self._walk(positions.astype(np.uint64))
        while len(outside := np.flatnonzero(x >= self._n)):
            x[outside] = self._walk(x[outside])
        return x.astype(np.int64)

    def _walk(self, x: np.ndarray) -> np.ndarray:
        halves = [x & self._masks[0], x >> self._low]
        for r, key in enumerate(self._keys):
            halves[r % 2] ^= draws(key, halves[1 - r % 2]) & self._masks[r % 2]
        return halves[1] << self._low | halves[0]
