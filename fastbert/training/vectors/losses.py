"""Losses over the vectors of a step: columns (N, E), row by row what belongs together.

The columns are an anchor, a positive and any number of hard negatives; or two texts and their score; or one text and
its class. Each loss is a mean over rows, with the defaults of sentence-transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Sequence[Tensor], Any], Tensor]  # of columns and labels
Similarity = Callable[[Tensor, Tensor], Tensor]  # (N, E), (M, E) -> (N, M)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Of all pairs: (N, E), (M, E) -> (N, M)."""
    return F.normalize(a, dim=1) @ F.normalize(b, dim=1).T


def dots(a: Tensor, b: Tensor) -> Tensor:
    """The inner products of all pairs: (N, E), (M, E) -> (N, M)."""
    return a @ b.T


def pair_cosines(a: Tensor, b: Tensor) -> Tensor:
    """Row by row: (N, E), (N, E) -> (N,)."""
    return (F.normalize(a, dim=1) * F.normalize(b, dim=1)).sum(1)


def ranking(
    columns: Sequence[Tensor],
    labels: Tensor | None = None,
    *,
    scale: float,
    similarity: Similarity = cosines,
    symmetric: bool = False,
) -> Tensor:
    """InfoNCE: each anchor is to find its positive among all positives and hard negatives of the batch.

    Args:
        labels: (N, columns), a number for each text, the same for equal texts: a candidate that equals the anchor, its
            positive, or another positive of the same anchor, is none of its negatives. None: all others are.
        symmetric: adds the same from positives to anchors, and halves the sum.

    Source: van den Oord et al. (2018), "Representation Learning with Contrastive Predictive Coding"; Henderson et al.
    (2017), "Efficient Natural Language Response Suggestion for Smart Reply".
    """
    anchors, *candidates = columns
    scores = scale * similarity(anchors, torch.cat(candidates))
    if labels is not None:
        scores = scores.masked_fill(_no_negatives(labels), float("-inf"))
    rows = torch.arange(len(anchors), device=scores.device)
    loss = F.cross_entropy(scores, rows)
    if not symmetric:
        return loss
    return (loss + F.cross_entropy(scores[:, : len(anchors)].T, rows)) / 2


def _no_negatives(labels: Tensor) -> Tensor:
    """(N, N * candidates): True where a candidate is neither the anchor's own positive nor a negative of it."""
    anchors, positives = labels[:, :1], labels[:, 1:2]
    candidates = labels[:, 1:].T.flatten()
    known = (candidates == positives) | (candidates == anchors)
    rows = len(labels)
    known[:, :rows] |= anchors == anchors.T
    return known & ~torch.eye(rows, known.shape[1], dtype=torch.bool, device=known.device)


def supervised(columns: Sequence[Tensor], labels: Tensor, *, scale: float, similarity: Similarity = cosines) -> Tensor:
    """Each text is to find the others of its class, among all others of the batch; labels (N,) are classes.

    A text that is alone in its class counts for nothing. Source: Khosla et al. (2020), "Supervised Contrastive
    Learning", (2).
    """
    (vectors,) = columns
    own = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    scores = (scale * similarity(vectors, vectors)).masked_fill(own, float("-inf"))
    found = (labels[:, None] == labels) & ~own
    counts = found.sum(1)
    logs = F.log_softmax(scores, 1).masked_fill(~found, 0.0).sum(1) / counts.clamp(min=1)
    return -logs.sum() / (counts > 0).sum().clamp(min=1)


def cosent(columns: Sequence[Tensor], labels: Tensor, *, scale: float) -> Tensor:
    """Of any two pairs of texts, the one with the higher label is to have the higher cosine.

    log(1 + sum of exp(scale (c_i - c_j)) over label_i < label_j). Source: Su (2022), "CoSENT".
    """
    a, b = columns
    return _ordered(scale * pair_cosines(a, b), labels)


def angle(columns: Sequence[Tensor], labels: Tensor, *, scale: float) -> Tensor:
    """As `cosent`, of the angle between vectors as complex numbers. Source: Li and Li (2024), "AnglE", (5) to (8)."""
    a, b = columns
    (x, y), (u, v) = a.chunk(2, 1), b.chunk(2, 1)
    z = (u**2 + v**2).sum(1, keepdim=True)
    real, imaginary = (x * u + y * v) / z, (y * u - x * v) / z
    size = (x**2 + y**2).sum(1, keepdim=True).sqrt() / z.sqrt()
    return _ordered(scale * (torch.cat([real, imaginary], 1) / size).sum(1).abs(), labels)


def _ordered(scores: Tensor, labels: Tensor) -> Tensor:
    differences = scores[:, None] - scores[None, :]
    wrong = differences.masked_fill(labels[:, None] >= labels[None, :], float("-inf")).flatten()
    return torch.logsumexp(torch.cat([wrong.new_zeros(1), wrong]), 0)


def cosine_regression(columns: Sequence[Tensor], labels: Tensor) -> Tensor:
    """The mean squared error of cosines; labels (N,) are -1 to 1."""
    a, b = columns
    return F.mse_loss(pair_cosines(a, b), labels)


def _each(columns: Sequence[Tensor]) -> Tensor:
    """The inner product of the anchor with each of its own candidates, (N, candidates)."""
    anchors, *candidates = columns
    return torch.stack([(anchors * candidate).sum(1) for candidate in candidates], 1)


def margin_mse(columns: Sequence[Tensor], labels: Tensor) -> Tensor:
    """The squared error of the margin between a positive's and each negative's inner product with the anchor.

    labels are the teacher's margins, (N, negatives), or its scores, (N, 1 + negatives).

    Source: Hofstätter et al. (2020), "Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge
    Distillation", (2).
    """
    scores = _each(columns)
    if labels.shape == scores.shape:
        labels = labels[:, :1] - labels[:, 1:]
    return F.mse_loss(scores[:, :1] - scores[:, 1:], labels)


def distillation(columns: Sequence[Tensor], labels: Tensor) -> Tensor:
    """The KL divergence of the candidates' inner products with the anchor from a teacher's scores, (N, candidates)."""
    student, teacher = F.log_softmax(_each(columns), 1), F.log_softmax(labels, 1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def matryoshka(loss: Loss, widths: Sequence[int]) -> Loss:
    """The sum of a loss over vectors cut to each width.

    Source: Kusupati et al. (2022), "Matryoshka Representation Learning", (1), with weights of 1.
    """

    def whole(columns: Sequence[Tensor], labels: Tensor | None) -> Tensor:
        return torch.stack([loss([column[:, :width] for column in columns], labels) for width in widths]).sum()

    return whole


def flops(vectors: Tensor) -> Tensor:
    """The sum over the vocabulary of the squared mean weight: (N, V) -> ().

    Source: Paria et al. (2020), "Minimizing FLOPs to Learn Efficient Sparse Representations", (4).
    """
    return vectors.abs().mean(0).square().sum()


def sparse(loss: Loss, of_queries: float, of_documents: float) -> Loss:
    """A loss and, by weight, the `flops` of anchors and of all other columns (Formal et al., 2021, SPLADE v2, (4))."""

    def whole(columns: Sequence[Tensor], labels: Tensor | None) -> Tensor:
        queries, documents = columns[0], torch.cat([*columns[1:]] or [columns[0]])
        return loss(columns, labels) + of_queries * flops(queries) + of_documents * flops(documents)

    return whole


@dataclass(frozen=True)
class LossKind:
    """A loss, and what it can learn from, of "pairs", "classes", "scored", "margins" and "scores"."""

    make: Callable[..., Loss]
    learns_from: tuple[str, ...]
    scaled: bool = True  # whether it has a scale, one over the temperature
    compares: bool = False  # whether it takes another similarity than the cosine
    across_rows: bool = True  # whether it compares the rows of a batch


LOSSES = {
    "ranking": LossKind(lambda **o: partial(ranking, **o), ("pairs",), compares=True),
    "symmetric-ranking": LossKind(lambda **o: partial(ranking, symmetric=True, **o), ("pairs",), compares=True),
    "supervised": LossKind(lambda **o: partial(supervised, **o), ("classes",), compares=True),
    "cosent": LossKind(lambda **o: partial(cosent, **o), ("scored",)),
    "angle": LossKind(lambda **o: partial(angle, **o), ("scored",)),
    "cosine": LossKind(lambda: cosine_regression, ("scored",), scaled=False, across_rows=False),
    "margin-mse": LossKind(lambda: margin_mse, ("margins", "scores"), scaled=False, across_rows=False),
    "distillation": LossKind(lambda: distillation, ("scores",), scaled=False, across_rows=False),
}
USUAL = {"pairs": "ranking", "classes": "supervised", "scored": "cosent", "margins": "margin-mse"}  # by the data
