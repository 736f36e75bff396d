"""Tokenization over the `tokenizers` library, with transformers' argument names and ids.

The Rust library tokenizes; this module configures it and pads. Truncation is a setting of a Rust tokenizer, which
another thread may be using. So each combination of settings gets a Rust tokenizer of its own, which shares the
vocabulary and is made in microseconds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from copy import copy
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any, Self, overload

from fastbert.checkpoint.files import write_text
from fastbert.tokenizer.encoding import (
    UNLIMITED,
    BatchEncoding,
    as_list,
    as_rows,
    as_tensor,
    check_inputs,
    check_settings,
    check_side,
    check_tensors,
    check_unicode,
    feature_columns,
    pad_columns,
    pad_features,
    padded_width,
    stack_columns,
)
from fastbert.tokenizer.files import NAMED_TOKENS, SPECIAL_TOKENS, as_added_token, content_of, vocab_of_lines

PIPELINE = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
MAX_VIEWS = 8
_COLUMNS: dict[str, tuple[Any, Any]] = {  # columns in addition to input_ids: row of an encoding, padding value
    "token_type_ids": (attrgetter("type_ids"), 0),
    "attention_mask": (lambda encoding: [1] * len(encoding), 0),
    "special_tokens_mask": (attrgetter("special_tokens_mask"), 1),
    "offset_mapping": (attrgetter("offsets"), (0, 0)),
}


class Tokenizer:
    """A tokenizer of any kind, with the ids of transformers' fast tokenizer; safe to call from several threads.

    Args:
        backend: a tokenizer of the `tokenizers` library, which is changed: its special tokens are added to it.
        special: the tokens by their names, `cls_token` to `mask_token`: strings or `tokenizers.AddedToken`.
        tokenizer_class: of transformers, for the file of settings.

    Raises:
        ValueError: a side is neither left nor right.
    """

    pad_token_type_id = 0
    is_fast = True  # for callers that check whether encodings map tokens to characters and words

    def __init__(
        self,
        backend: Any,
        special: dict[str, Any],
        *,
        model_max_length: int | None = None,
        padding_side: str = "right",
        truncation_side: str = "right",
        clean_up_tokenization_spaces: bool | None = False,
        split_special_tokens: bool = False,
        model_input_names: Iterable[str] = ("input_ids", "attention_mask"),
        tokenizer_class: str = "PreTrainedTokenizerFast",
    ) -> None:
        self._backend = backend
        self._ids: tuple[Any, frozenset[int]] | None = None  # those of a backend's tokens, from the first decode on
        self.special_tokens_map = {name: content_of(token) for name, token in special.items()}
        self.model_max_length = UNLIMITED if model_max_length is None else int(model_max_length)
        self.padding_side = check_side("padding_side", padding_side)
        self.truncation_side = check_side("truncation_side", truncation_side)
        self.split_special_tokens = split_special_tokens
        self.clean_up_tokenization_spaces = bool(clean_up_tokenization_spaces)
        self.model_input_names = tuple(model_input_names)
        self._normalization: dict[str, Any] = {}  # the arguments of BERT's normalizer, for the file of settings
        self._tokenizer_class = tokenizer_class
        self._views: dict[tuple, Any] = {}
        added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
        named = [token for name, token in special.items() if name in NAMED_TOKENS]
        missing = [as_added_token(token, special=True) for token in named if not _is_special(added, token)]
        if missing:
            backend.add_special_tokens(missing)

    def lower_cased(self) -> Self:
        """This tokenizer if it lower-cases, else a copy that lower-cases the text first.

        Special tokens in the text are unchanged.
        """
        from tokenizers import normalizers

        normalizer: Any = self._backend.normalizer
        are_several = isinstance(normalizer, normalizers.Sequence)
        steps = list(normalizer) if are_several else [normalizer]
        for step in steps:
            if isinstance(step, normalizers.Lowercase) or getattr(step, "lowercase", False):
                return self
        steps = [normalizers.Lowercase(), *(step for step in steps if step is not None)]
        lower = copy(self)
        lower._backend, lower._views = self._copy(), {}
        lower._backend.normalizer = normalizers.Sequence(steps)
        lower._tokenizer_class = "PreTrainedTokenizerFast"  # so that its normalizer is read back
        return lower

    def with_prefix_space(self) -> Self:
        """This tokenizer; or, if the first word of a text gets other tokens than one after a space, as in RoBERTa's
        byte BPE, a copy that does not distinguish them. Texts that come as words or sentences need it."""
        if has_prefix_space(self._backend) is not False:
            return self
        prefixed = copy(self)
        prefixed._backend, prefixed._views = self._copy(), {}
        set_prefix_space(prefixed._backend, True)
        return prefixed

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """The number of special tokens around a text or pair."""
        return self._backend.num_special_tokens_to_add(pair)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes tokenizer.json, settings in two files and, for WordPiece, vocab.txt into `folder`, each atomically."""
        folder, prefix = Path(folder), has_prefix_space(self._backend)
        config = {
            **self._normalization,
            **self.special_tokens_map,
            "mask_token": self.mask_token,
            "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
            "model_input_names": list(self.model_input_names),
            "model_max_length": self.model_max_length,
            "padding_side": self.padding_side,
            **({"split_special_tokens": True} if self.split_special_tokens else {}),
            **({} if prefix is None else {"add_prefix_space": prefix}),
            "tokenizer_class": self._tokenizer_class,
            "truncation_side": self.truncation_side,
        }
        write_text(folder / "tokenizer.json", self._backend.to_str(pretty=True))
        for name, content in (("tokenizer_config", config), ("special_tokens_map", self.special_tokens_map)):
            text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
            write_text(folder / f"{name}.json", text + "\n")
        if type(self._backend.model).__name__ != "WordPiece":
            return
        vocab = self._backend.get_vocab(with_added_tokens=False)
        lines = "".join(f"{token}\n" for token in sorted(vocab, key=vocab.__getitem__))
        # A vocab.txt cannot represent a gap in the ids, or a token with a line break.
        if list(vocab_of_lines(lines).values()) == sorted(vocab.values()):
            write_text(folder / "vocab.txt", lines)

    def __call__(
        self,
        text: Any,
        text_pair: Any = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool = True,
        return_offsets_mapping: bool = False,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_length: bool = False,
        is_split_into_words: bool = False,
        split_special_tokens: bool | None = None,
    ) -> BatchEncoding:
        """Tokenizes a text, a pair, or a list of either; a list is parallelised over cores.

        Arguments have the meaning they have in transformers; `max_length` alone also turns truncation on.
        `return_token_type_ids` of None means: if they are among `model_input_names`.
        `padding_side` and `split_special_tokens` override the tokenizer's own. With `split_special_tokens`, a
        special token that occurs in the text is split like any other text. `return_length` also counts pad tokens.
        Columns are lists, or int64 arrays or tensors (B, S) with `return_tensors` "np" or "pt". Raises
        TypeError for input that is not text, ValueError for settings that cannot be met.
        """
        items, batched = check_inputs(text, text_pair, is_split_into_words)
        return_tensors = check_tensors(return_tensors)
        side = self.padding_side if padding_side is None else check_side("padding_side", padding_side)
        pad, strategy, max_length = check_settings(
            padding, truncation, max_length, stride, pad_to_multiple_of, self.model_max_length
        )
        split = self.split_special_tokens if split_special_tokens is None else bool(split_special_tokens)
        backend = self._view(items, add_special_tokens, strategy, max_length, stride, split)
        encodings = self._encode(backend, items, is_split_into_words, add_special_tokens)
        samples: list[int] = []
        if return_overflowing_tokens:
            families = [[first, *first.overflowing] for first in encodings]
            samples = [sample for sample, family in enumerate(families) for _ in family]
            encodings = list(chain.from_iterable(families))
        lengths = [len(encoding) for encoding in encodings]
        width = padded_width(lengths, pad, max_length, pad_to_multiple_of)

        if return_token_type_ids is None:
            return_token_type_ids = "token_type_ids" in self.model_input_names
        wanted = {
            "token_type_ids": return_token_type_ids,
            "attention_mask": return_attention_mask,
            "special_tokens_mask": return_special_tokens_mask,
            "offset_mapping": return_offsets_mapping,
        }
        columns: dict[str, tuple[list, Any]] = {"input_ids": ([e.ids for e in encodings], self.pad_token_id)}
        for name, (rows_of, fill) in _COLUMNS.items():
            if wanted[name]:
                columns[name] = [*map(rows_of, encodings)], fill
        result = stack_columns(columns, width, side) if return_tensors else pad_columns(columns, width, side)
        if return_length:
            result["length"] = [max(length, width) for length in lengths]
        if return_overflowing_tokens:
            result["overflow_to_sample_mapping"] = samples
        elif not batched and not return_tensors:
            result = {name: rows[0] if isinstance(rows[0], list) else rows for name, rows in result.items()}
        if return_tensors:
            result = {name: as_tensor(name, column, return_tensors) for name, column in result.items()}
        return BatchEncoding(result, encodings, width, self.pad_token, side)

    def encodings(
        self,
        texts: list,
        *,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        offsets: bool = True,
    ) -> list[Any]:
        """The tokenizers library's encoding of each text or pair; that of a cut one has `overflowing` ones.

        Args:
            texts: as in `__call__`.
            truncation: the same.
            max_length: the same.
            stride: the same.
            is_split_into_words: the same.
            offsets: False leaves out each token's place in the text, which is faster.
        """
        items, _ = check_inputs(texts, None, is_split_into_words)
        _, strategy, max_length = check_settings(False, truncation, max_length, stride, None, self.model_max_length)
        backend = self._view(items, True, strategy, max_length, stride, self.split_special_tokens)
        return self._encode(backend, items, is_split_into_words, True, offsets)

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """Pads tokenized texts to one length, for data collators.

        Args:
            encoded_inputs: a list of features (mappings from a column's name to its row), or columns of a batch or of
                one text. `input_ids`, `token_type_ids`, `attention_mask` and `special_tokens_mask` are padded, other
                columns are returned unchanged. The input is not modified.
            return_attention_mask: False neither adds a mask nor pads an existing one.
            return_tensors: "np" or "pt"; None for the type of `input_ids`.

        Raises:
            TypeError, ValueError: invalid features, features with different columns, or rows that make no tensor.
        """
        columns, batched, kind = as_rows(feature_columns(encoded_inputs))
        kind = check_tensors(return_tensors) or kind
        side = self.padding_side if padding_side is None else check_side("padding_side", padding_side)
        pad, _, max_length = check_settings(padding, False, max_length, 0, pad_to_multiple_of, self.model_max_length)
        if not batched:
            columns = {name: [value] for name, value in columns.items()}
        lengths = [len(row) for row in columns["input_ids"]]
        width = padded_width(lengths, pad, max_length, pad_to_multiple_of)
        fills = {"input_ids": self.pad_token_id, "token_type_ids": self.pad_token_type_id, "special_tokens_mask": 1}
        if return_attention_mask is not False:
            fills["attention_mask"] = 0
            columns.setdefault("attention_mask", [[1] * length for length in lengths])
        columns = pad_features(columns, fills, width, side)
        if not batched:
            columns = {name: rows[0] for name, rows in columns.items()}
        if kind:
            columns = {name: as_tensor(name, value, kind) for name, value in columns.items()}
        return BatchEncoding(columns)

    def get_special_tokens_mask(
        self, token_ids_0: Any, token_ids_1: Any = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 for each special token of a tokenized row, 0 for every other token."""
        if not already_has_special_tokens or token_ids_1 is not None:
            raise NotImplementedError(
                "get_special_tokens_mask takes one row of ids with its special tokens, and "
                "already_has_special_tokens=True; before they are added, return_special_tokens_mask=True tells"
            )
        special = set(self.all_special_ids)
        return [int(index in special) for index in as_list(token_ids_0)]

    def encode(self, text: Any, text_pair: Any = None, **options: Any) -> Any:
        """Ids of one text or pair, or of each in a list; takes the arguments of `__call__`."""
        return self(text, text_pair, **options)["input_ids"]

    def encode_plain(self, texts: list[str]) -> list[list[int]]:
        """Ids of plain texts: no special token is added, and none is recognised in the text."""
        backend = self._view(texts, False, None, None, 0, split=True)
        try:
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        except BaseException:
            check_unicode(texts)
            raise

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **options: Any
    ) -> list[str]:
        """Tokens of one text or pair; takes the arguments of `__call__`."""
        return self(text, pair, add_special_tokens=add_special_tokens, **options).tokens()

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> Any:
        """Text of one row of ids (a list, array or tensor), or a list of texts for a list of rows."""
        ids = as_list(token_ids)
        if ids and isinstance(ids[0], list):
            return self.batch_decode(ids, skip_special_tokens, clean_up_tokenization_spaces)
        return self.batch_decode([ids], skip_special_tokens, clean_up_tokenization_spaces)[0]

    @property
    def _known_ids(self) -> frozenset[int]:
        if self._ids is None or self._ids[0] is not self._backend:
            self._ids = self._backend, frozenset(self.get_vocab().values())
        return self._ids[1]

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[str]:
        """Texts of several rows of ids, in threads."""
        rows = [as_list(row) for row in sequences]
        for ids in rows:
            if not self._known_ids.issuperset(ids):  # which the library skips silently
                self.convert_ids_to_tokens(ids)  # raises
        texts: list[str] = self._backend.decode_batch(rows, skip_special_tokens=skip_special_tokens)
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        return [_without_spaces(text) for text in texts] if clean_up_tokenization_spaces else texts

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int: ...  # type: ignore[overload-overlap]  # a str is Iterable[str]
    @overload
    def convert_tokens_to_ids(self, tokens: Iterable[str]) -> list[int]: ...
    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> int | list[int]:
        """Id of a token, or ids of several; a token outside the vocabulary gets the id of the unknown token."""
        if isinstance(tokens, str):
            index = self._backend.token_to_id(tokens)
            return self.unk_token_id if index is None else index
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> str | list[str]:
        """Token of an id, or tokens of several. Raises ValueError for an id outside the vocabulary."""
        ids = ids if isinstance(ids, int) else as_list(ids)
        tokens = []
        for index in [ids] if isinstance(ids, int) else ids:
            token = self._backend.id_to_token(index) if 0 <= index < 2**32 else None
            if token is None:
                raise ValueError(f"id {index} is not in the vocabulary of {len(self)} tokens")
            tokens.append(token)
        if isinstance(ids, int):
            return tokens[0]
        skipped = set(self.all_special_tokens) if skip_special_tokens else ()
        return [token for token in tokens if token not in skipped]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens: words, with spaces between them."""
        decoder: Any = self._backend.decoder
        return " ".join(tokens) if decoder is None else decoder.decode(tokens)

    @property
    def knows_words(self) -> bool:
        """True if a token's form tells that it continues a word, as WordPiece's ## does."""
        return bool(getattr(self._backend.model, "continuing_subword_prefix", None))

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Adds tokens (strings or `tokenizers.AddedToken`) that are never split; returns how many are new."""
        new_tokens = new_tokens if isinstance(new_tokens, list | tuple) else [new_tokens]
        backend = self._copy()
        add = backend.add_special_tokens if special_tokens else backend.add_tokens
        added = add([as_added_token(token, special=special_tokens) for token in new_tokens])
        self._backend, self._views = backend, {}
        return added

    def get_vocab(self) -> dict[str, int]:
        """All tokens with their ids, added tokens included."""
        return self._backend.get_vocab(with_added_tokens=True)

    def as_json(self) -> str:
        """The text of tokenizer.json: all that determines a text's tokens, but for the limit and side of cutting."""
        return str(self._backend.to_str())

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary without added tokens, as in transformers."""
        return self._backend.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def __repr__(self) -> str:
        options = {"model_max_length": self.model_max_length, **self._normalization}
        return f"{type(self).__name__}({len(self)} tokens, {options})"

    @property
    def all_special_tokens(self) -> list[str]:
        """The named special tokens and all added tokens that are marked special."""
        added = self._backend.get_added_tokens_decoder().values()
        return list(dict.fromkeys([*self.special_tokens_map.values(), *(t.content for t in added if t.special)]))

    @property
    def all_special_ids(self) -> list[int]:
        return self.convert_tokens_to_ids(self.all_special_tokens)

    def __getattr__(self, name: str) -> Any:
        """`cls_token`, `cls_token_id` and the like; None where a tokenizer has no such token."""
        token_name = name.removesuffix("_id")
        if token_name not in SPECIAL_TOKENS and token_name not in self.__dict__.get("special_tokens_map", {}):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        token = self.special_tokens_map.get(token_name)
        return token if name == token_name or token is None else self._backend.token_to_id(token)

    def _encode(self, backend: Any, items: list, pretokenized: bool, special: bool, offsets: bool = True) -> list:
        try:
            return (backend.encode_batch if offsets else backend.encode_batch_fast)(items, pretokenized, special)
        except BaseException as error:
            # A Rust panic derives from BaseException; the library's error about pairs is a bare Exception.
            if (setting := backend.truncation) and type(error).__name__ in ("Exception", "PanicException"):
                shown = "truncation={strategy!r}, max_length={max_length}, stride={stride}".format(**setting)
                raise ValueError(f"{shown} cannot be met: {error}") from error
            check_unicode(items)
            raise

    def _view(self, items: list, special: bool, strategy: str | None, max_length: Any, stride: int, split: bool) -> Any:
        """A Rust tokenizer with these settings."""
        if strategy:
            paired = any(type(item) is tuple for item in items)
            added = self._backend.num_special_tokens_to_add(paired) if special else 0
            if max_length < added or (stride and stride >= max_length - added):
                raise ValueError(f"max_length={max_length} leaves no room for {added} special tokens, stride={stride}")
        elif not split:
            return self._backend
        key = (strategy and (max_length, stride, strategy, self.truncation_side), split)
        views = self._views
        if key not in views:
            view = self._copy()
            view.encode_special_tokens = split
            if strategy:
                view.enable_truncation(max_length, stride=stride, strategy=strategy, direction=self.truncation_side)
            if len(views) >= MAX_VIEWS:
                views = self._views = {}
            views[key] = view
        return views[key]

    def _copy(self) -> Any:
        """A Rust tokenizer that shares the vocabulary but has its own settings: 8 us (a deep copy takes 15 ms)."""
        from tokenizers import Tokenizer

        copy = Tokenizer(self._backend.model)
        for part in PIPELINE:
            setattr(copy, part, getattr(self._backend, part))
        copy.add_tokens([token for _, token in sorted(self._backend.get_added_tokens_decoder().items())])
        return copy


def has_prefix_space(backend: Any) -> bool | None:
    """True if a text's first word gets the tokens of one after a space; None if its tokenizer is no byte BPE."""
    from tokenizers import pre_tokenizers

    step: Any = backend.pre_tokenizer
    return step.add_prefix_space if isinstance(step, pre_tokenizers.ByteLevel) else None


def set_prefix_space(backend: Any, prefix: bool) -> None:
    """Changes what `has_prefix_space` says of a byte BPE."""
    from tokenizers import pre_tokenizers, processors

    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=backend.pre_tokenizer.use_regex)
    step: Any = backend.post_processor
    if isinstance(step, processors.RobertaProcessing):  # offsets leave out the space that was added
        state = json.loads(step.__getstate__())
        backend.post_processor = processors.RobertaProcessing(
            tuple(state["sep"]), tuple(state["cls"]), state["trim_offsets"], prefix
        )


def _without_spaces(text: str) -> str:
    """The text without spaces before punctuation and English contractions, as transformers cleans it."""
    for spaced in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(spaced, spaced.strip())
    return text


def _is_special(added: dict[str, Any], token: Any) -> bool:
    """True if a token is among a backend's added tokens, by content, and special there."""
    found = added.get(content_of(token))
    return found is not None and found.special
