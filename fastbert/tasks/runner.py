"""A model with its tokenizer: windows of texts, run in packed batches, while the next ones are tokenized."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbert.config import BertConfig
from fastbert.inference.base_embedder import MAX_TOKENS
from fastbert.inference.embed import weights_digest
from fastbert.inference.windows import Window
from fastbert.model.pretrained import BertPreTrainedModel
from fastbert.tasks.base_runner import BaseRunner, Read
from fastbert.tokenizer.tokenizer import Tokenizer


class Runner(BaseRunner):
    """A model with its tokenizer.

    Args:
        model: one of fastbert's, or of transformers', which then is accelerated and gets padded batches.
        max_tokens: most real tokens in a batch.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer, *, max_tokens: int = MAX_TOKENS) -> None:
        self.model, self.is_own = model, isinstance(model, BertPreTrainedModel)
        config: BertConfig = model.config if self.is_own else BertConfig.from_dict(model.config.to_dict())
        super().__init__(config, tokenizer, max_tokens=max_tokens)

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def device(self) -> str:
        return str(self.model.device.type)

    def weights_digest(self) -> str:
        return str(weights_digest(self.model).hexdigest())

    @torch.inference_mode()
    def run(
        self, windows: Sequence[Window], read: Read, rows: Callable[[Window], int] | None = None, module: Any = None
    ) -> list[np.ndarray]:
        found: list[np.ndarray] = [np.empty(0)] * len(windows)
        for batch, inputs in self.batches(windows):
            output = (self.model if module is None else module)(**inputs, return_dict=True)
            values = read(output, inputs["input_ids"])
            if rows is not None and values.dim() > 2:
                values = values[inputs["attention_mask"] == 1]
            values = values.float().cpu()
            parts = values.unbind() if rows is None else values.split([rows(windows[i]) for i in batch])
            for i, part in zip(batch, parts, strict=True):
                found[i] = part.numpy()
        return found

    def _inputs(self, encodings: list[Any], lengths: list[int]) -> dict[str, Any]:
        """The arguments of a batch: packed for a model of fastbert, padded for one of transformers."""
        packed = {name: _flat(rows) for name, rows in self.columns(encodings).items()}
        device = self.model.device
        if self.is_own:
            cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            packed = {name: values.to(device) for name, values in packed.items()}
            return {**packed, "cu_seqlens": torch.from_numpy(cu_seqlens).to(device), "max_seqlen": max(lengths)}
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        fills = {"input_ids": self.tokenizer.pad_token_id, "token_type_ids": 0}
        inputs = {"attention_mask": mask.long()}
        for name, values in packed.items():
            inputs[name] = torch.full(mask.shape, fills[name], dtype=torch.int64)
            inputs[name][mask] = values
        return {name: values.to(device) for name, values in inputs.items()}


def _flat(rows: list[list[int]]) -> Tensor:
    return torch.from_numpy(np.fromiter(chain.from_iterable(rows), np.int64, sum(map(len, rows))))
