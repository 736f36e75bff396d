"""Work that is done ahead in a thread: the next texts are tokenized while the model runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

AHEAD = 2  # items that are made before they are needed

Item = TypeVar("Item")
Made = TypeVar("Made")


def ahead(items: Iterable[Item], make: Callable[[Item], Made]) -> Iterator[tuple[Item, Made]]:
    """Each item and what is made of it, in order; a thread makes the next ones while the caller works.

    An error of the iterable is raised after the items before it.
    """
    source, end = iter(items), None
    with ThreadPoolExecutor(1) as thread:
        waiting: deque[tuple[Item, Future[Made]]] = deque()
        try:
            while waiting or end is None:
                if end is None and len(waiting) <= AHEAD:
                    try:
                        item = next(source)
                    except Exception as error:  # StopIteration among them
                        end = error
                    else:
                        waiting.append((item, thread.submit(make, item)))
                    continue
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            for _, future in waiting:
                future.cancel()
    if not isinstance(end, StopIteration):
        raise end
