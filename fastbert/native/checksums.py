"""Checksums of parameters: what sees writes to them that bypass the version counter."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastbert.native.extension import C

_CHUNK = 1 << 15  # bytes
_LEAST = 1 << 16  # bytes of the weights that a call looks at, however short it is
_SHARE = 0.01  # of a call's time


class Checksums:
    """The values of several `ops.Weight`s on the CPU, as they were when `take` was called last.

    Biases are compared whole at each call of `changed`; of the weights a part that moves on from call to call.
    """

    def __init__(self, weights: Sequence[Any]) -> None:
        self.weights = weights
        self.words, self.owners = array("Q"), []  # address, bytes, checksum of each chunk; the weight it belongs to
        for kind in ("biases", "weights"):
            for owner, weight in enumerate(weights):
                for tensor in getattr(weight, kind):
                    self._cut(tensor, owner)
            if kind == "biases":
                self.small = len(self.owners)
        self.next = self.small
        self.bytes = sum(self.words[1::3])
        self.speed = 1e10  # bytes per second, until it is measured
        self.credit = 0.0
        self.seconds = 0.0  # that the last call took, for its owner to say

    def _cut(self, tensor: Tensor, owner: int) -> None:
        address, left = tensor.data_ptr(), _span(tensor)
        while left > 0:
            self.words.extend((address, min(left, _CHUNK), 0))
            self.owners.append(owner)
            address, left = address + _CHUNK, left - _CHUNK

    def take(self) -> None:
        """Reads all values."""
        start = time.perf_counter()
        C.checksum_cpu(self.words.buffer_info()[0], len(self.owners), torch.get_num_threads())
        self.speed = self.bytes / max(time.perf_counter() - start, 1e-6)

    def changed(self, *, whole: bool) -> bool:
        """Whether values have changed, as far as this call looks: at all of them, or for a hundredth of its time."""
        if self._differ(0, len(self.owners) if whole else self.small):
            return True
        count = len(self.owners) - self.small
        if whole or not count:
            return False
        self.credit = min(self.credit + max(_SHARE * self.seconds * self.speed, _LEAST), count * _CHUNK)
        steps = int(self.credit // _CHUNK)
        self.credit -= steps * _CHUNK
        first, self.next = self.next, self.small + (self.next - self.small + steps) % count
        if first + steps <= len(self.owners):
            return self._differ(first, first + steps)
        return self._differ(first, len(self.owners)) or self._differ(self.small, self.next)

    def calls_until_seen(self) -> int:
        """The most calls like the last one until a write to any weight is seen."""
        count = len(self.owners) - self.small
        return max(1, -(-count * _CHUNK // int(max(_SHARE * self.seconds * self.speed, _LEAST))))

    def _differ(self, begin: int, end: int) -> bool:
        address = self.words.buffer_info()[0] + 24 * begin
        return end > begin and C.first_changed_cpu(address, end - begin, torch.get_num_threads()) >= 0


def _span(x: Tensor) -> int:
    """The bytes from the first element of x to the last one."""
    if not x.numel():
        return 0
    return (sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) + 1) * x.element_size()
