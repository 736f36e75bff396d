"""OpenVINO: fp32, bf16, and int8 weights and activations by nncf with bf16 for the rest.

int8 is nncf's recipe for transformers (MIXED preset, SmoothQuant, bias correction), calibrated on random ids as the
benchmark's own batches hold: calibrated on anything else its numbers would be worse.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Provider
from workload import SEED

from .common import Forward, Source, States, example_inputs, pair, require_cpu

PACKAGES = ("openvino",)
QUANTIZING = ("openvino", "nncf")
NAMES = ("input_ids", "attention_mask")
HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "bf16"}
CALIBRATION_BATCHES, CALIBRATION_SHAPE = 16, (4, 128)


def providers(source: Source) -> list[Provider]:
    def load(dtype: str) -> Forward:
        require_cpu(source)
        return source.once(("openvino", dtype), lambda: compiled(model_file(source, dtype), dtype))

    return [
        provider
        for dtype in HINTS
        for provider in pair(
            "openvino", dtype, lambda d=dtype: load(d), packages=QUANTIZING if dtype == "int8" else PACKAGES
        )
    ]


def model_file(source: Source, dtype: str) -> Path:
    folder = source.converted("openvino-fp32", PACKAGES, lambda into: export(source, into / "model.xml"))
    if dtype == "int8":
        plain = folder / "model.xml"
        folder = source.converted(
            "openvino-int8", QUANTIZING, lambda into: quantize(plain, into / "model.xml", source.folder)
        )
    return folder / "model.xml"


def without_statistics() -> None:
    """The converters would report their use to their makers; without this package they cannot."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


def export(source: Source, file: Path) -> None:
    """transformers' model with sdpa, which OpenVINO has an op for, as a graph with free batch and length."""
    without_statistics()
    import openvino

    model = openvino.convert_model(
        States(source.folder, "sdpa"),
        example_input=example_inputs(),
        input=[(name, openvino.PartialShape([-1, -1]), openvino.Type.i64) for name in NAMES],
    )
    openvino.save_model(model, file, compress_to_fp16=False)


def quantize(plain: Path, file: Path, folder: Path) -> None:
    without_statistics()
    import nncf
    import openvino
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    ids = np.random.default_rng(SEED + 1)
    first = min(1000, config.vocab_size // 2)
    shape = CALIBRATION_SHAPE[0], min(CALIBRATION_SHAPE[1], config.max_position_embeddings)
    batches: list[dict[str, Any]] = [
        {
            "input_ids": ids.integers(first, config.vocab_size, shape),
            "attention_mask": np.ones(shape, dtype=np.int64),
        }
        for _ in range(CALIBRATION_BATCHES)
    ]
    model = nncf.quantize(
        openvino.Core().read_model(plain),
        nncf.Dataset(batches),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(batches),
    )
    openvino.save_model(model, file, compress_to_fp16=False)


def compiled(file: Path, dtype: str) -> Forward:
    import openvino

    core = openvino.Core()
    model = core.compile_model(
        core.read_model(file),
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": HINTS[dtype],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
        },
    )
    request = model.create_infer_request()
    # Outputs are copied: the next call of the same request writes over the memory of this one.
    return lambda inputs: request.infer({name: inputs[name].numpy() for name in NAMES}, share_inputs=True)[0]
