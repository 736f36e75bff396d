"""Reads checkpoints in Hugging Face layout (safetensors, pytorch_model.bin, also in shards); writes safetensors."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from fastbert.checkpoint.files import atomic_path, write_text
from fastbert.checkpoint.pickled_file import PickledFile
from fastbert.checkpoint.safetensors_file import SafetensorsFile
from fastbert.checkpoint.stored_names import plain_name
from fastbert.checkpoint.stored_tensors import SAFETENSORS_INDEX, UNREADABLE, StoredTensors, aliases_of
from fastbert.families import BERT, FAMILIES, Family

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Checkpoint(StoredTensors):
    """The tensors of a checkpoint, and copies of them in torch's."""

    def __init__(self, path: str | Path, revision: str | None = None, family: Family = BERT) -> None:
        super().__init__(path, revision, family, _opened)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self._stored.clear()  # frees the memory of mapped and read files

    def dtype(self, name: str) -> torch.dtype:
        file, stored, _ = self._stored[name]
        try:
            return file.dtype(stored)
        except ValueError as error:
            raise ValueError(f"{self.files[name]}: tensor {name} cannot be read: {error}") from error

    def copy_into(self, target: Tensor, name: str) -> None:
        """Copies the tensor `name` into `target`, which has its shape and may have another dtype and device."""
        file, stored, part = self._stored[name]
        try:
            if part.blocks == 1:
                file.copy_into(target, stored)
            else:
                file.copy_into(target, stored, part.block * len(target))
        except UNREADABLE as error:
            raise ValueError(f"{self.files[name]}: tensor {name} cannot be read: {error}") from error


def _opened(path: Path) -> SafetensorsFile | PickledFile:
    return PickledFile(path) if path.suffix == ".bin" else SafetensorsFile(path)


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype the weights were saved in."""
    name = next((name for name in (checkpoint.words, checkpoint.decoder) if name in checkpoint), None)
    if name is None:
        checkpoint.fail_missing([checkpoint.words])
    dtype = checkpoint.dtype(name)
    if dtype not in _DTYPES:
        raise ValueError(
            f"{checkpoint.files[name]}: tensor {name} has dtype {dtype}; a model runs in one of "
            f"{', '.join(map(str, _DTYPES))}: choose it with dtype"
        )
    return dtype


@dataclass
class Match:
    """The source tensor of each parameter of a model."""

    sources: dict[str, str | None] = field(default_factory=dict)  # parameter -> tensor; None: newly initialised
    missing: list[str] = field(default_factory=list)  # parameters of a head that the checkpoint lacks
    mismatched: list[str] = field(default_factory=list)  # messages on parameters of another shape in the checkpoint


def match(model: nn.Module, checkpoint: Checkpoint, ignore_mismatched_sizes: bool | str = False) -> Match:
    """Finds the tensor of each parameter by name and compares shapes; the model may be on the meta device.

    With `ignore_mismatched_sizes`, tensors of another shape are left out (True: all; "head": only those of the head).

    Raises:
        ValueError: an encoder tensor is missing, or a tensor has another shape or an integer dtype. The message names
            file and tensor.
    """
    found, tied, family = Match(), model.config.tie_word_embeddings, FAMILIES[model.config.model_type]
    places = family.embeddings.owner or family.embeddings.word, family.layer_list, family.final_norm, family.projection
    encoder = tuple(f"{part}." for part in places if part)
    missing_encoder: list[str] = []
    for name, parameter in model.named_parameters():
        plain = plain_name(name, family)
        aliases = aliases_of(family, tied).get(plain, (plain,))
        source = next((alias for alias in aliases if alias in checkpoint), None)
        if source is None:
            (missing_encoder if plain.startswith(encoder) else found.missing).append(name)
        elif (shape := checkpoint.shape(source)) != parameter.shape:
            mismatch = (
                f"{checkpoint.files[source]}: tensor {source} has shape {tuple(shape)}; "
                f"the config makes it {tuple(parameter.shape)}"
            )
            if not _may_differ(name, family, ignore_mismatched_sizes):
                hint = "" if ignore_mismatched_sizes else " (ignore_mismatched_sizes=True initialises it instead)"
                raise ValueError(mismatch + hint)
            found.mismatched.append(mismatch)
            source = None
        elif not (dtype := checkpoint.dtype(source)).is_floating_point:
            raise ValueError(f"{checkpoint.files[source]}: tensor {source} has dtype {dtype}; a weight is no integer")
        found.sources[name] = source
    if missing_encoder:
        checkpoint.fail_missing(missing_encoder)
    return found


def load_into(
    model: nn.Module,
    checkpoint: Checkpoint,
    found: Match,
    initialise: Callable[[nn.Module, list[str]], None],
    loaded: Callable[[str], None] = lambda name: None,
) -> None:
    """Copies a checkpoint's tensors into `model`, as `found` by `match`, in the model's dtype and on its device.

    `loaded` is called with the name of each parameter once it has its values, in the model's order. Parameters without
    a tensor are passed to `initialise`. One warning names those of another shape, another the missing ones.

    Raises:
        ValueError: a tensor cannot be read, or the config ties two tables that differ.
    """
    for name, source in found.sources.items():
        parameter = model.get_parameter(name)
        if source is None:
            initialise(model, [name])
        else:
            checkpoint.copy_into(parameter, source)
            if (
                source == checkpoint.words
                and model.config.tie_word_embeddings
                and model.get_output_embeddings() is not None
            ):
                _check_tied(checkpoint, parameter)
        loaded(name)
    if found.mismatched:
        listed = "; ".join(found.mismatched)
        warnings.warn(f"of another size, newly initialised (train before use): {listed}", stacklevel=3)
    if found.missing:
        warnings.warn(
            f"newly initialised, not in the checkpoint (train them before use): {', '.join(found.missing)}",
            stacklevel=3,
        )


@torch.no_grad()
def _check_tied(checkpoint: Checkpoint, words: Tensor) -> None:
    other = checkpoint.decoder
    if other not in checkpoint:
        return
    decoder = torch.empty_like(words)
    if checkpoint.shape(other) == words.shape:
        checkpoint.copy_into(decoder, other)
        if torch.equal(decoder.view(torch.uint8), words.view(torch.uint8)):
            return
    raise ValueError(
        f"{checkpoint.files[other]}: tensors {checkpoint.words} and {other} differ, but config: tie_word_embeddings is "
        "true; tie_word_embeddings=False loads both"
    )


def _may_differ(name: str, family: Family, ignore_mismatched_sizes: bool | str) -> bool:
    """True if a parameter may have another shape in the checkpoint. With a head, the encoder's names begin `bert.`."""
    return (
        not name.startswith(f"{family.attribute}.")
        if ignore_mismatched_sizes == "head"
        else bool(ignore_mismatched_sizes)
    )


def save(state: dict[str, Tensor], folder: str | Path, max_shard_size: int | str = "5GB") -> None:
    """Writes tensors as safetensors into `folder`, in shards with an index if they exceed `max_shard_size`.

    Each file is written atomically. Weight files of an earlier save that this one does not overwrite are removed
    last.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Contiguous; and a copy for a tensor's second name, as safetensors refuses shared storage.
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
