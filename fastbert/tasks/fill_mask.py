"""fill-mask: the likeliest tokens for each mask of a text, with transformers' fields; FillMask, for one text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from fastbert.config import BertConfig, family_of
from fastbert.inference.windows import Window, count_tokens
from fastbert.precision import LoadOptions
from fastbert.tasks.base import LengthSettings, Pipeline
from fastbert.tokenizer.auto import AutoTokenizer
from fastbert.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

    from fastbert.model.heads import ModelForMaskedLM


# Sequences that are decoded in one call: one by one they take three times as long.
DECODED = 4096
# Of so many columns of scores, the largest of each is looked at first.
COLUMNS = 256


@dataclass(frozen=True)
class MaskSettings(LengthSettings):
    """Settings of a call.

    Args:
        top_k: how many tokens, best first.
        targets: words to choose from; of one that is no token, the first token counts.

    Raises:
        ValueError: top_k is below 1.
    """

    top_k: int | None = 5
    targets: Any = None

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1")


class TooLongTextError(ValueError):
    """A text with more tokens than the model takes, where it must not be cut."""


class FillMaskPipeline(Pipeline):
    """Texts to [{score, token, token_str, sequence}], a list for each mask where there are several.

    A text that is too long is not split, as its masks read all of it: it is an error, unless `truncation` is True.
    """

    task = "fill-mask"
    settings_class = MaskSettings

    def settings(self, **given: Any) -> Any:
        """As Pipeline; the targets become ids, once a call."""
        found = super().settings(**given)
        return found if found.targets is None else replace(found, targets=self._targets(found.targets))

    def __call__(self, inputs: Any, **given: Any) -> Any:
        """As Pipeline; as in transformers, a list of one text gives the answer alone.

        Raises:
            ValueError: a text without a mask, or with more tokens than the model takes.
        """
        answers = super().__call__(inputs, **given)
        return answers[0] if isinstance(inputs, list) and len(inputs) == 1 else answers

    def prepare(self, items: list[Any], settings: Any) -> list[Window]:
        windows = super().prepare(items, settings)
        limit, mask = self.runner.limit(settings.max_length), self.tokenizer.mask_token_id
        for item, group in groupby(windows, key=lambda window: window.item):
            text, own = items[item], list(group)
            if len(own) > 1:
                tokens = count_tokens(own) + self.tokenizer.num_special_tokens_to_add(False)
                raise TooLongTextError(f"the text {text!r:.60} has {tokens} tokens; the model takes {limit}")
            if mask not in own[0].encoding.ids:
                raise ValueError(f"the text has no {self.tokenizer.mask_token}: {text!r:.80}")
        return windows

    def run(self, windows: list[Window]) -> list[np.ndarray]:
        """Of each window, the logits (masks, V)."""
        return self.runner.predictions_at(windows, self.tokenizer.mask_token_id)

    def answers(
        self, items: list[Any], windows: Sequence[Window], rows: Sequence[np.ndarray], settings: Any
    ) -> Iterator[tuple[Any, list[Window]]]:
        step = max(1, DECODED // (settings.top_k or 5))
        for first in range(0, len(windows), step):
            part = slice(first, first + step)
            found = [[_likeliest(mask, settings) for mask in logits] for logits in rows[part]]
            self._decode(windows[part], found)
            for window, masks in zip(windows[part], found, strict=True):
                yield masks[0] if len(masks) == 1 else masks, [window]

    def _decode(self, windows: Sequence[Window], found: list[list[list[dict[str, Any]]]]) -> None:
        """Adds token_str and sequence to what was found for each mask of each text."""
        tokens = [row for masks in found for mask in masks for row in mask]
        for row, word in zip(tokens, self.tokenizer.batch_decode([[row["token"]] for row in tokens]), strict=True):
            row["token_str"] = word
        for several in (False, True):
            rows: list[dict[str, Any]] = []
            filled: list[list[int]] = []
            for window, masks in zip(windows, found, strict=True):
                if (len(masks) > 1) == several:
                    rows += [row for mask in masks for row in mask]
                    filled += self._filled(window.encoding.ids, masks)
            # With several masks, the others would vanish with the special tokens.
            sequences = self.tokenizer.batch_decode(filled, skip_special_tokens=not several)
            for row, sequence in zip(rows, sequences, strict=True):
                row["sequence"] = sequence

    def _filled(self, ids: list[int], masks: list[list[dict[str, Any]]]) -> Iterator[list[int]]:
        """A text's ids without pads, with each token in its mask's place."""
        mask, pad = self.tokenizer.mask_token_id, self.tokenizer.pad_token_id
        places = [place for place, token in enumerate(ids) if token == mask]
        for place, found in zip(places, masks, strict=True):
            for row in found:
                yield [i for i in (*ids[:place], row["token"], *ids[place + 1 :]) if i != pad]

    def _targets(self, targets: Any) -> np.ndarray:
        """Ids of the words to choose from, as in transformers: in ascending order, each once."""
        vocabulary = self.tokenizer.get_vocab()
        found: set[int] = set()
        for word in [targets] if isinstance(targets, str) else targets:
            index = vocabulary.get(word)
            parts = [index] if index is not None else self.tokenizer.encode_plain([word])[0][:1]
            found.update(parts)
        if not found:
            raise ValueError(f"targets is {targets!r}; none of them has a token")
        return np.array(sorted(found))


def _likeliest(logits: np.ndarray, settings: Any) -> list[dict[str, Any]]:
    """The best tokens of a mask's logits (V,): [{score, token}]."""
    count = settings.top_k or 5
    if settings.targets is None:
        best = _best(logits, count)
    else:
        best = settings.targets[_best(logits[settings.targets], count)]
    top = logits.max()
    scores = np.exp(logits[best] - top) / np.exp(logits - top).sum()
    return [{"score": score, "token": token} for score, token in zip(scores.tolist(), best.tolist(), strict=True)]


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    """The places of the highest scores, best first; of equals, the first. Sorting a whole vocabulary takes as long as
    the model."""
    if count >= len(scores):
        return np.argsort(-scores, kind="stable")
    # Each of `count` columns has a score as high as `floor`, so the best are among the scores from there on.
    rows = len(scores) // COLUMNS
    largest = scores[: rows * COLUMNS].reshape(rows, COLUMNS).max(0) if rows and count <= COLUMNS else scores
    floor = np.partition(largest, -count)[-count]
    places = np.flatnonzero(~(scores < floor))
    return places[np.argsort(-scores[places], kind="stable")][:count]


class Candidate(NamedTuple):
    """A token for one [MASK], its probability, and the text with it in place."""

    token: str
    probability: float
    sequence: str


class FillMask:
    """A masked-language model and its tokenizer: the fill-mask pipeline for one text, with names of its own.

    Raises:
        ValueError: the tokenizer has no mask token.
    """

    def __init__(self, model: ModelForMaskedLM, tokenizer: Tokenizer) -> None:
        if tokenizer.mask_token is None:
            raise ValueError("the tokenizer has no mask token")
        from fastbert.tasks.runner import Runner

        self._pipeline = FillMaskPipeline(Runner(model, tokenizer))

    @property
    def model(self) -> ModelForMaskedLM:
        return self._pipeline.model

    @property
    def tokenizer(self) -> Tokenizer:
        return self._pipeline.tokenizer

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        tokenizer: Tokenizer | None = None,
        dtype: torch.dtype | None = None,
        precision: str | None = None,
        quantize: str | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        inference_only: bool = False,
    ) -> Self:
        """Loads a folder or hub id; dtype to inference_only are those of BertForMaskedLM.from_pretrained.

        Raises:
            FileNotFoundError: config.json, weights or vocabulary are missing.
            ValueError: the checkpoint has no masked-language-model head; and as BertForMaskedLM.from_pretrained.
        """
        from fastbert.checkpoint.load import Checkpoint
        from fastbert.model.auto import AutoModelForMaskedLM

        config = BertConfig.from_pretrained(path, revision=revision)
        family = family_of(config.model_type)
        with Checkpoint(path, revision, family) as checkpoint:
            if (name := checkpoint.missing_masked_lm(config.tie_word_embeddings)) is not None:
                raise ValueError(f"{path}: no tensor {name}: this checkpoint has no masked-language-model head")
        options = LoadOptions(dtype, precision, quantize, device, revision, inference_only)
        model = AutoModelForMaskedLM.of(config).load(path, options)
        return cls(model, tokenizer or AutoTokenizer.from_pretrained(path, revision=revision))

    def __call__(self, text: str, top_k: int = 5) -> list[list[Candidate]]:
        """The `top_k` likeliest tokens for each [MASK]: one list per mask, best first.

        As in transformers, a sequence shows special tokens only if the text has several masks: otherwise the other
        masks would vanish from it.

        Raises:
            TypeError: text is not a str.
            ValueError: the text has no mask, or more tokens than the model takes; top_k is less than 1.
        """
        if not isinstance(text, str):
            raise TypeError(f"text is a {type(text).__name__}; it must be a str")
        found = self._pipeline(text, top_k=top_k)
        masks = found if isinstance(found[0], list) else [found]
        return [[Candidate(row["token_str"], row["score"], row["sequence"]) for row in mask] for mask in masks]
