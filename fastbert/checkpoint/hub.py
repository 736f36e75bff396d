"""Finds a checkpoint's files in a local folder or in a model on the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import overload

from fastbert.checkpoint.json_files import shown

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_LONGEST_NAME = 255  # bytes of a file name in common file systems


class MissingFileError(FileNotFoundError, ValueError):
    """A model's folder or id, given as an argument, lacks a file that is needed."""


@overload
def resolve_file(
    path_or_id: str | os.PathLike, filename: str, *, revision: str | None = None, named_by: Path | None = None
) -> Path: ...
@overload
def resolve_file(
    path_or_id: str | os.PathLike,
    filename: str,
    *,
    revision: str | None = None,
    required: bool,
    named_by: Path | None = None,
) -> Path | None: ...
def resolve_file(
    path_or_id: str | os.PathLike,
    filename: str,
    *,
    revision: str | None = None,
    required: bool = True,
    named_by: Path | None = None,
) -> Path | None:
    """Path of `filename` in a local folder, or in the hub model of that id (downloaded into the hub's cache).

    A local folder takes precedence over a hub id. `revision` is a branch, tag or commit of a hub model; a folder
    ignores it. Returns None for a missing file that is not `required`. Raises MissingFileError for a missing
    required file, FileNotFoundError for a missing folder, OSError if the hub cannot be reached, TypeError for a wrong
    type.

    `named_by` is the file in which `filename` was found. `filename` is then not trusted: if its text or a link leads
    out of the folder, a ValueError that begins with `named_by` is raised.
    """
    if named_by is not None:
        _check_relative(filename, named_by)
    if not isinstance(path_or_id, str | os.PathLike):
        raise TypeError(f"path_or_id must be a folder or a hub id, got {path_or_id!r}")
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        file = folder / filename
        if file.is_file():
            if named_by is not None:
                _check_inside(file, folder, filename, named_by)
            return file
        if required:
            named = f"{named_by}: " if named_by else ""
            raise MissingFileError(f"{named}no file {filename!r} in the folder {str(folder)!r}")
        return None
    if folder.exists():
        raise NotADirectoryError(f"{str(folder)!r} is a file: expected a folder that holds {filename!r}, or a hub id")
    if not isinstance(path_or_id, str) or not _HUB_ID.fullmatch(path_or_id):
        raise FileNotFoundError(f"no folder {str(path_or_id)!r}, and it is no hub id ('name' or 'org/name') either")
    return _hub_file(path_or_id, filename, revision, required)


def resolve_folder(path_or_id: str | os.PathLike, name: str, *, revision: str | None = None, named_by: Path) -> Path:
    """Path of the folder `name` in a local folder, or in a hub model (its model files are downloaded).

    `named_by` is the file in which `name` was found. Raises a ValueError that begins with `named_by` if the text of
    `name` or a link leads out of the folder, FileNotFoundError for a missing folder, OSError if the hub cannot be
    reached.
    """
    _check_relative(name, named_by)
    folder = Path(path_or_id).expanduser()
    inner = folder / name if folder.is_dir() else _hub_folder(str(path_or_id), name, revision)
    if not inner.is_dir():
        raise FileNotFoundError(f"{named_by}: no folder {name!r} in {str(path_or_id)!r}")
    if folder.is_dir():
        _check_inside(inner, folder, name, named_by)
    return inner


def _check_relative(filename: str, named_by: Path) -> None:
    parts = filename.split("/")
    odd = any(part in ("", ".", "..") or len(part.encode()) > _LONGEST_NAME for part in parts)
    if odd or re.search(r"[\\\0]", filename) or Path(filename).drive:
        raise ValueError(f"{named_by} names {shown(filename)}; it must lie in the folder of {named_by.name}")


def _check_inside(file: Path, folder: Path, filename: str, named_by: Path) -> None:
    real = file.resolve()
    # The hub's cache holds contents in models--x/blobs; its snapshots, and older downloads, link to them.
    in_cache = real.parent.name == "blobs" and real.parent.parent.name.startswith("models--")
    if not in_cache and not real.is_relative_to(folder.resolve()):
        raise ValueError(f"{named_by} names {shown(filename)}, a link that leads out of the folder, to {real}")


def _hub_folder(model_id: str, name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    for weights in ("model*.safetensors", "pytorch_model*.bin"):  # the second only if there are none of the first
        patterns = [f"{name}/{pattern}" for pattern in ("*.json", "vocab.txt", weights)]
        try:
            folder = Path(snapshot_download(model_id, revision=revision, allow_patterns=patterns)) / name
        except OSError as error:  # covers HTTP, connection and disk errors
            where = f"{model_id!r}" + (f" at revision {revision!r}" if revision else "")
            raise OSError(f"cannot get {name!r} of the hub model {where}: {_first_line(error)}") from error
        if any(folder.glob(weights)):
            break
    return folder


def _hub_file(model_id: str, filename: str, revision: str | None, required: bool) -> Path | None:
    from huggingface_hub import _CACHED_NO_EXIST, constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"{model_id!r}" + (f" at revision {revision!r}" if revision else "")
    reason: object
    cause: Exception
    try:
        return Path(hf_hub_download(model_id, filename, revision=revision))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        # An optional file counts as absent if the hub reported so before, or if it is not cached while offline.
        # After a network failure it does not: a missing tokenizer_config.json would silently change ids.
        known_absent = try_to_load_from_cache(model_id, filename, revision=revision) is _CACHED_NO_EXIST
        if not required and (known_absent or constants.HF_HUB_OFFLINE):
            return None
        reason = "offline mode is on and it is not in the cache" if constants.HF_HUB_OFFLINE else error
        cause = error
    except EntryNotFoundError as error:
        if not required:
            return None
        raise MissingFileError(f"the hub model {where} has no file {filename!r}") from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        reason, cause = _first_line(error) or "no such model or revision, or no access to it", error
    except OSError as error:  # covers HTTP, connection and disk errors: huggingface_hub's derive from OSError
        reason, cause = error, error
    raise OSError(
        f"cannot get {filename!r} of the hub model {where}: {_first_line(reason)}. "
        f"{model_id!r} was not found locally as a folder either"
    ) from cause


def _first_line(reason: object) -> str:
    lines = str(reason).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(reason).__name__
