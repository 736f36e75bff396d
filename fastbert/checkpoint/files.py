"""Loading and saving: files are written whole or not at all, and the garbage collector rests while models are made."""

from __future__ import annotations

import errno
import gc
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of a write, which do not name the file themselves


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Makes an error of a full disk name `path`, which is being written in the context.

    safetensors reports such an error as an exception of its own, with the number in the text; here it is an OSError.
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
    """Yields a temporary path in the folder of `path`; on success it is flushed to the disk and renamed to `path`.

    On an exception the temporary file is removed and the file at `path`, if there is one, stays as it was.
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
            # mkstemp makes files that only their owner can read; a result is an ordinary file.
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
    """Within it, nothing is collected in this process.

    Loading makes thousands of objects that stay. Counting them, Python would go over all that torch has made, a tenth
    of a second, as long as all the rest takes for a small model, and find nothing to free.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
