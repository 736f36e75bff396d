"""Reads the files of a tokenizer, in new and old formats, as transformers does."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fastbert.checkpoint import checks
from fastbert.checkpoint.hub import resolve_file
from fastbert.checkpoint.json_files import LARGEST, read_json, shown

SPECIAL_TOKENS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
NAMED_TOKENS = (*SPECIAL_TOKENS, "bos_token", "eos_token")
OPTIONS = (
    "do_lower_case",
    "strip_accents",
    "tokenize_chinese_chars",
    "clean_up_tokenization_spaces",
    "split_special_tokens",
    "padding_side",
    "truncation_side",
    "model_input_names",
    *SPECIAL_TOKENS,
)
_MOST_IDS = 2**32  # the library's ids have 32 bits
_ID = checks.integer(0, _MOST_IDS - 1)
_CONFIG = {
    **dict.fromkeys(("do_lower_case", "tokenize_chinese_chars", "split_special_tokens"), checks.FLAG),
    **dict.fromkeys(("strip_accents", "clean_up_tokenization_spaces"), checks.or_null(checks.FLAG)),
    **dict.fromkeys(("padding_side", "truncation_side"), checks.one_of("left", "right")),
    "model_input_names": (
        lambda names: isinstance(names, list) and "input_ids" in names and all(isinstance(n, str) for n in names),
        "a list of names, input_ids among them",
    ),
}
# AutoTokenizer uses tokenizer.json unchanged for these classes. For BertTokenizer, and for a folder that
# names no class, it rebuilds the pipeline from tokenizer_config.json, with lower-casing by default.
AS_THE_FILE_SAYS = ("PreTrainedTokenizerFast", "TokenizersBackend")


Read = Callable[[str], tuple[Path | None, dict]]


@dataclass(frozen=True)
class TokenizerFiles:
    """The content of a folder: arguments of BertTokenizer, and added tokens in the order of their ids."""

    source: Path  # tokenizer.json or vocab.txt
    vocab: dict[str, int]
    options: dict[str, Any]
    added: list[Any]  # AddedToken
    added_ids: dict[str, int]
    pipeline: Path | None  # the tokenizer.json whose pipeline is used unchanged


def read_folder(path_or_id: str | os.PathLike, revision: str | None, read: Read | None = None) -> TokenizerFiles:
    """Reads tokenizer.json, else vocab.txt, and the files next to it. Its ValueErrors name file and field.

    `read` is the folder's `reader`, if the caller has one: what it has read it does not read again.
    """
    read = read or reader(path_or_id, revision)
    config_file, config = read("tokenizer_config.json")
    options = read_options(config_file, config)
    source, content = read("tokenizer.json")
    if source is None:
        source = resolve_file(path_or_id, "vocab.txt", revision=revision)
        vocab = read_vocab(source)
    else:
        model = _wordpiece(content, source)
        vocab = model["vocab"]
        options |= _shape(source, model)
    added, ids = read_added(read, (config_file, config), (source, content), options)
    as_it_is = content and config.get("tokenizer_class") in AS_THE_FILE_SAYS
    return TokenizerFiles(source, vocab, options, added, ids, source if as_it_is else None)


def reader(path_or_id: str | os.PathLike, revision: str | None) -> Read:
    """A function that reads a JSON file of a folder or hub id, once: path and content, None and {} where it is not."""

    @cache
    def read(name: str) -> tuple[Path | None, dict]:
        file = resolve_file(path_or_id, name, revision=revision, required=False)
        return file, {} if file is None else read_json(file)

    return read


def read_added(
    read: Read,
    config: tuple[Path | None, dict],
    source: tuple[Path, dict],
    options: dict[str, Any],
    names: Iterable[str] = tuple(SPECIAL_TOKENS),
) -> tuple[list[Any], dict[str, int]]:
    """The added tokens in the order of their ids, then the extra special ones; and the ids, where the files have them.

    Named tokens of the older format are put into `options`.
    """
    config_file, settings = config
    if "added_tokens_decoder" in settings:
        by_id = _decoder(config_file, settings["added_tokens_decoder"])
        extra = _extra_tokens(config_file, settings)
    else:  # older format: the same data in three other files
        map_file, special_map = read("special_tokens_map.json")
        options |= special_tokens(map_file, special_map, names)
        _extra_tokens(config_file, settings)  # for its errors
        extra = _extra_tokens(map_file, settings | special_map)
        contents = [content_of(token) for token in (*options.values(), *extra)]
        special = {content for content in contents if isinstance(content, str)}
        added_file, added = read("added_tokens.json")
        by_id = {
            _id(added_file, token, index): _token(added_file, token, token, special=token in special)
            for token, index in added.items()
        }
        file, content = source
        by_id |= _listed(file, content.get("added_tokens") or [])
    tokens = [token for _, token in sorted(by_id.items())]
    known = {token.content for token in tokens}
    tokens += [as_added_token(token, special=True) for token in extra if content_of(token) not in known]
    return tokens, {token.content: index for index, token in by_id.items()}


def read_options(file: Path | None, config: dict) -> dict[str, Any]:
    """The arguments of BertTokenizer in tokenizer_config.json."""
    checks.fields(file, config, _CONFIG, others=True)
    options = {name: config[name] for name in OPTIONS if name in config} | special_tokens(file, config)
    name = "model_max_length" if "model_max_length" in config else "max_len"
    longest = config.get(name)
    if longest is not None:
        if isinstance(longest, float) and math.isfinite(longest):
            longest = int(longest)  # some files have 1e30 for "no limit"
        if not checks.is_integer(longest) or longest < 1:
            checks.refuse(file, name, config[name], "null or an integer of at least 1")
    options["model_max_length"] = longest
    return options


def _shape(file: Path, model: dict) -> dict[str, Any]:
    """The arguments of BertTokenizer in the model section of tokenizer.json."""
    longest, prefix = model.get("max_input_chars_per_word", 100), model.get("continuing_subword_prefix", "##")
    shape = {"max_input_chars_per_word": longest, "continuing_subword_prefix": prefix}
    checks.fields(file, shape, {"max_input_chars_per_word": _ID, "continuing_subword_prefix": checks.STRING})
    return shape


def special_tokens(file: Path | None, config: dict, names: Iterable[str] = tuple(SPECIAL_TOKENS)) -> dict[str, Any]:
    """The named tokens, as strings or dicts; the mask token may be null."""
    tokens = {name: config[name] for name in names if name in config}
    for name, token in tokens.items():
        if token is not None or name != "mask_token":
            _token(file, name, token)
    return tokens


def _extra_tokens(file: Path | None, config: dict) -> list:
    """The extra special tokens, and bos_token and eos_token, which BERT does not use."""
    field = "extra_special_tokens" if config.get("extra_special_tokens") else "additional_special_tokens"
    extra = config.get(field) or []
    if not isinstance(extra, dict | list):
        checks.refuse(file, field, extra, "a list of tokens, or an object of them")
    extra = [(field, token) for token in (extra.values() if isinstance(extra, dict) else extra)]
    extra = [(name, config[name]) for name in ("bos_token", "eos_token") if config.get(name)] + extra
    for name, token in extra:
        _token(file, name, token)
    return [token for _, token in extra]


def _decoder(file: Path | None, decoder: object) -> dict[int, Any]:
    if not isinstance(decoder, dict):
        checks.refuse(file, "added_tokens_decoder", decoder, "an object of tokens by their ids")
    tokens = {}
    for index, token in decoder.items():
        number = int(index) if index.isdecimal() and len(index) <= 10 else None
        tokens[_id(file, "added_tokens_decoder", number, index)] = _token(file, "added_tokens_decoder", token)
    return tokens


def _listed(file: Path, listed: object) -> dict[int, Any]:
    """The added tokens of a tokenizer.json."""
    if not isinstance(listed, list) or not all(isinstance(token, dict) for token in listed):
        checks.refuse(file, "added_tokens", listed, "a list of objects")
    return {_id(file, "added_tokens", t.get("id"), t): _token(file, "added_tokens", t) for t in listed}


def _id(file: Path | None, field: str, index: object, value: object = None) -> int:
    if not checks.is_integer(index) or not 0 <= index < _MOST_IDS:
        checks.refuse(file, field, index if value is None else value, f"given with an id from 0 to {_MOST_IDS - 1}")
    return index


def _token(file: Path | None, field: str, token: object, special: bool | None = None) -> Any:
    """Makes an AddedToken of a value in a file."""
    try:
        return as_added_token(token, special)
    except TypeError:
        checks.refuse(file, field, token, "a token: a string, or an object with the string 'content' and flags")


def content_of(token: Any) -> Any:
    """Text of a special token: a string, an AddedToken or its dict in a configuration file."""
    return token["content"] if isinstance(token, dict) else getattr(token, "content", token)


def as_added_token(token: Any, special: bool | None = None) -> Any:
    from tokenizers import AddedToken

    if isinstance(token, AddedToken):
        return AddedToken(**token.__getstate__())  # a copy, as it may be marked as special
    if isinstance(token, str):
        return AddedToken(token, special=bool(special))
    if isinstance(token, dict) and isinstance(token.get("content"), str):
        known = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
        options = {name: token[name] for name in known if name in token}
        return AddedToken(**options | ({} if special is None else {"special": special}))
    raise TypeError(f"a token must be a string or a tokenizers.AddedToken, got {token!r}")


def read_vocab(vocab: Any) -> dict[str, int]:
    """A vocabulary as a dict token -> id, from a dict, a list of tokens or the path of a vocab.txt."""
    source = "vocab"
    if isinstance(vocab, str | os.PathLike):
        source = os.fspath(vocab)
        with open(vocab, "rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"{source} is longer than {LARGEST} bytes, the limit for a vocabulary")
        try:
            vocab = vocab_of_lines(content.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{source}: not UTF-8 text, at byte {error.start}") from error
    elif isinstance(vocab, list | tuple):
        vocab = {token: index for index, token in enumerate(vocab)}
    elif not isinstance(vocab, dict):
        raise TypeError(f"vocab must be a dict, a list or a path, got {type(vocab).__name__}")
    if not vocab:
        raise ValueError(f"{source}: the vocabulary is empty")
    ids = vocab.values()
    if {*map(type, vocab)} == {str} and {*map(type, ids)} == {int} and min(ids) >= 0 and max(ids) < _MOST_IDS:
        return vocab  # checked one by one, the tokens of a usual vocabulary take 4 ms
    for token, index in vocab.items():
        if not isinstance(token, str) or type(index) is not int or not 0 <= index < _MOST_IDS:
            raise ValueError(f"{source}: expected tokens with ids from 0, got {shown(token)}: {shown(index)}")
    return vocab


def vocab_of_lines(text: str) -> dict[str, int]:
    """The vocabulary of a vocab.txt, as the library reads it: ids are line numbers, trailing white space is removed."""
    lines = text.split("\n")
    return {line.rstrip(): index for index, line in enumerate(lines[:-1] if lines[-1] == "" else lines)}


def _wordpiece(content: dict, file: Path) -> dict:
    """The model section of a tokenizer.json. In old files without a type, max_input_chars_per_word means WordPiece."""
    model = content.get("model")
    if not isinstance(model, dict):
        raise ValueError(f"{file}: no model section")
    kind = model.get("type", "WordPiece" if "max_input_chars_per_word" in model else "unknown")
    if kind != "WordPiece":
        raise ValueError(f"{file}: a {kind if isinstance(kind, str) else shown(kind)} tokenizer; BERT's is WordPiece")
    if not isinstance(model.get("vocab"), dict):
        raise ValueError(f"{file}: the model section has no vocab")
    return model
