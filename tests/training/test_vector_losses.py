"""The losses over vectors and over documents' logits are those of sentence-transformers."""

import pytest
import torch

from fastbert.training.finetune import ranking
from fastbert.training.vectors import losses as own

st = pytest.importorskip("sentence_transformers.sentence_transformer.losses")


class Given(torch.nn.Module):
    """A model whose features are the vectors."""

    def forward(self, features):
        return features


def columns(count, rows=12, width=24, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(rows, width, requires_grad=True) for _ in range(count)]


def check(mine, theirs, vectors):
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    own_gradients, their_gradients = (torch.autograd.grad(x, vectors, retain_graph=True) for x in (mine, theirs))
    for a, b in zip(own_gradients, their_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_ranking(count):
    vectors = columns(count)
    theirs = st.MultipleNegativesRankingLoss(Given())
    check(own.ranking(vectors, scale=20.0), theirs.compute_loss_from_embeddings(vectors, None), vectors)


def test_symmetric_ranking():
    vectors = columns(2)
    theirs = st.MultipleNegativesRankingLoss(
        Given(), directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
    )
    mine = own.ranking(vectors, scale=20.0, symmetric=True)
    check(mine, theirs.compute_loss_from_embeddings(vectors, None), vectors)


@pytest.mark.parametrize("name, theirs", [("cosent", "CoSENTLoss"), ("angle", "AnglELoss")])
def test_order_of_scores(name, theirs):
    vectors, labels = columns(2), torch.rand(12)
    mine = own.LOSSES[name].make(scale=20.0)(vectors, labels)
    check(mine, getattr(st, theirs)(Given()).compute_loss_from_embeddings(vectors, labels), vectors)


def test_cosine_regression():
    vectors, labels = columns(2), torch.rand(12)
    theirs = st.CosineSimilarityLoss(Given()).compute_loss_from_embeddings(vectors, labels)
    check(own.cosine_regression(vectors, labels), theirs, vectors)


def test_margins_and_scores_of_a_teacher():
    vectors, scores = columns(4), torch.randn(12, 3)
    margins = scores[:, :1] - scores[:, 1:]
    theirs = st.MarginMSELoss(Given()).compute_loss_from_embeddings(vectors, margins)
    check(own.margin_mse(vectors, margins), theirs, vectors)
    torch.testing.assert_close(own.margin_mse(vectors, scores), own.margin_mse(vectors, margins))
    theirs = st.DistillKLDivLoss(Given()).compute_loss_from_embeddings(vectors, scores)
    check(own.distillation(vectors, scores), theirs, vectors)


def test_a_matryoshka_is_the_sum_over_widths():
    vectors = columns(2)
    whole = own.matryoshka(own.LOSSES["ranking"].make(scale=20.0), [24, 8])
    parts = [own.ranking([x[:, :width] for x in vectors], scale=20.0) for width in (24, 8)]
    torch.testing.assert_close(whole(vectors, None), sum(parts))


def test_equal_texts_are_no_negatives():
    """Rows 0 and 1 have one positive, rows 2 and 3 one anchor: they are left out of each other's candidates."""
    vectors = columns(2, rows=4)
    labels = torch.tensor([[0, 10], [1, 10], [2, 12], [2, 13]])
    scores = 20 * own.cosines(*vectors)
    kept = torch.ones(4, 4, dtype=torch.bool)
    kept[0, 1] = kept[1, 0] = kept[2, 3] = kept[3, 2] = False
    expected = torch.stack([-scores[i].masked_fill(~kept[i], -1e9).log_softmax(0)[i] for i in range(4)]).mean()
    torch.testing.assert_close(own.ranking(vectors, labels, scale=20.0), expected)
    torch.testing.assert_close(
        own.ranking(vectors, torch.arange(8).view(4, 2), scale=20.0), own.ranking(vectors, scale=20.0)
    )


def test_supervised_draws_a_class_together():
    (vectors,) = columns(1, rows=5)
    labels = torch.tensor([0, 0, 1, 1, 2])
    scores = (20 * own.cosines(vectors, vectors)).fill_diagonal_(float("-inf")).log_softmax(1)
    expected = -(scores[0, 1] + scores[1, 0] + scores[2, 3] + scores[3, 2]) / 4  # the last is alone
    loss = own.supervised([vectors], labels, scale=20.0)
    torch.testing.assert_close(loss, expected)
    assert torch.isfinite(torch.autograd.grad(loss, vectors)[0]).all()


def test_flops_are_those_of_sentence_transformers():
    from sentence_transformers.sparse_encoder.losses import FlopsLoss

    vectors = torch.rand(6, 30) * (torch.rand(6, 30) > 0.6)
    torch.testing.assert_close(own.flops(vectors), FlopsLoss(Given()).compute_loss_from_embeddings(vectors))
    queries, documents = vectors[:3], vectors[3:]
    whole = own.sparse(lambda columns, labels: torch.tensor(1.0), 2.0, 3.0)([queries, documents], None)
    torch.testing.assert_close(whole, 1 + 2 * own.flops(queries) + 3 * own.flops(documents))


SIZES = torch.tensor([4, 2, 5])


class Reranker(torch.nn.Module):
    """A cross-encoder whose logits are given, in order."""

    num_labels, device = 1, torch.device("cpu")

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def preprocess(self, pairs, **kwargs):
        return {"places": torch.tensor([int(document) for _, document in pairs])}

    def forward(self, features):
        return {"scores": self.logits[features["places"]][:, None]}


@pytest.mark.parametrize("name, theirs", [("listnet", "ListNetLoss"), ("lambda", "LambdaLoss")])
@pytest.mark.parametrize("graded", [False, True])
def test_listwise_losses(name, theirs, graded):
    cross_losses = pytest.importorskip("sentence_transformers.cross_encoder.losses")
    torch.manual_seed(3)
    logits = torch.randn(11, requires_grad=True)
    grades = torch.randint(0, 4 if graded else 2, (11,)).float()
    grades[0], grades[4], grades[6] = 1.0, 1.0, 1.0
    model = Reranker(logits)
    loss = getattr(cross_losses, theirs).__new__(getattr(cross_losses, theirs))
    torch.nn.Module.__init__(loss)
    options = {"model": model, "activation_fn": torch.nn.Identity(), "mini_batch_size": -1}
    options |= {"weighting_scheme": cross_losses.NDCGLoss2PPScheme(), "k": None, "sigma": 1.0, "eps": 1e-10}
    options |= {"reduction_log": "binary", "cross_entropy_loss": torch.nn.CrossEntropyLoss()}
    for key, value in options.items():
        setattr(loss, key, value)
    ends = SIZES.cumsum(0).tolist()
    places = [list(range(end - size, end)) for end, size in zip(ends, SIZES.tolist(), strict=True)]
    documents = [[str(i) for i in of_query] for of_query in places]
    expected = loss([["q"] * 3, documents], [grades[of_query] for of_query in places])
    check(ranking.RANK_LOSSES[name].loss(logits, grades, SIZES), expected, [logits])


def test_pointwise_losses_and_margins():
    torch.manual_seed(0)
    logits, grades = torch.randn(11), torch.rand(11)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, grades)
    torch.testing.assert_close(ranking.binary(logits, grades, SIZES), expected)
    torch.testing.assert_close(ranking.regression(logits, grades, SIZES), ((logits - grades) ** 2).mean())
    pairs = [(0, i) for i in (1, 2, 3)] + [(4, 5)] + [(6, i) for i in (7, 8, 9, 10)]
    errors = [((logits[a] - logits[b]) - (grades[a] - grades[b])) ** 2 for a, b in pairs]
    torch.testing.assert_close(ranking.margin(logits, grades, SIZES), torch.stack(errors).mean())


def test_queries_of_one_grade_have_no_lambda_loss():
    logits = torch.randn(11, requires_grad=True)
    loss = ranking.lambda_loss(logits, torch.ones(11), SIZES)
    assert loss.item() == 0.0
    assert (torch.autograd.grad(loss, logits)[0] == 0).all()
