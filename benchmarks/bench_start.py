"""From nothing to MiniLM's vector of the first text: whole processes, the interpreter and all imports included.

    python benchmarks/bench_start.py --rounds 9

fastbert without torch, with its packed weights kept on disk and without, and with torch; transformers, ONNX Runtime,
OpenVINO and CTranslate2; in fp32, one process each a round, in rotating order. The clock runs from the start of the
process to its end. Each vector is held to transformers'. Graphs are converted before and lie on disk, as a service
would have them; bytecode is cached, as of any installed package. Resident memory is that after 100 calls.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fresh
import torch
from assets import AssetUnavailable, fetch
from encoders import quiet_transformers
from harness import append_rows, check_columns, percentile, rotated
from peers import Source, ctranslate2_runtime, onnx_runtime, openvino_runtime

RESULTS = Path(__file__).resolve().parent / "results"
# What must hold, by provider: ms from start to end, MB after 100 calls.
LIMITS = {"fastbert.light": (250.0, 120.0), "fastbert.light, kept": (150.0, 120.0)}
VECTOR_LIMIT = 1e-4  # of a vector of length 1: this is about time, the numbers are bench_encoder's business
TEXT = "A man is playing a guitar on the stage."

_TOKENIZE = f"""
import numpy as np
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[2] + "/tokenizer.json")
tokenizer.no_padding()
ids = np.array([tokenizer.encode({TEXT!r}).ids])
mask = np.ones_like(ids)
"""
_MEAN = """
vector = np.asarray(states)[0].mean(0)
result = (vector / np.linalg.norm(vector)).tolist()
"""
_LIGHT = f"""
from fastbert.light import TextEmbedder
embedder = TextEmbedder.from_pretrained(sys.argv[2], threads=int(sys.argv[1]), cache={{cache}})
again = lambda: embedder.embed([{TEXT!r}])[0]
vector = again()
result = (vector / (vector**2).sum() ** 0.5).tolist()
assert "torch" not in sys.modules
"""
# Around a program, which leaves its vector in `result`, and a call that makes it in `again`.
FRAME = """
import sys
{body}
if sys.argv[5] == "time":
    print(str(list(result)))
else:
    for _ in range(99):
        again()
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    print(int(status["VmRSS"].split()[0]) / 1e3)
"""
# sys.argv: threads, the model's folder, the converted graph, the folder of packed weights, "time" or "memory".
PROGRAMS = {
    "transformers": f"""
import torch
torch.set_num_threads(int(sys.argv[1]))
from transformers import AutoTokenizer, BertModel
tokenizer, model = AutoTokenizer.from_pretrained(sys.argv[2]), BertModel.from_pretrained(sys.argv[2]).eval()
with torch.inference_mode():
    states = model(**tokenizer({TEXT!r}, return_tensors="pt")).last_hidden_state.mean(1)[0]
result = (states / states.norm()).tolist()
again = lambda: model(**tokenizer({TEXT!r}, return_tensors="pt"))
""",
    "onnxruntime": f"""
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(sys.argv[1])
model = onnxruntime.InferenceSession(sys.argv[3], options, providers=["CPUExecutionProvider"])
{_TOKENIZE}
again = lambda: model.run(None, {{"input_ids": ids, "attention_mask": mask}})[0]
states = again()
{_MEAN}
""",
    "openvino": f"""
import openvino
settings = {{"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": int(sys.argv[1]), "NUM_STREAMS": 1}}
model = openvino.Core().compile_model(sys.argv[3], "CPU", settings)
{_TOKENIZE}
again = lambda: model({{"input_ids": ids, "attention_mask": mask}})[0]
states = again()
{_MEAN}
""",
    "ctranslate2": f"""
import ctranslate2
model = ctranslate2.Encoder(sys.argv[3], compute_type="float32", intra_threads=int(sys.argv[1]))
{_TOKENIZE}
view = ctranslate2.StorageView.from_array
lengths = np.array([ids.shape[1]], dtype=np.int32)
again = lambda: np.array(model.forward_batch(view(ids.astype(np.int32)), view(lengths)).last_hidden_state)
states = again()
{_MEAN}
""",
    "fastbert": f"""
import torch
torch.set_num_threads(int(sys.argv[1]))
import fastbert
embedder = fastbert.Embedder.from_pretrained(sys.argv[2])
again = lambda: embedder.embed([{TEXT!r}])[0]
vector = again()
result = (vector / (vector**2).sum() ** 0.5).tolist()
""",
    "fastbert.light": _LIGHT.format(cache="False"),
    "fastbert.light, kept": _LIGHT.format(cache="sys.argv[4]"),
}
GRAPHS: dict[str, Callable[[Source], Path]] = {
    "onnxruntime": lambda source: onnx_runtime.model_file(source, "fp32"),
    "openvino": lambda source: openvino_runtime.model_file(source, "fp32"),
    "ctranslate2": ctranslate2_runtime.model_folder,
}


def converted(folder: Path, names: list[str]) -> tuple[dict[str, Path | str], dict[str, str]]:
    """The graph of each provider ("" where it needs none), and the reasons of those that have none."""
    source = Source(folder, torch.device("cpu"))
    graphs: dict[str, Path | str] = {}
    reasons: dict[str, str] = {}
    for name in names:
        if name in GRAPHS and not importlib.util.find_spec(name):
            reasons[name] = f"unsupported: not installed: {name}"
            continue
        try:
            graphs[name] = GRAPHS[name](source) if name in GRAPHS else ""
        except Exception as error:  # a converter that breaks must not take the other rows with it
            reasons[name] = f"failed: {type(error).__name__}: {str(error)[:200]}"
    return graphs, reasons


def whole(body: str, *arguments: object) -> tuple[float, Any]:
    """The seconds that a process took from start to end, and what it printed.

    Raises:
        RuntimeError: it failed; the message is the last line of its error output.
    """
    command = [sys.executable, "-c", FRAME.format(body=body), str(torch.get_num_threads()), *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    begun = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    seconds = time.perf_counter() - begun
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:200])
    return seconds, json.loads(done.stdout.splitlines()[-1])


def measure(
    folder: Path, names: list[str], rounds: int
) -> tuple[dict[str, list[float]], dict[str, str], dict[str, float]]:
    """Seconds of each provider, one process of each a round; the reasons of those without a time; and MB of memory."""
    graphs, reasons = converted(folder, names)
    times: dict[str, list[float]] = {name: [] for name in graphs}
    memory: dict[str, float] = {}
    expected: torch.Tensor | None = None
    with tempfile.TemporaryDirectory() as kept:
        for turn in range(-1, rounds):  # the first round warms the disk cache, is checked and not counted
            order = list(times) if turn < 0 else rotated(tuple(times), turn)
            for name in order:
                arguments = folder, graphs[name], kept
                try:
                    seconds, vector = whole(PROGRAMS[name], *arguments, "time")
                    if turn < 0:
                        memory[name] = whole(PROGRAMS[name], *arguments, "memory")[1]
                except RuntimeError as error:
                    reasons[name] = f"failed: {error}"
                    del times[name]
                    continue
                if turn >= 0:
                    times[name].append(seconds)
                    continue
                found = torch.tensor(vector)
                expected = found if expected is None else expected
                if not (difference := (found - expected).abs().max().item()) <= VECTOR_LIMIT:
                    reasons[name] = f"wrong: the vector differs by {difference:.1e}"
                    del times[name]
    return times, reasons, memory


def row(name: str, times: list[float], reason: str | None, memory: float | None) -> dict[str, Any]:
    columns: dict[str, Any] = {"op": "process start", "provider": name, "model": "minilm", "dtype": "fp32"}
    columns |= {"case": "process to first vector", "shape": "1 text", "status": reason or "ok"}
    columns |= {"peak_memory_mb": memory, "peak_memory_kind": "process RSS after 100 calls"}
    if reason is None:
        columns |= {"rounds": len(times)} | {f"p{q}_ms": percentile(times, q) * 1e3 for q in (20, 50, 80)}
    return fresh.row(**columns)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", 1)[0], epilog="example: python benchmarks/bench_start.py"
    )
    parser.add_argument("--rounds", type=int, default=9, help="processes of each")
    parser.add_argument("--providers", nargs="+", choices=list(PROGRAMS), default=list(PROGRAMS))
    parser.add_argument("--output", type=Path, default=RESULTS / "start.csv", help="CSV to append to")
    chosen = parser.parse_args(arguments)
    if chosen.rounds < 1:
        parser.error("--rounds must be at least 1")
    quiet_transformers()
    try:
        check_columns(chosen.output)
        folder = fetch("minilm")
    except (AssetUnavailable, ValueError) as error:
        print(f"bench_start: {error}", file=sys.stderr)
        return 1
    # transformers comes first: its vector is what the others are held to.
    names = [name for name in PROGRAMS if name in {"transformers", *chosen.providers}]
    times, reasons, memory = measure(folder, names, chosen.rounds)
    rows = [row(name, times.get(name, []), reasons.get(name), memory.get(name)) for name in names]
    append_rows(chosen.output, rows)
    for found in rows:
        figures = found["status"]
        if figures == "ok":
            spread = f"({found['p20_ms']:.0f} - {found['p80_ms']:.0f})"
            figures = f"{found['p50_ms']:8.0f} ms  {spread:16}{found['peak_memory_mb']:8.0f} MB"
        print(f"{found['provider']:22}{figures}")
    return missed(rows)


def missed(rows: list[dict[str, Any]]) -> int:
    """Prints what must hold; returns 1 where it does not."""
    failed = 0
    for found in rows:
        if (limits := LIMITS.get(found["provider"])) is None:
            continue
        for value, limit, unit in zip(
            (found.get("p50_ms"), found.get("peak_memory_mb")), limits, ("ms", "MB after 100 calls"), strict=True
        ):
            held = value is not None and value <= limit
            shown = "none" if value is None else f"{value:.0f}"
            print(f"{'PASS' if held else 'MISS'} {found['provider']}: {shown} {unit} (at most {limit:g})")
            failed |= not held
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
