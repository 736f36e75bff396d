"""Makes shards of pre-training examples from text, in many processes; a killed run can be resumed.

The sizes of the inputs determine which documents go to which shard. A shard is a function of its documents, the
vocabulary, the settings and the seed. So its bytes do not depend on the number of processes or on interruptions.
A shard's file appears by a rename when it is complete; a resumed run keeps the shards that exist.
`prepare.journal.json` holds the settings of an unfinished run; `index.json` is written last.

Documents are held out by a hash of their text, so that copies of a document are in the same split. The held-out split
has shards of its own, made by reading all text a second time, which is cheap next to tokenizing. So both segments of
its pairs come from held-out documents.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import accumulate, chain, islice
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np

from fastbert.checkpoint.journal import Journal, lock
from fastbert.checkpoint.journal import RunError as PrepareError
from fastbert.inference.input_files import InputError
from fastbert.progress import Progress
from fastbert.tokenizer.auto import AutoTokenizer
from fastbert.tokenizer.bert import BertTokenizer
from fastbert.tokenizer.tokenizer import Tokenizer
from fastbert.training.documents import Document, DocumentReading, Piece, cut, documents, find_files, group
from fastbert.training.examples import (
    LEAST_LENGTH,
    PAIR_SPECIALS,
    RUN_SPECIALS,
    TokenizedDocuments,
    assemble,
    pairs,
    runs,
)
from fastbert.training.pool import Advance, run_tasks
from fastbert.training.sentences import split_sentences
from fastbert.training.settings import check_fields, limited
from fastbert.training.shards import (
    INDEX,
    SUFFIX,
    Counts,
    Shard,
    ShardError,
    Vocabulary,
    token_dtype,
    write_index,
    write_shard,
)
from fastbert.training.vocabulary import learn_vocabulary

JOURNAL, JOURNAL_VERSION = "prepare.journal.json", 1
LEARN_BYTES = 256 << 20  # bytes of text, sampled evenly, that a vocabulary is learned from
TOKENIZED_TOGETHER = 1 << 19  # characters
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


@dataclass(frozen=True)
class PrepareSettings:
    """The settings that, with text and vocabulary, determine the examples.

    Args:
        max_length: most tokens of an example, including special ones.
        pairs: whether to make pairs for next-sentence prediction; else runs of a document's sentences.
        short_seq_prob: probability that a document is cut to shorter examples, so that training sees short ones;
            None is 0.1 for pairs, as in BERT, and 0 for runs.
        held_out: share of the documents that go to the split "held_out".
        seed: seed of all random draws.
        shard_bytes: approximate bytes of text in a shard: bounds the memory of a process, and the work a kill loses.
        skip_bad: count documents that cannot be read or are empty instead of failing.

    Raises:
        ValueError: a setting is out of range.
    """

    max_length: int = limited(512, least=LEAST_LENGTH)
    pairs: bool = True
    short_seq_prob: float | None = limited(None, least=0, most=1)
    held_out: float = limited(0.0, least=0, below=1)
    seed: int = limited(0, least=-(2**63), most=2**63 - 1)
    shard_bytes: int = limited(32 << 20, least=1)
    skip_bad: bool = False
    reading: DocumentReading = field(default_factory=DocumentReading)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.short_seq_prob is None:
            object.__setattr__(self, "short_seq_prob", 0.1 if self.pairs else 0.0)

    @property
    def specials(self) -> int:
        """Number of special tokens of an example."""
        return PAIR_SPECIALS if self.pairs else RUN_SPECIALS

    @property
    def room(self) -> int:
        """Most text tokens of an example."""
        return self.max_length - self.specials


class Summary(NamedTuple):
    """Results of a run."""

    splits: dict[str, Counts]
    shards: int
    resumed: int  # of them, made by an earlier run
    bytes: int  # of the shards
    vocabulary: Vocabulary


class _Task(NamedTuple):
    """One shard to be made."""

    path: Path
    split: str
    number: int
    pieces: list[Piece]


def prepare(
    inputs: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    settings: PrepareSettings | None = None,
    *,
    vocab: str | os.PathLike | None = None,
    learn_vocab: int | None = None,
    lower: bool | None = None,
    processes: int = 1,
    resume: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Makes a folder of shards and their tokenizer from text files; `Shards` reads it.

    Args:
        inputs: files, or folders of files.
        output: the folder to make.
        vocab: a vocab.txt, or the folder of a tokenizer. Give either this or learn_vocab.
        learn_vocab: number of tokens to learn from the text.
        lower: whether to lower-case text (default: True); not for a tokenizer's folder, which has its own setting.
        processes: number of processes; 1 runs in this one.
        resume: continue an interrupted run, if there is one.
        restart: discard the output of an earlier run in this folder.
        progress: reports the bytes read.

    Raises:
        InputError: an input cannot be read, is empty, or holds a bad document.
        PrepareError: there is an earlier run and neither resume nor restart is set, or its settings differ;
            the folder is not a run's; another process is writing it.
        ValueError: settings do not go together.
    """
    settings = settings or PrepareSettings()
    if (vocab is None) == (learn_vocab is None):
        raise ValueError("give a vocabulary, or the size of one to learn: one of vocab and learn_vocab")
    given = None if vocab is None else _read_tokenizer(vocab, lower)
    files = find_files(inputs, settings.reading)
    pieces = [piece for path in files for piece in cut(path, settings.reading, settings.shard_bytes)]
    asked = {
        "inputs": [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files],
        **asdict(settings),
        "vocabulary": Vocabulary.of(given).sha256 if given else f"learned, {learn_vocab} tokens",
        "lower": given is None and lower is not False,
    }
    output = Path(output)
    tasks = _plan(pieces, output, settings)
    with _Run(output, asked, resume=resume, restart=restart) as run:
        if run.vocabulary is None:
            tokenizer = given or learn_vocabulary(
                lambda: _sample(pieces, settings, LEARN_BYTES), learn_vocab or 0, lower=lower is not False
            )
            _ends(tokenizer)  # before any work
            tokenizer.save_pretrained(output)
            run.commit(Vocabulary.of(tokenizer).sha256)
        vocabulary = Vocabulary.of(AutoTokenizer.from_pretrained(output))
        if vocabulary.sha256 != run.vocabulary:
            raise PrepareError(f"{output}: the tokenizer is not the interrupted run's; --restart begins again")
        left = [task for task in tasks if not _is_done(task.path, vocabulary)]
        progress = progress or Progress(shown=False)
        progress.begin(sum(piece.bytes for task in left for piece in task.pieces))
        run_tasks(_ShardMaker(output, settings), left, processes, progress.update)
        totals: dict[str, Counts] = {}
        for task in tasks:
            totals[task.split] = totals.get(task.split, Counts()) + Shard(task.path).counts
        _check_splits(totals, settings)
        paths = {split: [task.path for task in tasks if task.split == split] for split in totals}
        write_index(output, vocabulary, asdict(settings), paths)
        run.finish()
    size = sum(task.path.stat().st_size for task in tasks)
    return Summary(totals, len(tasks), len(tasks) - len(left), size, vocabulary)


def _read_tokenizer(vocab: str | os.PathLike, lower: bool | None) -> Tokenizer:
    if Path(vocab).is_dir():
        if lower is not None:
            raise ValueError(f"lower is {lower}; the tokenizer in {vocab} says itself whether it lower-cases")
        return AutoTokenizer.from_pretrained(vocab)
    if not Path(vocab).is_file():
        raise InputError(f"{vocab}: no such vocabulary")
    return BertTokenizer(os.fspath(vocab), do_lower_case=lower is not False)


def _ends(tokenizer: Tokenizer) -> tuple[int, int]:
    """The ids before and after an example: [CLS] and [SEP], or, where a tokenizer has none, those of a text.

    Raises:
        PrepareError: it has neither.
    """
    ends = []
    for name, other in (("cls_token", "bos_token"), ("sep_token", "eos_token")):
        found: list[Any] = [getattr(tokenizer, f"{n}_id") for n in (name, other) if n in tokenizer.special_tokens_map]
        if not found:
            raise PrepareError(f"the tokenizer has neither {name} nor {other}, which an example needs")
        ends.append(int(found[0]))
    return ends[0], ends[1]


def _plan(pieces: list[Piece], output: Path, settings: PrepareSettings) -> list[_Task]:
    groups = {"train": group(pieces, settings.shard_bytes)}
    if settings.held_out:
        groups["held_out"] = group(pieces, round(settings.shard_bytes / settings.held_out))
    return [
        _Task(output / f"{split}-{number:05}{SUFFIX}", split, number, members)
        for split, listed in groups.items()
        for number, members in enumerate(listed)
    ]


def _split_of(document: Document, settings: PrepareSettings) -> str:
    """The split of a document, by its text alone; an unreadable one belongs to the first split."""
    if not settings.held_out or document.problem:
        return "train"
    salt = settings.seed.to_bytes(16, "little", signed=True)
    digest = hashlib.blake2b(document.text.encode(), digest_size=8, salt=salt).digest()
    return "held_out" if int.from_bytes(digest, "little") < settings.held_out * 2**64 else "train"


def _sample(pieces: list[Piece], settings: PrepareSettings, size: int) -> Iterator[str]:
    """About `size` bytes of documents of the training split, from pieces spread evenly over the text."""
    step = max(1, round(sum(piece.bytes for piece in pieces) / size))
    for piece in pieces[::step]:
        for document in documents(piece, settings.reading):
            if document.problem is not None and not settings.skip_bad:
                raise InputError(f"{document.where()} {document.problem}")
            if document.problem is None and _split_of(document, settings) == "train":
                yield document.text


def _is_done(path: Path, vocabulary: Vocabulary) -> bool:
    """True if an earlier run finished this shard and it is undamaged; else it is made again."""
    if not path.exists():
        return False
    try:
        shard = Shard(path)
        shard.verify()
    except ShardError:
        return False
    return shard.vocabulary == vocabulary


class _ShardMaker:
    """Makes one shard of one task; called in several processes."""

    def __init__(self, output: Path, settings: PrepareSettings) -> None:
        self._output, self._settings = output, settings

    @cached_property
    def _tokenizer(self) -> Tokenizer:  # each process reads its own
        return AutoTokenizer.from_pretrained(self._output).with_prefix_space()  # before each sentence

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary.of(self._tokenizer)

    def __call__(self, task: _Task, advance: Advance) -> None:
        settings = self._settings
        held, skipped = self._tokenize(task, advance)
        rng = Random(f"{settings.seed} {task.split} {task.number}")
        make = pairs if settings.pairs else runs
        rows: Iterable = ()
        if len(held.documents) > 1:
            try:
                rows = list(make(held, settings.max_length, settings.short_seq_prob or 0.0, rng))
            except ValueError as error:
                where = f"{task.pieces[0].path}" + " and more" * (len(task.pieces) > 1)
                raise InputError(
                    f"{task.path.name} ({where}): {error}; separate documents by blank lines, put more text in a "
                    "shard, hold out more, or make no pairs"
                ) from None
        examples = assemble(held, rows, *_ends(self._tokenizer))
        counts = Counts(
            documents=len(held.documents) - 1,
            sentences=len(held.sentences) - 1,
            skipped=skipped,
            unknown=int((examples.tokens == self._tokenizer.unk_token_id).sum()),
            too_long=int((np.diff(held.sentences) > settings.room).sum()),
        )
        write_shard(task.path, examples, self._vocabulary, counts)

    def _tokenize(self, task: _Task, advance: Advance) -> tuple[TokenizedDocuments, int]:
        """The task's documents, and the number of skipped ones."""
        dtype = token_dtype(self._vocabulary)
        blocks, skipped = [np.zeros(0, dtype)], 0
        lengths: list[int] = []  # tokens of each sentence
        sizes: list[int] = []  # sentences of each document
        for batch, read in self._batches(task):
            split = [split_sentences(document.text) for document in batch]
            ids = iter(self._tokenizer.encode_plain(list(chain.from_iterable(split))))
            kept: list[list[int]] = []
            for document, sentences in zip(batch, split, strict=True):
                full = [sentence for sentence in islice(ids, len(sentences)) if sentence]
                problem = document.problem or (None if full else "holds no token")
                if problem and not self._settings.skip_bad:
                    raise InputError(f"{document.where()} {problem}")
                skipped += bool(problem)
                if not problem:
                    kept += full
                    sizes.append(len(full))
            lengths += map(len, kept)
            blocks.append(np.fromiter(chain.from_iterable(kept), dtype))
            advance(read, len(blocks[-1]))
        return TokenizedDocuments(np.concatenate(blocks), [0, *accumulate(lengths)], [0, *accumulate(sizes)]), skipped

    def _batches(self, task: _Task) -> Iterator[tuple[list[Document], int]]:
        """Batches of the split's documents to tokenize together, each with the approximate bytes read for it."""
        batch: list[Document] = []
        held = read = 0
        for piece in task.pieces:
            left = piece.bytes
            for document in documents(piece, self._settings.reading):
                read += (size := min(len(document.text), left))
                left -= size
                if _split_of(document, self._settings) == task.split:
                    batch.append(document)
                    held += len(document.text)
                if held >= TOKENIZED_TOGETHER:
                    yield batch, read
                    batch, held, read = [], 0, 0
            read += left
        yield batch, read


def _check_splits(totals: dict[str, Counts], settings: PrepareSettings) -> None:
    if not totals["train"].examples:
        raise InputError("no document of the inputs is left to train on")
    if "held_out" in totals and not totals["held_out"].examples:
        documents = totals["train"].documents
        raise InputError(f"held_out is {settings.held_out}, which of {documents} documents holds out none")


class _Run:
    """A folder that is being made: its lock, and the journal with its settings."""

    def __init__(self, output: Path, asked: dict[str, Any], *, resume: bool, restart: bool) -> None:
        self._output = output
        self._journal = Journal(output / JOURNAL, output, version=JOURNAL_VERSION, asked=asked, key="asked")
        self.vocabulary: str | None = None  # sha256 of the saved tokenizer's; None until it is saved
        if output.exists() and not output.is_dir():
            raise PrepareError(f"{output} is a file; it must be a folder")
        self._made = not output.exists()
        output.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(output, os.O_RDONLY)
        try:
            lock(self._lock, output)
            for stale in output.glob(".*.tmp"):  # of a run that was killed
                stale.unlink()
            if restart:
                self._clear()
            self._begin(resume)
        except BaseException:
            os.close(self._lock)
            raise

    def _clear(self) -> None:
        ours = [self._output / name for name in (INDEX, JOURNAL, *_TOKENIZER_FILES)]
        for path in (*ours, *self._output.glob(f"*{SUFFIX}")):
            path.unlink(missing_ok=True)

    def _begin(self, resume: bool) -> None:
        if (before := self._journal.read(resume=resume)) is not None:
            if "vocabulary" not in before:
                raise self._journal.damaged()
            self.vocabulary = before["vocabulary"]
            return
        if (self._output / INDEX).exists():
            raise PrepareError(f"{self._output} holds prepared data: --restart makes it again")
        if other := sorted(path.name for path in self._output.iterdir()):
            raise PrepareError(f"{self._output} is not empty: it holds {other[0]}")
        self.commit(None)

    def commit(self, vocabulary: str | None) -> None:
        """Records in the journal that the tokenizer is saved, or (None) that nothing is yet."""
        self.vocabulary = vocabulary
        self._journal.write(vocabulary=vocabulary)

    def finish(self) -> None:
        self._journal.path.unlink()

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is not None and self.vocabulary is None:
            self._clear()  # nothing was made that a resumed run could use
            if self._made:
                self._output.rmdir()
        os.close(self._lock)
