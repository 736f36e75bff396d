"""ONNX Runtime: fp32, and dynamic int8 with a scale for each output channel.

The graph is exported once, fused by ONNX Runtime's own optimizer for BERT (attention, GELU, LayerNorm), and quantised
from that: both steps made it faster. A scale for a whole weight, the default of quantize_dynamic, put real MiniLM
weights 37 % off; a scale a channel 18 %.
"""

from __future__ import annotations

from pathlib import Path

import torch
from harness import Provider

from .common import Forward, Source, States, example_inputs, pair, require_cpu

PACKAGES = ("onnxruntime", "onnx")
NAMES = ("input_ids", "attention_mask")


def providers(source: Source) -> list[Provider]:
    def load(dtype: str) -> Forward:
        require_cpu(source)
        return source.once(("onnxruntime", dtype), lambda: session(model_file(source, dtype)))

    return [
        provider
        for dtype in ("fp32", "int8")
        for provider in pair("onnxruntime", dtype, lambda d=dtype: load(d), packages=PACKAGES)
    ]


def model_file(source: Source, dtype: str) -> Path:
    """The fused graph, in fp32 or quantised."""
    folder = source.converted("onnx-fp32", PACKAGES, lambda into: export(source, into))
    if dtype == "int8":
        fused = folder / "model.onnx"
        folder = source.converted("onnx-int8", PACKAGES, lambda into: quantize(fused, into / "model.onnx"))
    return folder / "model.onnx"


def export(source: Source, folder: Path) -> None:
    """transformers' model as model.onnx in `folder`, with free batch and length."""
    from onnxruntime.transformers import optimizer

    model, inputs = States(source.folder, "eager"), example_inputs()  # the fusions know eager attention
    axes = {0: "batch", 1: "length"}
    plain, config = folder / "plain.onnx", model.model.config
    torch.onnx.export(
        model,
        tuple(inputs.values()),
        plain,
        dynamo=False,  # the fusions know the graphs of the older exporter
        opset_version=17,
        input_names=list(NAMES),
        output_names=["states"],
        dynamic_axes=dict.fromkeys((*NAMES, "states"), axes),
    )
    fused = optimizer.optimize_model(
        str(plain),
        model_type="bert",
        num_heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
        opt_level=1,
    )
    fused.save_model_to_file(str(folder / "model.onnx"))
    plain.unlink()


def quantize(fused: Path, target: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        fused,
        target,
        weight_type=QuantType.QInt8,
        per_channel=True,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # the shapes of fused nodes are unknown to it
    )


def session(file: Path) -> Forward:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    # Its threads spin within a call, but not for the tens of milliseconds after it in which the next runtime is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    model = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda inputs: model.run(None, {name: inputs[name].numpy() for name in NAMES})[0]
