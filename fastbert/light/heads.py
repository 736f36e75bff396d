"""Heads for classes without torch: of texts and of tokens, in every family."""

from __future__ import annotations

import numpy as np

from fastbert.config import BertConfig
from fastbert.engine.library import ACTIVATIONS
from fastbert.families.names import ClassesNames
from fastbert.light.encoder import Encoder

FIRST = ("cls", "bos")  # poolings that read the first token alone


def pools(names: ClassesNames) -> bool:
    """True if a head over texts reads the encoder's pooler."""
    return names.dense is None


def needs_torch_for(config: BertConfig, names: ClassesNames | None) -> str | None:
    """What of a model's config the extension alone cannot run; None if it runs all. `names` are its head's, if any."""
    if config.hidden_size % (2 * config.num_attention_heads):
        return f"a head of width {config.head_dim}"
    activations = [config.hidden_act]
    if names is not None and names.dense is not None:
        activations.append(config.activation_of(names.activation))
    unknown = [name for name in activations if name not in ACTIVATIONS]
    return f"the activation {unknown[0]}" if unknown else None


class Head:
    """A head over states: a layer with its activation and a norm, where the family has them, and the classifier.

    Raises:
        ValueError: an activation that the extension does not have, or a pooling that is not known.
    """

    def __init__(self, encoder: Encoder, names: ClassesNames, count: int) -> None:
        self.encoder, self.names, self.count, config = encoder, names, count, encoder.config
        self.activation = config.activation_of(names.activation)
        if names.dense is not None and self.activation not in ACTIVATIONS:
            raise ValueError(f"config: {names.activation} is {self.activation!r}, which needs torch")
        self.pooling = "cls" if names.pooling is None else config.extra.get(names.pooling, "cls")
        if self.pooling not in (*FIRST, "mean", "late"):
            raise ValueError(f"config: {names.pooling} is {self.pooling!r}; it must be 'cls', 'bos', 'mean' or 'late'")

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Of rows (M, E), in the model's dtype: (M, N)."""
        encoder = self.encoder
        if self.names.dense is not None:
            x = encoder.linear(encoder.arrays["head.dense"], x, encoder.width, self.activation)
        if self.names.norm is not None:
            x = encoder.norm("head.norm", x)
        return encoder.linear(encoder.arrays["head.out"], x, self.count)

    def of_texts(self, ids: np.ndarray, cu_seqlens: np.ndarray, token_type_ids: np.ndarray | None = None) -> np.ndarray:
        """The logits of packed texts, (B, N) float32."""
        encoder = self.encoder
        first = np.clip(cu_seqlens[:-1].astype(np.int64), 0, max(0, len(ids) - 1))
        if pools(self.names) or self.pooling in FIRST:
            x = encoder(ids, cu_seqlens, token_type_ids=token_type_ids, picked=first)
            x = encoder.pooled(x) if pools(self.names) else x
            return encoder.float32(self(x))
        x = encoder(ids, cu_seqlens, token_type_ids=token_type_ids)
        if self.pooling == "late":
            return encoder.float32(encoder.in_dtype(_means(encoder.float32(self(x)), cu_seqlens)))
        return encoder.float32(self(encoder.in_dtype(_means(encoder.float32(x), cu_seqlens))))

    def of_tokens(
        self, ids: np.ndarray, cu_seqlens: np.ndarray, token_type_ids: np.ndarray | None = None
    ) -> np.ndarray:
        """The logits of packed tokens, (T, N) float32."""
        return self.encoder.float32(self(self.encoder(ids, cu_seqlens, token_type_ids=token_type_ids)))


def _means(x: np.ndarray, cu_seqlens: np.ndarray) -> np.ndarray:
    """The mean of each text's rows, one after the other: (T, N) -> (B, N); zeros for a text without any."""
    y = np.zeros((len(cu_seqlens) - 1, x.shape[1]), np.float32)
    for row, start, end in zip(y, cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        if end > start:
            np.add.reduce(x[start:end], axis=0, out=row)
            row /= np.float32(end - start)
    return y
