"""Embedder: one vector for each text, computed without pad tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from fastbert.checkpoint.load import Checkpoint
from fastbert.config import BertConfig, family_of
from fastbert.inference import device_pooling
from fastbert.inference.base_embedder import BaseEmbedder
from fastbert.inference.pooling import POOLER, pool, pooling_modes
from fastbert.inference.sentence_modules import RowModule, apply, made
from fastbert.model.auto import AutoModel
from fastbert.model.bert import EncoderModel, picked_states
from fastbert.precision import LoadOptions
from fastbert.tokenizer.tokenizer import Tokenizer


class Embedder(BaseEmbedder):
    """A model, its tokenizer, and the pooling of token states into one vector.

    Args:
        model: the encoder of any family, with a pooler for pooling "pooler".
        tokenizer: the model's tokenizer.
        pooling: "mean" of the token states, "cls" (the first state), "max", "mean_sqrt_len_tokens" (the sum over the
            square root of the length), "weightedmean" (by position, from 1), "lasttoken", or "pooler" (the model's
            pooler_output); or a list of them, whose vectors are concatenated.
        normalize: whether vectors are scaled to length 1.
        max_length: tokens a text is cut to, including [CLS] and [SEP]; None for as many as model and
            tokenizer take.
        lower_case: whether texts are lower-cased first where the tokenizer does not.
        prompt: put before each text, unless a call gives another.
        truncate_dim: number of leading elements of a vector that are returned, after normalize; None for all.
        prompts: prompts by name, for the `prompt_name` of `embed`.
        include_prompt: whether the pooling includes [CLS] and the prompt's tokens where there is a prompt.
        token_modules: modules of fastbert.inference.sentence_modules applied to token states before the pooling.
        modules: modules applied to vectors after the pooling, before normalize.

    Raises:
        ValueError: no such pooling, no pooler, a module for another width, or a max_length that the model cannot take.
    """

    def __init__(
        self,
        model: EncoderModel,
        tokenizer: Tokenizer,
        *,
        pooling: str | Sequence[str] = "mean",
        normalize: bool = False,
        max_length: int | None = None,
        lower_case: bool = False,
        prompt: str = "",
        truncate_dim: int | None = None,
        prompts: Mapping[str, str] | None = None,
        include_prompt: bool = True,
        token_modules: Sequence[RowModule] = (),
        modules: Sequence[RowModule] = (),
    ) -> None:
        if POOLER in pooling_modes(pooling) and model.pooler is None:
            raise ValueError("pooling is 'pooler', but the model has no pooler")
        self.model = model
        self._compiled: Any = None
        super().__init__(
            tokenizer,
            positions=model.config.max_length,
            hidden_size=model.config.hidden_size,
            pooling=pooling,
            normalize=normalize,
            max_length=max_length,
            lower_case=lower_case,
            prompt=prompt,
            truncate_dim=truncate_dim,
            prompts=prompts,
            include_prompt=include_prompt,
            token_modules=token_modules,
            modules=modules,
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        tokenizer: Tokenizer | None = None,
        dtype: torch.dtype | None = None,
        precision: str | None = None,
        quantize: str | None = None,
        device: torch.device | str | None = None,
        pooling: str | Sequence[str] | None = None,
        normalize: bool | None = None,
        max_length: int | None = None,
        truncate_dim: int | None = None,
        revision: str | None = None,
        inference_only: bool = False,
    ) -> Self:
        """Loads a folder or hub id. Arguments from pooling to truncate_dim default to its sentence-transformers files.

        A given pooling replaces that of the folder's Pooling module; a given normalize replaces its Normalize module at
        the end. Both together replace all modules that follow the Transformer. Without such files, the pooling is the
        mean, not normalised, over as many tokens as model and tokenizer take. dtype, precision, quantize and
        inference_only are those of BertModel.from_pretrained.

        Raises:
            FileNotFoundError: config.json, weights or vocabulary are missing.
            ValueError: the folder names a module that fastbert does not have, holds a value of the wrong type, or has
                no pooler and pooling is "pooler"; and as BertModel.from_pretrained.
        """
        options = LoadOptions(dtype, precision, quantize, device, revision, inference_only)

        def load(folder: str | Path, config: BertConfig, revision: str | None, pools: bool) -> Any:
            if pools:
                with Checkpoint(folder, revision, family_of(config.model_type)) as checkpoint:
                    if "pooler.dense.weight" not in checkpoint:
                        raise ValueError(f"{folder}: no tensor pooler.dense.weight, so no pooling 'pooler'")
            kind = AutoModel.of(config)
            return kind.load(folder, replace(options, revision=revision), config, add_pooling_layer=pools)

        return cls.from_folder(
            path,
            load,
            made,
            tokenizer=tokenizer,
            pooling=pooling,
            normalize=normalize,
            max_length=max_length,
            truncate_dim=truncate_dim,
            revision=revision,
        )

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def device(self) -> str:
        return self.model.device.type

    def embed_tokens(self, batch: Sequence[Sequence[int]], *, skip: int = 0) -> Tensor:
        """Vectors of texts given as ids with their special tokens: (B, E) float32 on the model's device.

        Args:
            skip: number of tokens at the start of each text that the pooling leaves out.

        Raises:
            ValueError: an id outside the vocabulary, a text over max_position_embeddings.
        """
        return torch.from_numpy(self._finished(self.pooled(batch, skip))).to(self.model.device)

    def compile(self, **limits: int) -> None:
        """Replays CUDA graphs for small batches from now on: see inference.compile, which takes the limits.

        Raises:
            ValueError: the model is not on a GPU; a limit is less than 1.
        """
        from fastbert.inference.cuda_graphs import compile

        self._compiled = compile(self.model, **limits)

    @torch.inference_mode()
    def pooled(self, batch: Sequence[Sequence[int]], skip: int = 0) -> np.ndarray:
        ids, lengths, packed = self._packed(batch)
        if self._modes == ("cls",) and not skip and self._compiled is None:
            states = picked_states(self.model, ids, **packed, picked="first")
            vectors = apply(self.token_modules, states.float()) * (lengths.to(ids.device) > 0)[:, None]
        else:
            output = (self._compiled or self.model)(ids, **packed, return_dict=True)
            pooler_output = None if output.pooler_output is None else output.pooler_output.float()
            states = apply(self.token_modules, output.last_hidden_state.float())
            vectors = _pooled(states, lengths, self._modes, skip, pooler_output)
        return apply(self.modules, vectors).cpu().numpy()

    @torch.inference_mode()
    def states(self, batch: Sequence[Sequence[int]]) -> list[np.ndarray]:
        ids, lengths, packed = self._packed(batch)
        states = (self._compiled or self.model)(ids, **packed, return_dict=True).last_hidden_state
        states = apply(self.token_modules, states.float()).cpu()
        return [part.numpy() for part in states.split(lengths.tolist())] if len(batch) else []

    def _packed(self, batch: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """The ids of texts, (T,) int64 on the model's device; their lengths, (B,) int64; the model's arguments."""
        device = self.model.device
        lengths = torch.tensor([len(ids) for ids in batch], dtype=torch.int64, device="cpu")
        cu_seqlens = torch.zeros(len(batch) + 1, dtype=torch.int32, device="cpu")
        torch.cumsum(lengths, dim=0, out=cu_seqlens[1:])
        flat = np.fromiter(chain.from_iterable(batch), np.int64, int(lengths.sum()))
        longest = int(lengths.max()) if len(batch) else 0
        return torch.from_numpy(flat).to(device), lengths, {"cu_seqlens": cu_seqlens.to(device), "max_seqlen": longest}

    def fingerprint(self) -> str:
        if any(p.is_meta for p in self.model.parameters()):
            raise ValueError("the model was loaded with inference_only=True and has no weights left to hash")
        digest = weights_digest(self.model)
        digest.update(repr(sorted(self.model.config.to_dict().items())).encode())
        digest.update(self._settings_text())
        for module in (*self.token_modules, *self.modules):
            digest.update(repr(module.settings).encode())
            for name, tensor in module.tensors.items():
                digest.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.cpu().numpy().tobytes())
        digest.update(f"{self.model.matmul_precision}".encode())
        return str(digest.hexdigest())


def weights_digest(model: torch.nn.Module) -> Any:
    """A SHA-256 of a model's tensors and their names, which the caller may update further."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest


def _pooled(states: Tensor, lengths: Tensor, modes: Sequence[str], skip: int, pooler_output: Tensor | None) -> Tensor:
    if not states.is_cpu:
        return device_pooling.pool(states, lengths.to(states.device), modes, skip=skip, pooler_output=pooler_output)
    given = None if pooler_output is None else pooler_output.numpy()
    return torch.from_numpy(pool(states.numpy(), lengths.numpy(), modes, skip=skip, pooler_output=given))
