"""Runs independent tasks in processes, with progress. The processes end with their parent, even if it is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

POLL_SECONDS = 0.2


class Stopped(Exception):
    """Another task failed, or the run was interrupted."""


Advance = Callable[[int, int], None]


def run_tasks(make: Callable[[Any, Advance], None], tasks: Sequence, processes: int, progress: Advance) -> None:
    """Calls `make(task, advance)` for each task; `make` calls `advance(bytes, tokens)` while it works.

    `progress` is called with the total bytes and tokens of all tasks so far.
    With more than one process, each has a copy of `make`. The first task that fails stops the others.

    Raises:
        RuntimeError: a process was killed.
        Exception: the exception of a task.
    """
    if processes == 1 or len(tasks) < 2:
        total = [0, 0]

        def advance(read: int, tokens: int) -> None:
            total[0] += read
            total[1] += tokens
            progress(*total)

        for task in tasks:
            make(task, advance)
        return
    # No fork: threads of torch and of the tokenizers may be running, which do not survive it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([make.__class__.__module__])
    shared = context.Array("q", 3)  # bytes, tokens, whether to stop
    with ProcessPoolExecutor(min(processes, len(tasks)), context, _start, (make, shared)) as pool:
        pending = {pool.submit(_work, task) for task in tasks}
        try:
            while pending:
                done, pending = wait(pending, POLL_SECONDS, FIRST_EXCEPTION)
                progress(*shared[:2])
                for future in done:
                    future.result()
        except BaseException as error:
            shared[2] = 1
            pool.shutdown(cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise RuntimeError(
                    "a process was killed; was there too little memory? Fewer processes take less"
                ) from None
            raise


_make: Any = None
_shared: Any = None


def _start(make: Callable, shared: Any) -> None:
    global _make, _shared
    _make, _shared = make, shared
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the tasks

    parent: Any = multiprocessing.parent_process()  # not None in a process of the pool

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _work(task: Any) -> None:
    def advance(read: int, tokens: int) -> None:
        with _shared.get_lock():
            _shared[0] += read
            _shared[1] += tokens
        if _shared[2]:
            raise Stopped

    _make(task, advance)
