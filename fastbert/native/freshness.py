"""The state that a plan compares at each call: the objects of a module tree, and checksums of parameters."""

from __future__ import annotations

import time
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, chain
from operator import is_
from typing import Any

import torch
from torch import Tensor

from fastbert.native.extension import C
from fastbert.weight import Weight

_CHUNK = 1 << 15  # bytes
_LEAST = 1 << 16  # bytes of weights that every call compares at least
_SHARE = 0.01  # of a call's time, spent on comparing


class SameObjects:
    """Some hundreds of objects, compared by identity in one pass.

    Args:
        objects: whose classes are compared.
        entries: (dict, key): the value under the key is compared, None where there is none.
        tables: dicts whose keys and values are compared, in order.
    """

    def __init__(self, objects: list[Any], entries: list[tuple[dict, str]], tables: list[dict]) -> None:
        self.objects, self.classes = objects, [*map(type, objects)]
        self.dicts, self.keys = [d for d, _ in entries], [key for _, key in entries]
        self.values = [*map(dict.get, self.dicts, self.keys)]
        self.tables, self.contents = tables, self._contents(tables)

    @staticmethod
    def _contents(tables: list[dict]) -> list[Any]:
        """Key, value, key, value and so on of each table, and None at its end."""
        return [x for table in tables for x in (*chain.from_iterable(table.items()), None)]

    def hold(self) -> bool:
        """True if nothing has changed."""
        known = self.objects, self.classes, self.dicts, self.keys, self.values, self.tables, self.contents
        if C is not None:
            return C.same_objects(*known)
        contents = self._contents(self.tables)
        return (
            all(map(is_, map(type, self.objects), self.classes))
            and all(map(is_, map(dict.get, self.dicts, self.keys), self.values))
            and len(contents) == len(self.contents)
            and all(map(is_, contents, self.contents))
        )


class Checksums:
    """Checksums of several `Weight`s on the CPU, as of the last call of `take`.

    Each call of `changed` compares all biases and a part of the weights, which advances from call to call.
    """

    def __init__(self, weights: Sequence[Weight]) -> None:
        self.weights = weights  # held, as the chunks are addresses in their memory
        self.words = array("Q")  # address, bytes, checksum of each chunk
        for weight in weights:
            for bias in weight.biases:
                self._cut(bias)
        self.next = self.small = len(self.words) // 3  # chunks of biases; those of weights follow
        for weight in weights:
            for tensor in weight.weights:
                self._cut(tensor)
        self.ends = list(accumulate(self.words[1::3]))  # bytes up to the end of each chunk
        self.bytes = self.ends[-1] if self.ends else 0
        self.speed = 1e10  # bytes per second, until it is measured
        self.credit = 0.0
        self.seconds = 0.0  # duration of the last model call, set by the owner

    def _cut(self, tensor: Tensor) -> None:
        address, left = tensor.data_ptr(), _span(tensor)
        while left > 0:
            self.words.extend((address, min(left, _CHUNK), 0))
            address, left = address + _CHUNK, left - _CHUNK

    def take(self) -> None:
        """Computes the checksums of all values."""
        start = time.perf_counter()
        C.checksum_cpu(self.words.buffer_info()[0], len(self.ends), torch.get_num_threads())
        self.speed = self.bytes / max(time.perf_counter() - start, 1e-6)

    def changed(self, *, whole: bool) -> bool:
        """True if a compared value has changed: all are compared if `whole`, else for about 1% of a call's time."""
        everything, words = len(self.ends), self.words.buffer_info()[0]
        credit = self.credit + self._bytes_a_call()
        if whole or credit >= self.bytes:
            self.credit = 0.0
            return C.changed_cpu(words, everything, 0, 0, torch.get_num_threads())
        first, done = self.next, self.ends[self.next - 1] if self.next else 0
        end = bisect_right(self.ends, done + credit)
        self.credit = credit - (self.ends[end - 1] - done) if end > first else credit
        self.next = end if end < everything else self.small
        return C.changed_cpu(words, self.small, first, max(end, first), torch.get_num_threads())

    def calls_until_seen(self) -> int:
        """The most calls like the last one until a write to any weight is detected."""
        return 1 + int(self.bytes / self._bytes_a_call())

    def _bytes_a_call(self) -> float:
        return max(_SHARE * self.seconds * self.speed, _LEAST)


def checksums_of(weights: Sequence[Weight]) -> Checksums | None:
    """The checksums of the weights on the CPU, taken now; None without the extension or without such weights."""
    lying = [w for w in weights if all(t.is_cpu for t in w.tensors)]
    if C is None or not lying:
        return None
    checksums = Checksums(lying)
    checksums.take()
    return checksums


def _span(x: Tensor) -> int:
    """The bytes from the first element of x to the last one."""
    if not x.numel():
        return 0
    return (sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) + 1) * x.element_size()
