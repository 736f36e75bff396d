"""The common part of all embedders: tokenize, cut or split texts, batch by tokens, finish vectors. No torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from fastbert.checkpoint.hub import resolve_folder
from fastbert.checkpoint.json_files import shown
from fastbert.config import BertConfig
from fastbert.inference.batching import WINDOW, token_budget_batches
from fastbert.inference.pooling import POOLER, pooling_modes, unit
from fastbert.inference.sentence_settings import ModuleSettings, SentenceSettings, read_settings
from fastbert.inference.vector_precision import check_vector_precision, quantize_vectors
from fastbert.progress import Progress
from fastbert.tokenizer.auto import AutoTokenizer
from fastbert.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from fastbert.inference.windows import Window

MAX_TOKENS = 8192  # per batch: larger batches are no faster on a CPU, and this one is small for a GPU
_TOKENIZED_TOGETHER = 256  # texts per call: the tokenizer holds offsets and more for each token until a call ends


@dataclass
class TokenCounts:
    """Counts of tokens and of cut texts; each call adds to them."""

    tokens: int = 0  # without [CLS], [SEP] and the prompt
    unknown: int = 0  # [UNK] among them
    cut: int = 0  # texts longer than max_length


@dataclass(frozen=True)
class Tokenized:
    """Texts with the ids of prompt and text, cut to the embedder's `max_length`; `cut`: which ones were."""

    texts: Sequence[str]
    prompt: str
    ids: list[list[int]]
    cut: set[int]


class BaseEmbedder:
    """A tokenizer, and how texts become vectors: all but the model, which a subclass has.

    Args:
        tokenizer: the model's tokenizer.
        positions: the most tokens that the model takes.
        hidden_size: of a token's state.
        pooling, normalize, max_length, lower_case, prompt, truncate_dim, prompts, include_prompt: see Embedder.
        token_modules, modules: have `width_after`, and are called with rows.

    Raises:
        ValueError: no such pooling, a module for another width, or a max_length or truncate_dim out of range.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        positions: int,
        hidden_size: int,
        pooling: str | Sequence[str] = "mean",
        normalize: bool = False,
        max_length: int | None = None,
        lower_case: bool = False,
        prompt: str = "",
        truncate_dim: int | None = None,
        prompts: Mapping[str, str] | None = None,
        include_prompt: bool = True,
        token_modules: Sequence[Any] = (),
        modules: Sequence[Any] = (),
    ) -> None:
        self._modes = pooling_modes(pooling)
        if max_length is None:
            max_length = min(tokenizer.model_max_length, positions)
        if not 3 <= max_length <= positions:
            raise ValueError(f"max_length is {max_length}; it must be 3 to {positions}, as the model has positions")
        self.token_modules, self.modules = list(token_modules), list(modules)
        self._full_width = full_width(hidden_size, self._modes, token_modules, modules)
        check_truncate_dim(truncate_dim, self._full_width)
        self.truncate_dim = truncate_dim
        self.tokenizer = tokenizer.lower_cased() if lower_case else tokenizer
        self.normalize, self.max_length = normalize, max_length
        self.lower_case, self.prompt = lower_case, prompt
        self.prompts, self.include_prompt = dict(prompts or {}), include_prompt

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        load: Callable[[str | Path, BertConfig, str | None, bool], Any],
        made: Callable[[ModuleSettings], Any],
        *,
        tokenizer: Tokenizer | None,
        pooling: str | Sequence[str] | None,
        normalize: bool | None,
        max_length: int | None,
        truncate_dim: int | None,
        revision: str | None,
    ) -> Self:
        """The embedder of a folder or hub id, by its sentence-transformers files.

        Args:
            load: makes the first argument of the class, of the Transformer's folder, its config, a revision, and
                whether a pooler is needed.
            made: makes a module of its settings.
        """
        modes = None if pooling is None else pooling_modes(pooling)
        settings = read_settings(path, modes, normalize, revision)
        token_modules, modules = ([*map(made, found)] for found in (settings.token_modules, settings.modules))
        folder = path  # the Transformer's folder
        if settings.transformer and settings.modules_file is not None:
            folder = resolve_folder(path, settings.transformer, revision=revision, named_by=settings.modules_file)
            revision = None
        config = BertConfig.from_pretrained(folder, revision=revision)
        model = load(folder, config, revision, POOLER in settings.pooling)
        truncate_dim = _checked_widths(path, settings, config.hidden_size, token_modules, modules, truncate_dim)
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision)
        if max_length is None:
            longest = tokenizer.model_max_length if settings.max_length is None else settings.max_length
            max_length = min(longest, config.max_length)
            if max_length < 3:
                raise ValueError(
                    f"{folder}: max_seq_length in sentence_bert_config.json, or else model_max_length in "
                    f"tokenizer_config.json, and the positions by config.json are {longest}, {config.max_length}; "
                    "each must be at least 3"
                )
        make: Any = cls
        try:
            return make(
                model,
                tokenizer,
                pooling=settings.pooling,
                normalize=settings.normalize,
                max_length=max_length,
                lower_case=settings.lower_case,
                prompt=settings.prompt,
                truncate_dim=truncate_dim,
                prompts=settings.prompts,
                include_prompt=settings.include_prompt,
                token_modules=token_modules,
                modules=modules,
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @property
    def dtype(self) -> str:
        """Of the weights: "float32", say."""
        raise NotImplementedError

    @property
    def device(self) -> str:
        """Where the model is: "cpu", say."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """A hash of all that determines the vectors: weights, precision, vocabulary, settings (not the device)."""
        raise NotImplementedError

    def _settings_text(self) -> bytes:
        """Of the tokenizer and the settings, for `fingerprint`."""
        vocab = sorted(self.tokenizer.get_vocab().items())
        prompts = (sorted(self.prompts.items()), self.prompt, self.include_prompt)
        text = repr((vocab, repr(self.tokenizer), self.lower_case, prompts))
        return f"{text}{self.pooling} {self.normalize} {self.max_length} {self.truncate_dim}".encode()

    def pooled(self, batch: Sequence[Sequence[int]], skip: int = 0) -> np.ndarray:
        """Vectors of texts given as ids, pooled without their first `skip` tokens, before they are scaled and
        truncated: (B, E) float32."""
        raise NotImplementedError

    def states(self, batch: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """The states of the tokens of texts given as ids, (T, E) float32 each."""
        raise NotImplementedError

    def skipped_tokens(self, prompt: str) -> int:
        """The number of tokens at the start of a text after `prompt` that the pooling leaves out."""
        return 0 if self.include_prompt else self._prompt_tokens(prompt)

    def _finished(self, vectors: np.ndarray) -> np.ndarray:
        """Vectors normalised, if the embedder does, and truncated."""
        if self.normalize:
            vectors = unit(vectors)
        return vectors[:, : self.width]

    @property
    def pooling(self) -> str | tuple[str, ...]:
        """The pooling's name, or several that are concatenated."""
        return self._modes[0] if len(self._modes) == 1 else self._modes

    @property
    def pooling_modes(self) -> tuple[str, ...]:
        """The names of the poolings, one or more."""
        return self._modes

    @property
    def width(self) -> int:
        """The length E of a vector."""
        return self._full_width if self.truncate_dim is None else self.truncate_dim

    def prompt_of(self, prompt_name: str | None = None, prompt: str | None = None) -> str:
        """The text put before each text: `prompt`, else the prompt named `prompt_name`, else the embedder's own.

        Raises:
            ValueError: there is no prompt of that name.
            TypeError: prompt is no str.
        """
        if prompt is not None:
            if not isinstance(prompt, str):
                raise TypeError(f"prompt is a {type(prompt).__name__}; it must be a str")
            if prompt_name is not None:
                warnings.warn(f"prompt is given, so prompt_name {prompt_name!r} is not used", stacklevel=3)
            return prompt
        if prompt_name is None:
            return self.prompt
        if prompt_name not in self.prompts:
            known = f"one of {', '.join(map(repr, self.prompts))}" if self.prompts else "None, as there are no prompts"
            raise ValueError(f"prompt_name is {prompt_name!r}; it must be {known}")
        return self.prompts[prompt_name]

    def tokenize(
        self,
        texts: Sequence[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        counts: TokenCounts | None = None,
    ) -> list[list[int]]:
        """Ids of prompt and text for each text, cut to `max_length`; adds to `counts`."""
        return self._ids(texts, self.prompt_of(prompt_name, prompt), counts)[0]

    def _ids(
        self, texts: Sequence[str], prompt: str, counts: TokenCounts | None = None
    ) -> tuple[list[list[int]], set[int]]:
        """The ids of texts, and which of them were cut; adds to `counts`."""
        ids: list[list[int]] = []
        cut: set[int] = set()
        for start in range(0, len(texts), _TOKENIZED_TOGETHER):
            encodings = self._encodings([prompt + text for text in texts[start : start + _TOKENIZED_TOGETHER]])
            ids.extend(encoding.ids for encoding in encodings)
            cut.update(
                place
                for place, encoding in enumerate(encodings, start)
                if len(encoding) == self.max_length  # shorter texts have no overflow, and reading it costs time
                and encoding.overflowing
            )
        if counts is not None:
            counts.cut += len(cut)
            skip = max(self._prompt_tokens(prompt), 1)  # [CLS] at least
            special = (self.tokenizer.cls_token_id, self.tokenizer.sep_token_id)
            for text in (text[skip:] for text in ids):
                counts.tokens += len(text) - sum(map(text.count, special))
                counts.unknown += text.count(self.tokenizer.unk_token_id)
        return ids, cut

    def _encodings(self, texts: list[str]) -> list[Any]:
        return self.tokenizer.encodings(texts, truncation=True, max_length=self.max_length, offsets=False)

    def _prompt_tokens(self, prompt: str) -> int:
        """Number of tokens of [CLS] and the prompt at the start of a text; 0 without a prompt."""
        return len(self._encodings([prompt])[0]) - 1 if prompt else 0

    def embed(
        self,
        texts: Sequence[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        max_tokens: int = MAX_TOKENS,
        progress: bool | Callable[[int, int], None] = False,
        counts: TokenCounts | None = None,
        long: str = "cut",
        truncate_dim: int | None = None,
        normalize: bool = False,
        precision: str = "float32",
    ) -> np.ndarray:
        """Vectors of texts, in their order: (N, E) float32.

        Args:
            texts: a list of str; an empty text is `[CLS] [SEP]`.
            prompt_name: name in `prompts` of the prompt to use instead of the embedder's own.
            prompt: put before each text; overrides prompt_name.
            max_tokens: most real tokens in a batch.
            progress: True for a bar on stderr; or a function that is called after each batch with its number of
                texts and of tokens.
            counts: the texts' token counts are added to it.
            long: what becomes of a text with more tokens than `max_length`: "cut"; or "mean", of the vectors of its
                overlapping windows, each weighted by its number of tokens. `counts.cut` counts those texts.
            truncate_dim: the first numbers of a vector that are kept (default: all that the embedder gives).
            normalize: whether vectors, once truncated, are scaled to length 1; a model's own Normalize is in addition.
            precision: "float32", "int8", "uint8", "binary" or "ubinary"; see quantize_vectors.

        Raises:
            TypeError: texts is one string, or holds anything but str; or prompt is not a str.
            ValueError: max_tokens is less than 1, another long or precision, a truncate_dim out of range, or there is
                no prompt of that name.
        """
        check_vector_precision(precision)
        check_truncate_dim(truncate_dim, self.width)
        if long not in ("cut", "mean"):
            raise ValueError(f"long is {long!r}; it must be 'cut' or 'mean'")
        if isinstance(texts, str | bytes | dict) or not hasattr(texts, "__len__") or not hasattr(texts, "__getitem__"):
            raise TypeError(f"texts is a {type(texts).__name__}; it must be a list of str")
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"texts[{i}] is a {type(text).__name__}; it must be a str")
        prompt = self.prompt_of(prompt_name, prompt)
        vectors = np.empty((len(texts), self.width), dtype=np.float32)
        blocks = [texts[start : start + WINDOW] for start in range(0, len(texts), WINDOW)]

        def prepare(block: Sequence[str]) -> Tokenized:
            return self.tokenize_block(block, prompt, counts)

        made: Iterable[Tokenized] = map(prepare, blocks)
        if len(blocks) > 1:  # else there is nothing to do ahead of, and the first vector does not wait for the import
            from fastbert.inference.ahead import ahead

            made = (tokenized for _, tokenized in ahead(blocks, prepare))
        with _reporting(progress, len(texts)) as report:
            for number, tokenized in enumerate(made):
                own = self.embed_block(tokenized, max_tokens=max_tokens, long=long, report=report)
                vectors[number * WINDOW : number * WINDOW + len(own)] = own
        vectors = vectors[:, :truncate_dim]
        if normalize:
            vectors = unit(vectors)
        return quantize_vectors(vectors, precision)

    def tokenize_block(self, texts: Sequence[str], prompt: str, counts: TokenCounts | None = None) -> Tokenized:
        """The ids of texts, each after the prompt, for `embed_block`; adds to `counts`."""
        ids, cut = self._ids(texts, prompt, counts)
        return Tokenized(texts, prompt, ids, cut)

    def embed_block(
        self,
        tokenized: Tokenized,
        *,
        max_tokens: int = MAX_TOKENS,
        long: str = "cut",
        report: Callable[[int, int], None] = lambda texts, tokens: None,
    ) -> np.ndarray:
        """Vectors of tokenized texts, (N, E) float32; see `embed`, and `progress` there for `report`."""
        ids, prompt = tokenized.ids, tokenized.prompt
        split = sorted(tokenized.cut) if long == "mean" else []
        whole = [i for i in range(len(ids)) if i not in tokenized.cut] if split else list(range(len(ids)))
        skip = self.skipped_tokens(prompt)
        vectors = np.empty((len(ids), self.width), dtype=np.float32)
        for batch in token_budget_batches([len(ids[i]) for i in whole], max_tokens):
            places = [whole[i] for i in batch]
            vectors[places] = self._finished(self.pooled([ids[i] for i in places], skip))
            report(len(places), sum(len(ids[i]) for i in places))
        if split:
            windows, parts = self._window_vectors([tokenized.texts[i] for i in split], prompt, None, max_tokens)
            weights = np.array([max(window.text_tokens, 1) for window in windows], np.float32)
            of = np.array([window.item for window in windows])
            shares = (weights / np.bincount(of, weights)[of]).astype(np.float32)
            means = np.zeros((len(split), parts.shape[1]), np.float32)
            np.add.at(means, of, parts * shares[:, None])
            vectors[split] = self._finished(means)
            report(len(split), sum(map(len, windows)))
        return vectors

    def embed_windows(
        self,
        text: str,
        *,
        overlap: int | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        max_tokens: int = MAX_TOKENS,
    ) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """A vector for each window of a text, (W, E) float32, and the windows' places in it, in code points.

        Args:
            overlap: tokens that two windows share (default: 128, or a quarter of a window if that is less).
            prompt_name: as for `embed`; the prompt stands before each window.
            prompt: as for `embed`.
            max_tokens: as for `embed`.

        Raises:
            ValueError: an overlap that leaves windows no room.
        """
        prompt = self.prompt_of(prompt_name, prompt)
        windows, vectors = self._window_vectors([text], prompt, overlap, max_tokens)
        return self._finished(vectors), [_span(window.encoding) for window in windows]

    def _window_vectors(
        self, texts: Sequence[str], prompt: str, overlap: int | None, max_tokens: int
    ) -> tuple[list[Window], np.ndarray]:
        """The windows of texts, and of each its vector before `_finished`."""
        from fastbert.inference.windows import windows_of

        before = self._encodings([prompt])[0].ids[1:-1] if prompt else []
        windows = windows_of(self.tokenizer, texts, self.max_length - len(before), overlap=overlap)
        ids = [[w.encoding.ids[0], *before, *w.encoding.ids[1:]] for w in windows]
        skip = 0 if self.include_prompt else len(before) + 1
        vectors = np.empty((len(ids), self._full_width), dtype=np.float32)
        for batch in token_budget_batches([len(one) for one in ids], max_tokens):
            vectors[batch] = self.pooled([ids[i] for i in batch], skip)
        return windows, vectors


def _span(encoding: Any) -> tuple[int, int]:
    """The first and last places of a window's tokens in the text."""
    places = [place for place, part in zip(encoding.offsets, encoding.sequence_ids, strict=True) if part is not None]
    return (places[0][0], places[-1][1]) if places else (0, 0)


def check_truncate_dim(value: object, width: int, where: str = "") -> None:
    if value is not None and (type(value) is not int or not 1 <= value <= width):
        raise ValueError(f"{where}truncate_dim is {shown(value)}; it must be 1 to {width}, or None")


def width_after(modules: Iterable[Any], width: int) -> int:
    """The length of a row of length `width` after `modules`.

    Raises:
        ValueError: a module expects rows of another length.
    """
    for module in modules:
        width = module.width_after(width)
    return width


def full_width(hidden_size: int, modes: Sequence[str], token_modules: Sequence[Any], modules: Sequence[Any]) -> int:
    """The length of a vector before it is truncated."""
    width = width_after(token_modules, hidden_size)
    return width_after(modules, sum(hidden_size if mode == POOLER else width for mode in modes))


def _checked_widths(
    path: str | Path,
    settings: SentenceSettings,
    hidden_size: int,
    token_modules: Sequence[Any],
    modules: Sequence[Any],
    truncate_dim: int | None,
) -> int | None:
    """The truncate_dim to use: the given one or the folder's. Errors name the file of the width that does not fit."""
    width = width_after(token_modules, hidden_size)
    if settings.pooling_width is not None and settings.pooling_width[1] != width:
        where, named = settings.pooling_width
        raise ValueError(f"{where} is {named}; the token states have {width} numbers")
    width = full_width(hidden_size, settings.pooling, token_modules, modules)
    check_truncate_dim(settings.truncate_dim, width, f"{path}/config_sentence_transformers.json: ")
    return settings.truncate_dim if truncate_dim is None else truncate_dim


@contextmanager
def _reporting(progress: bool | Callable[[int, int], None], total: int) -> Iterator[Callable[[int, int], None]]:
    if callable(progress) or not progress:
        yield progress or (lambda texts, tokens: None)
        return
    bar = Progress(shown=True, texts=True)
    bar.begin(total)
    yield lambda texts, tokens: bar.update(bar.done + texts, bar.tokens + tokens)
    bar.line.close()
