"""CTranslate2: fp32 and int8. It has bf16 on GPUs only.

Its loader wants a tokenizer for a vocabulary that plays no part here: ids go in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Provider, Unsupported
from torch import Tensor

from .common import Forward, Source, pair, require_cpu

PACKAGES = ("ctranslate2",)
COMPUTE_TYPES = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}


def providers(source: Source) -> list[Provider]:
    def load(dtype: str) -> Forward:
        require_cpu(source)
        return source.once(("ctranslate2", dtype), lambda: encoder(model_folder(source), dtype))

    return [
        provider
        for dtype in COMPUTE_TYPES
        for provider in pair("ctranslate2", dtype, lambda d=dtype: load(d), _to_tensor, packages=PACKAGES)
    ]


def model_folder(source: Source) -> Path:
    return source.converted("ctranslate2", PACKAGES, lambda into: export(source, into))


def export(source: Source, folder: Path) -> None:
    from ctranslate2.converters.transformers import BertLoader
    from transformers import BertModel

    model = BertModel.from_pretrained(source.folder, dtype=torch.float32).eval()
    model.config.position_embedding_type = "absolute"  # the loader asks; transformers 5 has no other
    loader = BertLoader()
    spec = loader.get_model_spec(model)
    spec.register_vocabulary([f"token{i}" for i in range(model.config.vocab_size)])
    loader.set_config(spec.config, model, _NoTokenizer)
    spec.validate()
    spec.optimize()
    spec.save(str(folder))


class _NoTokenizer:
    unk_token = "token0"


def encoder(folder: Path, dtype: str) -> Forward:
    """In int8 the weights are quantised on loading, one scale a row, and activations one scale a token."""
    import ctranslate2

    if COMPUTE_TYPES[dtype] not in ctranslate2.get_supported_compute_types("cpu"):
        raise Unsupported(f"CTranslate2 has no {COMPUTE_TYPES[dtype]} on this CPU")
    model = ctranslate2.Encoder(
        str(folder), compute_type=COMPUTE_TYPES[dtype], inter_threads=1, intra_threads=torch.get_num_threads()
    )

    def forward(inputs: dict[str, Tensor]) -> Any:
        ids, mask = inputs["input_ids"].to(torch.int32), inputs["attention_mask"]
        lengths = mask.sum(1, dtype=torch.int32)
        view = ctranslate2.StorageView.from_array
        return model.forward_batch(view(ids.numpy()), view(lengths.numpy())).last_hidden_state

    return forward


def _to_tensor(states: Any) -> Tensor:
    return torch.from_numpy(np.array(states))
