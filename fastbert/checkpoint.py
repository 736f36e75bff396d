"""Reads and writes Hugging Face BERT checkpoints: safetensors, whole or in shards, and pytorch_model.bin."""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from fastbert.files import atomic_path, write_text
from fastbert.hub import resolve_file
from fastbert.safetensors_file import SafetensorsFile

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_ENCODER = ("embeddings.", "encoder.")
# Buffers that old versions of transformers saved; they hold no weight.
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
_LEGACY = (
    (re.compile(r"LayerNorm\.gamma$"), "LayerNorm.weight"),
    (re.compile(r"LayerNorm\.beta$"), "LayerNorm.bias"),
)
# The names, in order of preference, of a tensor that goes by several because it is tied: transformers adds the
# decoder's own bias, and saves whichever of the two it meets first.
_UNTIED = {"cls.predictions.bias": ("cls.predictions.decoder.bias", "cls.predictions.bias")}
_ALIASES = {
    "cls.predictions.decoder.weight": ("cls.predictions.decoder.weight", "embeddings.word_embeddings.weight"),
    **_UNTIED,
}


class _PickledFile:
    """The tensors of a pytorch_model.bin, by name; see SafetensorsFile."""

    def __init__(self, path: Path) -> None:
        # Files from before torch 1.6 are no zip archives and cannot be mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        state = state.get("state_dict", state) if isinstance(state, dict) else {}
        self._state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        if not self._state:
            raise ValueError("it holds no tensors by name")

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def close(self) -> None:
        self._state = {}

    def shape(self, name: str) -> torch.Size:
        return self._state[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._state[name].dtype

    @torch.no_grad()
    def copy_into(self, target: Tensor, name: str) -> None:
        target.copy_(self._state[name])


class Checkpoint:
    """The tensors of a checkpoint under their plain names: no `bert.` in front, no gamma and beta.

    Attributes:
        files: plain name -> the file that holds it.
    """

    def __init__(self, path: str | Path, revision: str | None = None) -> None:
        self._stack = ExitStack()
        self._stored: dict[str, tuple[SafetensorsFile | _PickledFile, str]] = {}  # plain name -> file, name in it
        self.files: dict[str, Path] = {}
        with self._stack:  # closes what is open when a later file cannot be read
            for file in _weight_files(path, revision):
                self._open(file)
            self._stack = self._stack.pop_all()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self._stored.clear()
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def shape(self, name: str) -> torch.Size:
        file, stored = self._stored[name]
        return file.shape(stored)

    def dtype(self, name: str) -> torch.dtype:
        file, stored = self._stored[name]
        try:
            return file.dtype(stored)
        except ValueError as error:
            raise ValueError(f"{self.files[name]}: tensor {name} cannot be read: {error}") from error

    def copy_into(self, target: Tensor, name: str) -> None:
        """Fills `target`, of the shape of the tensor called `name`, in its own dtype and on its own device."""
        file, stored = self._stored[name]
        try:
            file.copy_into(target, stored)
        except _UNREADABLE as error:
            raise ValueError(f"{self.files[name]}: tensor {name} cannot be read: {error}") from error

    def _open(self, path: Path) -> None:
        try:
            file = _PickledFile(path) if path.suffix == ".bin" else SafetensorsFile(path)
        except _UNREADABLE as error:
            raise ValueError(f"{path} is truncated or no checkpoint: {error}") from error
        self._stack.callback(file.close)
        for stored in file:
            name = plain_name(stored)
            self._stored[name], self.files[name] = (file, stored), path


_UNREADABLE = (ValueError, pickle.UnpicklingError, EOFError, RuntimeError, OSError, KeyError)


def _weight_files(path: str | Path, revision: str | None) -> list[Path]:
    for whole, index in ((SAFETENSORS, SAFETENSORS_INDEX), (PICKLE, PICKLE_INDEX)):
        if file := resolve_file(path, whole, revision=revision, required=False):
            return [file]
        if file := resolve_file(path, index, revision=revision, required=False):
            try:
                shards = sorted(set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{file} is not an index of shards: {error!r}") from error
            return [resolve_file(path, shard, revision=revision) for shard in shards]
    raise FileNotFoundError(f"{path} holds no weights: neither {SAFETENSORS} nor {PICKLE}, whole or in shards")


def plain_name(name: str) -> str:
    """A stored tensor's name without the `bert.` in front and with today's LayerNorm names."""
    name = name.removeprefix("bert.")
    for pattern, replacement in _LEGACY:
        name = pattern.sub(replacement, name)
    return name


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype the weights were saved in."""
    name = "embeddings.word_embeddings.weight"
    if name not in checkpoint:
        _fail_missing(checkpoint, [name])
    return checkpoint.dtype(name)


def load_into(
    model: nn.Module,
    checkpoint: Checkpoint,
    initialise: Callable[[nn.Module, list[str]], None],
    loaded: Callable[[str], None] = lambda name: None,
    ignore_mismatched_sizes: bool | str = False,
) -> None:
    """Copies a checkpoint's tensors into `model`, in the model's dtype and on its device.

    `loaded` hears the name of each parameter, in the model's order, once it has its values. A head that the
    checkpoint lacks goes to `initialise` and is named in one warning; a tensor of another shape, with
    `ignore_mismatched_sizes` (True, or "head" for those of the head alone), likewise.

    Raises:
        ValueError: an encoder tensor is missing, or a tensor has another shape: naming file and tensor.
    """
    missing_encoder, missing_heads, mismatched = [], [], []
    for name in [name for name, _ in model.named_parameters()]:  # which itself would hold on to what `loaded` frees
        parameter = model.get_parameter(name)
        plain = plain_name(name)
        aliases = _ALIASES.get(plain, (plain,)) if model.config.tie_word_embeddings else _UNTIED.get(plain, (plain,))
        source = next((alias for alias in aliases if alias in checkpoint), None)
        if source is None:
            (missing_encoder if plain.startswith(_ENCODER) else missing_heads).append(name)
            continue
        if (shape := checkpoint.shape(source)) != parameter.shape:
            mismatch = f"tensor {source} has shape {tuple(shape)}; the config makes it {tuple(parameter.shape)}"
            if not _may_differ(name, ignore_mismatched_sizes):
                hint = "" if ignore_mismatched_sizes else " (ignore_mismatched_sizes=True initialises it instead)"
                raise ValueError(f"{checkpoint.files[source]}: {mismatch}{hint}")
            mismatched.append(f"{checkpoint.files[source]}: {mismatch}")
            initialise(model, [name])
        else:
            checkpoint.copy_into(parameter, source)
        loaded(name)
    if missing_encoder:
        _fail_missing(checkpoint, missing_encoder)
    if mismatched:
        warnings.warn(f"of another size, newly initialised (train before use): {'; '.join(mismatched)}", stacklevel=3)
    if missing_heads:
        initialise(model, missing_heads)
        warnings.warn(
            f"newly initialised, not in the checkpoint (train them before use): {', '.join(missing_heads)}",
            stacklevel=3,
        )


def _may_differ(name: str, ignore_mismatched_sizes: bool | str) -> bool:
    """Whether a parameter may have another shape in the checkpoint; the encoder is `bert.` in a model with a head."""
    return not name.startswith("bert.") if ignore_mismatched_sizes == "head" else bool(ignore_mismatched_sizes)


def _fail_missing(checkpoint: Checkpoint, names: list[str]) -> None:
    files = ", ".join(str(f) for f in sorted(set(checkpoint.files.values()))) or "the checkpoint"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    raise ValueError(f"{files}: no tensor {', '.join(names[:3])}{more}; is this a BERT checkpoint?")


def save(state: dict[str, Tensor], folder: str | Path, max_shard_size: int | str = "5GB") -> None:
    """Writes tensors as safetensors into `folder`, in shards with an index where they exceed `max_shard_size`.

    Each file is written whole or not at all; weight files of an earlier save that the new one does not
    use are removed last.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Contiguous, and a copy for a tensor's second name: safetensors holds no two names for one memory.
    seen: set[int] = set()
    state = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    for name, tensor in state.items():
        if tensor.data_ptr() in seen:
            state[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    split = split_torch_state_dict_into_shards(state, max_shard_size=max_shard_size)
    for filename, names in split.filename_to_tensors.items():
        with atomic_path(folder / filename) as temporary:
            save_file({name: state[name] for name in names}, temporary, metadata={"format": "pt"})
    written = set(split.filename_to_tensors)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_text(folder / SAFETENSORS_INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
        written.add(SAFETENSORS_INDEX)
    _remove_stale(folder, written)


def _remove_stale(folder: Path, written: Iterable[str]) -> None:
    ours = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|pytorch_model(-.*)?\.bin(\.index\.json)?")
    for file in folder.iterdir():
        if ours.fullmatch(file.name) and file.name not in written:
            file.unlink()
