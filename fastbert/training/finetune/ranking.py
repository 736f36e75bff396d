"""Losses of rerankers: over the logits (P,) of all documents, one query's after another's, and their grades (P,).

`sizes` is the number of documents of each query, (Q,).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MU = 10.0  # of the weights of NDCG-Loss2 in those of NDCG-Loss2++


def binary(logits: Tensor, grades: Tensor, sizes: Tensor) -> Tensor:
    """The binary cross entropy; grades are 0 to 1."""
    return F.binary_cross_entropy_with_logits(logits, grades)


def regression(logits: Tensor, grades: Tensor, sizes: Tensor) -> Tensor:
    """The squared error from a teacher's logits."""
    return F.mse_loss(logits, grades)


def margin(logits: Tensor, grades: Tensor, sizes: Tensor) -> Tensor:
    """The squared error of the margins between a query's first document and its others, from a teacher's logits."""
    firsts = sizes.cumsum(0) - sizes
    of = torch.repeat_interleave(firsts, sizes)
    others = torch.ones_like(logits, dtype=torch.bool).index_fill(0, firsts, False)
    return F.mse_loss((logits[of] - logits)[others], (grades[of] - grades)[others])


def listnet(logits: Tensor, grades: Tensor, sizes: Tensor) -> Tensor:
    """The cross entropy of the documents' shares by the logits from those by the grades, a mean over queries.

    Source: Cao et al. (2007), "Learning to Rank: From Pairwise Approach to Listwise Approach", with top-one
    probabilities.
    """
    scores, wanted = _table(logits, sizes), _table(grades, sizes)
    kept = torch.isfinite(scores)
    logs = F.log_softmax(scores, 1).masked_fill(~kept, 0.0)
    return -(F.softmax(wanted, 1) * logs).sum(1).mean()


def lambda_loss(logits: Tensor, grades: Tensor, sizes: Tensor) -> Tensor:
    """NDCG-Loss2++, a mean over the pairs of documents of which one has a higher grade.

    Source: Wang et al. (2018), "The LambdaLoss Framework for Ranking Metric Optimization", (14) to (18), with log2.
    """
    scores, order = _table(logits, sizes).sort(dim=1, descending=True)
    wanted = _table(grades, sizes)
    ranked = wanted.gather(1, order)
    places = torch.arange(1, scores.shape[1] + 1, device=scores.device)
    discounts = torch.log2(1.0 + places)
    best = ((2 ** wanted.sort(dim=1, descending=True)[0].clamp(min=0) - 1) / discounts).sum(1, keepdim=True)
    gains = (2 ** ranked.clamp(min=0) - 1) / best.clamp(min=1e-10)
    apart = (places[:, None] - places).abs()
    steps = 1 / discounts[(apart - 1).clamp(min=0)] - 1 / discounts[apart.clamp(max=len(places) - 1)]
    ranks = (1 / discounts[:, None] - 1 / discounts).abs()
    weights = (MU * steps + ranks) * (gains[:, :, None] - gains[:, None, :]).abs()
    better = (ranked[:, :, None] > ranked[:, None, :]) & torch.isfinite(ranked)[:, None, :]
    differences = (scores[:, :, None] - scores[:, None, :])[better]
    if not len(differences):  # every query's documents have one grade
        return logits.sum() * 0.0
    return -(weights[better].detach() * F.logsigmoid(differences)).mean() / torch.log(logits.new_tensor(2.0))


def _table(values: Tensor, sizes: Tensor) -> Tensor:
    """(P,) as (Q, the most documents), with -inf where a query has fewer."""
    rows = torch.repeat_interleave(torch.arange(len(sizes), device=values.device), sizes)
    places = torch.arange(len(values), device=values.device) - torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    table = values.new_full((len(sizes), int(sizes.max())), float("-inf"))
    return table.index_put((rows, places), values)


@dataclass(frozen=True)
class RankLoss:
    """A loss, and which grades it takes."""

    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    least: float = float("-inf")  # grade
    most: float = float("inf")
    by_query: bool = False  # whether it compares the documents of a query, which needs several


RANK_LOSSES = {
    "binary": RankLoss(binary, 0.0, 1.0),
    "listnet": RankLoss(listnet, by_query=True),
    "lambda": RankLoss(lambda_loss, 0.0, 30.0, by_query=True),
    "mse": RankLoss(regression),
    "margin-mse": RankLoss(margin, by_query=True),
}
