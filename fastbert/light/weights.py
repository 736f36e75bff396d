"""The tensors of a checkpoint as numpy's arrays over the mapped files: a weight is read as it is packed."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.checkpoint.json_files import parse_json
from fastbert.checkpoint.stored_tensors import StoredTensors, aliases_of
from fastbert.families import Family
from fastbert.lazy import needs_torch

# numpy has no bfloat16: its bits are uint16 here.
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
DTYPES = ("float32", "bfloat16")  # that a light model runs in
STORED = {"F64": "float32", "F32": "float32", "F16": "float32", "BF16": "bfloat16"}  # what each is run in by default


class MappedFile:
    """The tensors of one safetensors file, by name.

    Raises:
        ValueError: the file violates the format, or names a tensor twice.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        if path.suffix == ".bin":
            raise needs_torch(f"{path}, a pickled checkpoint,")
        try:
            with safe_open(path, framework="numpy"):  # checks the header for overlaps, gaps and wrong sizes
                pass
        except SafetensorError as error:
            raise ValueError(str(error)) from error
        with open(path, "rb") as file:
            # Of what is mapped, whatever becomes of the path.
            stat = os.fstat(file.fileno())
            self.path, self.size, self.time = path.resolve(), stat.st_size, stat.st_mtime_ns
            size = int.from_bytes(file.read(8), "little")
            self._entries = parse_json(file.read(size), "its header")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._entries.pop("__metadata__", None)
        self._first = 8 + size

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name]["shape"])

    def stored_dtype(self, name: str) -> str:
        return str(self._entries[name]["dtype"])

    def array(self, name: str) -> np.ndarray:
        """The tensor, mapped; bfloat16 as its bits in uint16."""
        entry = self._entries[name]
        dtype = np.dtype(_DTYPES[entry["dtype"]])
        first, last = entry["data_offsets"]
        count = (last - first) // dtype.itemsize
        return np.frombuffer(self._map, dtype, count, self._first + first).reshape(entry["shape"])

    def sha256(self) -> str:
        """Of the file's bytes."""
        return hashlib.sha256(self._map).hexdigest()

    def forget(self) -> None:
        """Tells the system that what was read is not needed soon: it no longer counts as the process's memory."""
        if hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)


class Weights(StoredTensors):
    """The tensors of a checkpoint in the dtype that a model runs in.

    Args:
        dtype: "float32" or "bfloat16"; None for the one that the table of words is stored in, float32 for other than
            bfloat16.
        tied: whether the table of words is the weight of the masked-language-model head's decoder, too.
    """

    def __init__(
        self, path: str | Path, revision: str | None, family: Family, dtype: str | None = None, *, tied: bool = False
    ) -> None:
        super().__init__(path, revision, family, MappedFile)
        self._aliases = aliases_of(family, tied)
        if dtype not in (None, *DTYPES):
            raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(map(repr, DTYPES))}, or None")
        if self._found(self.words) not in self and dtype is None:
            self.fail_missing([self.words])
        self.dtype: str = dtype or STORED[self.stored]

    @property
    def stored(self) -> str:
        """The dtype that the table of words is stored in, as safetensors calls it.

        Raises:
            ValueError: none of a weight.
        """
        return self._dtype_of(self._found(self.words))

    def get(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor, of this shape by the config; bfloat16 as its bits in uint16.

        Raises:
            ValueError: it is missing, has another shape, or is no weight. The message names file and tensor.
        """
        name = self._found(name)
        if name not in self:
            self.fail_missing([name])
        if (found := self.shape(name)) != shape:
            raise ValueError(
                f"{self.files[name]}: tensor {name} has shape {tuple(found)}; the config makes it {tuple(shape)}"
            )
        stored = self._dtype_of(name)
        file, in_file, part = self._stored[name]
        x = file.array(in_file)
        if part.blocks > 1:
            x = x[part.block * shape[0] :][: shape[0]]
        return aligned(converted(x, stored, self.dtype))

    def _found(self, name: str) -> str:
        """The name that a tensor is stored by: its own, unless it is a tied one that has another."""
        return next((alias for alias in self._aliases.get(name, ()) if alias in self), name)

    def by_name(self) -> dict[str, MappedFile]:
        """The files that hold the weights, by their names."""
        found = {file.path.name: file for file, _, _ in self._stored.values()}
        return dict(sorted(found.items()))

    def forget(self) -> None:
        for file in {id(file): file for file, _, _ in self._stored.values()}.values():
            file.forget()

    def _dtype_of(self, name: str) -> str:
        file, stored, _ = self._stored[name]
        dtype = file.stored_dtype(stored)
        if dtype not in _DTYPES:
            raise ValueError(
                f"{self.files[name]}: tensor {name} has dtype {dtype}; a weight has one of {', '.join(_DTYPES)}"
            )
        return dtype


def converted(x: np.ndarray, stored: str, dtype: str) -> np.ndarray:
    """An array stored as safetensors calls it, in "float32" or "bfloat16"."""
    if dtype == "float32":
        return as_float32(x) if stored == "BF16" else x.astype(np.float32, copy=False)
    return x if stored == "BF16" else as_bfloat16(x.astype(np.float32, copy=False))


def as_float32(bits: np.ndarray) -> np.ndarray:
    """bfloat16, as its bits, in float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def as_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 rounded to bfloat16, ties to even: its bits in uint16."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def aligned(x: np.ndarray) -> np.ndarray:
    """The array, or a copy where its first element or rows do not begin at a multiple of four bytes."""
    address: Any = x.__array_interface__["data"][0]
    return x if address % 4 == 0 and x.flags.c_contiguous else x.copy()
