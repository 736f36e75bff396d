"""explain: which implementation of each op runs here, or what runs in a given model, and why."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastbert.config import family_of
from fastbert.integrations.transformers import explain_model
from fastbert.model.plan import freshness
from fastbert.model.pretrained import BertPreTrainedModel
from fastbert.ops import EncoderWeights, LayerWeights, Weight
from fastbert.ops.dispatch import Explanation, explain_table
from fastbert.precision import PRECISIONS, QUANTIZED, describe_setting, quantized_reason


def explain(model: Any = None) -> Explanation:
    """A printable table of what runs and why.

    Args:
        model: a model, accelerated or not: the table covers what runs in it, in its dtype and precision.
            None: the ops on this machine's devices, in fp32 inference.
    """
    if model is None:
        return _explain_ops(devices(), torch.float32, None)
    ours = _own_model(model)
    if ours is None:
        verdicts = explain_model(model)
        rows = [(verdict.kind, verdict.name, "", verdict.text) for verdict in verdicts]
        settings = [verdict.runs for verdict in verdicts if verdict.runs is not None]
    else:
        settings = [(ours.device.type, ours.dtype, ours.matmul_precision)]
        text = f"fastbert, in {describe_setting(*settings[0][1:])}"
        seen = next(filter(None, map(freshness, ours.modules())), None)
        kind = family_of(ours.config.model_type).base
        rows = [(kind, ours.device.type, "", text if seen is None else f"{text}\n  {seen}")]
    for device, dtype, setting in dict.fromkeys(settings):
        rows += _explain_ops([device], dtype, setting).rows
    return Explanation(tuple(rows))


def explain_precisions() -> list[tuple[str, str]]:
    """Per precision setting and device: (the setting, the device with the backend of its products and a note)."""
    asked = [(torch.float32, None), *((torch.float32, setting) for setting in PRECISIONS), (torch.bfloat16, None)]
    lines = []
    for dtype, setting in asked:
        for device in devices():
            if device == "cuda" and setting in QUANTIZED and (why := quantized_reason(torch.device(device))):
                lines.append((describe_setting(dtype, setting), f"{device}: no, it is {why}"))
            else:
                rows = _explain_ops([device], dtype, setting).rows
                backend, verdict = next(row[2:] for row in rows if row[0] == "linear" and row[3].startswith("yes"))
                note = verdict.removeprefix("yes").removeprefix("; ").removeprefix(f"{setting}: ")
                text = f"{device}: {backend}" + (f", {note}" if note else "")
                lines.append((describe_setting(dtype, setting), text))
    return lines


def devices() -> list[str]:
    """The kinds of devices here, the fastest last."""
    return ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def _explain_ops(devices: list[str], dtype: torch.dtype, precision: str | None) -> Explanation:
    with torch.inference_mode(False), torch.no_grad():
        return explain_table(devices, lambda op, device: _example(op, device, dtype, precision))


def _own_model(model: Any) -> BertPreTrainedModel | None:
    """The fastbert model in `model`: itself, a part of it, or what an Embedder holds."""
    root = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    modules = root.modules() if isinstance(root, nn.Module) else ()
    return next((m for m in modules if isinstance(m, BertPreTrainedModel)), None)


def _example(op: str, device: str, dtype: torch.dtype, precision: str | None) -> tuple[tuple, dict]:
    """Small example arguments for each backend's `supports`: a layer of width 64 with 2 heads."""
    width, tokens = 64, 8

    def weight(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    x, vector = weight(tokens, width), weight(width)
    ids = torch.zeros(tokens, dtype=torch.int64, device=device)
    cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    norm = vector, vector

    def product(rows: int, columns: int) -> Weight:
        return Weight([weight(rows, columns)], [weight(rows)])

    up, down = product(4 * width, width), product(width, 4 * width)
    constants: dict[str, Any] = {"num_heads": 2, "activation": "gelu", "eps": 1e-12, "precision": precision}
    layer = LayerWeights(product(3 * width, width), product(width, width), norm, up, down, norm, **constants)
    examples: dict[str, tuple[tuple, dict]] = {
        "embed_layer_norm": (
            (ids, ids, ids, x, x, x, vector, vector),
            {"eps": 1e-12, "dropout_p": 0.0, "padding_idx": 0},
        ),
        "linear": ((x, product(width, width)), {"activation": "gelu", "precision": precision}),
        "gate": ((weight(tokens, 2 * width), "gelu"), {}),
        "rotary": ((weight(tokens, 6, 32), torch.zeros(tokens, 32, device=device), ids, 2), {}),
        "attention": ((weight(tokens, 3, 2, 32), cu_seqlens, tokens), {"scale": None, "dropout_p": 0.0}),
        "add_layer_norm": ((x, x, vector, vector), {"eps": 1e-12, "dropout_p": 0.0}),
        "linear_cross_entropy": ((x, weight(100, width), weight(100), ids), {"ignore_index": -100}),
        "encoder": ((x, EncoderWeights([layer]), cu_seqlens, tokens), {}),
        "read_mask": ((ids[None],), {}),
        "pack_mask": ((ids[None],), {}),
        "gather_rows": ((x, ids), {"fill": 0.0}),
    }
    return examples[op]
