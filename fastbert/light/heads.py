"""Heads without torch, of texts and of tokens, in every family."""

from __future__ import annotations

import numpy as np

from fastbert.config import BertConfig
from fastbert.engine.library import ACTIVATIONS
from fastbert.families.parts import HeadParts
from fastbert.light.encoder import Encoder
from fastbert.tasks.base_runner import VOCABULARY_ROWS

FIRST = ("cls", "bos", "pooler")  # what a head may read of a text that its first token's state is enough for


def needs_torch_for(config: BertConfig, head: HeadParts | None = None) -> str | None:
    """The part of a model that the extension alone cannot run; None if it runs all."""
    if config.hidden_size % (2 * config.num_attention_heads):
        return f"a head of width {config.head_dim}"
    activations = [config.hidden_act]
    if head is not None and head.dense is not None:
        activations.append(str(head.activation))
    unknown = [name for name in activations if name not in ACTIVATIONS]
    return f"the activation {unknown[0]}" if unknown else None


class Head:
    """A head over an encoder's states.

    Raises:
        ValueError: an activation that the extension does not have.
    """

    def __init__(self, encoder: Encoder, parts: HeadParts) -> None:
        self.encoder, self.parts = encoder, parts
        if parts.dense is not None and parts.activation not in ACTIVATIONS:
            raise ValueError(f"config: the head's activation is {parts.activation!r}, which needs torch")

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Of rows (M, E), in the model's dtype: (M, N)."""
        encoder, parts = self.encoder, self.parts
        if parts.dense is not None:
            x = encoder.linear(encoder.arrays["head.dense"], x, parts.dense.rows, parts.activation)
        if parts.norm is not None:
            x = encoder.norm("head.norm", x, rms=encoder.family.rms)
        return encoder.linear(encoder.arrays["head.out"], x, parts.out.rows)

    def of_texts(self, ids: np.ndarray, cu_seqlens: np.ndarray, token_type_ids: np.ndarray | None = None) -> np.ndarray:
        """The logits of packed texts, (B, N) float32."""
        if self.parts.reads in FIRST:
            first = np.clip(cu_seqlens[:-1].astype(np.int64), 0, max(0, len(ids) - 1))
            return self.of_first(self.encoder(ids, cu_seqlens, token_type_ids=token_type_ids, picked=first))
        return self.of_states(self.encoder(ids, cu_seqlens, token_type_ids=token_type_ids), cu_seqlens)

    def of_first(self, x: np.ndarray) -> np.ndarray:
        """The logits of texts whose first token's state is enough, (B, E) -> (B, N) float32."""
        return self.encoder.float32(self(self.encoder.pooled(x) if self.parts.reads == "pooler" else x))

    def of_states(self, x: np.ndarray, cu_seqlens: np.ndarray) -> np.ndarray:
        """The logits of texts by the states of their tokens, (T, E) -> (B, N) float32."""
        encoder = self.encoder
        if self.parts.reads in FIRST:
            return self.of_first(x[cu_seqlens[:-1]])
        if self.parts.reads == "late":
            return encoder.float32(encoder.in_dtype(_means(encoder.float32(self(x)), cu_seqlens)))
        return encoder.float32(self(encoder.in_dtype(_means(encoder.float32(x), cu_seqlens))))

    def of_tokens(
        self, ids: np.ndarray, cu_seqlens: np.ndarray, token_type_ids: np.ndarray | None = None
    ) -> np.ndarray:
        """The logits of packed tokens, (T, N) float32."""
        return self.encoder.float32(self(self.encoder(ids, cu_seqlens, token_type_ids=token_type_ids)))

    def of_places(
        self, ids: np.ndarray, cu_seqlens: np.ndarray, places: np.ndarray, token_type_ids: np.ndarray | None = None
    ) -> np.ndarray:
        """The logits of the tokens at `places` (P,) int64 of packed ones, (P, N) float32."""
        states = self.encoder(ids, cu_seqlens, token_type_ids=token_type_ids, picked=places)
        return self.encoder.float32(self(states))

    def largest(self, ids: np.ndarray, cu_seqlens: np.ndarray, token_type_ids: np.ndarray | None = None) -> np.ndarray:
        """The largest logit of each text's tokens, (B, N) float32; -inf for a text without any."""
        states = self.encoder(ids, cu_seqlens, token_type_ids=token_type_ids)
        y = np.full((len(cu_seqlens) - 1, self.parts.out.rows), -np.inf, np.float32)
        for row, start, end in zip(y, cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
            for first in range(start, end, VOCABULARY_ROWS):
                logits = self.encoder.float32(self(states[first : min(end, first + VOCABULARY_ROWS)]))
                np.maximum(row, logits.max(axis=0), out=row)
        return y


def _means(x: np.ndarray, cu_seqlens: np.ndarray) -> np.ndarray:
    """The mean of each text's rows, one after the other: (T, N) -> (B, N); zeros for a text without any."""
    y = np.zeros((len(cu_seqlens) - 1, x.shape[1]), np.float32)
    for row, start, end in zip(y, cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        if end > start:
            np.add.reduce(x[start:end], axis=0, out=row)
            row /= np.float32(end - start)
    return y
