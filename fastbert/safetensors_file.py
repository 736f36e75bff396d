"""Reads a safetensors file straight into the tensors that want it, in chunks.

The package safetensors judges the file: its reader refuses a header with overlaps, holes or sizes that do not fit the
file. It maps the file, though, and each page that was read counts as memory of the process until the map goes, so that
loading would hold the whole file next to the model: the bytes are read here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fastbert.json_files import parse_json

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
_CHUNK = 4 << 20  # bytes that are held while they are converted


class SafetensorsFile:
    """The tensors of one open file, by name.

    Raises:
        ValueError: the file is not what the format describes, or names a tensor twice.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np"):
                pass
        except SafetensorError as error:
            raise ValueError(str(error)) from error
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        try:
            length = int.from_bytes(self._file.read(8), "little")
            self._start = 8 + length
            # The library takes the last of two entries of one name.
            self._entries = parse_json(self._file.read(length), "its header")
        except BaseException:
            self._file.close()
            raise
        self._entries.pop("__metadata__", None)

    def __iter__(self) -> Iterator[str]:
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
        count = max(1, _CHUNK // (rows[0].numel() * dtype.itemsize))
        chunk = torch.empty((min(count, len(rows)), *rows.shape[1:]), dtype=dtype)
        for part in rows.split(count):
            self._fill(chunk[: len(part)])
            part.copy_(chunk[: len(part)])

    def _fill(self, tensor: Tensor) -> None:
        memory = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
        while len(memory):
            got = self._file.readinto(memory)  # at most 2 GiB at a time
            if not got:
                raise ValueError("the file ends within it")
            memory = memory[got:]
