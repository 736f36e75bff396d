"""Distillation losses on the teacher's outputs, its states, and the relations between its tokens.

Each loss is a sum over rows, decisions or tokens; the caller divides it by their number in a step. The teacher's side
needs no gradient. Everything is computed in at least float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def choice_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Soft targets of one class out of several: T^2 KL(teacher || student) over (N, C) logits, summed over N.

    Both are softened by the temperature T; the factor T^2 preserves the scale of the gradients (Hinton et al., 2015).
    A class with logit -inf on both sides is ignored.
    """
    log_q, log_p = (F.log_softmax(_wide(x) / temperature, dim=-1) for x in (student, teacher))
    return temperature**2 * _divergence(log_p, log_q).sum()


def label_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Soft targets of several binary labels: T^2 KL of (N, C) logits, mean over labels, summed over N."""
    student, teacher = _wide(student) / temperature, _wide(teacher) / temperature
    cross = F.binary_cross_entropy_with_logits(student, teacher.sigmoid(), reduction="none")
    own = F.binary_cross_entropy_with_logits(teacher, teacher.sigmoid(), reduction="none")
    return temperature**2 * (cross - own).mean(dim=-1).sum()


def number_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Regression: squared errors of (N, C), mean over C, summed over N. The temperature is ignored."""
    return (_wide(student) - _wide(teacher)).square().mean(dim=-1).sum()


def state_loss(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """States (T, E) of the same tokens: "mse", mean over E, or "cosine", 1 - cos; summed over T."""
    if kind == "mse":
        return number_loss(student, teacher)
    return (1 - F.cosine_similarity(_wide(student), _wide(teacher), dim=-1)).sum()


def relation_loss(student: Tensor, teacher: Tensor, cu_seqlens: Tensor, relations: Sequence[str], heads: int) -> Tensor:
    """KL(teacher || student) of relations between a sequence's tokens, mean over relations and heads, summed over T.

    Each side gives its queries, keys and values (T, 3, H, D). A relation such as "qk" is softmax(q k^T / sqrt(d))
    within each sequence, after q and k are split again into `heads` of width d, so that the sides may differ in width
    and number of heads. "qq,kk,vv" is MiniLMv2 (Wang et al., 2021), "qk,vv" MiniLM (Wang et al., 2020). "qk" with the
    number of heads that both sides have is the KL of the attention probabilities.

    Fast attention never forms these matrices; here they are formed for one layer. Sequences are batched by their
    length's power of 2, which bounds memory and work to 4 times those of unpadded n^2 matrices.
    """
    sides = [_wide(x.flatten(2)).unflatten(-1, (heads, -1)) for x in (student, teacher)]  # (T, 3, heads, d)
    total = sides[0].new_zeros(())
    for rows, mask in _by_length(cu_seqlens):
        student, teacher = (_relations(x[rows], mask, relations) for x in sides)
        divergence = _divergence(teacher, student)  # (B, R, heads, S), including rows of pads
        total = total + divergence.masked_fill(~mask[:, None, None], 0).sum()
    return total / (len(relations) * heads)


def _relations(qkv: Tensor, mask: Tensor, relations: Sequence[str]) -> Tensor:
    """(B, S, 3, heads, d), (B, S) -> log-probabilities (B, R, heads, S, S); pads are masked."""
    parts = dict(zip("qkv", qkv.permute(2, 0, 3, 1, 4), strict=True))  # each (B, heads, S, d)
    scores = torch.stack([parts[pair[0]] @ parts[pair[1]].transpose(-1, -2) for pair in relations], dim=1)
    scores = (scores / qkv.shape[-1] ** 0.5).masked_fill(~mask[:, None, None, None], -torch.inf)
    return F.log_softmax(scores, dim=-1)


def _by_length(cu_seqlens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each group of sequences of similar length: the indices of their tokens, (B, S), and a mask of real ones."""
    bounds = cu_seqlens.tolist()
    groups: dict[int, list[tuple[int, int]]] = {}
    for start, end in pairwise(bounds):
        if end > start:
            groups.setdefault((end - start - 1).bit_length(), []).append((start, end))
    found = []
    for group in groups.values():
        starts, ends = torch.tensor(group, device=cu_seqlens.device).T[..., None]  # (B, 1) each
        columns = torch.arange(max(end - start for start, end in group), device=cu_seqlens.device)
        rows = starts + columns
        found.append((rows.minimum(ends - 1), rows < ends))
    return found


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last dimension; an entry that is -inf on both sides adds 0 and has no gradient."""
    ruled_out = log_p == -torch.inf
    return (log_p.exp() * (log_p - log_q).masked_fill(ruled_out, 0)).sum(dim=-1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
