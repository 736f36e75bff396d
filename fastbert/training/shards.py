"""Files of pre-training examples: their format, a writer, and a memory-mapping reader.

A shard is one little-endian file of five parts:

    header    128 bytes, `_HEADER`
    offsets   int64 (N+1,)            example i is tokens[offsets[i] : offsets[i + 1]], special tokens included
    seconds   int32 (N,)              start of the second segment in example i; its length if it has none
    tokens    uint16 or uint32 (T,)   uint16 where the vocabulary has at most 65,536 tokens
    labels    uint8 (N,)              1 where the second segment is from another document, else 0

A folder holds the shards of its splits, the tokenizer they were made with and, written last, `index.json`, which
names the shards with their checksums.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastbert.checkpoint.files import atomic_path, write_text
from fastbert.config import BertConfig, family_of
from fastbert.tokenizer.auto import AutoTokenizer
from fastbert.tokenizer.tokenizer import Tokenizer

INDEX, SUFFIX, VERSION = "index.json", ".shard", 1
_MAGIC = b"fbSHARD\n"
# magic, version, bytes per token, sha256 of the vocabulary; tokens in the vocabulary, documents, sentences, skipped
# documents, examples, tokens; crc32 of all after the header; crc32 of the header up to here
_HEADER = struct.Struct("<8sII32s6QI2Q8x")
_HEADER_BYTES = _HEADER.size + 4
_PADDED = 128  # a model's vocabulary may be larger by so many tokens, as some are rounded up for speed


class ShardError(ValueError):
    """A file is not a complete shard, or does not fit what it is used with; the message gives file and reason."""


@dataclass(frozen=True)
class Counts:
    """Statistics of a shard or of a split."""

    documents: int = 0
    sentences: int = 0
    skipped: int = 0  # documents that could not be read
    examples: int = 0
    tokens: int = 0  # of the examples, including special ones
    unknown: int = 0  # of them, [UNK]
    too_long: int = 0  # sentences longer than an example

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


class Vocabulary(NamedTuple):
    """The identity of a vocabulary."""

    size: int
    sha256: str  # of its tokens in the order of their ids, a line each

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        vocab = tokenizer.get_vocab()
        lines = "".join(f"{vocab[token]}\t{token}\n" for token in sorted(vocab, key=vocab.__getitem__))
        return cls(max(vocab.values()) + 1, hashlib.sha256(lines.encode()).hexdigest())


def token_dtype(vocabulary: Vocabulary) -> np.dtype:
    return np.dtype("<u2" if vocabulary.size <= 1 << 16 else "<u4")


class Examples(NamedTuple):
    """Packed examples, as a shard stores them."""

    tokens: np.ndarray  # (T,)
    offsets: np.ndarray  # (N+1,) int64
    seconds: np.ndarray  # (N,)
    labels: np.ndarray  # (N,)


def write_shard(path: Path, examples: Examples, vocabulary: Vocabulary, counts: Counts) -> None:
    """Writes a shard atomically. `counts.examples` and `counts.tokens` are replaced by those of the examples."""
    dtype = token_dtype(vocabulary)
    parts = [
        examples.offsets.astype("<i8", copy=False),
        examples.seconds.astype("<i4", copy=False),
        examples.tokens.astype(dtype, copy=False),
        examples.labels.astype("<u1", copy=False),
    ]
    crc = 0
    for part in parts:
        crc = zlib.crc32(part.data, crc)
    header = _HEADER.pack(
        _MAGIC,
        VERSION,
        dtype.itemsize,
        bytes.fromhex(vocabulary.sha256),
        vocabulary.size,
        counts.documents,
        counts.sentences,
        counts.skipped,
        len(examples.labels),
        len(examples.tokens),
        crc,
        counts.unknown,
        counts.too_long,
    )
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(header + struct.pack("<I", zlib.crc32(header)))
        for part in parts:
            file.write(part.data)


class Shard:
    """One memory-mapped shard; its pages are shared by all processes and take no heap.

    Raises:
        ShardError: the file is not a shard, is of another version, too short or too long, or its header is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        size = self.path.stat().st_size
        with open(self.path, "rb") as file:
            header = file.read(_HEADER_BYTES)
        if header[:8] != _MAGIC:
            raise ShardError(f"{path} is no shard of `fastbert prepare`")
        if size < _HEADER_BYTES:
            raise ShardError(f"{path} is cut short: {size} bytes, less than its header's {_HEADER_BYTES}")
        _, version, width, sha256, vocab_size, *numbers, self.crc32, unknown, too_long = _HEADER.unpack(header[:-4])
        if version != VERSION:
            raise ShardError(f"{path} is a shard of version {version}; this is version {VERSION}")
        if struct.pack("<I", zlib.crc32(header[:-4])) != header[-4:]:
            raise ShardError(f"{path} is corrupted: its header does not have the checksum that it names")
        self.vocabulary = Vocabulary(vocab_size, sha256.hex())
        self.counts = Counts(*(*numbers, unknown, too_long))  # the last two are 0 in older shards
        examples, tokens = self.counts.examples, self.counts.tokens
        expected = _HEADER_BYTES + 8 * (examples + 1) + 5 * examples + width * tokens
        if size != expected:
            problem = "is cut short" if size < expected else "is too long"
            raise ShardError(f"{path} {problem}: {size} bytes, and its header speaks of {expected}")
        # torch's mapping does not keep the file open, numpy's does: a corpus may exceed the limit of open files.
        self._bytes = torch.from_file(str(self.path), size=size, dtype=torch.uint8).numpy()
        self._bytes.flags.writeable = False
        self._at = _HEADER_BYTES
        self.offsets = self._take(examples + 1, "<i8")
        self.seconds = self._take(examples, "<i4")
        self.tokens = self._take(tokens, f"<u{width}")
        self.labels = self._take(examples, "<u1")

    def _take(self, count: int, dtype: str) -> np.ndarray:
        start, self._at = self._at, self._at + count * np.dtype(dtype).itemsize
        return self._bytes[start : self._at].view(dtype)

    def verify(self) -> None:
        """Reads the whole shard. Raises ShardError if its checksum differs from that in the header."""
        if zlib.crc32(self._bytes[_HEADER_BYTES:].data) != self.crc32:
            raise ShardError(f"{self.path} is corrupted: its content does not have the checksum in its header")


class Shards:
    """All examples of a split, numbered consecutively: `len(shards)` of them, `shards.counts.tokens` tokens.

    Opening reads the headers only; `verify()` reads everything. An unpickled copy opens the files again.

    Args:
        folder: a folder that `fastbert prepare` wrote.
        split: "train" or "held_out".

    Raises:
        ShardError: the folder is incomplete, has no such split, or holds a damaged or foreign file.
    """

    def __init__(self, folder: str | Path, split: str = "train") -> None:
        self.folder, self.split = Path(folder), split
        index = read_index(self.folder)
        if split not in index["splits"]:
            raise ShardError(f"{self.folder} has no split {split!r}; it has {', '.join(index['splits'])}")
        self.vocabulary = Vocabulary(**index["vocabulary"])
        self.max_length: int = index["max_length"]
        self.pairs: bool = index["pairs"]
        self._shards = [self._open(**entry) for entry in index["splits"][split]["shards"]]
        self.counts = sum((shard.counts for shard in self._shards), Counts())
        self._first = np.cumsum([0, *(shard.counts.examples for shard in self._shards)])  # first example of each shard

    def _open(self, name: str, crc32: int) -> Shard:
        path = self.folder / name
        if not path.is_file():
            raise ShardError(f"{path} is missing; {self.folder / INDEX} names it")
        shard = Shard(path)
        if shard.vocabulary != self.vocabulary:
            raise ShardError(f"{path} is of another vocabulary than {self.folder / INDEX}")
        if shard.crc32 != crc32:
            raise ShardError(f"{path} is foreign: {self.folder / INDEX} speaks of another file of this name")
        return shard

    @property
    def crc32(self) -> int:
        """The crc32 of all shards' checksums, in order."""
        return zlib.crc32(np.array([shard.crc32 for shard in self._shards], dtype="<u4").data)

    def __reduce__(self) -> tuple:
        return Shards, (self.folder, self.split)

    def __len__(self) -> int:
        return self.counts.examples

    def __repr__(self) -> str:
        return f"Shards({str(self.folder)!r}, {self.split!r}): {len(self):,} examples, {self.counts.tokens:,} tokens"

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the examples. Raises ShardError if it has been replaced by another."""
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        if Vocabulary.of(tokenizer) != self.vocabulary:
            raise ShardError(f"{self.folder}: the tokenizer has another vocabulary than the shards")
        return tokenizer

    def check_model(self, config: BertConfig, tokenizer: Tokenizer | None = None) -> None:
        """Raises ShardError if the sizes or vocabulary of a model do not fit these examples."""
        size = self.vocabulary.size
        if not size <= config.vocab_size < size + _PADDED:
            raise ShardError(
                f"vocab_size of the model is {config.vocab_size}; the vocabulary that {self.folder} was prepared with "
                f"has {size}"
            )
        if config.max_length < self.max_length:
            taken = f", of which it takes {config.max_length} tokens" if config.first_position else ""
            raise ShardError(
                f"max_position_embeddings of the model is {config.max_position_embeddings}{taken}; "
                f"{self.folder} holds examples of up to {self.max_length} tokens"
            )
        types = config.type_vocab_size if family_of(config.model_type).has_token_types else 1
        if self.pairs and types < 2:
            raise ShardError(f"type_vocab_size of the model is {types}; {self.folder} holds pairs")
        if tokenizer is not None and Vocabulary.of(tokenizer) != self.vocabulary:
            raise ShardError(f"the model's tokenizer has another vocabulary than {self.folder} was prepared with")

    def verify(self) -> None:
        """Reads everything. Raises ShardError for a file with a wrong checksum."""
        for shard in self._shards:
            shard.verify()

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Numbers of tokens of these examples, int64."""
        return self._spans(numbers)[2]

    def read(self, numbers: np.ndarray) -> Examples:
        """The examples of these numbers, in this order, tokens as int64.

        Raises:
            ShardError: an example's bounds or tokens are out of range, so its file is damaged.
        """
        owners, starts, lengths = self._spans(numbers)
        local = numbers - self._first[owners]
        offsets = np.zeros(len(numbers) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        tokens = np.empty(offsets[-1], dtype=np.int64)
        seconds, labels = np.empty((2, len(numbers)), dtype=np.int64)
        spans = zip(owners.tolist(), local.tolist(), starts.tolist(), lengths.tolist(), strict=True)
        at = 0
        for i, (owner, row, start, length) in enumerate(spans):
            shard = self._shards[owner]
            tokens[at : at + length] = shard.tokens[start : start + length]
            seconds[i], labels[i] = shard.seconds[row], shard.labels[row]
            at += length
        if at and tokens.max() >= self.vocabulary.size:
            bad = np.searchsorted(offsets, tokens.argmax(), side="right") - 1
            raise self._corrupted(owners[bad], f"token {tokens.max()} is outside the vocabulary")
        if wrong := np.flatnonzero((seconds < 1) | (seconds > lengths) | (labels > 1)).tolist():
            raise self._corrupted(owners[wrong[0]], f"example {local[wrong[0]]} has an impossible second segment")
        return Examples(tokens, offsets, seconds, labels)

    def _spans(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each example: its shard, its start in the shard, and its length."""
        owners = np.searchsorted(self._first, numbers, side="right") - 1
        starts, lengths = np.empty((2, len(numbers)), dtype=np.int64)
        order = np.argsort(owners, kind="stable")
        for rows in _runs(order, owners):
            owner = owners[rows[0]]
            offsets, local = self._shards[owner].offsets, numbers[rows] - self._first[owner]
            starts[rows] = offsets[local]
            lengths[rows] = offsets[local + 1] - starts[rows]
            ends = starts[rows] + lengths[rows]
            if (
                lengths[rows].min() < 1
                or lengths[rows].max() > self.max_length
                or starts[rows].min() < 0
                or ends.max() > len(self._shards[owner].tokens)
            ):
                raise self._corrupted(owner, f"an example is not between 1 and {self.max_length} tokens long")
        return owners, starts, lengths

    def _corrupted(self, owner: int, what: str) -> ShardError:
        return ShardError(f"{self._shards[owner].path} is corrupted: {what}")


def _runs(order: np.ndarray, owners: np.ndarray) -> Iterator[np.ndarray]:
    """Splits `order` where the owner changes."""
    if len(order):
        yield from np.split(order, np.flatnonzero(np.diff(owners[order])) + 1)


def write_index(
    folder: Path, vocabulary: Vocabulary, settings: dict[str, Any], splits: Mapping[str, Sequence[Path]]
) -> None:
    """Completes a folder: opens all its shards and writes index.json."""
    entries = {}
    for split, paths in splits.items():
        shards = [Shard(path) for path in paths]
        total = sum((shard.counts for shard in shards), Counts())
        listed = [{"name": shard.path.name, "crc32": shard.crc32} for shard in shards]
        entries[split] = {**asdict(total), "shards": listed}
    content = {"format": "fastbert shards", "version": VERSION, "vocabulary": vocabulary._asdict(), **settings}
    write_text(folder / INDEX, json.dumps({**content, "splits": entries}, indent=1) + "\n")


def read_index(folder: Path) -> dict[str, Any]:
    """The content of index.json. Raises ShardError if it is missing or invalid."""
    path = folder / INDEX
    if not path.is_file():
        raise ShardError(f"{folder} holds no prepared data: it has no {INDEX}, which `fastbert prepare` writes last")
    try:
        index = json.loads(path.read_bytes())
        version = index["version"] if index["format"] == "fastbert shards" else None
    except (ValueError, KeyError, TypeError):
        version = None
    if version is None:
        raise ShardError(f"{path} is no index of shards")
    if version != VERSION:
        raise ShardError(f"{path} is of version {version}; this is version {VERSION}")
    return index
