"""The scores, against cases whose results are known by hand."""

import numpy as np
import pytest

from fastbert.training.finetune import metrics


@pytest.mark.parametrize(
    "gold, predicted, exact, f1",
    [
        (["Denver Broncos"], "The Denver Broncos!", 1, 1),  # articles, punctuation and case do not count
        (["Denver Broncos", "Broncos"], "broncos", 1, 1),  # the best over the answers
        (["Denver Broncos"], "Broncos of Denver", 0, 4 / 5),
        (["a b c d"], "c d e", 0, 2 * (2 / 3) * (2 / 3) / (2 / 3 + 2 / 3)),  # "a" is an article
        (["the the cat cat"], "cat", 0, 2 / 3),  # repeated words count as often as both have them
        (["cat"], "dog", 0, 0),
        (["cat"], "", 0, 0),
        ([], "", 1, 1),
        ([], "cat", 0, 0),
        (["the"], "", 1, 1),  # nothing is left of it
        (["the", "cat"], "", 0, 0),  # which is left out, where there is another
        (["U.S."], "US", 1, 1),
        (["well-known"], "wellknown", 1, 1),  # punctuation is dropped, not replaced
        (["Saint Bernadette  Soubirous"], "saint\tbernadette soubirous", 1, 1),
        (["theatre"], "atre", 0, 0),  # an article is a word of its own
    ],
)
def test_squad_scores(gold, predicted, exact, f1):
    scores = metrics.squad([gold], [predicted])
    assert (scores["exact_match"], scores["f1"]) == pytest.approx((exact, f1))


def test_squad_scores_are_means_and_by_kind_of_question():
    scores = metrics.squad([["cat"], [], []], ["cat dog", "", "x"])
    assert scores == pytest.approx(
        {"f1": (2 / 3 + 1) / 3, "exact_match": 1 / 3, "has_answer_f1": 2 / 3, "no_answer_f1": 1 / 2}
    )


def test_entities_count_whole_and_strictly():
    gold = [["B-PER", "I-PER", "O", "B-LOC", "B-LOC"]]
    assert metrics.entities(gold, gold)["f1"] == 1
    half = metrics.entities(gold, [["B-PER", "O", "O", "B-LOC", "B-LOC"]])
    assert (half["precision"], half["recall"], half["f1"], half["accuracy"]) == pytest.approx(
        (2 / 3, 2 / 3, 2 / 3, 4 / 5)
    )
    assert metrics.entities(gold, [["I-PER", "I-PER", "O", "B-LOC", "I-LOC"]])["f1"] == 0  # no B-; and too long
    assert metrics.entities(gold, [["B-LOC", "I-LOC", "O", "B-LOC", "B-LOC"]])["f1"] == pytest.approx(2 / 3)
    assert metrics.entities(gold, [["O"] * 5])["f1"] == 0


def test_classification_scores():
    scores = metrics.classification(["a", "a", "a", "b"], ["a", "a", "b", "b"])
    assert scores == pytest.approx(
        {"accuracy": 3 / 4, "f1_micro": 3 / 4, "f1_macro": (4 / 5 + 2 / 3) / 2, "matthews": 2 / np.sqrt(3 * 1 * 2 * 2)}
    )


def test_multi_label_scores():
    gold, predicted = np.array([[1, 0], [1, 1], [0, 0]]), np.array([[1, 0], [1, 0], [0, 0]])
    scores = metrics.multi_label(gold, predicted)
    assert scores == pytest.approx({"f1_micro": 4 / 5, "f1_macro": 1 / 2, "accuracy": 2 / 3})


def test_correlations():
    scores = metrics.regression([1, 2, 3, 4], [1, 4, 9, 100])
    assert scores["spearman"] == pytest.approx(1) and scores["pearson"] == pytest.approx(
        np.corrcoef([1, 2, 3, 4], [1, 4, 9, 100])[0, 1]
    )
    assert scores["mse"] == pytest.approx((0 + 4 + 36 + 96**2) / 4)
    constant = metrics.regression([1, 2], [3, 3])
    assert (constant["pearson"], constant["spearman"]) == (0, 0)
    assert metrics.regression([1], [3]) == {"pearson": 0, "spearman": 0, "mse": 4, "mae": 2}


def test_binary_scores_and_classes_of_their_own():
    gold, predicted, probabilities = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]), np.array([0.1, 0.7, 0.6, 0.9])
    assert metrics.binary(gold, predicted, probabilities) == pytest.approx({"f1_binary": 4 / 5, "auc": 3 / 4})
    assert metrics.binary(gold * 0, gold * 0, probabilities) == {"f1_binary": 0}
    rows = metrics.per_class(["a", "a", "b", "b"], ["a", "b", "b", "b"], ["a", "b", "c"])
    assert rows["a"] == pytest.approx({"precision": 1, "recall": 1 / 2, "f1": 2 / 3, "number": 2})
    assert rows["b"] == pytest.approx({"precision": 2 / 3, "recall": 1, "f1": 4 / 5, "number": 2})
    assert rows["c"] == {"precision": 0, "recall": 0, "f1": 0, "number": 0}
    table = metrics.per_class(np.array([[1, 0], [1, 1]]), np.array([[1, 0], [0, 1]]), ["x", "y"])
    assert (table["x"]["recall"], table["y"]["f1"]) == (1 / 2, 1)


def test_entities_by_type():
    rows = metrics.per_entity_type([["B-PER", "I-PER", "O", "B-LOC"]], [["B-PER", "O", "O", "B-LOC"]])
    assert rows["LOC"] == {"precision": 1, "recall": 1, "f1": 1, "number": 1}
    assert (rows["PER"]["f1"], rows["PER"]["number"]) == (0, 1)
    assert metrics.per_entity_type([["O"]], [["O"]]) == {}
