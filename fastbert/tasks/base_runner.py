"""The common part of all runners: windows of texts, and batches of them by tokens. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from fastbert.config import BertConfig
from fastbert.inference.base_embedder import MAX_TOKENS
from fastbert.inference.batching import blocks, token_budget_batches
from fastbert.inference.windows import Window, windows_of
from fastbert.tokenizer.tokenizer import Tokenizer

VOCABULARY_ROWS = 256  # rows whose logits over a vocabulary are held at a time
_CHUNK, _CHUNK_CHARS = 1024, 1 << 20  # inputs that are tokenized together, and characters at which a chunk ends

Read = Callable[[Any, Any], Any]
Item = TypeVar("Item")


class BaseRunner:
    """A tokenizer and the limits of a model; a subclass has the model.

    Args:
        config: of the model.
        max_tokens: most real tokens in a batch.
    """

    model: Any
    is_own: bool  # a model of fastbert, which takes packed batches

    def __init__(self, config: BertConfig, tokenizer: Tokenizer, *, max_tokens: int = MAX_TOKENS) -> None:
        self.config, self.tokenizer, self.max_tokens = config, tokenizer, max_tokens
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

    @property
    def dtype(self) -> str:
        """Of the weights: "float32", say."""
        raise NotImplementedError

    @property
    def device(self) -> str:
        """Where the model is: "cpu", say."""
        raise NotImplementedError

    def weights_digest(self) -> str:
        """A hash of the weights, and of how they are multiplied."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """A hash of what determines the rows besides the inputs: weights, precision, config and tokenizer."""
        vocabulary, config = sorted(self.tokenizer.get_vocab().items()), sorted(self.config.to_dict().items())
        text = repr((self.weights_digest(), vocabulary, repr(self.tokenizer), config))
        return hashlib.sha256(text.encode()).hexdigest()

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
        raise NotImplementedError

    def predictions_at(self, windows: Sequence[Window], token: int) -> list[np.ndarray]:
        """The masked-language-model head's logits where a window has that token, (P, V) of each."""
        raise NotImplementedError

    def largest_predictions(self, windows: Sequence[Window]) -> list[np.ndarray]:
        """The largest of that head's logits over the tokens of a window, (V,) of each."""
        raise NotImplementedError

    def batches(self, windows: Sequence[Window]) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """The windows of each batch, as indices, and the model's arguments for them."""
        for batch in token_budget_batches([len(window) for window in windows], self.max_tokens):
            yield batch, self._inputs([windows[i].encoding for i in batch], [len(windows[i]) for i in batch])

    def _inputs(self, encodings: list[Any], lengths: list[int]) -> dict[str, Any]:
        """The arguments of a batch."""
        raise NotImplementedError

    def columns(self, encodings: list[Any]) -> dict[str, list[list[int]]]:
        """The rows of each argument that the model takes for texts."""
        found = {"input_ids": [encoding.ids for encoding in encodings]}
        if self.types_of_one or (self.has_types and any(encoding.n_sequences > 1 for encoding in encodings)):
            found["token_type_ids"] = [encoding.type_ids for encoding in encodings]
        return found


def chunks(items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Lists of inputs to tokenize together; `size` is an input's number of characters."""
    return blocks(items, size, _CHUNK, _CHUNK_CHARS)
