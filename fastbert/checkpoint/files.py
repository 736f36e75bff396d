"""Atomic file writes, errors of a full disk that name the file, and a pause of the garbage collector for loading."""

from __future__ import annotations

import errno
import gc
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of a write; they do not name the file


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Adds `path`, which is being written in the context, to errors of a full disk.

    safetensors raises its own exception for such an error, with the errno in its text; this raises an OSError.
    """
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else _wrapped_errno(error)
        if number in FULL:
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


def _wrapped_errno(error: Exception) -> int | None:
    if type(error).__name__ != "SafetensorError":
        return None
    found = re.search(r"\b(?:os error|code:) (\d+)", str(error))
    return int(found[1]) if found else None


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path in the folder of `path`; on success the file is flushed to disk and renamed to `path`.

    On an exception the temporary file is removed and an existing file at `path` is unchanged.
    A full disk is an OSError that names `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        with naming(path):
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            # mkstemp makes files that only their owner can read; give the result ordinary permissions.
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` to `path` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """Turns garbage collection off in this process.

    Loading makes thousands of long-lived objects, which trigger full collections. Each traverses all of torch's objects
    and frees nothing. That takes 0.1 s, as long as the rest of loading a small model.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
