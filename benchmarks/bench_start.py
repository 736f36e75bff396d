"""From MiniLM on disk to the vector of the first text, in fresh processes, torch's own import apart.

    python benchmarks/bench_start.py --rounds 9

fastbert, transformers, ONNX Runtime, OpenVINO and CTranslate2 in fp32, one process each a round, in rotating order. The
clock runs from torch's import to the vector: imports, tokenizer, weights, first call. Each vector is held to
transformers'. Graphs are converted before and lie on disk, as a service would have them.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
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
LIMIT_MS = 350.0
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
# sys.argv: threads, the model's folder, the converted graph.
PROGRAMS = {
    "transformers": f"""
from transformers import AutoTokenizer, BertModel
tokenizer, model = AutoTokenizer.from_pretrained(sys.argv[2]), BertModel.from_pretrained(sys.argv[2]).eval()
with torch.inference_mode():
    states = model(**tokenizer({TEXT!r}, return_tensors="pt")).last_hidden_state.mean(1)[0]
result = (states / states.norm()).tolist()
""",
    "onnxruntime": f"""
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(sys.argv[1])
model = onnxruntime.InferenceSession(sys.argv[3], options, providers=["CPUExecutionProvider"])
{_TOKENIZE}
states = model.run(None, {{"input_ids": ids, "attention_mask": mask}})[0]
{_MEAN}
""",
    "openvino": f"""
import openvino
settings = {{"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": int(sys.argv[1]), "NUM_STREAMS": 1}}
model = openvino.Core().compile_model(sys.argv[3], "CPU", settings)
{_TOKENIZE}
states = model({{"input_ids": ids, "attention_mask": mask}})[0]
{_MEAN}
""",
    "ctranslate2": f"""
import ctranslate2
model = ctranslate2.Encoder(sys.argv[3], compute_type="float32", intra_threads=int(sys.argv[1]))
{_TOKENIZE}
view = ctranslate2.StorageView.from_array
lengths = np.array([ids.shape[1]], dtype=np.int32)
states = np.array(model.forward_batch(view(ids.astype(np.int32)), view(lengths)).last_hidden_state)
{_MEAN}
""",
    "fastbert": f"""
import fastbert
vector = fastbert.Embedder.from_pretrained(sys.argv[2]).embed([{TEXT!r}])[0]
result = (vector / (vector**2).sum() ** 0.5).tolist()
""",
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


def measure(folder: Path, names: list[str], rounds: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of each provider, one process of each a round, and the reasons of those without a time."""
    graphs, reasons = converted(folder, names)
    times: dict[str, list[float]] = {name: [] for name in graphs}
    expected: torch.Tensor | None = None
    for turn in range(-1, rounds):  # the first round warms the disk cache, is checked and not counted
        order = list(times) if turn < 0 else rotated(tuple(times), turn)
        for name in order:
            try:
                done = fresh.run(PROGRAMS[name], folder, graphs[name])
            except RuntimeError as error:
                reasons[name] = f"failed: {error}"
                del times[name]
                continue
            if turn >= 0:
                times[name].append(done["seconds"])
                continue
            vector = torch.tensor(done["result"])
            expected = vector if expected is None else expected
            if not (difference := (vector - expected).abs().max().item()) <= VECTOR_LIMIT:
                reasons[name] = f"wrong: the vector differs by {difference:.1e}"
                del times[name]
    return times, reasons


def row(name: str, times: list[float], reason: str | None) -> dict[str, Any]:
    columns: dict[str, Any] = {"op": "start", "provider": name, "model": "minilm", "dtype": "fp32"}
    columns |= {"case": "disk to first vector", "shape": "1 text", "status": reason or "ok"}
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
    times, reasons = measure(folder, names, chosen.rounds)
    rows = [row(name, times.get(name, []), reasons.get(name)) for name in names]
    append_rows(chosen.output, rows)
    for found in rows:
        figures = found["status"]
        if figures == "ok":
            figures = f"{found['p50_ms']:8.0f} ms  ({found['p20_ms']:.0f} - {found['p80_ms']:.0f})"
        print(f"{found['provider']:16}{figures}")
    own = next((found["p50_ms"] for found in rows if found["provider"] == "fastbert"), None)
    passed = own is not None and own <= LIMIT_MS
    print(f"{'PASS' if passed else 'MISS'} (fastbert <= {LIMIT_MS:g} ms after torch)")
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
