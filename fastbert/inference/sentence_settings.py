"""How a sentence-transformers folder wants its token states made into one vector."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbert.hub import resolve_file
from fastbert.json_files import read_json, shown

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
            and pooling and normalize are not both given; a file is no JSON object, or has a value of another kind.
    """
    if pooling is not None and pooling not in POOLINGS:
        raise ValueError(f"pooling is {pooling!r}; it must be one of {', '.join(POOLINGS)}")
    modules_file = resolve_file(path, "modules.json", revision=revision, required=False)
    if modules_file is None:
        return SentenceSettings(pooling or "mean", bool(normalize))
    modules = read_json(modules_file, list)
    kinds = []
    for module in modules:
        if not isinstance(module, dict) or not all(isinstance(module.get(name, ""), str) for name in ("type", "path")):
            _refuse(modules_file, "a module", module, "an object with the strings 'type' and 'path'")
        kinds.append(module.get("type", "").rpartition(".")[2])
    if pooling is None or normalize is None:
        for kind in kinds:
            if kind not in ("Transformer", "Pooling", "Normalize"):
                raise ValueError(
                    f"{modules_file} holds a {kind} module, which fastbert does not run; "
                    "to do without it, give both pooling and normalize"
                )
    if pooling is None:
        folder = next((m.get("path", "") for m, kind in zip(modules, kinds, strict=True) if kind == "Pooling"), None)
        pooling = "mean" if folder is None else _read_pooling(path, folder, modules_file, revision)
    file, transformer = _read_optional(path, "sentence_bert_config.json", revision)
    longest, lower = transformer.get("max_seq_length"), transformer.get("do_lower_case")
    if longest is not None and (not isinstance(longest, int) or isinstance(longest, bool) or longest < 1):
        _refuse(file, "max_seq_length", longest, "null or an integer of at least 1")
    if lower not in (None, False, True):
        _refuse(file, "do_lower_case", lower, "true, false or null")
    file, sentence = _read_optional(path, "config_sentence_transformers.json", revision)
    return SentenceSettings(
        pooling,
        "Normalize" in kinds if normalize is None else normalize,
        longest,
        bool(lower),
        _default_prompt(file, sentence),
        sentence.get("truncate_dim"),
    )


def _default_prompt(file: Path | None, config: dict[str, Any]) -> str:
    prompts, name = config.get("prompts") or {}, config.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(prompt, str) for prompt in prompts.values()):
        _refuse(file, "prompts", prompts, "an object of strings by their names")
    if name is not None and (not isinstance(name, str) or name not in prompts):
        _refuse(file, "default_prompt_name", name, f"null or one of the prompts' names, {shown(list(prompts))}")
    return prompts.get(name, "")


def _read_pooling(path: str | Path, folder: str, modules_file: Path, revision: str | None) -> str:
    file = resolve_file(path, f"{folder}/config.json", revision=revision, named_by=modules_file)
    config = read_json(file)
    modes = config.get("pooling_mode") or [mode for key, mode in _SWITCHES.items() if config.get(key)]
    modes = [modes] if isinstance(modes, str) else modes or ["mean"]
    if not isinstance(modes, list) or not all(isinstance(mode, str) for mode in modes):
        _refuse(file, "pooling_mode", modes, "a string or a list of strings")
    if config.get("include_prompt") is False:
        modes = [*modes, "no prompt tokens"]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise ValueError(
            f"{file} asks for {' + '.join(modes)} pooling; fastbert has {', '.join(POOLINGS)}: choose one with pooling"
        )
    return modes[0]


def _read_optional(path: str | Path, name: str, revision: str | None) -> tuple[Path | None, dict[str, Any]]:
    file = resolve_file(path, name, revision=revision, required=False)
    return file, {} if file is None else read_json(file)


def _refuse(file: Path | None, field: str, value: object, wanted: str) -> None:
    raise ValueError(f"{file}: {field} is {shown(value)}; it must be {wanted}")
