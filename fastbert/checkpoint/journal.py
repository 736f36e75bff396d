"""Resumable runs: a journal of a run's settings and progress, and a lock on its output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

from fastbert.checkpoint.files import write_text


class RunError(ValueError):
    """An output cannot be written, or a run cannot be resumed; the message gives the reason."""


class Journal:
    """A JSON file next to a run's output; it exists only until the run is complete.

    Args:
        subject: path of the output, for messages.
        version: version of the journal's content.
        asked: settings by name that determine the result. A run is resumed only with equal settings.
        key: the key of these settings in the file.
    """

    def __init__(self, path: Path, subject: Path, *, version: int, asked: dict[str, Any], key: str) -> None:
        self.path, self._subject, self._version, self._asked, self._key = path, subject, version, asked, key

    def read(self, *, resume: bool) -> dict[str, Any] | None:
        """The progress of an interrupted run, as passed to `write`; None if there is no such run.

        Raises:
            RunError: there is one and `resume` is false, its settings differ, or its journal is damaged.
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
    """Locks `path`, which is open as `file`, against other processes until this one closes it or exits.

    Raises:
        RunError: another process has the lock.
    """
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(f"another process is writing {path}") from None
