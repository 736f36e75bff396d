"""TextEmbedder: one vector for each text, by numpy and the extension alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Self

import numpy as np

from fastbert.config import BertConfig
from fastbert.inference.base_embedder import BaseEmbedder
from fastbert.inference.pooling import POOLER, pool
from fastbert.light.encoder import Encoder
from fastbert.light.loading import default_threads, load_encoder
from fastbert.light.rows import RowModule, made
from fastbert.tokenizer.tokenizer import Tokenizer


class TextEmbedder(BaseEmbedder):
    """An encoder, its tokenizer, and the pooling of token states into one vector: `fastbert.Embedder` without torch.

    `from_pretrained` makes one; the vectors of `embed` are the Embedder's, bit for bit.
    """

    def __init__(self, encoder: Encoder, tokenizer: Tokenizer, **settings: Any) -> None:
        self.encoder = encoder
        config = encoder.config
        super().__init__(tokenizer, positions=config.max_length, hidden_size=config.hidden_size, **settings)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        tokenizer: Tokenizer | None = None,
        dtype: str | None = None,
        quantize: str | None = None,
        pooling: str | Sequence[str] | None = None,
        normalize: bool | None = None,
        max_length: int | None = None,
        truncate_dim: int | None = None,
        revision: str | None = None,
        threads: int | None = None,
        cache: str | Path | bool = False,
    ) -> Self:
        """Loads a folder or hub id with safetensors weights; see `Embedder.from_pretrained` for what is not here.

        Args:
            dtype: "float32" or "bfloat16"; None for the stored one (float32 for float16 and float64).
            quantize: "int8", or None.
            threads: of each call; None for OMP_NUM_THREADS, or the number of cores.
            cache: a folder that keeps the packed weights, or True for fastbert/packed in the user's cache; they are
                mapped the next time.

        Raises:
            FileNotFoundError: config.json, weights or vocabulary are missing.
            ValueError: as Embedder.from_pretrained.
            ImportError: the weights are pickled, or the folder has a module that needs torch.
        """
        threads = default_threads() if threads is None else threads

        def load(folder: str | Path, config: BertConfig, revision: str | None, pools: bool) -> Encoder:
            options: dict[str, Any] = {"dtype": dtype, "quantize": quantize, "revision": revision}
            return load_encoder(folder, config, threads=threads, cache=cache, with_pooler=pools, **options)

        return cls.from_folder(
            path,
            load,
            lambda settings: made(settings, threads),
            tokenizer=tokenizer,
            pooling=pooling,
            normalize=normalize,
            max_length=max_length,
            truncate_dim=truncate_dim,
            revision=revision,
        )

    @property
    def dtype(self) -> str:
        return self.encoder.dtype

    @property
    def device(self) -> str:
        return "cpu"

    def fingerprint(self) -> str:
        digest = self.encoder.digest()
        digest.update(self._settings_text())
        for module in (*self.token_modules, *self.modules):
            digest.update(module.digest)
        return str(digest.hexdigest())

    def states(self, batch: Sequence[Sequence[int]]) -> list[np.ndarray]:
        lengths, cu_seqlens, ids = _packed(batch)
        states = _applied(self.token_modules, self.encoder.float32(self.encoder(ids, cu_seqlens)))
        return np.split(states, cu_seqlens[1:-1]) if len(lengths) else []

    def pooled(self, batch: Sequence[Sequence[int]], skip: int = 0) -> np.ndarray:
        lengths, cu_seqlens, ids = _packed(batch)
        first = np.clip(cu_seqlens[:-1].astype(np.int64), 0, max(0, len(ids) - 1))
        encoder = self.encoder
        if self._modes == ("cls",) and not skip:
            states = encoder.float32(encoder(ids, cu_seqlens, picked=first))
            vectors = _applied(self.token_modules, states) * (lengths > 0)[:, None]
        else:
            states = encoder(ids, cu_seqlens)
            pooler_output = None
            if POOLER in self._modes:
                pooler_output = encoder.float32(encoder.pooled(states[first])) * (lengths > 0)[:, None]
            states = _applied(self.token_modules, encoder.float32(states))
            vectors = pool(states, lengths, self._modes, skip=skip, pooler_output=pooler_output)
        return _applied(self.modules, vectors)


def _packed(batch: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The lengths of texts, (B,) int64; where each starts, and their end, (B + 1,) int32; their ids, (T,) int64."""
    lengths = np.array([len(ids) for ids in batch], np.int64)
    cu_seqlens = np.zeros(len(batch) + 1, np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    return lengths, cu_seqlens, np.fromiter(chain.from_iterable(batch), np.int64, int(lengths.sum()))


def _applied(modules: Iterable[RowModule], x: np.ndarray) -> np.ndarray:
    for module in modules:
        x = module(x)
    return x
