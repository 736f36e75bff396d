"""feature-extraction: the states of a text's tokens, as transformers' pipeline returns them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbert.inference.windows import Window, central_tokens
from fastbert.tasks.base import LengthSettings, Pipeline


@dataclass(frozen=True)
class FeatureSettings(LengthSettings):
    """Settings of a call.

    Args:
        return_tensors: whether the answer is a tensor (1, T, E) float32 instead of nested lists.
    """

    return_tensors: bool = False


class FeatureExtraction(Pipeline):
    """Texts to the states (1, T, E) of their tokens, special tokens included.

    Of a text in several windows, each token's state is that of the window where it is most central; [CLS] and what else
    comes first are of the first window, [SEP] of the last. One vector for a text is Embedder's work.
    """

    task = "feature-extraction"
    settings_class = FeatureSettings

    def run(self, windows: list[Window]) -> list[np.ndarray]:
        return self.runner.run(windows, _states, rows=len)

    def answer(self, item: Any, windows: list[Window], rows: list[np.ndarray], settings: Any) -> Any:
        states = rows[0]
        if len(rows) > 1:
            parts = [window.encoding.sequence_ids for window in (windows[0], windows[-1])]
            before = next(i for i, part in enumerate(parts[0]) if part is not None)
            after = next(i for i, part in enumerate(reversed(parts[1])) if part is not None)
            text = np.stack([rows[number][place] for number, place in central_tokens(windows)])
            states = np.concatenate([rows[0][:before], text, rows[-1][len(rows[-1]) - after :]])
        return torch.from_numpy(states[None]) if settings.return_tensors else states[None].tolist()


def _states(output: Any, ids: Tensor) -> Tensor:
    return output.last_hidden_state
