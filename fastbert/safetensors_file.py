"""Reads a safetensors file straight into the tensors that want it, piece by piece.

The package safetensors maps the file: each page that was read counts as memory of the process until the map goes, so
that loading holds the whole file beside the model.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
_PIECE = 4 << 20  # bytes that are held while they are converted
_LONGEST_HEADER = 100_000_000  # as the format has it


class SafetensorsFile:
    """The tensors of one open file, by name.

    Raises:
        ValueError: the file is not what the format describes.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        try:
            self._entries = self._read_header(os.fstat(self._file.fileno()).st_size)
        except BaseException:
            self._file.close()
            raise

    def __iter__(self):
        return iter(self._entries)

    def close(self) -> None:
        self._file.close()

    def shape(self, name: str) -> torch.Size:
        return torch.Size(self._entries[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        stored = self._entries[name]["dtype"]
        if stored not in _DTYPES:
            raise ValueError(f"its dtype is {stored}; known are {', '.join(_DTYPES)}")
        return _DTYPES[stored]

    @torch.no_grad()
    def copy_into(self, target: Tensor, name: str) -> None:
        """Fills `target`, of the tensor's shape, in its own dtype and on its own device."""
        dtype = self.dtype(name)
        self._file.seek(self._start + self._entries[name]["data_offsets"][0])
        if not target.numel():
            return
        if target.dtype == dtype and target.device.type == "cpu" and target.is_contiguous():
            self._fill(target)
            return
        rows = target if target.dim() else target[None]
        count = max(1, _PIECE // (rows[0].numel() * dtype.itemsize))
        piece = torch.empty((min(count, len(rows)), *rows.shape[1:]), dtype=dtype)
        for part in rows.split(count):
            self._fill(piece[: len(part)])
            part.copy_(piece[: len(part)])

    def _fill(self, tensor: Tensor) -> None:
        memory = memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())
        while len(memory):
            got = self._file.readinto(memory)  # at most 2 GiB at a time
            if not got:
                raise ValueError("the file ends within it")
            memory = memory[got:]

    def _read_header(self, size: int) -> dict[str, dict[str, Any]]:
        length = int.from_bytes(self._file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        self._start = 8 + length
        entries = json.loads(self._file.read(length))
        if not isinstance(entries, dict):
            raise ValueError("its header is no JSON object")
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            try:
                (begin, end), shape = entry["data_offsets"], entry["shape"]
                sound = 0 <= begin <= end <= size - self._start and all(n >= 0 for n in shape)
                if sound and (dtype := _DTYPES.get(entry["dtype"])):
                    sound = end - begin == math.prod(shape) * dtype.itemsize
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"tensor {name} is described by {entry}") from error
            if not sound:
                raise ValueError(f"tensor {name} has shape {shape} and is said to lie at {begin} to {end} of {size}")
        return entries
