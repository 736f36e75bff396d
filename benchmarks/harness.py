"""Providers x cases: checked first, then timed side by side, written as one CSV row each.

A provider is one way to do a piece of work, a case the work. `run_case` prepares every provider, holds its
output to a gate, and times those that passed in rounds: each round calls each of them once, in an order that
rotates. So a machine that slows down for a while slows all of them, and no provider always runs behind the
same other one. A provider that cannot run, or whose result is wrong, gets a row with the reason and no time.
"""

from __future__ import annotations

import csv
import gc
import importlib.util
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
import torch
from accuracy import complaint, differences, limits, root_mean_square
from torch import Tensor

COLUMNS = (
    *("date", "op", "provider", "backend", "mode", "model", "case", "shape", "fill", "tokens", "dtype"),
    *("status", "rounds", "p20_ms", "p50_ms", "p80_ms", "tokens_per_s", "texts_per_s"),
    *("tflops", "ceiling_tflops", "gb_per_s", "ceiling_gb_per_s", "ceiling_share", "ceiling"),
    "read_gb_s",
    *("peak_memory_mb", "peak_memory_kind", "memory_floor_mb"),
    *("max_error", "rms_error", "max_error_limit", "rms_error_limit", "relative_error", "pooled_cosine"),
    *("device", "versions", "commit", "dirty"),
)

# A public runtime whose first call takes this long, and many times as long as another provider's, is not timed.
SLOW_SECONDS, SLOW_FACTOR = 20.0, 5.0
# Runtimes keep threads spinning for some milliseconds after a call, and each call finds the caches full of another
# model. So a call shorter than this is made once untimed before each timing: no one alternates between engines.
WARMED_SECONDS = 0.3


class Unsupported(Exception):
    """A provider cannot do this case; the message is the reason, for the row."""


class Slow(Exception):
    """A provider takes too long to be timed; the message says how long."""


@dataclass(frozen=True)
class Case:
    """One piece of work.

    `tokens` are real tokens and `flops` what they need: pads count nowhere. Work that memory bounds has `bytes` in
    their place. `payload` is the provider's input. The precision is the provider's: one case may hold several, so that
    they are compared within one run. A mode other than forward runs with gradients.
    """

    op: str
    model: str
    name: str
    shape: str
    fill: float  # real tokens / tokens of the padded batch
    tokens: int
    flops: float
    mode: str = "forward"
    payload: Any = None
    bar: float | None = None  # the tokens/s wanted, as a multiple of the baseline provider's
    min_rounds: int = 5
    texts: int = 0
    bytes: float = 0.0

    def columns(self) -> dict[str, Any]:
        names = ("op", "mode", "model", "shape", "tokens")
        return {
            **{name: getattr(self, name) for name in names},
            "case": self.name,
            "fill": f"{self.fill:.3f}",
        }


@dataclass(frozen=True)
class Prepared:
    """A provider made ready for one case: what to time, and how its result reads as the gate's tensor.

    `resident` are MB held between two calls that count as the call's own: weights in training, say.
    """

    run: Callable[[], Any]
    result: Callable[[Any], Tensor] = lambda output: output
    backend: str = ""
    resident: Callable[[], float] | None = None


@dataclass(frozen=True)
class Provider:
    """A name, a precision, and what makes it ready for a case; `prepare` raises Unsupported with a reason where it
    cannot.

    `dtype` is fp32, fp32-high (fp32 out of several bf16 products), bf16, fp16 or int8. `public` is a runtime with
    rounding of its own, held to the limits of its class; `packages` are what it must import.
    """

    name: str
    prepare: Callable[[Case], Prepared]
    dtype: str = "fp32"
    public: bool = False
    packages: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.name}-{self.dtype}"

    def missing(self) -> list[str]:
        """The packages it needs that are not installed."""
        return [package for package in self.packages if not importlib.util.find_spec(package)]


@dataclass(frozen=True)
class Gate:
    """A right result: `expected`, and the largest and root-mean-square differences allowed from it.

    `lengths` are those of the texts whose states `expected` holds one after the other, where it holds any.
    """

    expected: Tensor
    max_error: float
    rms_error: float
    lengths: Sequence[int] = ()

    def errors(self, actual: Tensor) -> tuple[float, float]:
        return differences(actual, self.expected)

    def reason(self, actual: Tensor) -> str | None:
        """Why `actual` is wrong; None where it is right. A NaN is wrong."""
        return complaint(actual, self.expected, (self.max_error, self.rms_error))


def relative_gate(expected: Tensor, limit: float) -> Gate:
    """The contract of a class of rounding: the RMS difference is at most `limit` of the RMS of what is right."""
    return Gate(expected, math.inf, limit * root_mean_square(expected))


def exact_gate(expected: Tensor, limit: float = 1e-5) -> Gate:
    """The contract in fp32: within `limit` of the reference everywhere."""
    return Gate(expected, limit, limit)


def twice_eager_gate(expected: Tensor, eager: Tensor) -> Gate:
    """The accuracy contract, see `accuracy.limits`: `expected` in fp32 or fp64, `eager` in the measured dtype."""
    return Gate(expected, *limits(expected, eager))


def pooled_cosine(actual: Tensor, expected: Tensor, lengths: Sequence[int]) -> float:
    """The lowest cosine between the mean of a text's states, (T, E), and what it should be."""
    means = [
        torch.stack([states.mean(0) for states in x.cpu().double().split(list(lengths))]) for x in (actual, expected)
    ]
    return torch.nn.functional.cosine_similarity(*means).min().item()


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """The order of round `turn`: each full cycle starts once with each name; every other cycle runs backwards."""
    names = list(names)
    if not names:
        return []
    cycle, start = divmod(turn, len(names))
    order = names[start:] + names[:start]
    return order[::-1] if cycle % 2 else order


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100), between neighbours by a straight line."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * q / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass
class Harness:
    """Runs cases on one device and collects their rows; `output` gets them, case by case, as CSV."""

    device: torch.device
    output: Path | None = None
    seconds: float = 15.0  # of timing for each case, once its min_rounds are done
    min_rounds: int = 0  # more than a case's own, where given
    max_rounds: int = 100
    longest: float = 180.0  # seconds of timing, after which a case ends with two rounds or more
    ceilings: bool = True  # whether they are measured
    clock: Callable[[Callable[[], Any], torch.device], float] = machine.time_call
    rows: list[dict[str, Any]] = field(default_factory=list)
    # By provider and model: the smallest case, in FLOPs, for which it was too slow, and what is said of it.
    slow: dict[tuple[str, str], tuple[float, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.output is not None:
            check_columns(self.output)

    def run_case(
        self, case: Case, providers: Sequence[Provider], make_gate: Callable[[Provider], Gate]
    ) -> list[dict[str, Any]]:
        """Checks and times every provider on `case`; returns the rows, and appends them to the output file."""
        with torch.inference_mode(case.mode == "forward"):
            return self._run_case(case, providers, make_gate)

    def _run_case(
        self, case: Case, providers: Sequence[Provider], make_gate: Callable[[Provider], Gate]
    ) -> list[dict[str, Any]]:
        rows: dict[str, dict[str, Any]] = {}
        ready: dict[str, Callable[[], Any]] = {}
        first_calls: list[float] = []  # seconds
        for provider in providers:
            prepared, figures = self._admit(provider, case, make_gate, first_calls)
            rows[provider.label] = {
                **dict.fromkeys(COLUMNS),
                **case.columns(),
                "provider": provider.name,
                "dtype": provider.dtype,
                **figures,
            }
            if prepared is not None:
                ready[provider.label] = prepared.run
        measured = self._measure(ready, case.min_rounds)
        ceilings = {dtype: self._ceiling(case, dtype) for dtype in {rows[label]["dtype"] for label in ready}}
        for label, times in measured.items():
            rows[label].update(_figures(case, times, ceilings[rows[label]["dtype"]]))
        stamp = {"date": machine.now(), "read_gb_s": machine.read_bandwidth(self.device) if self.ceilings else None}
        stamp |= machine.environment(self.device)
        done = [{**row, **stamp} for row in rows.values()]
        self.rows += done
        if self.output is not None:
            append_rows(self.output, done)
        return done

    def _ceiling(self, case: Case, dtype: str) -> tuple[float, str] | None:
        if not self.ceilings:
            return None
        return machine.copy_ceiling(self.device) if case.bytes else machine.ceiling(self.device, dtype)

    def _admit(
        self, provider: Provider, case: Case, make_gate: Callable[[Provider], Gate], first_calls: list[float]
    ) -> tuple[Prepared | None, dict[str, Any]]:
        """Prepares a provider and holds its result to the gate: what to time, or None, and the columns so far."""
        try:
            flops, said = self.slow.get((provider.label, case.model), (math.inf, ""))
            if case.flops >= flops:
                raise Slow(said)
            if missing := provider.missing():
                raise Unsupported(f"not installed: {', '.join(missing)}")
            prepared = provider.prepare(case)
            begin = time.perf_counter()
            output = prepared.run()
            self._check_speed(provider, case, time.perf_counter() - begin, first_calls)
            actual = prepared.result(output)
            del output
            gate = make_gate(provider)
            figures = {"backend": prepared.backend, **_accuracy(gate, actual)}
            reason = gate.reason(actual)
            del actual
            if reason is not None:
                return None, {**figures, "status": f"wrong: {reason}"}
            figures["peak_memory_mb"], figures["peak_memory_kind"] = machine.peak_memory(prepared.run, self.device)
            if prepared.resident is not None:
                figures["peak_memory_mb"] += prepared.resident()
                figures["peak_memory_kind"] += ", and what is held between calls"
            prepared.run()  # warm again: measuring memory made the allocator start afresh
        except Unsupported as reason:
            return None, {"status": f"unsupported: {reason}"}
        except Slow as reason:
            return None, {"status": f"slow: {reason}"}
        except Exception as error:  # a peer that breaks must not take the other rows with it
            return None, {"status": f"failed: {type(error).__name__}: {_first_line(error)}"}
        return prepared, {**figures, "status": "ok"}

    def _check_speed(self, provider: Provider, case: Case, seconds: float, first_calls: list[float]) -> None:
        """Raises Slow if a public runtime's first call took too long; larger cases are then not tried."""
        if provider.public and first_calls and seconds > max(SLOW_SECONDS, SLOW_FACTOR * min(first_calls)):
            least = min(first_calls)
            said = f"the first call of {case.shape} took {seconds:.0f} s, that of another provider {least:.1f} s"
            self.slow[provider.label, case.model] = case.flops, said
            raise Slow(said)
        first_calls.append(seconds)

    def _measure(self, ready: dict[str, Callable[[], Any]], least: int) -> dict[str, list[float]]:
        """Seconds of every call, by provider, in rounds of rotating order."""
        times: dict[str, list[float]] = {name: [] for name in ready}
        least = max(least, self.min_rounds)
        begin, collecting = time.perf_counter(), gc.isenabled()
        gc.collect()
        gc.disable()
        try:
            for turn in range(max(least, self.max_rounds) if ready else 0):
                seconds = time.perf_counter() - begin
                if (turn >= least and seconds > self.seconds) or (turn >= 2 and seconds > self.longest):
                    break
                for name in rotated(tuple(ready), turn):
                    if times[name] and times[name][-1] < WARMED_SECONDS:
                        ready[name]()
                    times[name].append(self.clock(ready[name], self.device))
        finally:
            if collecting:
                gc.enable()
        return times


def _figures(case: Case, times: list[float], ceiling: tuple[float, str] | None) -> dict[str, Any]:
    p20, p50, p80 = (percentile(times, q) for q in (20, 50, 80))
    figures = {
        "rounds": len(times),
        "p20_ms": p20 * 1e3,
        "p50_ms": p50 * 1e3,
        "p80_ms": p80 * 1e3,
        "tokens_per_s": case.tokens / p50,
        "texts_per_s": case.texts / p50 if case.texts else None,
    }
    amount, column, unit = (case.bytes, "gb_per_s", 1e9) if case.bytes else (case.flops, "tflops", 1e12)
    figures[column] = amount / p50 / unit
    if ceiling is not None:
        limit, what = ceiling
        figures |= {f"ceiling_{column}": limit / unit, "ceiling_share": amount / p50 / limit, "ceiling": what}
    return figures


def _accuracy(gate: Gate, actual: Tensor) -> dict[str, float | None]:
    """The columns that say how far a result is from what is right, and how far it may be."""
    figures: dict[str, float | None] = {
        "max_error_limit": gate.max_error if math.isfinite(gate.max_error) else None,
        "rms_error_limit": gate.rms_error,
    }
    if actual.shape == gate.expected.shape:
        figures["max_error"], figures["rms_error"] = gate.errors(actual)
        size = root_mean_square(gate.expected)
        figures["relative_error"] = figures["rms_error"] / size if size else None
        if len(gate.lengths):
            figures["pooled_cosine"] = pooled_cosine(actual, gate.expected, gate.lengths)
    return figures


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else "no message"


def check_columns(path: Path) -> None:
    """Holds a results file to COLUMNS, before a long run ends in rows that do not fit.

    Raises:
        ValueError: the file has another header.
    """
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            header = next(csv.reader(file), None)
        if header is not None and tuple(header) != COLUMNS:
            raise ValueError(f"{path} has other columns than this harness writes; move it away")


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Adds rows to a CSV file; who reads it meets the old file or the new, nothing between."""
    for row in rows:
        if set(row) != set(COLUMNS):
            raise ValueError(f"a row has wrong columns: {', '.join(sorted(set(row) ^ set(COLUMNS)))}")
    check_columns(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", newline="", encoding="utf-8") as file:
            file.write(old)
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if not old:
                writer.writeheader()
            writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _cell(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else value
