"""Which tensors the files of a checkpoint hold, by the names of parameters. No torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from fastbert.checkpoint.hub import MissingFileError, resolve_file
from fastbert.checkpoint.json_files import read_json, shown
from fastbert.checkpoint.stored_names import Part, parts_of
from fastbert.families import Family

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
UNREADABLE = (ValueError, EOFError, RuntimeError, OSError, KeyError)


class StoredTensors:
    """The tensors of a checkpoint under their plain names: without a family's prefix (`bert.`), gamma and beta.

    Args:
        open_file: makes of a path the file's tensors, which iterate over their names and have shape(name).

    Attributes:
        files: plain name -> the file that holds it.
    """

    def __init__(
        self, path: str | Path, revision: str | None, family: Family, open_file: Callable[[Path], Any]
    ) -> None:
        self._family, self._open_file = family, open_file
        self.decoder, self.words = f"{family.masked_lm.decoder}.weight", words_of(family)
        # Plain name -> file, name in it, and which part of that tensor.
        self._stored: dict[str, tuple[Any, str, Part]] = {}
        self.files: dict[str, Path] = {}
        for file in _weight_files(path, revision):
            self._open(file)

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def shape(self, name: str) -> tuple[int, ...]:
        file, stored, part = self._stored[name]
        shape = file.shape(stored)
        return (shape[0] // part.blocks, *shape[1:]) if shape else shape

    def missing_masked_lm(self, tied: bool) -> str | None:
        """The name of a tensor of the masked-language-model head that is not there; None if the checkpoint has one.
        `tied`: whether its decoder may be the table of words."""
        names = self._family.masked_lm
        name = f"{names.dense or names.decoder}.weight"
        return None if name in self or (names.dense is None and tied) else name

    def fail_missing(self, names: list[str], why: str | None = None) -> NoReturn:
        """Raises ValueError: these tensors are not there."""
        files = ", ".join(str(f) for f in sorted(set(self.files.values()))) or "the checkpoint"
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(
            f"{files}: no tensor {', '.join(names[:3])}{more}; {why or 'is this a checkpoint of its family?'}"
        )

    def check_layers(self, count: int) -> None:
        """Raises ValueError, before layers are made, if there are fewer layers than `count`, the config's."""
        for i in range(count):
            name = f"{self._family.layer_list}.{i}.{self._family.layer.query}.weight"
            if name not in self:
                why = f"config: num_hidden_layers is {count}, the weights are of {i}" if i else None
                self.fail_missing([name], why)

    def _open(self, path: Path) -> None:
        try:
            file = self._open_file(path)
        except UNREADABLE as error:
            raise ValueError(f"{path} is truncated or no checkpoint: {error}") from error
        for stored in file:
            for part in parts_of(stored, self._family):
                name = part.name
                if name in self._stored:
                    other = shown(self._stored[name][1])
                    raise ValueError(f"{path}: tensors {other} and {shown(stored)} are both {name}")
                self._stored[name], self.files[name] = (file, stored, part), path


def _weight_files(path: str | Path, revision: str | None) -> list[Path]:
    for whole, index in ((SAFETENSORS, SAFETENSORS_INDEX), (PICKLE, PICKLE_INDEX)):
        if file := resolve_file(path, whole, revision=revision, required=False):
            return [file]
        if file := resolve_file(path, index, revision=revision, required=False):
            weight_map = read_json(file).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"{file} is not an index of shards: its weight_map is {shown(weight_map)}")
            for name, shard in weight_map.items():
                if not isinstance(shard, str) or "/" in shard:
                    raise ValueError(f"{file} names {shown(shard)} for {shown(name)}; it must be a file next to it")
            shards = sorted(set(weight_map.values()))
            return [resolve_file(path, shard, revision=revision, named_by=file) for shard in shards]
    raise MissingFileError(f"{path} holds no weights: neither {SAFETENSORS} nor {PICKLE}, whole or in shards")


def words_of(family: Family) -> str:
    """The plain name of the table of words."""
    return f"{family.embeddings.word}.weight"


def aliases_of(family: Family, tied: bool) -> dict[str, tuple[str, ...]]:
    """The possible names of a tied tensor, in order of preference.

    transformers also registers the bias under the decoder, and saves the name that it finds first.
    """
    names, found = family.masked_lm, dict[str, tuple[str, ...]]()
    decoder = f"{names.decoder}.weight"
    if names.bias is not None:
        biases = f"{names.decoder}.bias", names.bias
        found |= dict.fromkeys(biases, biases)
    words = words_of(family)
    return {**found, words: (words, decoder), decoder: (decoder, words)} if tied else found
