"""How a sentence-transformers folder wants its token states made into one vector."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbert.hub import resolve_file

POOLINGS = ("mean", "cls", "pooler")
# The switches of a Pooling module's config.json before sentence-transformers wrote one `pooling_mode`.
_SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True)
class SentenceSettings:
    """What a folder asks for; the defaults are those of a folder that says nothing."""

    pooling: str = "mean"
    normalize: bool = False
    max_length: int | None = None
    lower_case: bool = False  # of the text, before the tokenizer
    prompt: str = ""  # put before each text
    truncate_dim: Any = None  # leading numbers kept of a vector; not yet checked


def read_settings(
    path: str | Path, pooling: str | None, normalize: bool | None, revision: str | None = None
) -> SentenceSettings:
    """Reads modules.json and what it points to; an explicit `pooling` or `normalize` wins.

    Raises:
        ValueError: the folder asks for something fastbert has not (another pooling, a dense layer on top),
            and pooling and normalize are not both given; or a file is no JSON object.
    """
    if pooling is not None and pooling not in POOLINGS:
        raise ValueError(f"pooling is {pooling!r}; it must be one of {', '.join(POOLINGS)}")
    modules_file = resolve_file(path, "modules.json", revision=revision, required=False)
    if modules_file is None:
        return SentenceSettings(pooling or "mean", bool(normalize))
    modules = _read_json(modules_file, list)
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if pooling is None or normalize is None:
        for kind in kinds:
            if kind not in ("Transformer", "Pooling", "Normalize"):
                raise ValueError(
                    f"{modules_file} holds a {kind} module, which fastbert does not run; "
                    "to do without it, give both pooling and normalize"
                )
    if pooling is None:
        folder = next((m["path"] for m, kind in zip(modules, kinds, strict=True) if kind == "Pooling"), None)
        pooling = "mean" if folder is None else _read_pooling(path, folder, revision)
    transformer = _read_optional(path, "sentence_bert_config.json", revision)
    prompts = _read_optional(path, "config_sentence_transformers.json", revision)
    return SentenceSettings(
        pooling,
        "Normalize" in kinds if normalize is None else normalize,
        transformer.get("max_seq_length"),
        bool(transformer.get("do_lower_case")),
        (prompts.get("prompts") or {}).get(prompts.get("default_prompt_name"), ""),
        prompts.get("truncate_dim"),
    )


def _read_pooling(path: str | Path, folder: str, revision: str | None) -> str:
    file = resolve_file(path, f"{folder}/config.json", revision=revision)
    config = _read_json(file, dict)
    modes = config.get("pooling_mode") or [mode for key, mode in _SWITCHES.items() if config.get(key)]
    modes = [modes] if isinstance(modes, str) else list(modes) or ["mean"]
    if config.get("include_prompt") is False:
        modes.append("no prompt tokens")
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise ValueError(
            f"{file} asks for {' + '.join(modes)} pooling; fastbert has {', '.join(POOLINGS)}: choose one with pooling"
        )
    return modes[0]


def _read_optional(path: str | Path, name: str, revision: str | None) -> dict[str, Any]:
    file = resolve_file(path, name, revision=revision, required=False)
    return {} if file is None else _read_json(file, dict)


def _read_json(file: Path, kind: type) -> Any:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not a JSON file: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{file} holds a {type(value).__name__}, not a {kind.__name__}")
    return value
