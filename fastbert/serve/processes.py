"""Runs a server in this process, or in several that share its socket and its packed weights."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import wait
from typing import Any

import uvicorn
from prometheus_client.multiprocess import mark_process_dead

from fastbert.light.loading import cores_of
from fastbert.serve.app import make_app
from fastbert.serve.models import load
from fastbert.serve.settings import ServeSettings

log = logging.getLogger("fastbert.serve")
_BACKLOG = 2048
# Seconds after which a thread gives way to one that waits for the interpreter. A batch that has run waits so long for
# requests that are being read, and they for it: 5 ms, Python's default, is a part of a batch that shows.
_SWITCH = 0.0005


def serve(settings: ServeSettings) -> int:
    """Serves until SIGTERM or SIGINT, and then finishes what it has accepted; returns the exit code.

    Raises:
        OSError: the port is taken, or may not be used.
        ValueError, FileNotFoundError: a model cannot be loaded.
    """
    _log_to_stderr(settings.log_level)
    listening = _bind(settings)
    try:
        if settings.processes == 1:
            return _run(settings, listening)
        return _supervise(settings, listening)
    finally:
        listening.close()


def _log_to_stderr(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.handlers, log.propagate = [handler], False
    log.setLevel(level.upper())


def _bind(settings: ServeSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((settings.host, settings.port))
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise OSError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}") from error
    listening.set_inheritable(True)
    return listening


def _run(settings: ServeSettings, listening: socket.socket) -> int:
    """Serves in this process."""
    app = make_app(settings)
    sys.setswitchinterval(_SWITCH)
    config = uvicorn.Config(app, log_level=max(settings.log_level, "warning", key=_LEVELS.index), access_log=False)
    server = _Server(config)
    state = app.state.serve

    def stop() -> None:
        server.should_exit = True

    state.stop = stop
    host, port = listening.getsockname()[:2]
    log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    server.run(sockets=[listening])
    if state.failed is not None:
        raise state.failed
    return 0


class _Server(uvicorn.Server):
    """A server that ends by itself after a signal: uvicorn's raises the signal once more when it has shut down."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


_LEVELS = ["debug", "info", "warning", "error", "critical"]


def _supervise(settings: ServeSettings, listening: socket.socket) -> int:
    """Serves in several processes, each pinned to cores of its own; one that dies is replaced."""
    settings = replace(settings, cache=settings.cache or "")  # they share the packed weights
    for model in load(settings, lambda name, batch: None):  # packs them, and shows errors here
        model.batcher.close()
    counts = tempfile.mkdtemp(prefix="fastbert-serve-")
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = counts
    context, shares = multiprocessing.get_context("spawn"), _shares(settings.processes)
    stopping = False

    def stop(number: int, frame: Any) -> None:
        nonlocal stopping
        stopping = True

    def start(i: int) -> Any:
        process = context.Process(target=_work, args=(settings, listening, shares[i]), name=f"serve-{i}")
        process.start()
        return process

    running: dict[int, Any] = {}
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        while True:
            for i in range(settings.processes):
                if i not in running and not stopping:
                    running[i] = start(i)
            if not running:
                return 0
            wait([process.sentinel for process in running.values()], timeout=0.2)
            for i, process in list(running.items()):
                if stopping:  # whenever the signal came; each finishes what it has accepted
                    process.terminate()
                if process.is_alive():
                    continue
                process.join()
                mark_process_dead(process.pid)
                del running[i]
                if not stopping:
                    log.error("process %d ended with code %s; it is started again", i, process.exitcode)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        shutil.rmtree(counts, ignore_errors=True)
        del os.environ["PROMETHEUS_MULTIPROC_DIR"]


def _shares(count: int) -> list[list[int]]:
    """The cores that this process may use, in as many parts; some in several, where there are fewer."""
    if not hasattr(os, "sched_getaffinity"):
        return [[] for _ in range(count)]
    cores = cores_of(os.sched_getaffinity(0))
    if len(cores) < count:
        return [cores[i % len(cores)] for i in range(count)]
    parts = [cores[len(cores) * i // count : len(cores) * (i + 1) // count] for i in range(count)]
    return [[cpu for core in part for cpu in core] for part in parts]


def _work(settings: ServeSettings, listening: socket.socket, cpus: Sequence[int]) -> None:
    """One of several processes."""
    if cpus:
        os.sched_setaffinity(0, cpus)
    _log_to_stderr(settings.log_level)
    sys.exit(_run(settings, listening))
