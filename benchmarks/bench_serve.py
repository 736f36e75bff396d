"""Servers of MiniLM under load: `fastbert serve` next to others, each in a process of its own, and the engine alone.

    python benchmarks/bench_serve.py --rounds 3

The texts are sentences of log-normal lengths. Each round, in rotating order, starts every server, asks it, and then

* closed loop: so many clients, each of which sends its next request when it has an answer;
* open loop: requests at half of the rate that the closed loop reached, at random times, whatever the answers do. A
  latency counts from when a request was due, so that a server which falls behind shows it.

"engine" is the same model in a process without a server, on the same texts in one call. The client shares the cores
with each server. A server in one process answers a request by all cores; one with a process on each core answers more.
Medians over rounds; exits with 1 where fastbert misses what it says must hold.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from shutil import which
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from assets import AssetUnavailable, fetch
from load import Outcome, closed_loop, open_loop

SEED = 0
ENGINE_SHARE, PEER_FACTOR, PRECISION_FACTOR, LATENCY_FACTOR, BOUND_MS = (
    0.9,
    3.0,
    2.0,
    3.0,
    100.0,
)  # must hold; the bound is --max-latency
STARTED_S = 180
SERVE = [sys.executable, "-m", "fastbert", "serve", "{model}", "--port", "{port}", "--log-level", "warning"]
PEER = [sys.executable, str(Path(__file__).parent / "peers" / "embedding_server.py")]
INFINITY = ["infinity_emb", "v2", "--model-id", "{model}", "--port", "{port}", "--log-level", "error"]
INT8 = ["--quantize", "int8"]


class Server(NamedTuple):
    """A server: its command, the package or program that it needs, and how it is asked for vectors.

    In a command {model} is the folder, {port} a free port, {cores} the number of cores, and {fp32} and {int8} graphs of
    ONNX Runtime.
    """

    command: list[str]
    needs: str
    path: str = "/embed"
    field: str = "inputs"

    def in_processes(self) -> Server:
        """The same with a process on each core."""
        command = [*self.command, "--processes", "{cores}"]
        if self.needs != "starlette":
            command = [*self.command[:3], "{cores}", *self.command[4:]]
        return self._replace(command=command)


def _peer(name: str, package: str, *graph: str) -> Server:
    return Server([*PEER, name, "1", "{port}", "{model}", *graph], package)


ONE = {
    "fastbert fp32": Server(SERVE, "starlette"),
    "fastbert int8": Server([*SERVE, *INT8], "starlette"),
    "sentence-transformers": _peer("sentence-transformers", "sentence_transformers"),
    "onnxruntime fp32": _peer("onnxruntime", "onnxruntime", "{fp32}"),
    "onnxruntime int8": _peer("onnxruntime", "onnxruntime", "{int8}"),
    "fastembed": _peer("fastembed", "fastembed", "{fp32}"),
}
EACH = ", on each core"  # a process
# infinity has requirements of its own: its program may be another environment's, on PATH.
SERVERS = {
    **ONE,
    **{name + EACH: server.in_processes() for name, server in ONE.items()},
    "infinity torch": Server([*INFINITY, "--engine", "torch"], "infinity_emb", "/embeddings", "input"),
}
ENGINE = """
import json, sys, time
from fastbert.light import TextEmbedder
texts = json.load(sys.stdin)
embedder = TextEmbedder.from_pretrained(sys.argv[1], quantize=sys.argv[2] or None)
embedder.embed(texts[:64])
begun = time.perf_counter()
embedder.embed(texts, normalize=True)
print(json.dumps({"texts_per_s": len(texts) / (time.perf_counter() - begun)}))
"""


def sentences(count: int) -> list[str]:
    """Sentences of log-normal numbers of words, at most 150, of the words of the project's pages."""
    rng = random.Random(SEED)
    words = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8").split()
    words = [word for word in words if word.isalpha()]
    return [" ".join(rng.choices(words, k=max(3, min(150, int(rng.lognormvariate(2.8, 0.7)))))) for _ in range(count)]


def graphs(model: Path, command: Sequence[str]) -> dict[str, Path]:
    """The graphs of ONNX Runtime that a command names, made where they are missing."""
    wanted = [dtype for dtype in ("fp32", "int8") if f"{{{dtype}}}" in command]
    if not wanted:
        return {}
    import torch
    from peers import Source, onnx_runtime

    source = Source(model, torch.device("cpu"))
    return {dtype: onnx_runtime.model_file(source, dtype) for dtype in wanted}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Running:
    """A server's process, until it has answered once."""

    def __init__(self, name: str, model: Path) -> None:
        command, _, self.path, self.field = SERVERS[name]
        port = free_port()
        self.address = f"http://127.0.0.1:{port}"
        places = {"model": model, "port": port, "cores": len(os.sched_getaffinity(0)), **graphs(model, command)}
        filled = [part.format(**places) for part in command]
        self.process = subprocess.Popen(
            filled, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )

    def __enter__(self) -> Running:
        until = time.monotonic() + STARTED_S
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with code {self.process.returncode}")
            try:
                self.ask(["a text"])
                return self
            except OSError:
                time.sleep(0.2)
        self.close()
        raise RuntimeError(f"the server does not answer after {STARTED_S} s")

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends it and the processes that it has started."""
        group = self.process.pid
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(group, signal.SIGKILL)
            self.process.wait()

    def body(self, texts: list[str]) -> bytes:
        return json.dumps({self.field: texts, "model": "default/not-specified"}).encode()

    def ask(self, texts: list[str]) -> np.ndarray:
        request = urllib.request.Request(
            self.address + self.path, self.body(texts), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return vectors_of(answer.read())


def vectors_of(answer: bytes) -> np.ndarray:
    found = json.loads(answer)
    rows = found if isinstance(found, list) else [one["embedding"] for one in found["data"]]
    return np.array(rows, np.float32)


def engine(model: Path, texts: Sequence[str], quantize: str) -> float:
    """Texts a second of the model without a server, in a process of its own."""
    command = [sys.executable, "-c", ENGINE, str(model), quantize]
    done = subprocess.run(command, input=json.dumps(list(texts)), capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)["texts_per_s"])


def measure(name: str, model: Path, texts: list[str], args: argparse.Namespace, expected: np.ndarray | None) -> Any:
    """The figures of one server in one round, and its vectors of the first texts."""
    with Running(name, model) as server:
        bodies = [server.body(texts[i : i + args.texts]) for i in range(0, len(texts), args.texts)]
        asyncio.run(closed_loop(server.address, server.path, bodies[: 2 * args.clients], args.clients))  # warms up
        alone = asyncio.run(closed_loop(server.address, server.path, bodies[: args.alone], 1))
        closed = asyncio.run(closed_loop(server.address, server.path, bodies, args.clients))
        rate = closed.done / closed.seconds / 2
        rng, at = random.Random(SEED), [0.0]
        while at[-1] < args.seconds and len(at) < len(bodies):
            at.append(at[-1] + rng.expovariate(rate))
        opened = asyncio.run(open_loop(server.address, server.path, bodies, at))
        vectors = server.ask(texts[:8])
    if expected is not None and np.abs(vectors - expected).max() > (0.05 if "int8" in name else 1e-3):
        raise RuntimeError("its vectors are others")
    texts_per_s = closed.done * args.texts / closed.seconds
    return {"texts_per_s": texts_per_s, **figures("closed", closed), **figures("half", opened)} | {
        "alone_p50_ms": percentile(alone, 50)
    }, vectors


def figures(prefix: str, outcome: Outcome) -> dict[str, float]:
    found = {f"{prefix}_p{q}_ms": percentile(outcome, q) for q in (50, 95, 99)}
    failed = sum(count for status, count in outcome.statuses.items() if status != 200)
    return {**found, f"{prefix}_failed": failed}


def percentile(outcome: Outcome, q: float) -> float:
    return float(np.percentile(outcome.latencies, q) * 1e3) if outcome.latencies else float("nan")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--servers", nargs="+", choices=list(SERVERS), default=list(SERVERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--texts", type=int, default=1, help="of a request (default: 1)")
    parser.add_argument("--count", type=int, default=2000, help="texts in all (default: 2000)")
    parser.add_argument("--alone", type=int, default=50, help="requests of a lone client (default: 50)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of the open loop (default: 10)")
    parser.add_argument("--output", type=Path, help="a file of JSON lines to append to")
    args = parser.parse_args(arguments)
    try:
        model = fetch("minilm")
    except AssetUnavailable as error:
        print(f"bench_serve: {error}", file=sys.stderr)
        return 1
    texts = sentences(args.count)
    names = [
        name for name in args.servers if importlib.util.find_spec(SERVERS[name].needs) or which(SERVERS[name].needs)
    ]
    for name in args.servers:
        if name not in names:
            print(f"{name}: not installed: {SERVERS[name].needs}")
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    engines: dict[str, list[float]] = {"fp32": [], "int8": []}
    expected: np.ndarray | None = None
    for turn in range(args.rounds):
        for dtype, quantize in (("fp32", ""), ("int8", "int8")):
            if any(name.startswith(f"fastbert {dtype}") for name in names):
                engines[dtype].append(engine(model, texts, quantize))
        for name in [*names[turn % len(names) :], *names[: turn % len(names)]] if names else []:
            try:
                found, vectors = measure(name, model, texts, args, expected)
            except (RuntimeError, OSError) as error:
                print(f"{name}: failed: {error}")
                continue
            expected = vectors if expected is None and name == "fastbert fp32" else expected
            rows[name].append(found)
            if args.output is not None:
                with open(args.output, "a", encoding="utf-8") as file:
                    file.write(
                        json.dumps({"server": name, "clients": args.clients, "texts": args.texts, **found}) + "\n"
                    )
    return report(rows, engines)


_SHOWN = ("closed_p50", "closed_p99", "half_p50", "half_p95", "half_p99", "alone_p50")


def report(rows: dict[str, list[dict[str, float]]], engines: dict[str, list[float]]) -> int:
    """Prints the medians and what must hold; returns 1 where it does not."""
    medians = {name: {key: median(r[key] for r in found) for key in found[0]} for name, found in rows.items() if found}
    columns = (
        "texts_per_s",
        "closed_p50_ms",
        "closed_p99_ms",
        "half_p50_ms",
        "half_p95_ms",
        "half_p99_ms",
        "alone_p50_ms",
    )
    print(f"{'':34}" + "".join(f"{column.removesuffix('_ms'):>14}" for column in columns) + "    failed")
    for dtype, speeds in engines.items():
        if speeds:
            print(f"{'engine ' + dtype:34}{median(speeds):14.0f}")
    for name, found in medians.items():
        failed = found["closed_failed"] + found["half_failed"]
        print(f"{name:34}" + "".join(f"{found[column]:14.1f}" for column in columns) + f"{failed:10.0f}")
    peers = {name: found["texts_per_s"] for name, found in medians.items() if not name.startswith("fastbert")}
    missed = 0
    for name in (f"fastbert {dtype}{each}" for dtype in engines for each in ("", EACH)):
        if name not in medians:
            continue
        dtype = "int8" if "int8" in name else "fp32"
        found, speeds = medians[name], engines[dtype]
        share = median(r["texts_per_s"] / s for r, s in zip(rows[name], speeds, strict=False))
        limit = LATENCY_FACTOR * found["alone_p50_ms"] + BOUND_MS
        checks = [
            (f"{share:.2f} of the engine's speed", f"at least {ENGINE_SHARE}", share >= ENGINE_SHARE),
            (f"p99 {found['half_p99_ms']:.0f} ms at half load", f"at most {limit:.0f}", found["half_p99_ms"] <= limit),
            (f"{found['closed_failed'] + found['half_failed']:.0f} failed", "none", not found["closed_failed"]),
        ]
        # Precision for precision, and in its best against the others' best.
        for of, least in ((dtype, PRECISION_FACTOR), *((("any precision", PEER_FACTOR),) if dtype == "int8" else ())):
            others = [v for name, v in peers.items() if of == "any precision" or ("int8" in name) == (of == "int8")]
            if others:
                factor = found["texts_per_s"] / max(others)
                checks.append((f"{factor:.1f} times the best other in {of}", f"at least {least:g}", factor >= least))
        for what, wanted, held in checks:
            print(f"{'PASS' if held else 'MISS'} {name}: {what} ({wanted})")
            missed += not held
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
