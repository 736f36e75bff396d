"""The queue of a model: what waits is run in batches bounded by tokens and time, those that have waited longest first.

Batches are packed, so a text costs its own tokens whatever it runs with: there is no reason to wait for texts of the
same length, nor, while the model is idle, for more of them. A batch is what has come while the one before ran.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger("fastbert.serve")
_SMOOTHING = 0.3  # weight of the newest batch in the speed


class OverloadedError(Exception):
    """More is waiting than the queue takes; `retry_after` is in how many seconds there is room, by the speed so far."""

    def __init__(self, retry_after: float) -> None:
        super().__init__("the queue is full; try again later")
        self.retry_after = retry_after


class ClosedError(Exception):
    """The server is shutting down."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class BackendError(Exception):
    """The model failed on a batch. The error itself, which may hold texts, is the cause."""


@dataclass(eq=False)
class Item:
    """One text or window that waits: what the model runs, and its number of tokens."""

    work: Any
    tokens: int
    done: asyncio.Future[Any]
    arrived: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Batch:
    """The figures of a batch that has run."""

    items: int
    tokens: int
    budget: int  # the most tokens that it could have had
    seconds: float
    waited: float  # of the item that had waited longest


class Batcher:
    """A queue and the thread that runs it.

    Args:
        run: makes a result of each of several works, in a thread of its own.
        max_batch_tokens: of a batch; a longer item has one of its own.
        max_latency: seconds that a batch may take, by the speed of those before it.
        max_queue_tokens: that may wait.
        told: is called with each batch, in the thread.
    """

    def __init__(
        self,
        run: Callable[[list[Any]], Sequence[Any]],
        *,
        max_batch_tokens: int,
        max_latency: float,
        max_queue_tokens: int,
        told: Callable[[Batch], None] = lambda batch: None,
    ) -> None:
        self._run, self._told = run, told
        self.max_batch_tokens, self.max_latency = max_batch_tokens, max_latency
        self.max_queue_tokens = max_queue_tokens
        self._queue: deque[Item] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self.waiting = 0  # tokens in the queue
        self.speed = 0.0  # tokens per second; 0 before the first batch
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    async def submit(self, works: Sequence[tuple[Any, int]]) -> list[Any]:
        """The results of works, each with its number of tokens, in order.

        Raises:
            OverloadedError: they do not fit into the queue; none of them runs.
            ClosedError: after `close`.
        """
        loop = asyncio.get_running_loop()
        items = [Item(work, tokens, loop.create_future()) for work, tokens in works]
        tokens = sum(item.tokens for item in items)
        with self._changed:
            if self._closing:
                raise ClosedError
            # What no queue would hold waits alone: it can run at no other time.
            if self._queue and self.waiting + tokens > self.max_queue_tokens:
                raise OverloadedError(self.waiting / self.speed if self.speed else 1.0)
            self._queue.extend(items)
            self.waiting += tokens
            self._changed.notify()
        try:
            if len(items) == 1:
                return [await items[0].done]
            return list(await asyncio.gather(*(item.done for item in items)))
        except BaseException:  # the client has gone, or an item has failed: the others need not run
            for item in items:
                item.done.cancel()
            raise

    def close(self) -> None:
        """Takes nothing more, runs what waits, and returns when it is done."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    @property
    def budget(self) -> int:
        """The most tokens of the next batch."""
        if not self.speed:
            return self.max_batch_tokens
        return max(1, min(self.max_batch_tokens, int(self.speed * self.max_latency)))

    def _work(self) -> None:
        while (batch := self._next()) is not None:
            self._run_batch(*batch)

    def _next(self) -> tuple[list[Item], int] | None:
        """The items of the next batch and its budget; None when the queue is closed and empty."""
        with self._changed:
            items: list[Item] = []
            while not items:  # those that were cancelled meanwhile are passed over
                while not self._queue:
                    if self._closing:
                        return None
                    self._changed.wait()
                budget = left = self.budget
                while self._queue and (not items or self._queue[0].tokens <= left):
                    item = self._queue.popleft()
                    self.waiting -= item.tokens
                    if not item.done.cancelled():
                        items.append(item)
                        left -= item.tokens
            return items, budget

    def _run_batch(self, items: list[Item], budget: int) -> None:
        begun = time.monotonic()
        outcomes = self._outcomes(items)
        seconds, tokens = time.monotonic() - begun, sum(item.tokens for item in items)
        if seconds > 0 and not any(isinstance(outcome, BackendError) for outcome in outcomes):
            speed = tokens / seconds
            self.speed = speed if not self.speed else (1 - _SMOOTHING) * self.speed + _SMOOTHING * speed
        waited = begun - min(item.arrived for item in items)
        try:
            items[0].done.get_loop().call_soon_threadsafe(_deliver, items, outcomes)
            self._told(Batch(len(items), tokens, budget, seconds, waited))
        except Exception as error:  # the loop has ended, say: the thread goes on to the end of the queue
            log.error("a batch could not be told of: %s", type(error).__name__)

    def _outcomes(self, items: list[Item]) -> list[Any]:
        """The result of each item, or the BackendError of those that fail alone: no one's text fails another's."""
        try:
            return list(self._run([item.work for item in items]))
        except Exception as error:
            if len(items) == 1:
                failed = BackendError(type(error).__name__)
                failed.__cause__ = error
                return [failed]
        half = len(items) // 2
        return self._outcomes(items[:half]) + self._outcomes(items[half:])


def _deliver(items: list[Item], outcomes: Sequence[Any]) -> None:
    for item, outcome in zip(items, outcomes, strict=True):
        if item.done.done():
            continue
        if isinstance(outcome, BackendError):
            item.done.set_exception(outcome)
        else:
            item.done.set_result(outcome)
