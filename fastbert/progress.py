"""Messages on stderr and, on a terminal, a progress line that is updated in place."""

from __future__ import annotations

import sys
import time
from typing import TextIO

REFRESH_SECONDS = 0.1


def say(message: str) -> None:
    print(f"fastbert: {message}", file=sys.stderr)


class StatusLine:
    """Messages on a stream. On a terminal, the next message overwrites one of `show`; one of `say` stays."""

    def __init__(self, stream: TextIO | None = None, *, terminal: bool | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self.terminal = self._stream.isatty() if terminal is None else terminal
        self._open = False

    def show(self, message: str) -> None:
        self._write(message, replaceable=True)

    def say(self, message: str) -> None:
        self._write(message, replaceable=False)

    def _write(self, message: str, *, replaceable: bool) -> None:
        start = "\r\x1b[K" if self._open else ""
        self._open = self.terminal and replaceable
        self._stream.write(f"{start}fastbert: {message}" + ("" if self._open else "\n"))
        self._stream.flush()

    def close(self) -> None:
        if self._open:
            self._stream.write("\n")
            self._open = False


class Progress:
    """A status line with the work done, its speed and the time left.

    Args:
        shown: print the line; None: only if stderr is a terminal.
        texts: count the work in texts instead of bytes.
    """

    def __init__(self, *, shown: bool | None = None, texts: bool = False) -> None:
        self.line = StatusLine(terminal=shown)
        self._texts, self._refreshed = texts, 0.0
        self.done = self.tokens = 0
        self.begin(None)

    def begin(self, total: int | None) -> None:
        """Starts the clock; `total` is the amount of work, None if unknown."""
        self._total, self._start = total, time.monotonic()

    def update(self, done: int, tokens: int) -> None:
        """Reports the totals so far: work done and tokens."""
        self.done, self.tokens, now = done, tokens, time.monotonic()
        if self.line.terminal and (now - self._refreshed >= REFRESH_SECONDS or done == self._total):
            self._refreshed = now
            amount = self._amount(done)
            if self._total and done:
                left = (now - self._start) * (self._total - done) / done
                amount = f"{done / self._total:.0%} of {self._amount(self._total)}, {duration(left)} left"
            self.line.show(f"{amount}, {self.tokens / self._seconds():,.0f} tokens/s")

    def spent(self, what: str = "tokens") -> str:
        """Total tokens, time and speed, for a summary."""
        seconds = self._seconds()
        return f"{self.tokens:,} {what} in {seconds:.1f} s, {self.tokens / seconds:,.0f} tokens/s"

    def _amount(self, number: int) -> str:
        return f"{number:,} texts" if self._texts else f"{number / 1e6:,.1f} MB"

    def _seconds(self) -> float:
        return max(time.monotonic() - self._start, 1e-9)


def duration(seconds: float) -> str:
    """`3 h 05 min`, `4 min 10 s`, `12 s`."""
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600:,} h {seconds % 3600 // 60:02d} min"
    return f"{seconds // 60} min {seconds % 60:02d} s" if seconds >= 60 else f"{seconds} s"
