"""Batches to run encoders on: how long the texts are, their ids, and the FLOPs that their real tokens need."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastbert.families import FAMILIES
from fastbert.families.layer_kinds import key_heads, layer_kinds

SEED = 20240229


def log_normal_lengths(
    count: int = 64, mean: float = 50, longest: int = 256, shortest: int = 4, sigma: float = 0.8
) -> list[int]:
    """Lengths of texts as they come: log-normal, within [shortest, longest], the same at each call.

    The scale is chosen so that their mean is within 1 of `mean`, with one text of exactly `longest`.
    """
    generator = random.Random(SEED)
    draws = [generator.gauss(0.0, sigma) for _ in range(count)]
    top = max(range(count), key=draws.__getitem__)

    def lengths(scale: float) -> list[int]:
        drawn = [min(max(round(scale * math.exp(z)), shortest), longest) for z in draws]
        drawn[top] = longest
        return drawn

    low, high = float(shortest), float(longest)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(lengths(middle)) < mean * count else (low, middle)
    return lengths(high)


def normal_lengths(count: int, mean: float, deviation: float, longest: int, shortest: int = 8) -> list[int]:
    """Lengths drawn from a normal distribution, those past either end set to it; the same at each call."""
    generator = random.Random(SEED)
    return [min(max(round(generator.gauss(mean, deviation)), shortest), longest) for _ in range(count)]


def filled_lengths(batch_size: int, seq_len: int, fill: float) -> list[int]:
    """Lengths up to `seq_len` whose mean is about `fill * seq_len`, shuffled; fill 1 has no pad.

    Length i is S * u^(1/fill - 1) at u = (i + 1/2) / B, whose mean over u in (0, 1) is fill * S.
    """
    exponent = 1 / fill - 1
    lengths = [max(1, round(seq_len * ((i + 0.5) / batch_size) ** exponent)) for i in range(batch_size)]
    lengths[-1] = seq_len
    random.Random(SEED).shuffle(lengths)
    return lengths


def training_flops(config: Any, lengths: Sequence[int], labelled: int) -> float:
    """Three times the forward's, and those of the masked-language-model head at the labelled tokens alone.

    The same for every provider: fastbert computes less, as its last layer ends in the labelled tokens.
    """
    width = config.hidden_size
    return 3 * (forward_flops(config, lengths) + 2.0 * labelled * width * (width + config.vocab_size))


def forward_flops(config: Any, lengths: Sequence[int]) -> float:
    """FLOPs of an encoder's layers for these texts: 2 P a token, and 4 E S for attention over S tokens."""
    width, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "hidden_dim", None) or config.intermediate_size  # DistilBERT's name
    family = FAMILIES.get(getattr(config, "model_type", "bert"))
    products, windows, keys = 2, [None] * layers, 1.0
    if family is not None and family.rotary is not None:
        products = 3 if family.gated else 2
        windows = [kind.window for kind in layer_kinds(config, family)]
        keys = key_heads(config) / config.num_attention_heads
    weights = layers * ((2 + 2 * keys) * width * width + products * width * inner)
    seen = sum(n * (n if w is None else min(n, 2 * w + 1)) for w in windows for n in lengths)
    return 2.0 * weights * sum(lengths) + 4.0 * width * seen


@dataclass(frozen=True)
class Batch:
    """A right-padded batch: `inputs` are a model's arguments, `mask` (B, S) bool says which tokens are real."""

    inputs: dict[str, Tensor]
    lengths: list[int]
    mask: Tensor

    def real(self, hidden: Tensor) -> Tensor:
        """The states of the real tokens: (B, S, E) -> (T, E)."""
        return hidden[self.mask]

    def sorted_chunks(self, size: int) -> list[tuple[list[int], dict[str, Tensor]]]:
        """The texts from short to long, `size` at a time, padded to the longest of each: rows and arguments."""
        order = sorted(range(len(self.lengths)), key=self.lengths.__getitem__)
        chunks = []
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            width = max(self.lengths[row] for row in rows)
            chunks.append(
                (
                    rows,
                    {
                        "input_ids": self.inputs["input_ids"][rows, :width].contiguous(),
                        "attention_mask": self.mask[rows, :width].long(),
                    },
                )
            )
        return chunks

    def real_of_chunks(self, chunks: list[tuple[list[int], dict[str, Tensor]]], hidden: list[Tensor]) -> Tensor:
        """The states of the real tokens, in the batch's own order, from those of its sorted chunks."""
        texts: dict[int, Tensor] = {}
        for (rows, _), states in zip(chunks, hidden, strict=True):
            texts |= {row: states[i, : self.lengths[row]] for i, row in enumerate(rows)}
        return torch.cat([texts[row] for row in range(len(self.lengths))])


def make_batch(lengths: Sequence[int], vocab_size: int, device: torch.device, *, with_mask: bool = True) -> Batch:
    """Random ids in texts of these lengths, padded to the longest; the mask is left out where not wanted.

    Raises:
        ValueError: no mask is wanted, but there are pads.
    """
    width = max(lengths)
    if not with_mask and min(lengths) < width:
        raise ValueError("a batch with pads needs its mask")
    generator = torch.Generator().manual_seed(SEED)
    first = min(1000, vocab_size // 2)  # past the special tokens
    ids = torch.randint(first, vocab_size, (len(lengths), width), generator=generator)
    mask = torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]
    ids, mask = ids.masked_fill(~mask, 0).to(device), mask.to(device)
    inputs = {"input_ids": ids}
    if with_mask:
        inputs["attention_mask"] = mask.long()
    return Batch(inputs, list(lengths), mask)
