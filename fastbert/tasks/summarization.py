"""summarization: the sentences nearest to the middles of a text's topics (Miller, 2019, arXiv:1906.04165).

Extractive: a summary is made of whole sentences of the text, in their order.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from fastbert.inference.embed import Embedder

SEED = 12345  # of the clusters' first centres
# A sentence ends at such a mark with closing quotes after it, before a space; a full-width one needs no space.
_END = re.compile(r"(?<=[.!?…])[\"')\]»”’]*\s+|(?<=[。！？])[」』”]*\s*|\n\s*\n")


class Summarization:
    """Texts to summaries, by the vectors that an Embedder makes of their sentences.

    Args:
        ratio: share of the sentences that a summary has.
        num_sentences: how many it has, instead of a share.
        min_length, max_length: characters of a sentence that may be chosen.
        use_first: whether the first sentence is always in it.
        sentences: what splits a text, if not at marks that end sentences.
        return_as_list: whether a summary is a list of sentences, not one text.
        return_indices: whether it is a list of their numbers among all sentences.

    Raises:
        ValueError: a ratio outside 0 to 1, or num_sentences below 1.
    """

    task = "summarization"

    def __init__(
        self,
        embedder: Embedder,
        *,
        ratio: float = 0.2,
        num_sentences: int | None = None,
        min_length: int = 40,
        max_length: int = 600,
        use_first: bool = True,
        sentences: Callable[[str], list[str]] | None = None,
        return_as_list: bool = False,
        return_indices: bool = False,
    ) -> None:
        self.embedder = embedder
        self.defaults: dict[str, Any] = {
            **{"ratio": ratio, "num_sentences": num_sentences, "min_length": min_length, "max_length": max_length},
            **{"use_first": use_first, "sentences": sentences, "return_as_list": return_as_list},
            "return_indices": return_indices,
        }

    def __call__(self, inputs: Any, **given: Any) -> Any:
        """The summary of a text, or a list of them; the arguments are those of the class."""
        settings = self.defaults | given
        if unknown := settings.keys() - self.defaults.keys():
            raise TypeError(f"{self.task} takes no {min(unknown)}; it takes {', '.join(self.defaults)}")
        if not 0 < settings["ratio"] <= 1:
            raise ValueError(f"ratio is {settings['ratio']}; it must be above 0 and at most 1")
        if settings["num_sentences"] is not None and settings["num_sentences"] < 1:
            raise ValueError(f"num_sentences is {settings['num_sentences']}; it must be at least 1")
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        split = settings["sentences"] or sentences_of
        found = [split(text) for text in texts]
        kept = [
            [i for i, s in enumerate(parts) if settings["min_length"] <= len(s) <= settings["max_length"]]
            for parts in found
        ]
        vectors = self.embedder.embed(
            [parts[i] for parts, own in zip(found, kept, strict=True) for i in own], long="mean"
        )
        answers, start = [], 0
        for parts, own in zip(found, kept, strict=True):
            chosen = [own[i] for i in _chosen(vectors[start : start + len(own)], settings)]
            start += len(own)
            sentences = [parts[i] for i in chosen]
            answers.append(
                chosen
                if settings["return_indices"]
                else sentences
                if settings["return_as_list"]
                else " ".join(sentences)
            )
        return answers[0] if isinstance(inputs, str) else answers


def sentences_of(text: str) -> list[str]:
    """A text's sentences, without the space around them."""
    starts = [0, *(match.end() for match in _END.finditer(text))]
    parts = (text[begin:end].strip() for begin, end in zip(starts, [*starts[1:], len(text)], strict=True))
    return [part for part in parts if part]


def _chosen(vectors: np.ndarray, settings: dict[str, Any]) -> list[int]:
    """The sentence nearest to each cluster's centre, in the text's order; with `use_first` also the first."""
    if not len(vectors):
        return []
    wanted = settings["num_sentences"] or max(1, round(len(vectors) * settings["ratio"]))
    first = {0} if settings["use_first"] else set()
    wanted = min(wanted, len(vectors))
    clusters = wanted - len(first)
    if clusters < 1:
        return sorted(first)
    try:
        from sklearn.cluster import KMeans
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "summarization needs scikit-learn: pip install 'fastbert-engine[train]'", name="scikit-learn"
        ) from None
    centres = KMeans(clusters, random_state=SEED, n_init=10).fit(vectors).cluster_centers_
    chosen = set(first)
    for centre in centres:  # each takes the nearest that is not taken
        order = np.argsort(((vectors - centre) ** 2).sum(axis=1), kind="stable")
        chosen.add(next(int(i) for i in order if int(i) not in chosen))
    return sorted(chosen)
