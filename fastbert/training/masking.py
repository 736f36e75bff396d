"""Masked language modelling: chooses the tokens to predict and what the model sees in their place.

Masks are drawn again each time an example is read, by counter-based random numbers. The mask of token p of example i in
epoch e is a function of (seed, e, i, p); it does not depend on the batch, the rank or earlier steps.

Each token (or word) is chosen by a draw of its own, as in transformers' collator. The BERT release instead chooses a
fixed count in each sequence. A fixed count skips words that no longer fit, and so masks long words too rarely; and each
token's mask then depends on the whole sequence. As in the release, each sequence has something to predict: if no draw
is below the probability, the lowest one is chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastbert.tokenizer.tokenizer import Tokenizer
from fastbert.training.counter_random import draws

IGNORED = -100  # label where nothing is predicted
_CONTINUATION = "##"
MOST_SPAN = 10  # tokens or words


def span_shares(span_length: float) -> np.ndarray:
    """The share of spans that are longer than k, for k from 0 to MOST_SPAN - 1: geometric, cut off, of this mean."""
    lengths = np.arange(MOST_SPAN)
    low, high = 0.0, 1.0  # of the chance that a span goes on after a token
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (middle**lengths).sum() < span_length else (low, middle)
    return ((low + high) / 2) ** lengths


def start_probability(probability: float, shares: np.ndarray) -> float:
    """The chance that a span begins at a token, such that a token is in one with this probability."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 - np.prod(1 - middle * shares) < probability else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class Masking:
    """How tokens are masked. Of the chosen tokens, a share `mask_share` becomes [MASK], `random_share` another token,
    and the rest is unchanged.

    Args:
        probability: probability that a token is chosen. Special tokens never are.
        whole_words: whether the WordPieces of a word are chosen together. Each is still replaced by a draw of its own.
        span_length: mean number of tokens, or words, that are chosen together: spans, whose lengths are geometric up to
            MOST_SPAN (Joshi et al., 2020, "SpanBERT"). The probability is still that of a token. 1: none are.
    """

    probability: float = 0.15
    mask_share: float = 0.8
    random_share: float = 0.1
    whole_words: bool = False
    span_length: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.span_length <= MOST_SPAN:
            raise ValueError(f"span_length is {self.span_length}; it must be 1 to {MOST_SPAN}")
        if not 0 < self.probability <= 1:
            raise ValueError(f"probability of masking is {self.probability}; it must be above 0 and at most 1")
        if min(self.mask_share, self.random_share) < 0 or self.mask_share + self.random_share > 1:
            shares = f"mask_share {self.mask_share} and random_share {self.random_share}"
            raise ValueError(f"{shares} must not be negative, nor above 1 together")


class Masker:
    """Masks packed batches over one vocabulary.

    Args:
        tokenizer: must have a mask token. Its special tokens are neither chosen nor used as random tokens.

    Raises:
        ValueError: the tokenizer has no mask token; or with `whole_words`, is no WordPiece.
    """

    def __init__(self, tokenizer: Tokenizer, masking: Masking) -> None:
        if tokenizer.mask_token_id is None:
            raise ValueError("the tokenizer has no mask token")
        if masking.whole_words and not tokenizer.knows_words:
            raise ValueError(f"whole_words is true; the tokenizer has no tokens with {_CONTINUATION}, which tell words")
        vocab = tokenizer.get_vocab()
        self.masking, self._mask_id = masking, tokenizer.mask_token_id
        self._shares = span_shares(masking.span_length)
        self._special = np.zeros(max(vocab.values()) + 1, dtype=bool)
        self._special[tokenizer.all_special_ids] = True
        self._continues = np.zeros_like(self._special)
        self._continues[[index for token, index in vocab.items() if token.startswith(_CONTINUATION)]] = True
        ordinary = np.zeros_like(self._special)
        ordinary[list(vocab.values())] = True
        self._ordinary = np.flatnonzero(ordinary & ~self._special)

    def __call__(self, tokens: np.ndarray, offsets: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The masked tokens and the labels: both (T,) int64.

        Args:
            tokens: (T,) int64, packed sequences; not modified.
            offsets: (B+1,) offsets of the sequences; none is empty.
            keys: (B,) uint64, a random key for each sequence and epoch.
        """
        starts, lengths = offsets[:-1], np.diff(offsets)
        position = np.arange(len(tokens)) - np.repeat(starts, lengths)
        draw = draws(np.repeat(keys, lengths), position)
        # The high 32 bits choose a token, the low 32 its replacement. Special tokens get a value that is never chosen.
        choice = (draw >> np.uint64(32)).astype(np.int64)
        special = self._special[tokens]
        begins = np.ones(len(tokens), dtype=bool)
        if self.masking.whole_words:
            begins = ~self._continues[tokens]
            begins[starts] = True
            # A segment cut within a word begins with continuations: they take the draw of the special token before.
            choice = choice[np.maximum.accumulate(np.where(begins, np.arange(len(tokens)), 0))]
        never = np.int64(1) << 32
        choice[special] = never
        probability = self.masking.probability
        spans = self.masking.span_length > 1
        if spans:
            probability = start_probability(probability, self._shares)
        lowest = np.minimum.reduceat(choice, starts) if len(starts) else choice
        limit = np.maximum(lowest + 1, round(probability * 2**32))
        begun = choice < np.minimum(np.repeat(limit, lengths), never)
        if spans:
            begun = self._spans(begun, begins, special, position, draw)
        chosen = np.flatnonzero(begun)

        labels = np.full_like(tokens, IGNORED)
        labels[chosen] = tokens[chosen]
        fate = (draw[chosen] & np.uint64(0xFFFFFFFF)).astype(np.float64) / 2**32
        masked = fate < self.masking.mask_share
        replaced = ~masked & (fate < self.masking.mask_share + self.masking.random_share)
        seen = tokens.copy()
        seen[chosen[masked]] = self._mask_id
        # The token's draw is the key of the draw of its random replacement.
        pick = draws(draw[chosen[replaced]], np.zeros(int(replaced.sum()), dtype=np.int64))
        seen[chosen[replaced]] = self._ordinary[(pick % np.uint64(len(self._ordinary))).astype(np.int64)]
        return seen, labels

    def _spans(
        self, begun: np.ndarray, begins: np.ndarray, special: np.ndarray, position: np.ndarray, draw: np.ndarray
    ) -> np.ndarray:
        """(T,): the tokens of spans that begin at the chosen tokens or words; a span ends before a special token."""
        # Units are tokens, or words, which `begun` has as a whole; a special token, or a new sequence, is one as well.
        first = begins.copy()
        first[1:] |= special[:-1]  # the rest of a word that a segment's cut has left
        unit = np.cumsum(first) - 1
        heads = np.flatnonzero(first)
        starts, barrier = begun[heads], special[heads] | (position[heads] == 0)
        # A draw of the head's own says how long the span is: longer than k with the share shares[k].
        length = (draws(draw[heads], np.ones(len(heads), dtype=np.int64)) >> np.uint64(11)).astype(np.float64) / 2**53
        covered = starts.copy()
        for k in range(1, MOST_SPAN):
            open_spans = np.zeros_like(starts)
            open_spans[k:] = starts[:-k] & (length[:-k] < self._shares[k])
            crossed = np.add.reduce([np.roll(barrier, j) for j in range(k)], axis=0) > 0
            covered |= open_spans & ~crossed
        return covered[unit] & ~special
