"""Reads the files that describe a BERT tokenizer, new and old, as transformers reads them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbert.hub import resolve_file

SPECIAL_TOKENS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
OPTIONS = (
    "do_lower_case",
    "strip_accents",
    "tokenize_chinese_chars",
    "clean_up_tokenization_spaces",
    "padding_side",
    "truncation_side",
    *SPECIAL_TOKENS,
)
# AutoTokenizer takes tokenizer.json as it stands for these classes. For BertTokenizer, and for a folder that
# names no class, it rebuilds the pipeline from tokenizer_config.json, lower-casing unless told otherwise.
AS_THE_FILE_SAYS = ("PreTrainedTokenizerFast", "TokenizersBackend")


@dataclass(frozen=True)
class TokenizerFiles:
    """What a folder says: arguments of BertTokenizer, added tokens in the order of their ids."""

    source: Path  # tokenizer.json or vocab.txt
    vocab: dict[str, int]
    options: dict[str, Any]
    added: list[Any]  # AddedToken
    added_ids: dict[str, int]
    pipeline: Path | None  # the tokenizer.json to take normalizer and the rest from, as they stand


def read_folder(path_or_id: str | os.PathLike, revision: str | None) -> TokenizerFiles:
    """Reads tokenizer.json, else vocab.txt, and the files beside it. Errors name the file."""

    def read(name: str) -> dict:
        return read_json(resolve_file(path_or_id, name, revision=revision, required=False))

    config = read("tokenizer_config.json")
    options = {name: config[name] for name in OPTIONS if name in config}
    options["model_max_length"] = config.get("model_max_length", config.get("max_len"))
    source = resolve_file(path_or_id, "tokenizer.json", revision=revision, required=False)
    content = read_json(source)
    if source is None:
        source = resolve_file(path_or_id, "vocab.txt", revision=revision)
        vocab = read_vocab(source)
    else:
        model = _wordpiece(content, source)
        vocab = model["vocab"]
        shape = ("max_input_chars_per_word", "continuing_subword_prefix")
        options |= {name: model[name] for name in shape if name in model}

    try:
        by_id = {int(i): as_added_token(token) for i, token in config.get("added_tokens_decoder", {}).items()}
        if "added_tokens_decoder" not in config:  # older: the same facts in three more files
            config = config | read("special_tokens_map.json")
            options |= {name: config[name] for name in SPECIAL_TOKENS if name in config}
            special = {content_of(token) for token in (*options.values(), *_extra_tokens(config))}
            for token, index in read("added_tokens.json").items():
                by_id[index] = as_added_token(token, special=token in special)
            by_id |= {token["id"]: as_added_token(token) for token in content.get("added_tokens", [])}
        added = [token for _, token in sorted(by_id.items())]
        known = {token.content for token in added}
        extra = [token for token in _extra_tokens(config) if content_of(token) not in known]
        added += [as_added_token(token, special=True) for token in extra]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{source}: malformed special or added tokens, there or beside it: {error!r}") from error
    return TokenizerFiles(
        source=source,
        vocab=vocab,
        options=options,
        added=added,
        added_ids={token.content: index for index, token in by_id.items()},
        pipeline=source if content and config.get("tokenizer_class") in AS_THE_FILE_SAYS else None,
    )


def _extra_tokens(config: dict) -> list:
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra = extra.values() if isinstance(extra, dict) else extra
    return [*(config[name] for name in ("bos_token", "eos_token") if config.get(name)), *extra]


def content_of(token: Any) -> Any:
    """Text of a special token: a string, an AddedToken or its dict in a configuration file."""
    return token["content"] if isinstance(token, dict) else getattr(token, "content", token)


def as_added_token(token: Any, special: bool | None = None) -> Any:
    from tokenizers import AddedToken

    if isinstance(token, AddedToken):
        return AddedToken(**token.__getstate__())  # a copy: the caller's is not ours to mark as special
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
        try:
            vocab = vocab_of_lines(Path(vocab).read_bytes().decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{source}: not UTF-8 text, at byte {error.start}") from error
    elif isinstance(vocab, list | tuple):
        vocab = {token: index for index, token in enumerate(vocab)}
    elif not isinstance(vocab, dict):
        raise TypeError(f"vocab must be a dict, a list or a path, got {type(vocab).__name__}")
    if not vocab:
        raise ValueError(f"{source}: the vocabulary is empty")
    for token, index in vocab.items():
        if not isinstance(token, str) or not isinstance(index, int) or not 0 <= index < 2**32:
            raise ValueError(f"{source}: expected tokens with ids from 0, got {token!r}: {index!r}")
    return vocab


def vocab_of_lines(text: str) -> dict[str, int]:
    """As the library reads it: an id is a line's number, trailing white space is no part of a token."""
    lines = text.split("\n")
    return {line.rstrip(): index for index, line in enumerate(lines[:-1] if lines[-1] == "" else lines)}


def read_json(file: Path | None) -> dict:
    if file is None:
        return {}
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:  # bad JSON and bad UTF-8 alike
        raise ValueError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


def _wordpiece(content: dict, file: Path) -> dict:
    """The model section of a tokenizer.json. Old files name no type: the longest word tells WordPiece."""
    model = content.get("model")
    if not isinstance(model, dict):
        raise ValueError(f"{file}: no model section")
    kind = model.get("type", "WordPiece" if "max_input_chars_per_word" in model else "unknown")
    if kind != "WordPiece":
        raise ValueError(f"{file}: a {kind} tokenizer; BERT's is WordPiece")
    if not isinstance(model.get("vocab"), dict):
        raise ValueError(f"{file}: the model section has no vocab")
    return model
