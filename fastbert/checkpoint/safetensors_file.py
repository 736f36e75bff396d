"""Reads a safetensors file through its library, which checks the header for overlaps, gaps and wrong sizes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastbert.checkpoint.json_files import parse_json

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# The library maps the file, and pages that were read count as memory of the process until it is unmapped. After this
# many bytes the file is mapped again, so that loading does not hold the whole file in addition to the model.
_MAPPED = 8 << 20


class SafetensorsFile:
    """The tensors of one open file, by name.

    Raises:
        ValueError: the file violates the format, or names a tensor twice.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._stat = path, _identity(path)
        self._open()
        with open(path, "rb") as file:
            # parse_json refuses a duplicate name; of two entries, the library silently takes the last.
            self._entries = parse_json(file.read(int.from_bytes(file.read(8), "little")), "its header")
        self._entries.pop("__metadata__", None)

    def _open(self) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            self._map, self._left = safe_open(self._path, framework="pt"), _MAPPED
        except SafetensorError as error:
            raise ValueError(str(error)) from error
        if _identity(self._path) != self._stat:
            raise ValueError("the file was changed while it was read")

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def shape(self, name: str) -> torch.Size:
        return torch.Size(self._entries[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        stored = self._entries[name]["dtype"]
        if stored not in _DTYPES:
            raise ValueError(f"its dtype is {stored}; known are {', '.join(_DTYPES)}")
        return _DTYPES[stored]

    @torch.no_grad()
    def copy_into(self, target: Tensor, name: str, first: int | None = None) -> None:
        """Copies a tensor into `target`, which has its shape and may have another dtype and device; or from row `first`
        on as many rows as it has."""
        size = target.numel() * self.dtype(name).itemsize
        if first is None and (size <= _MAPPED or not target.dim()):
            target.copy_(self._mapped(size).get_tensor(name))
            return
        rows = max(1, len(target) * _MAPPED // size)
        for start in range(0, len(target), rows):
            end = min(start + rows, len(target))
            source = self._mapped(_MAPPED).get_slice(name)
            target[start:end].copy_(source[(first or 0) + start : (first or 0) + end])

    def _mapped(self, size: int) -> Any:
        """The mapped file, remapped if reading `size` more bytes would exceed _MAPPED."""
        if self._left < size:
            self._open()
        self._left -= size
        return self._map


def _identity(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
