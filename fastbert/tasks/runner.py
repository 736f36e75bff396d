"""A model with its tokenizer: windows of texts, run in packed batches, while the next ones are tokenized."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastbert.config import BertConfig
from fastbert.inference.base_embedder import MAX_TOKENS
from fastbert.inference.batching import blocks, token_budget_batches
from fastbert.inference.windows import Window, windows_of
from fastbert.model.pretrained import BertPreTrainedModel
from fastbert.tokenizer.tokenizer import Tokenizer

_CHUNK, _CHUNK_CHARS = 1024, 1 << 20  # inputs that are tokenized together, and characters at which a chunk ends

Read = Callable[[Any, Tensor], Tensor]
Item = TypeVar("Item")


class Runner:
    """A model with its tokenizer.

    Args:
        model: one of fastbert's, or of transformers', which then is accelerated and gets padded batches.
        max_tokens: most real tokens in a batch.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer, *, max_tokens: int = MAX_TOKENS) -> None:
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, max_tokens
        self.is_own = isinstance(model, BertPreTrainedModel)
        config: BertConfig = model.config if self.is_own else BertConfig.from_dict(model.config.to_dict())
        self.config = config
        self.max_length = min(tokenizer.model_max_length, config.max_length)
        self.has_types = "token_type_ids" in tokenizer.model_input_names
        # Of a text alone they are all 0 for most tokenizers, and then left to the model.
        self.types_of_one = self.has_types and any(tokenizer.encodings(["a"])[0].type_ids)

    def limit(self, max_length: int | None) -> int:
        """The most tokens of a window: `max_length`, or as many as model and tokenizer take.

        Raises:
            ValueError: the model has fewer positions.
        """
        if max_length is None:
            return self.max_length
        least = self.tokenizer.num_special_tokens_to_add(True) + 2
        if not least <= max_length <= self.config.max_length:
            raise ValueError(
                f"max_length is {max_length}; it must be {least} to {self.config.max_length}, as the model has "
                "positions"
            )
        return max_length

    def windows(self, texts: Any, max_length: int | None = None, **options: Any) -> list[Window]:
        """The windows of texts; see inference.windows.windows_of, which takes the options."""
        return windows_of(self.tokenizer, texts, self.limit(max_length), **options)

    @torch.inference_mode()
    def run(
        self, windows: Sequence[Window], read: Read, rows: Callable[[Window], int] | None = None, module: Any = None
    ) -> list[np.ndarray]:
        """The rows that `read` makes of the model's output, for each window, in float32.

        Args:
            read: from the output of a batch and its ids, (T,) or padded (B, S), to (B, N), a row for each window; or to
                (T, N) or (B, S, N), of each token; or to (R, N), `rows` for each window.
            rows: how many rows a window has, if not one: its length, for one.
            module: what is called, if not the model.
        """
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

    def batches(self, windows: Sequence[Window]) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """The windows of each batch, as indices, and the model's arguments for them."""
        for batch in token_budget_batches([len(window) for window in windows], self.max_tokens):
            yield batch, self._inputs([windows[i].encoding for i in batch], [len(windows[i]) for i in batch])

    def _inputs(self, encodings: list[Any], lengths: list[int]) -> dict[str, Any]:
        """The arguments of a batch: packed for a model of fastbert, padded for one of transformers."""
        columns = {"input_ids": [encoding.ids for encoding in encodings]}
        if self.types_of_one or (self.has_types and any(encoding.n_sequences > 1 for encoding in encodings)):
            columns["token_type_ids"] = [encoding.type_ids for encoding in encodings]
        packed = {name: _flat(rows) for name, rows in columns.items()}
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


def chunks(items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Lists of inputs to tokenize together; `size` is an input's number of characters."""
    return blocks(items, size, _CHUNK, _CHUNK_CHARS)
