"""Reads a pytorch_model.bin, with torch's own reader, which runs none of its code."""

from __future__ import annotations

import os
import pickle
import warnings
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SPARE = 1 << 30  # bytes that a compressed file may be longer once unpacked
_LONGEST_PICKLE = 64 << 20  # of a model, with the names of its tensors, 100 KB
_SIGNATURE = b"PK\x03\x04"  # of a record's header, and so of an archive
_LOCAL_HEADER = 30  # bytes in front of a record's name
_LONGEST_DESCRIPTOR = 24  # bytes after its content


class PickledFile:
    """The tensors of a pytorch_model.bin, by name; see SafetensorsFile.

    The file is mapped into memory where each tensor's numbers lie in it as they are; otherwise torch reads it whole.

    Raises:
        ValueError: no file of torch's, or one that holds anything but tensors, or less than its tensors need.
    """

    def __init__(self, path: Path) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch, about old kinds of storage
                state = _load(path)
        except ValueError:
            raise
        except Exception as error:  # its readers of pickle and zip raise what they stumble over
            raise ValueError(f"{type(error).__name__}: {_first_line(error)}") from error
        state = state.get("state_dict", state) if isinstance(state, dict) else {}
        state = state if isinstance(state, dict) else {}
        self._state = {name: t for name, t in state.items() if isinstance(name, str) and isinstance(t, Tensor)}
        if not self._state:
            raise ValueError("it holds no tensors by name")

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def close(self) -> None:
        self._state = {}

    def shape(self, name: str) -> torch.Size:
        return self._state[name].shape

    def dtype(self, name: str) -> torch.dtype:
        tensor = self._state[name]
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.is_meta:
            raise ValueError(f"it is a {tensor.layout} tensor of {tensor.dtype}; a weight is dense and real")
        return tensor.dtype

    @torch.no_grad()
    def copy_into(self, target: Tensor, name: str) -> None:
        self.dtype(name)
        target.copy_(self._state[name])


def _load(path: Path) -> object:
    with open(path, "rb") as file:
        zipped = file.read(4) == _SIGNATURE  # as torch tells a zip archive from what it wrote before 1.6
    if not zipped:
        return torch.load(path, map_location="cpu", weights_only=True)
    with zipfile.ZipFile(path) as archive:
        records = _records(archive, path)
        if not _stored_whole(archive, records):
            return torch.load(path, map_location="cpu", weights_only=True)  # it checks the sizes itself
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        # Mapped, a tensor takes what lies behind a record that is too short. The pickle has been found to be harmless.
        _check_sizes(archive, records)
    return state


def _records(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """The archive's records by their names without the folder, which torch names after the file."""
    entries = archive.infolist()
    records = {entry.filename.partition("/")[2]: entry for entry in entries}
    if len(records) != len(entries):
        raise ValueError("its archive names a record twice")
    unpacked, most = sum(entry.file_size for entry in entries), path.stat().st_size + _SPARE
    if unpacked > most:
        raise ValueError(f"its records unpack to {unpacked} bytes; the limit is {most}, {_SPARE} more than the file")
    if "data.pkl" not in records or records["data.pkl"].file_size > _LONGEST_PICKLE:
        raise ValueError(f"its archive has no data.pkl of at most {_LONGEST_PICKLE} bytes")
    return records


def _stored_whole(archive: zipfile.ZipFile, records: dict[str, zipfile.ZipInfo]) -> bool:
    """Whether each record lies in the file as it is, in this machine's byte order, apart from the others."""
    entries = sorted(records.values(), key=lambda entry: entry.header_offset)
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
        return False
    if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
        return False
    ends, file = [entry.header_offset for entry in entries[1:]] + [archive.start_dir], archive.fp
    assert file is not None, "the archive is closed"
    for entry, end in zip(entries, ends, strict=True):
        name = entry.orig_filename.encode()
        file.seek(entry.header_offset)
        header = file.read(_LOCAL_HEADER + len(name))
        name_length, extra_length = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        file.seek(extra_length + entry.file_size, os.SEEK_CUR)
        spare = end - file.tell()
        rest = file.read(spare) if 0 <= spare <= _LONGEST_DESCRIPTOR else None
        sound = header[:4] == _SIGNATURE and name_length == len(name) and header[_LOCAL_HEADER:] == name
        if not sound or entry.compress_size != entry.file_size or rest not in _descriptors(entry):
            raise ValueError(
                f"record {entry.filename} does not fill its place in the archive, or its header is damaged"
            )
    return True


def _descriptors(entry: zipfile.ZipInfo) -> list[bytes]:
    """What may follow a record's content: nothing, or, if a flag says so, its checksum and sizes once more."""
    if not entry.flag_bits & 8:
        return [b""]
    sizes = (entry.compress_size, entry.file_size)
    return [
        mark
        + entry.CRC.to_bytes(4, "little")
        + b"".join((size % 256**width).to_bytes(width, "little") for size in sizes)
        for mark in (b"PK\x07\x08", b"")
        for width in (4, 8)
    ]


def _check_sizes(archive: zipfile.ZipFile, records: dict[str, zipfile.ZipInfo]) -> None:
    reader = _SizeReader(BytesIO(archive.read(records["data.pkl"])), encoding="utf-8")
    reader.load()
    for key, needed in reader.sizes.items():
        entry = records.get(f"data/{key}")
        if entry is None or entry.file_size != needed:
            found = "is missing" if entry is None else f"has {entry.file_size} bytes"
            raise ValueError(f"record data/{key} {found}; its tensor has {needed}")


class _SizeReader(pickle._Unpickler):  # in Python: the one in C makes room for as many objects as a file claims
    """Runs through a pickle without making any of its objects, and notes the bytes of each storage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sizes: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> object:
        return type(name, (_Inert,), {"origin": (module, name)})

    def persistent_load(self, saved: tuple) -> object:
        _, storage, key, _, numel = saved
        kind = getattr(torch, storage.origin[1])
        dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
        self.sizes[key] = numel * dtype.itemsize
        return _Inert()


class _Inert:
    """Takes the place of whatever a pickle makes."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __new__(cls, *args: object, **kwargs: object) -> _Inert:
        return super().__new__(cls)

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def append(self, value: object) -> None:
        pass


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no more is known"])[0]
