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
from fastbert.model.bert import picked_states
from fastbert.model.pretrained import BertPreTrainedModel
from fastbert.tasks.base_runner import VOCABULARY_ROWS, BaseRunner, Read
from fastbert.tokenizer.tokenizer import Tokenizer


class Runner(BaseRunner):
    """A model with its tokenizer.

    Args:
        model: one of fastbert's, or of transformers', which then is accelerated and gets padded batches.
        max_tokens: most real tokens in a batch.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer, *, max_tokens: int = MAX_TOKENS) -> None:
        self.model, self.is_own = model, isinstance(model, BertPreTrainedModel)
        self._compiled: Any = None
        config: BertConfig = model.config if self.is_own else BertConfig.from_dict(model.config.to_dict())
        super().__init__(config, tokenizer, max_tokens=max_tokens)

    def compile(self, **limits: int) -> None:
        """Replays CUDA graphs for small batches from now on: see inference.compile, which takes the limits.

        Raises:
            TypeError: the model is transformers'.
            ValueError: the model is not on a GPU; a limit is less than 1.
        """
        from fastbert.inference.cuda_graphs import compile

        self._compiled = compile(self.model, **limits)

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def device(self) -> str:
        return str(self.model.device.type)

    def weights_digest(self) -> str:
        digest = weights_digest(self.model)
        digest.update(str(getattr(self.model, "matmul_precision", None)).encode())
        return str(digest.hexdigest())

    @torch.inference_mode()
    def run(
        self, windows: Sequence[Window], read: Read, rows: Callable[[Window], int] | None = None, module: Any = None
    ) -> list[np.ndarray]:
        found: list[np.ndarray] = [np.empty(0)] * len(windows)
        for batch, inputs in self.batches(windows):
            output = (module or self._compiled or self.model)(**inputs, return_dict=True)
            values = read(output, inputs["input_ids"])
            if rows is not None and values.dim() > 2:
                values = values[inputs["attention_mask"] == 1]
            values = values.float().cpu()
            parts = values.unbind() if rows is None else values.split([rows(windows[i]) for i in batch])
            for i, part in zip(batch, parts, strict=True):
                found[i] = part.numpy()
        return found

    def predictions_at(self, windows: Sequence[Window], token: int) -> list[np.ndarray]:
        """As BaseRunner; a model of fastbert runs its head and last products at these tokens only."""

        def own(input_ids: Tensor, return_dict: bool, **inputs: Any) -> Tensor:
            places = (input_ids == token).nonzero().flatten()
            return picked_states(self.model.base_model, input_ids, **inputs, picked=places)

        def read(output: Any, ids: Tensor) -> Tensor:
            return self.model.predictions(output) if self.is_own else output.logits[ids == token]

        return self.run(windows, read, lambda window: window.encoding.ids.count(token), own if self.is_own else None)

    @torch.inference_mode()
    def largest_predictions(self, windows: Sequence[Window]) -> list[np.ndarray]:
        found: list[np.ndarray] = [np.empty(0)] * len(windows)
        for batch, inputs in self.batches(windows):
            if self.is_own:
                states = self.model.base_model(**inputs, return_dict=True).last_hidden_state
                texts = states.split([len(windows[i]) for i in batch])
                rows = [
                    torch.stack([self.model.predictions(x).amax(0) for x in text.split(VOCABULARY_ROWS)])
                    for text in texts
                ]
            else:
                logits = self.model(**inputs, return_dict=True).logits
                rows = [one[mask == 1] for one, mask in zip(logits, inputs["attention_mask"], strict=True)]
            for i, row in zip(batch, rows, strict=True):
                found[i] = row.amax(0).float().cpu().numpy()
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
