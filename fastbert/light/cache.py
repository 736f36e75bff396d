"""Packed weights on disk, mapped by each process that runs them: a model starts without packing, processes share it.

A file holds the arrays of one model in one dtype and precision for one instruction set. It is made again where the
weights' files have changed, another size, or another time and other contents, and by another version of fastbert.

    8 bytes   the magic, with the version of the format
    8 bytes   the length of the header
    32 bytes  the header's SHA-256
    header    JSON: what the arrays are of, their dtypes, shapes and places, and the checksum of their bytes
    arrays    each at a multiple of 64 bytes, from the first page after the header on
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastbert import __version__
from fastbert.checkpoint.files import atomic_path
from fastbert.engine.library import C, chosen_isa
from fastbert.engine.memory import address_of
from fastbert.light.packing import Arrays
from fastbert.light.weights import MappedFile

_MAGIC = b"fbpack02"
_HEAD, _PAGE, _LINE = 48, 4096, 64  # bytes before the header, of a page, of a line of the processor's cache
_CHUNK = 1 << 20  # bytes of a checksum


def default_folder() -> Path:
    """`fastbert/packed` in XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastbert" / "packed"


def cached(
    folder: Path, files: Mapping[str, MappedFile], what: Mapping[str, Any], make: Callable[[], Arrays], threads: int
) -> Arrays:
    """The arrays of `make`, from the folder, where they are kept.

    Args:
        folder: made if it is missing.
        files: the weights' files as they are mapped, by names that do not change.
        what: what the arrays depend on besides the files: dtype, precision, head.
        make: packs them.
        threads: that check the bytes.

    Raises:
        OSError: the folder cannot be written to.
    """
    kind = {**what, "isa": chosen_isa()[0], "version": __version__}
    places = {name: str(file.path) for name, file in files.items()}
    digest = hashlib.sha256(json.dumps([places, kind], sort_keys=True).encode()).hexdigest()
    path = folder / f"{digest[:32]}.fbpack"
    header = _read_header(path)
    if header is not None and header["kind"] == kind and _same_files(header["files"], files):
        arrays = _mapped(path, header, threads)
        if arrays is not None:
            return arrays
    made = make()
    _write(path, {"kind": kind, "files": {name: _identity(file) for name, file in files.items()}}, made, threads)
    header = _read_header(path)
    found = None if header is None else _mapped(path, header, threads)
    return made if found is None else found  # another process may have replaced it


def _identity(file: MappedFile) -> dict[str, Any]:
    return {"size": file.size, "time": file.time, "sha256": file.sha256()}


def _same_files(recorded: Mapping[str, Any], files: Mapping[str, MappedFile]) -> bool:
    """True if the files are those recorded: of the same size, and of the same time or the same contents."""
    if recorded.keys() != files.keys():
        return False
    for name, file in files.items():
        then = recorded[name]
        if file.size != then["size"] or (file.time != then["time"] and file.sha256() != then["sha256"]):
            return False
    return True


def _write(path: Path, header: dict[str, Any], arrays: Arrays, threads: int) -> None:
    arrays = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
    entries: dict[str, dict[str, Any]] = {}
    end = 0
    for name, x in arrays.items():
        entries[name] = {"dtype": x.dtype.str, "shape": list(x.shape), "place": end, "checksum": _checksum(x, threads)}
        end += -(-x.nbytes // _LINE) * _LINE
    text = json.dumps({**header, "arrays": entries, "bytes": end}).encode()
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(_MAGIC + len(text).to_bytes(8, "little") + hashlib.sha256(text).digest() + text)
        first = _first_page(len(text))
        for entry, x in zip(entries.values(), arrays.values(), strict=True):
            file.seek(first + entry["place"])
            file.write(x.reshape(-1).view(np.uint8).data)
        file.truncate(first + end)


def _first_page(length: int) -> int:
    """Where the arrays begin, after a header of this length."""
    return -(-(_HEAD + length) // _PAGE) * _PAGE


def _read_header(path: Path) -> dict[str, Any] | None:
    """The header of a file; None where there is none, or another format or a truncated file."""
    try:
        with open(path, "rb") as file:
            start = file.read(_HEAD)
            if start[:8] != _MAGIC:
                return None
            text = file.read(int.from_bytes(start[8:16], "little"))
            if hashlib.sha256(text).digest() != start[16:]:
                return None
        header: dict[str, Any] = json.loads(text)
        header["first"] = _first_page(len(text))
        return header if path.stat().st_size == header["first"] + header["bytes"] else None
    except (OSError, ValueError, KeyError):
        return None


def _mapped(path: Path, header: dict[str, Any], threads: int) -> Arrays | None:
    """The arrays of a file, mapped; None where its bytes are not those that were written."""
    with open(path, "rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    found = Arrays()
    for name, entry in header["arrays"].items():
        dtype, count = np.dtype(entry["dtype"]), int(np.prod(entry["shape"]))
        x = np.frombuffer(memory, dtype, count, header["first"] + entry["place"]).reshape(entry["shape"])
        if _checksum(x, threads) != entry["checksum"]:
            return None
        found[name] = x
    return found


def _checksum(x: np.ndarray, threads: int) -> str:
    """Of the bytes of a contiguous array."""
    address, size = address_of(x), x.nbytes
    places = range(0, size, _CHUNK)
    words = array("Q", [word for at in places for word in (address + at, min(_CHUNK, size - at), 0)])
    C.checksum_cpu(words.buffer_info()[0], len(places), threads)
    return hashlib.sha256(array("Q", words[2::3]).tobytes()).hexdigest()[:16]
