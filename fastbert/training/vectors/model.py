"""The models that are trained to make vectors, an Embedder with all its modules and a sparse one, and their folders."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from fastbert.checkpoint.files import atomic_path, write_text
from fastbert.checkpoint.hub import resolve_file
from fastbert.checkpoint.json_files import read_json
from fastbert.config import BertConfig
from fastbert.inference import device_pooling
from fastbert.inference.embed import Embedder
from fastbert.inference.sentence_modules import apply, made
from fastbert.model.auto import AutoModel, AutoModelForMaskedLM
from fastbert.precision import LoadOptions
from fastbert.tasks.sparse import check_pooling

MODULES, TRANSFORMER, SETTINGS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
_WEIGHTS = "model.safetensors"


def with_dropout(config: BertConfig, dropout: float | None) -> BertConfig:
    """The config with another dropout, if one is given."""
    if dropout is not None:
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    config.extra.pop("_name_or_path", None)  # names the original checkpoint
    return config


class _Encoder(nn.Module):
    """A model that is trained to make vectors, and the sentence-transformers files that its folder gets, by name."""

    def __init__(self, held: Any, files: Mapping[str, str]) -> None:
        super().__init__()
        self.config, self.files = held.config, files
        self._held = (held,)  # registered under the subclass's own name

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        dropout: float | None = None,
        max_length: int | None = None,
        prompts: Mapping[str, str] | None = None,
    ) -> Self:
        """Loads a folder or hub id in float32.

        Args:
            path: the folder or id.
            revision: of the id.
            dropout: in place of the model's.
            max_length: in tokens, in place of the model's.
            prompts: by name, in addition to those of the folder, or in their place.

        Raises:
            ValueError: as Embedder.from_pretrained; or, of a SparseEncoder, an embedder's folder or another pooling.
        """
        held, files = cls._read(path, revision, dropout, max_length)
        return cls(held, _with(files, max_length, prompts or {}))

    @classmethod
    @abstractmethod
    def _read(
        cls, path: str | Path, revision: str | None, dropout: float | None, max_length: int | None
    ) -> tuple[Any, dict[str, str]]:
        """The first argument of the class, and the sentence-transformers files of a folder or hub id."""

    @property
    def device(self) -> torch.device:
        return self._held[0].device

    def save_pretrained(self, folder: str | Path, *, state_dict: dict[str, Tensor] | None = None) -> None:
        """Writes a folder that sentence-transformers and fastbert load; without a tokenizer."""
        assert state_dict is None, "the model is not sharded"
        self._held[0].save_pretrained(folder)
        for name, text in self.files.items():
            write_text(Path(folder) / name, text)


class TextEncoder(_Encoder):
    """An Embedder whose weights are all trained, those of its Dense and LayerNorm modules too.

    Args:
        embedder: with a model in float32.
        files: the sentence-transformers files that its folder gets, by their names.
    """

    def __init__(self, embedder: Embedder, files: Mapping[str, str]) -> None:
        super().__init__(embedder.model, files)
        self.embedder, self.encoder = embedder, embedder.model
        self.rows = nn.ModuleList()  # of modules with tensors, in the order of modules.json
        for module in (*embedder.token_modules, *embedder.modules):
            if module.tensors:
                held = nn.Module()
                for name, tensor in module.tensors.items():
                    module.tensors[name] = nn.Parameter(tensor)
                    held.register_parameter(name.replace(".", "_"), module.tensors[name])
                self.rows.append(held)

    @classmethod
    def _read(
        cls, path: str | Path, revision: str | None, dropout: float | None, max_length: int | None
    ) -> tuple[Embedder, dict[str, str]]:
        def load(folder: str | Path, config: BertConfig, revision: str | None, pools: bool) -> Any:
            options = LoadOptions(torch.float32, revision=revision)
            config = with_dropout(config, dropout)
            return AutoModel.of(config).load(folder, options, config, add_pooling_layer=pools)

        nothing: dict[str, Any] = dict.fromkeys(("tokenizer", "pooling", "normalize", "truncate_dim"))
        embedder = Embedder.from_folder(path, load, made, revision=revision, max_length=max_length, **nothing)
        return embedder, sentence_files(path, revision) or _usual_files(embedder)

    @property
    def width(self) -> int:
        """The length of a vector."""
        return self.embedder.width

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        skip: Tensor | int = 0,
    ) -> Tensor:
        """Vectors of packed texts, (B, E) float32.

        Args:
            input_ids: (T,) int64; token_type_ids too.
            cu_seqlens: (B + 1,) int32.
            skip: tokens at the start of each text that the pooling leaves out, (B,) int64.
        """
        embedder = self.embedder
        output = self.encoder(
            input_ids, token_type_ids=token_type_ids, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, return_dict=True
        )
        states = apply(embedder.token_modules, output.last_hidden_state.float())
        pooler_output = None if output.pooler_output is None else output.pooler_output.float()
        modes = embedder.pooling_modes
        vectors = device_pooling.pool(states, cu_seqlens.diff().long(), modes, skip=skip, pooler_output=pooler_output)
        vectors = apply(embedder.modules, vectors)
        if embedder.normalize:
            vectors = F.normalize(vectors, dim=1)
        return vectors[:, : embedder.width]

    def save_pretrained(self, folder: str | Path, *, state_dict: dict[str, Tensor] | None = None) -> None:
        super().save_pretrained(folder, state_dict=state_dict)
        embedder = self.embedder
        tensors = [module.tensors for module in (*embedder.token_modules, *embedder.modules) if module.tensors]
        folders = [entry["path"] for entry in json.loads(self.files[MODULES]) if _has_weights(entry)]
        for name, found in zip(folders, tensors, strict=True):
            with atomic_path(Path(folder) / name / _WEIGHTS) as temporary:
                save_file({key: tensor.detach().contiguous() for key, tensor in found.items()}, temporary)

    def embed(self, texts: Sequence[str], **settings: Any) -> np.ndarray:
        """Vectors of texts, as Embedder.embed."""
        self.eval()
        return self.embedder.embed(texts, **settings)


def _has_weights(entry: Mapping[str, Any]) -> bool:
    return str(entry["type"]).rpartition(".")[2] in ("Dense", "LayerNorm")


def sentence_files(path: str | Path, revision: str | None = None) -> dict[str, str]:
    """The sentence-transformers files of a folder or hub id but weights, by name, with the Transformer at the top.

    Empty where there is no modules.json.
    """
    modules_file = resolve_file(path, MODULES, revision=revision, required=False)
    if modules_file is None:
        return {}
    modules = read_json(modules_file, list)
    folder = modules[0].get("path", "")
    found: dict[str, str] = {}
    wanted = {TRANSFORMER: f"{folder}/{TRANSFORMER}" if folder else TRANSFORMER, SETTINGS: SETTINGS}
    wanted |= {name: name for entry in modules[1:] if entry.get("path") for name in (f"{entry['path']}/config.json",)}
    for name, place in wanted.items():
        file = resolve_file(path, place, revision=revision, required=False, named_by=modules_file)
        if file is not None:
            found[name] = file.read_text(encoding="utf-8")
    modules[0]["path"] = ""
    return found | {MODULES: json.dumps(modules, indent=2) + "\n"}


def _with(files: dict[str, str], max_length: int | None, prompts: Mapping[str, str]) -> dict[str, str]:
    """The files with another length of texts, if one is given, and with these prompts in addition."""
    transformer, settings = (json.loads(files.get(name, "{}")) for name in (TRANSFORMER, SETTINGS))
    changed: dict[str, Any] = {}
    if max_length is not None:
        changed[TRANSFORMER] = transformer | {"max_seq_length": max_length}
    if prompts:
        changed[SETTINGS] = settings | {"prompts": {**(settings.get("prompts") or {}), **prompts}}
    return files | _as_text(changed)


def _usual_files(embedder: Embedder) -> dict[str, str]:
    """For a plain encoder: the mean of the states, as sentence-transformers reads it."""
    pooling = {"word_embedding_dimension": embedder.model.config.hidden_size, "pooling_mode_mean_tokens": True}
    files = {
        MODULES: _module_list("sentence_transformers.models", ("", "Transformer"), ("1_Pooling", "Pooling")),
        TRANSFORMER: {"max_seq_length": embedder.max_length, "do_lower_case": False},
        "1_Pooling/config.json": pooling,
        SETTINGS: {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    }
    return _as_text(files)


def _module_list(home: str, *modules: tuple[str, str]) -> list[dict[str, Any]]:
    """The content of modules.json, of paths and the names of classes in `home`."""
    return [
        {"idx": i, "name": str(i), "path": path, "type": f"{home}.{kind}"} for i, (path, kind) in enumerate(modules)
    ]


def _as_text(files: Mapping[str, Any]) -> dict[str, str]:
    return {name: json.dumps(content, indent=2) + "\n" for name, content in files.items()}


class SparseEncoder(_Encoder):
    """A masked-language model whose logits make one sparse vector of each text: see tasks.sparse.SparseEmbedding.

    Args:
        model: with a masked-language head, in float32.
    """

    def __init__(self, model: Any, files: Mapping[str, str]) -> None:
        super().__init__(model, files)
        self.model = model

    @classmethod
    def _read(
        cls, path: str | Path, revision: str | None, dropout: float | None, max_length: int | None
    ) -> tuple[Any, dict[str, str]]:
        config = with_dropout(BertConfig.from_pretrained(path, revision=revision), dropout)
        files = sentence_files(path, revision)
        if files:
            check_pooling(path, revision)
        model = AutoModelForMaskedLM.of(config).load(path, LoadOptions(torch.float32, revision=revision), config)
        return model, files or _splade_files(config)

    @property
    def width(self) -> int:
        """The length of a vector: the size of the vocabulary."""
        return self.config.vocab_size

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        skip: Tensor | int = 0,
    ) -> Tensor:
        """Weights of the vocabulary for each of the packed texts, (B, V) float32; as TextEncoder.forward."""
        output = self.model(
            input_ids, token_type_ids=token_type_ids, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, return_dict=True
        )
        largest = device_pooling.pool(output.logits.float(), cu_seqlens.diff().long(), ("max",))
        return torch.log1p(F.relu(largest))


def _splade_files(config: BertConfig) -> dict[str, str]:
    """For a plain masked-language model, as sentence-transformers' SparseEncoder writes them."""
    kinds = ("", "MLMTransformer"), ("1_SpladePooling", "SpladePooling")
    pooling = {"pooling_strategy": "max", "activation_function": "relu", "word_embedding_dimension": config.vocab_size}
    files = {
        MODULES: _module_list("sentence_transformers.sparse_encoder.models", *kinds),
        TRANSFORMER: {"max_seq_length": config.max_length, "do_lower_case": False},
        "1_SpladePooling/config.json": pooling,
        SETTINGS: {"model_type": "SparseEncoder", "prompts": {}, "similarity_fn_name": "dot"},
    }
    return _as_text(files)
