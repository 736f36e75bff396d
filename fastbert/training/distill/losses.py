"""What a student is told to copy: the teacher's answers, its states, and how its tokens relate to each other.

Each loss is a sum over rows, decisions or tokens, for the caller to divide by how many there are in a step. The
teacher's side needs no gradient. All is computed in at least float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def choice_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Soft targets of one class out of several: T^2 KL(teacher || student) over (N, C) logits, summed over N.

    Both are softened by the temperature T; T^2 keeps the gradients' size (Hinton et al., 2015). A class of logit
    -inf on both sides is none.
    """
    log_q, log_p = (F.log_softmax(_wide(x) / temperature, dim=-1) for x in (student, teacher))
    return temperature**2 * _divergence(log_p, log_q).sum()


def label_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Soft targets of several labels, each there or not: T^2 KL of (N, C) logits, mean over labels, summed over N."""
    student, teacher = _wide(student) / temperature, _wide(teacher) / temperature
    cross = F.binary_cross_entropy_with_logits(student, teacher.sigmoid(), reduction="none")
    own = F.binary_cross_entropy_with_logits(teacher, teacher.sigmoid(), reduction="none")
    return temperature**2 * (cross - own).mean(dim=-1).sum()


def number_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Numbers in place of classes: squared errors of (N, C), mean over C, summed over N. No temperature applies."""
    return (_wide(student) - _wide(teacher)).square().mean(dim=-1).sum()


def state_loss(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """States (T, E) of the same tokens: "mse", mean over E, or "cosine", 1 - cos; summed over T."""
    if kind == "mse":
        return number_loss(student, teacher)
    return (1 - F.cosine_similarity(_wide(student), _wide(teacher), dim=-1)).sum()


def relation_loss(student: Tensor, teacher: Tensor, cu_seqlens: Tensor, relations: Sequence[str], heads: int) -> Tensor:
    """How tokens of a sequence relate, by queries, keys and values (T, 3, H, D) of each side; summed over T.

    A relation such as "qk" is softmax(q k^T / sqrt(d)) within each sequence, after q and k are cut again, into `heads`
    of width d, so that both sides may differ in width and number of heads: KL(teacher || student), mean over
    relations and heads. "qq,kk,vv" is MiniLMv2 (Wang et al., 2021), "qk,vv" MiniLM (Wang et al., 2020); "qk" with
    as many heads as both sides have is the KL of the attention probabilities.

    Fast attention never forms those, and neither does this but for the one layer it is given: sequences go together
    by their length's power of 2, which bounds memory and work at 4 times those of their own n^2.
    """
    sides = [_wide(x.flatten(2)).unflatten(-1, (heads, -1)) for x in (student, teacher)]  # (T, 3, heads, d)
    total = sides[0].new_zeros(())
    for rows, mask in _by_length(cu_seqlens):
        student, teacher = (_relations(x[rows], mask, relations) for x in sides)
        divergence = _divergence(teacher, student)  # (B, R, heads, S), a row of pads among them
        total = total + divergence.masked_fill(~mask[:, None, None], 0).sum()
    return total / (len(relations) * heads)


def _relations(qkv: Tensor, mask: Tensor, relations: Sequence[str]) -> Tensor:
    """(B, S, 3, heads, d), (B, S) -> log-probabilities (B, R, heads, S, S); no token relates to a pad."""
    parts = dict(zip("qkv", qkv.permute(2, 0, 3, 1, 4), strict=True))  # each (B, heads, S, d)
    scores = torch.stack([parts[pair[0]] @ parts[pair[1]].transpose(-1, -2) for pair in relations], dim=1)
    scores = (scores / qkv.shape[-1] ** 0.5).masked_fill(~mask[:, None, None, None], -torch.inf)
    return F.log_softmax(scores, dim=-1)


def _by_length(cu_seqlens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For sequences of like length: where their tokens are, (B, S), and which of these are real."""
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
    """KL(p || q) of the last dimension; what both sides rule out (-inf) adds nothing, and has no gradient."""
    ruled_out = log_p == -torch.inf
    return (log_p.exp() * (log_p - log_q).masked_fill(ruled_out, 0)).sum(dim=-1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
