"""fill-mask: the likeliest tokens for each mask of a text, with transformers' fields."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from fastbert.inference.windows import Window
from fastbert.tasks.base import LengthSettings, Pipeline
from fastbert.tasks.text_classification import apply


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
        for number, window in enumerate(windows):
            text = items[window.item]
            if number and windows[number - 1].item == window.item:
                raise ValueError(f"the text {text!r:.60} has more tokens than {limit}; truncation=True cuts it")
            if mask not in window.encoding.ids:
                raise ValueError(f"the text has no {self.tokenizer.mask_token}: {text!r:.80}")
        return windows

    def run(self, windows: list[Window]) -> list[np.ndarray]:
        """Of each window, the logits (masks, V). fastbert's own head runs at masks only."""
        runner, mask = self.runner, self.tokenizer.mask_token_id

        def at_masks(output: Any, ids: Tensor) -> Tensor:
            if not runner.is_own:
                return output.logits[ids == mask]
            return self.model.predictions(output.last_hidden_state[ids == mask])

        module = self.model.base_model if runner.is_own else None
        return runner.run(windows, at_masks, lambda window: window.encoding.ids.count(mask), module)

    def answer(self, item: Any, windows: list[Window], rows: list[np.ndarray], settings: Any) -> Any:
        ids = windows[0].encoding.ids
        places = [place for place, token in enumerate(ids) if token == self.tokenizer.mask_token_id]
        answers = []
        for place, logits in zip(places, rows[0], strict=True):
            scores = apply("softmax", logits)
            tokens = np.arange(len(scores)) if settings.targets is None else settings.targets
            best = np.argsort(-scores[tokens], kind="stable")[: settings.top_k or 5]
            answers.append([self._filled(ids, place, int(tokens[i]), scores, len(places)) for i in best])
        return answers[0] if len(answers) == 1 else answers

    def _filled(self, ids: list[int], place: int, token: int, scores: np.ndarray, masks: int) -> dict[str, Any]:
        decode, pad = self.tokenizer.decode, self.tokenizer.pad_token_id
        filled = [i for i in (*ids[:place], token, *ids[place + 1 :]) if i != pad]
        # With several masks, the others would vanish with the special tokens.
        sequence = decode(filled, skip_special_tokens=masks == 1)
        return {"score": float(scores[token]), "token": token, "token_str": decode([token]), "sequence": sequence}

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
