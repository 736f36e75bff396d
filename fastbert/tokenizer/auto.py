"""AutoTokenizer: the tokenizer of a folder, whatever its kind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NoReturn

from fastbert.checkpoint.files import collector_at_rest
from fastbert.checkpoint.hub import MissingFileError, resolve_file
from fastbert.checkpoint.json_files import shown
from fastbert.tokenizer.bert import BertTokenizer
from fastbert.tokenizer.files import (
    NAMED_TOKENS,
    content_of,
    read_added,
    read_folder,
    read_options,
    reader,
    special_tokens,
)
from fastbert.tokenizer.tokenizer import Tokenizer, has_prefix_space, set_prefix_space

_FAIRSEQ = {
    **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>", "pad_token": "<pad>"},
    **{"cls_token": "<s>", "mask_token": "<mask>"},
}
# The special tokens that transformers' classes have by default. Those that are not here are BERT's WordPiece, or a
# tokenizer.json that names its own.
_BY_CLASS = {
    **dict.fromkeys(("RobertaTokenizer", "XLMRobertaTokenizer", "CamembertTokenizer"), _FAIRSEQ),
    "MPNetTokenizer": {**_FAIRSEQ, "unk_token": "[UNK]"},
}
_BY_MODEL = {
    "roberta": "RobertaTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
    "camembert": "CamembertTokenizer",
    "mpnet": "MPNetTokenizer",
    "distilbert": "DistilBertTokenizer",
}
# Where nothing names a special token: the first of these that the file has as a special one.
_USUAL = {
    "unk_token": ("[UNK]", "<unk>"),
    "sep_token": ("[SEP]", "</s>"),
    "pad_token": ("[PAD]", "<pad>"),
    "cls_token": ("[CLS]", "<s>"),
    "mask_token": ("[MASK]", "<mask>"),
}
_WITHOUT_TYPES = ("input_ids", "attention_mask")
_SENTENCEPIECE = ("sentencepiece.bpe.model", "spiece.model", "spm.model", "tokenizer.model")


class AutoTokenizer:
    """Reads the tokenizer of any model."""

    @staticmethod
    @collector_at_rest()
    def from_pretrained(path_or_id: str | os.PathLike, *, revision: str | None = None) -> Tokenizer:
        """Reads tokenizer.json of any kind, or an older vocab.txt or vocab.json with merges.txt, and their settings.

        A WordPiece tokenizer with BERT's special tokens is a BertTokenizer. A special token that neither the settings
        nor the class name is the usual one in the vocabulary, as [PAD] or <pad>.

        Raises:
            FileNotFoundError, also a ValueError: there are no such files; the message says which is missing.
            ValueError: a file is no tokenizer; the message names file and field.
        """
        read = reader(path_or_id, revision)
        config_file, config = read("tokenizer_config.json")
        named = _class_of(config, read)
        file, content = read("tokenizer.json")
        model = content.get("model")
        kind = model.get("type", "WordPiece" if "max_input_chars_per_word" in model else None) if model else None
        if named not in _BY_CLASS and (
            kind == "WordPiece" or (file is None and _find(path_or_id, "vocab.txt", revision))
        ):
            files = read_folder(path_or_id, revision, read)
            if named == "DistilBertTokenizer":
                files.options.setdefault("model_input_names", _WITHOUT_TYPES)
            return BertTokenizer._of(files)
        # A null is no token, also none that the class or the vocabulary has.
        nulls = {name: None for name in NAMED_TOKENS if name in config and config[name] is None and name != "pad_token"}
        config = {name: value for name, value in config.items() if name not in nulls}
        options = read_options(config_file, config) | special_tokens(config_file, config, NAMED_TOKENS)
        for name in ("do_lower_case", "strip_accents", "tokenize_chinese_chars"):
            options.pop(name, None)  # of BERT's normalizer; the file has it
        if file is None:
            backend, source = _from_older(path_or_id, named, config, revision)
        else:
            backend, source = _from_json(file), file
        added, ids = read_added(read, (config_file, config), (source, content), options, NAMED_TOKENS)
        backend.add_tokens([token for token in added if backend.token_to_id(token.content) is None])
        for token, index in ids.items():
            if (got := backend.token_to_id(token)) != index:
                raise ValueError(f"{source}: added token {token!r} cannot have id {index}, it gets {got}")
        prefix = config.get("add_prefix_space")
        if named == "RobertaTokenizer" and isinstance(prefix, bool) and has_prefix_space(backend) is not None:
            set_prefix_space(backend, prefix)  # transformers' class goes by the settings, not by tokenizer.json
        given = {name: options.pop(name) for name in NAMED_TOKENS if name in options}
        special = _special(backend, nulls | given, named, guess_all=file is None)
        if "pad_token" not in special:
            raise ValueError(f"{source}: there is no pad_token; tokenizer_config.json can name one")
        options.setdefault("model_input_names", _WITHOUT_TYPES)
        return Tokenizer(backend, special, tokenizer_class=named or "PreTrainedTokenizerFast", **options)


def tokenizer_of(theirs: Any) -> Tokenizer:
    """A copy of a fast tokenizer of transformers.

    Raises:
        TypeError: it is none.
    """
    from tokenizers import Tokenizer as Backend

    backend = getattr(theirs, "backend_tokenizer", None)
    if not isinstance(backend, Backend):
        raise TypeError(
            f"tokenizer is a {type(theirs).__name__}; it must be one of fastbert, or transformers' fast one"
        )
    backend = Backend.from_str(backend.to_str())
    backend.no_padding()
    backend.no_truncation()
    special = {name: token for name in NAMED_TOKENS if (token := getattr(theirs, name, None)) is not None}
    most = theirs.model_max_length
    return Tokenizer(
        backend,
        special,
        model_max_length=most if most < 10**9 else None,
        padding_side=theirs.padding_side,
        truncation_side=theirs.truncation_side,
        model_input_names=theirs.model_input_names,
        tokenizer_class=type(theirs).__name__,
    )


def _class_of(config: dict[str, Any], read: Any) -> str:
    """The name of transformers' class, without "Fast": the settings', config.json's, or that of its model_type."""
    named = config.get("tokenizer_class")
    if not named:
        _, model = read("config.json")
        named = model.get("tokenizer_class") or _BY_MODEL.get(str(model.get("model_type")))
    return str(named or "").removesuffix("Fast")


def _find(path_or_id: str | os.PathLike, name: str, revision: str | None) -> Path | None:
    return resolve_file(path_or_id, name, revision=revision, required=False)


def _from_json(file: Path) -> Any:
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{file}: {error}") from error
    backend.no_padding()
    backend.no_truncation()
    return backend


def _from_older(
    path_or_id: str | os.PathLike, named: str, config: dict[str, Any], revision: str | None
) -> tuple[Any, Path]:
    """A backend of the files that came before tokenizer.json, and the first of them."""
    if words := _find(path_or_id, "vocab.txt", revision):  # MPNet's: others are BERT's
        return _mpnet(words, config), words
    vocab, merges = _find(path_or_id, "vocab.json", revision), _find(path_or_id, "merges.txt", revision)
    if vocab is None or merges is None:
        _fail_missing(path_or_id, vocab, merges, revision)
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors

    try:
        backend = Backend(models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{vocab}, {merges}: {error}") from error
    prefix = config.get("add_prefix_space") is True
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    ends: Any = [(token, backend.token_to_id(token)) for token in ("</s>", "<s>")]
    if any(index is None for _, index in ends):
        raise ValueError(f"{vocab}: the vocabulary has no <s> and </s>, as RoBERTa's has; a tokenizer.json is needed")
    backend.post_processor = processors.RobertaProcessing(ends[0], ends[1], trim_offsets=True, add_prefix_space=prefix)
    return backend, vocab


def _fail_missing(
    path_or_id: str | os.PathLike, vocab: Path | None, merges: Path | None, revision: str | None
) -> NoReturn:
    if vocab is not None or merges is not None:
        missing, there = ("merges.txt", vocab) if merges is None else ("vocab.json", merges)
        raise MissingFileError(f"{path_or_id}: {there} is there, but no {missing}, nor a tokenizer.json")
    for name in _SENTENCEPIECE:
        if _find(path_or_id, name, revision):
            raise MissingFileError(
                f"{path_or_id}: {name} is there, but no tokenizer.json, which is needed: transformers' "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one"
            )
    raise MissingFileError(f"{path_or_id} has no tokenizer.json, vocab.txt, or vocab.json with merges.txt")


def _mpnet(words: Path, config: dict[str, Any]) -> Any:
    """BERT's WordPiece between MPNet's special tokens."""
    from tokenizers import AddedToken, processors

    names = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")
    special = {name: token for name, token in _BY_CLASS["MPNetTokenizer"].items() if name[:3] not in ("bos", "eos")}
    settings: dict[str, Any] = {name: config[name] for name in names if name in config} | special
    # The space before a mask is its own.
    settings["mask_token"] = AddedToken(special["mask_token"], lstrip=True, special=True)
    backend = BertTokenizer(str(words), **settings)._backend
    ends: Any = [(special[name], backend.token_to_id(special[name])) for name in ("sep_token", "cls_token")]
    backend.post_processor = processors.RobertaProcessing(*ends)  # which trims offsets, as transformers has it
    return backend


def _special(backend: Any, given: dict[str, Any], named: str, *, guess_all: bool) -> dict[str, Any]:
    """The named special tokens: those given, those of the class, and the usual ones.

    Args:
        guess_all: whether a usual token may be any of the vocabulary, as older files do not mark special ones; else it
            is one that the file marks so, except for [UNK] and [PAD].
    """
    marked = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    found = dict(given)
    for name, token in _BY_CLASS.get(named, {}).items():
        if name not in found and backend.token_to_id(token) is not None:
            found[name] = token
    for name, usual in _USUAL.items():
        if name not in found:
            free = guess_all or name in ("unk_token", "pad_token")
            there = [t for t in usual if backend.token_to_id(t) is not None and (free or t in marked)]
            found |= {name: there[0]} if there else {}
    missing = [name for name, token in found.items() if token is None]
    for name in missing:
        del found[name]
    for name, token in found.items():
        if not isinstance(content_of(token), str):
            raise ValueError(f"{name} is {shown(token)}; it must be a token")
    return found
