"""Checks the input of the `tokenizers` library, and makes padded columns of its output."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from itertools import chain
from typing import Any, NamedTuple

PADDING = {False: None, True: "longest", "do_not_pad": None, "longest": "longest", "max_length": "max_length"}
TRUNCATION = {
    None: None,
    False: None,
    True: "longest_first",
    "do_not_truncate": None,
    "longest_first": "longest_first",
    "only_first": "only_first",
    "only_second": "only_second",
}
UNLIMITED = int(1e30)  # transformers' model_max_length for "no limit"


class CharSpan(NamedTuple):
    """Characters [start, end) of a text."""

    start: int
    end: int


class TokenSpan(NamedTuple):
    """Tokens [start, end) of a row."""

    start: int
    end: int


class BatchEncoding(dict):
    """Columns of a tokenized batch, for `model(**batch)`; also readable as attributes.

    The methods that map between characters, words and tokens take the row first; without it, the row is 0. They return
    None if nothing corresponds. They need the tokenizer's encodings, which a batch made by `pad` does not have.
    """

    def __init__(
        self,
        columns: Mapping[str, Any],
        encodings: list | None = None,
        width: int = 0,
        pad_token: str = "[PAD]",
        side: str = "right",
    ) -> None:
        super().__init__(columns)
        vars(self).update(encodings=encodings, _width=width, _pad_token=pad_token, _side=side)

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"this encoding has no column {name!r}: it has {', '.join(self)}")

    def to(self, device: Any, *, non_blocking: bool = False) -> BatchEncoding:
        """Moves the tensors to a device, in place, and returns self."""
        for name, value in self.items():
            if hasattr(value, "is_floating_point"):  # a tensor, not an array
                self[name] = value.to(device, non_blocking=non_blocking)
        return self

    def tokens(self, batch_index: int = 0) -> list[str]:
        """Tokens of a row, padding included."""
        return pad_row(self._encoding(batch_index).tokens, self._pad_token, self._width, self._side)

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """The word index of each token of a row; None for special and pad tokens."""
        return pad_row(self._encoding(batch_index).word_ids, None, self._width, self._side)

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """The text of the pair, 0 or 1, of each token of a row; None for special and pad tokens."""
        return pad_row(self._encoding(batch_index).sequence_ids, None, self._width, self._side)

    @property
    def n_sequences(self) -> int | None:
        """Number of texts of a row: 1, or 2 for a pair; None without encodings."""
        return self.encodings[0].n_sequences if self.encodings else None

    def char_to_token(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """The token that a character of a text belongs to; None for white space."""
        encoding, shift, index = self._place("char_index", batch_or_char_index, char_index)
        token = encoding.char_to_token(index, sequence_index)
        return None if token is None else token + shift

    def char_to_word(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """The word that a character of a text belongs to."""
        encoding, _, index = self._place("char_index", batch_or_char_index, char_index)
        return encoding.char_to_word(index, sequence_index)

    def token_to_chars(self, batch_or_token_index: int, token_index: int | None = None) -> CharSpan | None:
        """The characters of a token, in its own text of the pair."""
        encoding, shift, index = self._place("token_index", batch_or_token_index, token_index)
        span = encoding.token_to_chars(index - shift) if index >= shift else None
        return None if span is None else CharSpan(*span)

    def token_to_word(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        """The index of a token's word, in its own text of the pair."""
        encoding, shift, index = self._place("token_index", batch_or_token_index, token_index)
        return encoding.token_to_word(index - shift) if index >= shift else None

    def token_to_sequence(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        """The text of the pair, 0 or 1, that a token belongs to."""
        encoding, shift, index = self._place("token_index", batch_or_token_index, token_index)
        return encoding.token_to_sequence(index - shift) if index >= shift else None

    def word_to_tokens(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> TokenSpan | None:
        """The tokens of a word of a text; None also for a word without tokens."""
        encoding, shift, index = self._place("word_index", batch_or_word_index, word_index)
        span = encoding.word_to_tokens(index, sequence_index)
        return None if span is None else TokenSpan(span[0] + shift, span[1] + shift)

    def word_to_chars(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> CharSpan | None:
        """The characters of a word of a text."""
        encoding, _, index = self._place("word_index", batch_or_word_index, word_index)
        span = encoding.word_to_chars(index, sequence_index)
        return None if span is None else CharSpan(*span)

    def _encoding(self, row: int) -> Any:
        if self.encodings is None:
            raise ValueError("this batch was padded from features; only what a tokenizer returns knows its texts")
        if not -len(self.encodings) <= row < len(self.encodings):
            raise IndexError(f"batch_index is {row}; there are {len(self.encodings)} rows")
        return self.encodings[row]

    def _place(self, name: str, first: int, second: int | None) -> tuple[Any, int, int]:
        """A row's encoding, the number of pad tokens to its left, and the index in the row."""
        row, index = (0, first) if second is None else (first, second)
        encoding = self._encoding(row)
        if index < 0:
            raise ValueError(f"{name} must be at least 0, got {index}")
        return encoding, max(0, self._width - len(encoding)) if self._side == "left" else 0, index


def check_inputs(text: Any, pair: Any, split: bool) -> tuple[list, bool]:
    """The library's input (strings, lists of words if split, or tuples of two), and whether it is a batch."""
    batched = isinstance(text, list | tuple)
    if split and batched:
        batched = bool(text) and isinstance(text[0], list | tuple)
    if not batched:
        # Like transformers: for a single input, an empty second text is no second text; in a batch it is one.
        return [_item((text, pair), split, "text, text_pair") if pair else _item(text, split, "text")], False
    if pair is None:
        return [_item(item, split, f"text[{index}]") for index, item in enumerate(text)], True
    if not isinstance(pair, list | tuple):
        raise TypeError(f"text_pair must be a list, as text is, got {_shown(pair)}")
    if len(pair) != len(text):
        raise ValueError(f"text_pair has {len(pair)} entries, text has {len(text)}")
    pairs = zip(text, pair, strict=True)
    return [_item(item, split, f"entry {index} of text, text_pair") for index, item in enumerate(pairs)], True


def _item(item: Any, split: bool, where: str) -> Any:
    if _is_text(item, split):
        return list(item) if split else item
    if isinstance(item, list | tuple) and len(item) == 2 and all(_is_text(part, split) for part in item):
        return tuple(list(part) if split else part for part in item)
    expected = "a list of words" if split else "a string"
    raise TypeError(f"{where} must be {expected}, or a pair of them, got {_shown(item)}")


def _is_text(item: Any, split: bool) -> bool:
    if split:
        return isinstance(item, list | tuple) and all(isinstance(word, str) for word in item)
    return isinstance(item, str)


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def check_unicode(items: list) -> None:
    """Raises ValueError for half a surrogate pair, which a Python string can hold and UTF-8 cannot."""
    for index, item in enumerate(items):
        for text in item if isinstance(item, tuple) else [item]:
            for string in text if isinstance(text, list) else [text]:
                try:
                    string.encode()
                except UnicodeEncodeError as error:
                    lone = string[error.start]
                    where = f"text[{index}] has {lone!r} at position {error.start}"
                    raise ValueError(f"{where}: half a surrogate pair is no character") from None


def check_settings(
    padding: Any, truncation: Any, max_length: Any, stride: Any, multiple: Any, model_max_length: int
) -> tuple[str | None, str | None, int | None]:
    """Checks the settings; returns padding strategy, truncation strategy and max_length, None for off."""
    if truncation is None and max_length is not None and padding is False:
        truncation = True
    pad, strategy = _choice("padding", padding, PADDING), _choice("truncation", truncation, TRUNCATION)
    for name, number, least in (("max_length", max_length, 1), ("pad_to_multiple_of", multiple, 1)):
        if number is not None:
            _check_int(name, number, least)
    _check_int("stride", stride, 0)
    if max_length is None and (strategy or pad == "max_length"):
        if model_max_length > 10**20:
            setting = f"truncation={truncation!r}" if strategy else f"padding={padding!r}"
            raise ValueError(f"{setting} needs max_length: this tokenizer has no model_max_length")
        max_length = model_max_length
    if strategy and pad and multiple and max_length % multiple:
        raise ValueError(f"max_length={max_length} is not a multiple of pad_to_multiple_of={multiple}")
    return pad, strategy, max_length


def _choice(name: str, value: Any, choices: dict) -> str | None:
    value = value.value if isinstance(value, Enum) else value  # transformers also has enums for strategies
    if isinstance(value, bool | str | None) and value in choices:
        return choices[value]
    raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}")


def _check_int(name: str, number: Any, least: int) -> None:
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {number!r}")


def check_side(name: str, side: str) -> str:
    if side not in ("left", "right"):
        raise ValueError(f"{name} must be 'left' or 'right', got {side!r}")
    return side


def check_tensors(return_tensors: Any) -> str | None:
    kind = return_tensors.value if isinstance(return_tensors, Enum) else return_tensors
    if kind not in (None, "np", "pt"):
        raise ValueError(f"return_tensors must be None, 'np' or 'pt', got {return_tensors!r}")
    return kind


def padded_width(lengths: list[int], pad: str | None, max_length: int | None, multiple: int | None) -> int:
    """Number of tokens that rows are padded to; 0 without padding."""
    if pad is None:
        return 0
    width = max(lengths, default=0) if pad != "max_length" or max_length is None else max_length
    return width + -width % (multiple or 1)


def pad_row(row: list, fill: Any, width: int, side: str) -> list:
    """Pads `row` with `fill` to `width`; a longer row is unchanged."""
    padding = [fill] * (width - len(row))
    return padding + row if side == "left" else row + padding


def pad_columns(columns: dict[str, tuple[list, Any]], width: int, side: str) -> dict[str, list]:
    """Pads columns, each given as (rows, fill)."""
    return {name: [pad_row(row, fill, width, side) for row in rows] for name, (rows, fill) in columns.items()}


def stack_columns(columns: dict[str, tuple[list, Any]], width: int, side: str) -> dict[str, Any]:
    """Pads columns, each given as (rows, fill), into int64 arrays (B, S); pairs of numbers make (B, S, 2)."""
    import numpy as np

    lengths = np.array([len(row) for row in columns["input_ids"][0]], dtype=np.int64)
    widths = np.maximum(lengths, width)
    if len(widths) and widths.min() != widths.max():
        found = f"rows have {widths.min()} to {widths.max()} tokens"
        raise ValueError(f"{found}: a tensor needs padding=True, and truncation=True if max_length is to hold")
    size = int(widths.max(initial=0))
    real = np.arange(size) < lengths[:, None]  # (B, S)
    if side == "left":
        real = real[:, ::-1]
    result = {}
    for name, (rows, fill) in columns.items():
        out = np.full((len(lengths), size, *np.shape(fill)), 0 if isinstance(fill, tuple) else fill, dtype=np.int64)
        flat = chain.from_iterable(rows)
        if isinstance(fill, tuple):
            flat = chain.from_iterable(flat)
        out[real] = np.fromiter(flat, np.int64).reshape(-1, *np.shape(fill))
        result[name] = out
    return result


def as_list(ids: Any) -> list:
    """Converts a number, sequence, array or tensor of ids to a list of integers, or of lists."""
    if isinstance(ids, list) and {*map(type, ids)} <= {int}:  # most are
        return list(ids)
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    if isinstance(ids, int):
        return [ids]
    return [index.tolist() if hasattr(index, "tolist") else index for index in ids]


def feature_columns(features: Any) -> dict[str, Any]:
    """Converts a list of features, mappings from column names to rows, to columns. A mapping is columns already."""
    if isinstance(features, Mapping):
        columns = dict(features)
    elif isinstance(features, list | tuple) and features:
        for index, feature in enumerate(features):
            if not isinstance(feature, Mapping):
                raise TypeError(f"feature {index} must be a mapping with input_ids, got {_shown(feature)}")
            if missing := [name for name in features[0] if name not in feature]:
                raise ValueError(f"feature {index} has no {missing[0]!r}, which feature 0 has")
        columns = {name: [feature[name] for feature in features] for name in features[0]}
    else:
        raise TypeError(f"features must be a mapping, or a list of one or more, got {_shown(features)}")
    if "input_ids" not in columns:
        raise ValueError(f"features must have input_ids; they have {', '.join(map(repr, columns)) or 'nothing'}")
    return columns


def as_rows(columns: dict[str, Any]) -> tuple[dict[str, Any], bool, str | None]:
    """Columns with arrays and tensors as lists, whether they are a batch, and the kind of `input_ids` (see `_kind`)."""
    ids = columns["input_ids"]
    kind = _kind(ids)
    if kind is not None:
        columns = {name: _plain(value) for name, value in columns.items()}
        ids = columns["input_ids"]
    if not isinstance(ids, list | tuple):
        raise TypeError(f"input_ids must be a list, array or tensor, got {_shown(ids)}")
    batched = bool(ids) and isinstance(ids[0], list | tuple)
    for index, row in enumerate(ids if batched else [ids]):
        wrong = [n for n in row if not isinstance(n, int)] if isinstance(row, list | tuple) else [row]
        if wrong:
            where = f"input_ids[{index}]" if batched else "input_ids"
            raise ValueError(f"{where} must be a list of integers, got {_shown(wrong[0])} in it")
    if batched:
        for name, value in columns.items():
            if not hasattr(value, "__len__") or len(value) != len(ids):
                found = len(value) if hasattr(value, "__len__") else _shown(value)
                raise ValueError(f"input_ids has {len(ids)} rows, {name} {found}")
    return columns, batched, kind


def _kind(ids: Any) -> str | None:
    """ "np" for arrays, "pt" for tensors, also in lists; None for numbers."""
    while isinstance(ids, list | tuple) and ids:
        ids = next((part for part in ids if not (isinstance(part, list | tuple) and not part)), None)
    if hasattr(ids, "detach"):
        return "pt"
    return "np" if hasattr(ids, "dtype") else None


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def pad_features(columns: dict[str, Any], fills: dict[str, int], width: int, side: str) -> dict[str, Any]:
    """The columns of a batch; those with a fill are padded to `width`."""
    ids = columns["input_ids"]
    padded = {}
    for name, rows in columns.items():
        if name in fills:
            for index, (row, own) in enumerate(zip(rows, ids, strict=True)):
                if len(row) != len(own):
                    raise ValueError(f"row {index}: input_ids has {len(own)} tokens, {name} {len(row)}")
            rows = [pad_row(list(row), fills[name], width, side) for row in rows]
        padded[name] = rows
    return padded


def as_tensor(name: str, value: Any, kind: str) -> Any:
    """Converts a column to an array ("np") or tensor ("pt"); an empty one has dtype int64."""
    first = value
    while isinstance(first, list | tuple) and first:
        first = first[0]
    is_empty = isinstance(first, list | tuple)
    try:
        if kind == "np":
            import numpy as np

            return np.asarray(value, dtype=np.int64 if is_empty else None)
        import torch

        if isinstance(value, list | tuple) and not is_empty and isinstance(value[0], torch.Tensor):
            return torch.stack(tuple(value))
        return torch.as_tensor(value, dtype=torch.int64 if is_empty else None)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{name} makes no tensor: {error}; padding fills up input_ids, token_type_ids, attention_mask and "
            "special_tokens_mask, no other column"
        ) from None
