"""Runs that can be resumed: a journal of what one was asked and how far it came, and a lock on what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

from fastbert.checkpoint.files import write_text


class RunError(ValueError):
    """An output that cannot be written, or a run that cannot be resumed; the message says why."""


class Journal:
    """A JSON file next to what a run makes; it is there only while the run is not complete.

    Args:
        subject: what the run makes, for messages.
        version: of the journal's content.
        asked: what the result follows from, by name: a run is resumed by the same only.
        key: of that in the file.
    """

    def __init__(self, path: Path, subject: Path, *, version: int, asked: dict[str, Any], key: str) -> None:
        self.path, self._subject, self._version, self._asked, self._key = path, subject, version, asked, key

    def read(self, *, resume: bool) -> dict[str, Any] | None:
        """How far an interrupted run came, as `write` was told; None without such a run.

        Raises:
            RunError: there is one and `resume` is false, or it was asked otherwise, or its journal is damaged.
        """
        if not self.path.exists():
            return None
        if not resume:
            raise RunError(
                f"{self.path} is left of an interrupted run: --resume continues it, --restart throws it away"
            )
        try:
            journal = json.loads(self.path.read_bytes())
            version, before = journal.pop("version"), dict(journal.pop(self._key))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise self.damaged() from None
        if version != self._version:
            raise RunError(f"{self.path} is of another version of fastbert; --restart begins again")
        for name, value in self._asked.items():
            if (was := before.get(name)) != value:
                changed = "have changed" if name == "inputs" else f"was {was!r} and is {value!r} now"
                raise RunError(
                    f"cannot continue {self._subject}: {name} {changed}; give what was given before, or --restart to "
                    "begin again"
                )
        return journal

    def damaged(self) -> RunError:
        return RunError(f"{self.path} is no journal of a run; --restart throws it away")

    def write(self, **progress: Any) -> None:
        content = {"version": self._version, **progress, self._key: self._asked}
        write_text(self.path, json.dumps(content, indent=1) + "\n")


def lock(file: BinaryIO | int, path: Path) -> None:
    """Keeps other processes from writing `path`, which is open as `file`, until this one closes it, or ends.

    Raises:
        RunError: another process has the lock.
    """
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(f"another process is writing {path}") from None
