"""BERT tokenization over the `tokenizers` library, with transformers' argument names and ids.

The Rust library tokenizes; this module configures it and pads. Truncation is a setting of a Rust tokenizer, which
another thread may be using. So each combination of settings gets a Rust tokenizer of its own, which shares the
vocabulary and is made in microseconds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from copy import copy
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any, overload

from fastbert.checkpoint.files import collector_at_rest, write_text
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
from fastbert.tokenizer.files import (
    SPECIAL_TOKENS,
    as_added_token,
    content_of,
    read_folder,
    read_vocab,
    vocab_of_lines,
)

PIPELINE = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
MAX_VIEWS = 8
_COLUMNS: dict[str, tuple[Any, Any]] = {  # columns in addition to input_ids: row of an encoding, padding value
    "token_type_ids": (attrgetter("type_ids"), 0),
    "attention_mask": (lambda encoding: [1] * len(encoding), 0),
    "special_tokens_mask": (attrgetter("special_tokens_mask"), 1),
    "offset_mapping": (attrgetter("offsets"), (0, 0)),
}


class BertTokenizer:
    """WordPiece tokenizer with the ids of transformers' BertTokenizer; safe to call from several threads.

    `vocab` is a dict token -> id, a list of tokens, or the path of a vocab.txt. The other arguments are those
    of tokenizer_config.json. `added_tokens` are strings or `tokenizers.AddedToken`. Raises ValueError for a
    vocabulary that is empty, is not UTF-8 or lacks a special token.
    """

    model_input_names = ("input_ids", "token_type_ids", "attention_mask")
    pad_token_type_id = 0
    is_fast = True  # for callers that check whether encodings map tokens to characters and words

    def __init__(
        self,
        vocab: dict[str, int] | Sequence[str] | str | os.PathLike,
        *,
        do_lower_case: bool = True,
        strip_accents: bool | None = None,
        tokenize_chinese_chars: bool = True,
        unk_token: Any = "[UNK]",
        sep_token: Any = "[SEP]",
        pad_token: Any = "[PAD]",
        cls_token: Any = "[CLS]",
        mask_token: Any = "[MASK]",
        added_tokens: Iterable[Any] = (),
        model_max_length: int | None = None,
        padding_side: str = "right",
        truncation_side: str = "right",
        clean_up_tokenization_spaces: bool = False,
        split_special_tokens: bool = False,
        max_input_chars_per_word: int = 100,
        continuing_subword_prefix: str = "##",
    ) -> None:
        where = f" {os.fspath(vocab)}" if isinstance(vocab, str | os.PathLike) else ""
        vocab = read_vocab(vocab)
        special = dict(
            unk_token=unk_token,
            sep_token=sep_token,
            pad_token=pad_token,
            cls_token=cls_token,
            mask_token=mask_token,
        )
        if mask_token is None:
            del special["mask_token"]
        added = [as_added_token(token) for token in added_tokens]
        known = {token.content for token in added}
        for name, token in special.items():
            if token is None or (content_of(token) not in vocab and content_of(token) not in known):
                raise ValueError(f"the vocabulary{where} has no {name} {content_of(token)!r}")
            if content_of(token) not in known:
                added.append(as_added_token(token, special=True))

        self.special_tokens_map = {name: content_of(token) for name, token in special.items()}
        for token in added:
            token.special = token.special or token.content in self.special_tokens_map.values()
        self.model_max_length = UNLIMITED if model_max_length is None else int(model_max_length)
        self.padding_side = check_side("padding_side", padding_side)
        self.truncation_side = check_side("truncation_side", truncation_side)
        self.split_special_tokens = split_special_tokens
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces
        self._normalization: dict[str, Any] = dict(
            do_lower_case=do_lower_case,
            strip_accents=strip_accents,
            tokenize_chinese_chars=tokenize_chinese_chars,
        )
        self._tokenizer_class = "BertTokenizer"
        self._views: dict[tuple, Any] = {}
        self._backend = self._build(vocab, added, max_input_chars_per_word, continuing_subword_prefix)

    def _build(self, vocab: dict[str, int], added: list, max_input_chars_per_word: int, prefix: str) -> Any:
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

        model = models.WordPiece(
            vocab,
            unk_token=self.unk_token,
            max_input_chars_per_word=max_input_chars_per_word,
            continuing_subword_prefix=prefix,
        )
        backend = Tokenizer(model)
        backend.normalizer = normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=self._normalization["tokenize_chinese_chars"],
            strip_accents=self._normalization["strip_accents"],
            lowercase=self._normalization["do_lower_case"],
        )
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece(prefix=prefix)
        backend.add_tokens(added)
        cls, sep = self.cls_token, self.sep_token
        backend.post_processor = processors.TemplateProcessing(
            single=f"{cls}:0 $A:0 {sep}:0",
            pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
            special_tokens=[(token, backend.token_to_id(token)) for token in (cls, sep)],
        )
        return backend

    @classmethod
    @collector_at_rest()
    def from_pretrained(cls, path_or_id: str | os.PathLike, *, revision: str | None = None) -> BertTokenizer:
        """Reads tokenizer.json or vocab.txt, and the configuration next to it, from a folder or a hub id.

        Where the files disagree, the choice is that of transformers: vocabulary and added tokens from
        tokenizer.json; lower-casing, accents and Chinese characters from tokenizer_config.json.
        """
        files = read_folder(path_or_id, revision)
        try:
            tokenizer = cls(files.vocab, added_tokens=files.added, **files.options)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{files.source}: {error}") from error
        if files.pipeline is not None:
            tokenizer._take_pipeline(files.pipeline)
        for token, index in files.added_ids.items():
            if (got := tokenizer._backend.token_to_id(token)) != index:
                raise ValueError(f"{files.source}: added token {token!r} cannot have id {index}, it gets {got}")
        return tokenizer

    def _take_pipeline(self, file: Path) -> None:
        from tokenizers import Tokenizer

        try:
            stored = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{file}: {error}") from error
        for part in PIPELINE:
            setattr(self._backend, part, getattr(stored, part))
        self._tokenizer_class = "PreTrainedTokenizerFast"

    def lower_cased(self) -> BertTokenizer:
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

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes tokenizer.json, vocab.txt and two files of settings into `folder`, each atomically."""
        folder = Path(folder)
        config = {
            **self._normalization,
            **self.special_tokens_map,
            "mask_token": self.mask_token,
            "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
            "model_input_names": list(self.model_input_names),
            "model_max_length": self.model_max_length,
            "padding_side": self.padding_side,
            **({"split_special_tokens": True} if self.split_special_tokens else {}),
            "tokenizer_class": self._tokenizer_class,
            "truncation_side": self.truncation_side,
        }
        write_text(folder / "tokenizer.json", self._backend.to_str(pretty=True))
        for name, content in (("tokenizer_config", config), ("special_tokens_map", self.special_tokens_map)):
            text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
            write_text(folder / f"{name}.json", text + "\n")
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
        return_token_type_ids: bool = True,
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
            return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in ids]
        self.convert_ids_to_tokens(ids)  # raises for an unknown id; the library skips it silently
        text = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        if clean_up_tokenization_spaces:
            for spaced in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
                text = text.replace(spaced, spaced.strip())
        return text

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **options: Any) -> list[str]:
        """Texts of several rows of ids."""
        return [self.decode(row, skip_special_tokens, **options) for row in sequences]

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

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary without added tokens, as in transformers."""
        return self._backend.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def __repr__(self) -> str:
        options = {"model_max_length": self.model_max_length, **self._normalization}
        return f"BertTokenizer({len(self)} tokens, {options})"

    @property
    def all_special_tokens(self) -> list[str]:
        """The named special tokens and all added tokens that are marked special."""
        added = self._backend.get_added_tokens_decoder().values()
        return list(dict.fromkeys([*self.special_tokens_map.values(), *(t.content for t in added if t.special)]))

    @property
    def all_special_ids(self) -> list[int]:
        return self.convert_tokens_to_ids(self.all_special_tokens)

    def __getattr__(self, name: str) -> Any:
        """`cls_token`, `cls_token_id` and the like; None for a tokenizer without a mask token."""
        token_name = name.removesuffix("_id")
        if token_name not in SPECIAL_TOKENS:
            raise AttributeError(f"BertTokenizer has no attribute {name!r}")
        token = self.special_tokens_map.get(token_name)
        return token if name == token_name or token is None else self._backend.token_to_id(token)

    def _encode(self, backend: Any, items: list, pretokenized: bool, special: bool) -> list:
        try:
            return backend.encode_batch(items, pretokenized, special)
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
