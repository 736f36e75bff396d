"""Scores, each a share (0 to 1) or a correlation, by scikit-learn, seqeval and scipy; and SQuAD's own scores."""

from __future__ import annotations

import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def classification(gold: Sequence[str], predicted: Sequence[str]) -> dict[str, float]:
    """Accuracy, F1 (macro and micro), Matthews' correlation."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    return {
        "accuracy": float(accuracy_score(gold, predicted)),
        "f1_macro": float(f1_score(gold, predicted, average="macro", zero_division=0)),
        "f1_micro": float(f1_score(gold, predicted, average="micro", zero_division=0)),
        "matthews": float(matthews_corrcoef(gold, predicted)),
    }


def binary(gold: np.ndarray, predicted: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """For 0/1 labels (N,): F1 of class 1, and, if both classes occur, the area under the ROC curve."""
    from sklearn.metrics import f1_score, roc_auc_score

    scores = {"f1_binary": float(f1_score(gold, predicted, zero_division=0))}
    return scores | ({"auc": float(roc_auc_score(gold, probabilities))} if len(set(gold.tolist())) == 2 else {})


def ranking(found: Sequence[Sequence[float]], relevant: Sequence[Sequence[float]], k: int = 10) -> dict[str, float]:
    """nDCG@k, MRR@k and recall@k, means over the queries for which something is relevant; 0 if there are none.

    Args:
        found: the grades of what each query found, best first: 0 for what is not relevant. The gain is the grade.
        relevant: the grades of all that is relevant for it, in any order.
    """
    sums, count = np.zeros(3), 0
    discounts = 1 / np.log2(np.arange(2, k + 2))
    for grades, all_grades in zip(found, relevant, strict=True):
        top = np.maximum(np.array(grades[:k], dtype=float), 0)
        best = np.sort(np.maximum(np.array(all_grades, dtype=float), 0))[::-1]
        ideal = (best[:k] * discounts[: len(best)]).sum()
        hits = np.flatnonzero(top)
        if ideal:
            count += 1
            gained = (top * discounts[: len(top)]).sum()
            sums += gained / ideal, 1 / (hits[0] + 1) if len(hits) else 0, len(hits) / np.count_nonzero(best)
    names = (f"ndcg_at_{k}", f"mrr_at_{k}", f"recall_at_{k}")
    return dict(zip(names, (sums / max(1, count)).tolist(), strict=True))


def per_class(
    gold: Sequence | np.ndarray, predicted: Sequence | np.ndarray, labels: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and number of examples per class, from classes (N,) or 0/1 tables (N, labels)."""
    from sklearn.metrics import precision_recall_fscore_support

    names = labels if np.ndim(gold) == 1 else list(range(len(labels)))
    table = precision_recall_fscore_support(gold, predicted, labels=names, average=None, zero_division=0)
    return {label: _row(*row) for label, row in zip(labels, zip(*table, strict=True), strict=True)}


def per_entity_type(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, dict[str, float]]:
    """As `per_class`, for each type of whole entities, strictly as in `entities`."""
    from seqeval.metrics import classification_report
    from seqeval.scheme import IOB2

    gold, predicted = [list(tags) for tags in gold], [list(tags) for tags in predicted]
    if not any(tag != "O" for tags in (*gold, *predicted) for tag in tags):
        return {}
    report = classification_report(gold, predicted, output_dict=True, mode="strict", scheme=IOB2, zero_division=0)
    return {
        name: _row(row["precision"], row["recall"], row["f1-score"], row["support"])
        for name, row in report.items()
        if name not in ("micro avg", "macro avg", "weighted avg")
    }


def _row(precision: float, recall: float, f1: float, number: int) -> dict[str, float]:
    return {"precision": float(precision), "recall": float(recall), "f1": float(f1), "number": int(number)}


def multi_label(gold: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """For 0/1 tables (N, labels): F1, micro and macro, and the share of examples with all labels right."""
    from sklearn.metrics import accuracy_score, f1_score

    return {
        "f1_micro": float(f1_score(gold, predicted, average="micro", zero_division=0)),
        "f1_macro": float(f1_score(gold, predicted, average="macro", zero_division=0)),
        "accuracy": float(accuracy_score(gold, predicted)),
    }


def regression(gold: Sequence[float], predicted: Sequence[float]) -> dict[str, float]:
    """Pearson's and Spearman's correlations (0 if a side is constant), mean squared and mean absolute error."""
    from scipy.stats import pearsonr, spearmanr

    def correlation(function: Callable[..., Any]) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scipy warns of constant input
            value = float(function(gold, predicted).statistic)
        return value if np.isfinite(value) else 0.0

    enough = len(gold) > 1
    return {
        "pearson": correlation(pearsonr) if enough else 0.0,
        "spearman": correlation(spearmanr) if enough else 0.0,
        "mse": float(np.mean((np.asarray(gold) - np.asarray(predicted)) ** 2)),
        "mae": float(np.mean(np.abs(np.asarray(gold) - np.asarray(predicted)))),
    }


def entities(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 of whole entities, strictly: an I- tag without a preceding B- starts no entity."""
    from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score
    from seqeval.scheme import IOB2

    strict = {"mode": "strict", "scheme": IOB2, "zero_division": 0}
    gold, predicted = [list(tags) for tags in gold], [list(tags) for tags in predicted]
    return {
        "f1": float(f1_score(gold, predicted, **strict)),
        "precision": float(precision_score(gold, predicted, **strict)),
        "recall": float(recall_score(gold, predicted, **strict)),
        "accuracy": float(accuracy_score(gold, predicted)),
    }


def squad(gold: Sequence[Sequence[str]], predicted: Sequence[str]) -> dict[str, float]:
    """Exact match and F1 as in SQuAD's own evaluation; the right answer to a question without answers is ''."""
    exact, f1, has_answer = [], [], []
    for answers, prediction in zip(gold, predicted, strict=True):
        kept = [answer for answer in answers if normalize_answer(answer)] or [""]
        exact.append(max(float(normalize_answer(answer) == normalize_answer(prediction)) for answer in kept))
        f1.append(max(answer_f1(answer, prediction) for answer in kept))
        has_answer.append(kept != [""])
    scores = {"f1": float(np.mean(f1)), "exact_match": float(np.mean(exact))}
    if not all(has_answer):
        for name, chosen in (("has_answer", np.array(has_answer)), ("no_answer", ~np.array(has_answer))):
            if chosen.any():
                scores[f"{name}_f1"] = float(np.mean(np.array(f1)[chosen]))
    return scores


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous white space."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answer_f1(gold: str, predicted: str) -> float:
    """F1 of the common words. If a side has no words: 1 if neither has any, else 0."""
    gold_words, words = normalize_answer(gold).split(), normalize_answer(predicted).split()
    if not gold_words or not words:
        return float(gold_words == words)
    common = sum((Counter(gold_words) & Counter(words)).values())
    if not common:
        return 0.0
    precision, recall = common / len(words), common / len(gold_words)
    return 2 * precision * recall / (precision + recall)
