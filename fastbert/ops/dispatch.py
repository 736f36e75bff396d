"""Which implementation of an op runs, and why.

`TABLE` lists, for each op and kind of device, the backends in order of preference. `supports(...)` of an
implementation takes the op's own arguments and returns None, or the reason why it cannot run them. By
default, the first backend that returns None runs. A backend that the user names is a demand: if it cannot
run, BackendError gives the reason. No exception triggers a fallback.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

BACKENDS = ("triton", "native", "reference")
TABLE: dict[str, dict[str, tuple[str, ...]]] = {
    "embed_layer_norm": {"cuda": ("triton", "reference"), "cpu": ("native", "reference")},
    "linear": {"cuda": ("triton", "reference"), "cpu": ("native", "reference")},
    "gate": {"cuda": ("triton", "reference"), "cpu": ("native", "reference")},
    "rotary": {"cuda": ("triton", "reference"), "cpu": ("native", "reference")},
    "attention": {"cuda": ("triton", "reference"), "cpu": ("native", "reference")},
    "add_layer_norm": {"cuda": ("triton", "reference"), "cpu": ("native", "reference")},
    "linear_cross_entropy": {"cuda": ("triton", "reference"), "cpu": ("native", "reference")},
    "encoder": {"cuda": ("reference",), "cpu": ("native", "reference")},
    "read_mask": {"cuda": ("reference",), "cpu": ("native", "reference")},
    "pack_mask": {"cuda": ("native", "reference"), "cpu": ("reference",)},
    "gather_rows": {"cuda": ("native", "reference"), "cpu": ("reference",)},
}


class BackendError(RuntimeError):
    """The demanded backend cannot run this call; the message gives the reason."""


def always(*args: Any, **kwargs: Any) -> None:
    """The default of `supports` and of `describe`: all arguments are supported, without a note."""


@dataclass(frozen=True)
class Implementation:
    """One backend's version of an op.

    `supports` returns why it cannot take some arguments, or None. `describe` returns a note for `explain` on how it
    runs arguments that it takes, or None.
    """

    run: Callable[..., Any]
    supports: Callable[..., str | None]
    describe: Callable[..., str | None] = always


_implementations: dict[tuple[str, str], Implementation] = {}
_demand: ContextVar[dict[str, str]] = ContextVar("fastbert_backend")
# torch.compile cannot trace a ContextVar; while compiling, the last demand of any thread applies.
_demand_when_compiling: dict[str, str] | None = None


def implement(
    op: str,
    backend: str,
    run: Callable[..., Any],
    supports: Callable[..., str | None] = always,
    describe: Callable[..., str | None] = always,
) -> None:
    """Registers `run` as the implementation of `op` by `backend`."""
    _implementations[op, backend] = Implementation(run, supports, describe)


def choose(op: str, device: str, *args: Any, **kwargs: Any) -> tuple[str, Callable[..., Any]]:
    """The backend that runs `op` on `device` (torch's name of its type) for these arguments, and its function.

    Raises:
        BackendError: the backend demanded for this op cannot run them.
    """
    order = TABLE[op].get(device, ("reference",))
    demands = None if torch.compiler.is_compiling() else _demand.get(None) or _from_environment()
    demanded = (_current() if demands is None else demands).get(op)
    if demanded is None or demanded == "auto":
        for backend in order:
            implementation = _implementations[op, backend]
            if implementation.supports(*args, **kwargs) is None:
                return backend, implementation.run
    else:
        if demanded not in order:
            raise BackendError(f"{op}: backend {demanded!r} has no version for {device}; there are {', '.join(order)}")
        implementation = _implementations[op, demanded]
        reason = implementation.supports(*args, **kwargs)
        if reason is None:
            return demanded, implementation.run
        raise BackendError(f"{op}: backend {demanded!r} cannot run this call: {reason}")
    raise AssertionError(f"{op}: the reference refused a call")


@contextmanager
def use_backend(backend: str, *ops: str) -> Iterator[None]:
    """Demands `backend` ("auto" lifts a demand) for the named ops, or for all, within a `with` block.

    The environment variable FASTBERT_BACKEND does the same for a whole process: a backend's name, or
    comma-separated `op=backend` pairs.

    Raises:
        ValueError: no such backend or op.
    """
    global _demand_when_compiling
    before = _current()
    token = _demand.set({**before, **_checked(dict.fromkeys(ops or TABLE, backend))})
    _demand_when_compiling = _demand.get()
    try:
        yield
    finally:
        _demand.reset(token)
        _demand_when_compiling = before


def demands() -> dict[str, str]:
    """The demands in effect, op -> backend; the caller must not change them."""
    return _current()


def _demanded(op: str) -> str | None:
    backend = _current().get(op)
    return None if backend == "auto" else backend


def _current() -> dict[str, str]:
    if torch.compiler.is_compiling():
        return _demand_when_compiling if _demand_when_compiling is not None else _from_environment()
    return _demand.get(None) or _from_environment()


def _checked(demand: dict[str, str]) -> dict[str, str]:
    for op, backend in demand.items():
        if op not in TABLE:
            raise ValueError(f"op is {op!r}; it must be one of {', '.join(TABLE)}")
        if backend not in (*BACKENDS, "auto"):
            raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)} or auto")
    return demand


@cache
def _from_environment() -> dict[str, str]:
    """The demands of FASTBERT_BACKEND: `native`, or `attention=reference,linear=native`; read once."""
    text = os.environ.get("FASTBERT_BACKEND", "")
    if not text:
        return {}
    if "=" not in text:
        return _checked(dict.fromkeys(TABLE, text))
    return _checked(dict(part.strip().partition("=")[::2] for part in text.split(",")))


@dataclass(frozen=True)
class Explanation:
    """Rows of (op, device, backend, verdict); prints as a table."""

    rows: tuple[tuple[str, str, str, str], ...]

    def __str__(self) -> str:
        table = [("op", "device", "backend", "runs"), *self.rows]
        widths = [max(len(row[i]) for row in table) for i in range(3)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in table]
        return "\n".join(lines)

    __repr__ = __str__


def explain_table(devices: list[str], example: Callable[[str, str], tuple[tuple, dict]]) -> Explanation:
    """For each op, device and backend: whether it supports the arguments `example(op, device)`, or why not."""
    rows = []
    for op, by_device in TABLE.items():
        for device in devices:
            args, kwargs = example(op, device)
            taken = False
            for backend in by_device.get(device, ("reference",)):
                implementation = _implementations[op, backend]
                reason = implementation.supports(*args, **kwargs)
                demanded = _demanded(op)
                if demanded not in (None, backend):
                    verdict = f"no: {demanded} is demanded"
                elif reason is not None:
                    verdict = f"no: {reason}"
                else:
                    note = implementation.describe(*args, **kwargs)
                    verdict = ("if asked" if taken else "yes") + (f"; {note}" if note else "")
                    taken = True
                rows.append((op, device, backend, verdict))
    return Explanation(tuple(rows))
