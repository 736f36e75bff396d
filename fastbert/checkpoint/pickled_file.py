"""Reads a pytorch_model.bin by torch.load with weights_only, which runs no code of the file."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

_SPARE = 1 << 30  # bytes by which a file may grow when it is unpacked
_LONGEST_PICKLE = 64 << 20  # bytes; a model's pickle with its tensor names has about 100 KB
_SIGNATURE = b"PK\x03\x04"  # starts a record's header, and so an archive


class PickledFile:
    """The tensors of a pytorch_model.bin, by name; see SafetensorsFile. Each is freed after it has been copied.

    Raises:
        ValueError: the file is not torch's, holds anything but tensors, or is truncated.
    """

    def __init__(self, path: Path) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of old storage types
                _check_archive(path)
                state = torch.load(path, map_location="cpu", weights_only=True)
        except ValueError:
            raise
        except Exception as error:  # the pickle and zip readers raise many types
            raise ValueError(f"{type(error).__name__}: {_first_line(error)}") from error
        state = state.get("state_dict", state) if isinstance(state, dict) else {}
        state = state if isinstance(state, dict) else {}
        self._state = {name: t for name, t in state.items() if isinstance(name, str) and isinstance(t, Tensor)}
        if not self._state:
            raise ValueError("it holds no tensors by name")

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def shape(self, name: str) -> torch.Size:
        return self._state[name].shape

    def dtype(self, name: str) -> torch.dtype:
        tensor = self._state[name]
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.is_meta:
            raise ValueError(f"it is a {tensor.layout} tensor of {tensor.dtype}; a weight is dense and real")
        return tensor.dtype

    @torch.no_grad()
    def copy_into(self, target: Tensor, name: str, first: int | None = None) -> None:
        self.dtype(name)
        source = self._state[name]
        if first is None:
            target.copy_(source)
        else:
            target.copy_(source[first : first + len(target)])
            if first + len(target) < len(source):  # the rest is wanted too
                return
        self._state[name] = self._state[name].to("meta")  # else file and model would both be in memory at the end


def _check_archive(path: Path) -> None:
    """Refuses a zip archive that is damaged (torch does not check) or that unpacks to far more than its size."""
    with open(path, "rb") as file:
        if file.read(4) != _SIGNATURE:  # torch's own test: files from before torch 1.6 are no zip archives
            return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        records = {entry.filename.partition("/")[2]: entry for entry in entries}  # the folder is named after the file
        if len(records) != len(entries):
            raise ValueError("its archive names a record twice")
        unpacked, most = sum(entry.file_size for entry in entries), path.stat().st_size + _SPARE
        if unpacked > most:
            raise ValueError(f"its records unpack to {unpacked} bytes; the limit is {most}, {_SPARE} above the file's")
        if "data.pkl" not in records or records["data.pkl"].file_size > _LONGEST_PICKLE:
            raise ValueError(f"its archive has no data.pkl of at most {_LONGEST_PICKLE} bytes")
        # torch.serialization.set_crc32_options(False) writes archives without checksums.
        if any(entry.CRC for entry in entries) and (damaged := archive.testzip()):
            raise ValueError(f"record {damaged} does not have its checksum")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no more is known"])[0]
