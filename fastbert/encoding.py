"""What goes into the `tokenizers` library and what comes out of it: checked texts, padded columns."""

from __future__ import annotations

from itertools import chain
from typing import Any

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
UNLIMITED = int(1e30)  # what transformers writes as model_max_length when it knows none


class BatchEncoding(dict):
    """Columns of a tokenized batch, to be passed on as `model(**batch)`; also readable as attributes."""

    def __init__(
        self,
        columns: dict[str, Any],
        encodings: list,
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

    def to(self, device: Any) -> BatchEncoding:
        """Moves the tensors to a device, in place, and returns itself."""
        for name, value in self.items():
            if hasattr(value, "is_floating_point"):  # a tensor, not an array (whose `to` says something else)
                self[name] = value.to(device)
        return self

    def tokens(self, index: int = 0) -> list[str]:
        """Tokens of row `index`, padding included."""
        return pad_row(self.encodings[index].tokens, self._pad_token, self._width, self._side)

    def word_ids(self, index: int = 0) -> list[int | None]:
        """For each token of row `index` the number of its word, None for special and pad tokens."""
        return pad_row(self.encodings[index].word_ids, None, self._width, self._side)

    def sequence_ids(self, index: int = 0) -> list[int | None]:
        """For each token of row `index` 0 or 1, its text in the pair; None for special and pad tokens."""
        return pad_row(self.encodings[index].sequence_ids, None, self._width, self._side)


def check_inputs(text: Any, pair: Any, split: bool) -> tuple[list, bool]:
    """The library's input (strings, lists of words if split, or tuples of two), and whether it is a batch."""
    batched = isinstance(text, list | tuple)
    if split and batched:
        batched = bool(text) and isinstance(text[0], list | tuple)
    if not batched:
        # Like transformers: an empty second text given alone is no second text, in a batch it is one.
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
    """Raises ValueError for half a surrogate pair: a Python string can hold one, UTF-8 cannot."""
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
    """Padding strategy, truncation strategy and max_length, checked; None is off."""
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
    if isinstance(value, bool | str | None) and value in choices:
        return choices[value]
    raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}")


def _check_int(name: str, number: Any, least: int) -> None:
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {number!r}")


def pad_row(row: list, fill: Any, width: int, side: str) -> list:
    """`row` with `fill` up to `width`; a longer row stays as it is."""
    padding = [fill] * (width - len(row))
    return padding + row if side == "left" else row + padding


def pad_columns(columns: dict[str, tuple[list, Any]], width: int, side: str) -> dict[str, list]:
    """Columns of rows, given as (rows, fill), padded."""
    return {name: [pad_row(row, fill, width, side) for row in rows] for name, (rows, fill) in columns.items()}


def stack_columns(columns: dict[str, tuple[list, Any]], width: int, side: str) -> dict[str, Any]:
    """Columns of rows, given as (rows, fill), as int64 arrays (B, S); pairs of numbers make (B, S, 2)."""
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
    """Ids as a list of integers, or of lists, from a number, sequence, array or tensor."""
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    if isinstance(ids, int):
        return [ids]
    return [index.tolist() if hasattr(index, "tolist") else index for index in ids]


def as_int64(column: Any, kind: str) -> Any:
    """A list or array as an int64 array ("np") or tensor ("pt")."""
    if kind == "np":
        import numpy as np

        return np.asarray(column, dtype=np.int64)
    import torch

    return torch.as_tensor(column, dtype=torch.int64)
