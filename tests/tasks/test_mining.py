"""Hard negatives: those that a search by brute force finds, by each option."""

import json
import math
from zlib import crc32

import numpy as np
import pytest
from finetune_support import NAMES, PLACES, VERBS, save_model, write_jsonl

from fastbert.cli.main import main
from fastbert.inference.embed import Embedder
from fastbert.tasks.mining import Mining, mine, rows_of_mined


def texts_of(count, seed):
    """Different texts of a few words."""
    random = np.random.default_rng(seed)
    words = [*NAMES, *PLACES, *VERBS]
    found = {}
    while len(found) < count:
        found[" ".join(random.choice(words, random.integers(3, 9)).tolist())] = None
    return list(found)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    return Embedder.from_pretrained(save_model(tmp_path_factory.mktemp("model") / "m"))


CORPUS = texts_of(300, seed=1)
PAIRS = [(query, CORPUS[i * 7]) for i, query in enumerate(texts_of(30, seed=2))]
PAIRS += [(PAIRS[0][0], CORPUS[299]), (PAIRS[1][0], "a text of its own")]


def by_hand(embedder, mining, looked_at, scores_of=None):
    """Per query, all scores of the corpus, positives left out, filtered and sorted in a loop."""
    texts = list(dict.fromkeys([*CORPUS, *(positive for _, positive in PAIRS)]))
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    vectors = unit(embedder.embed(texts))
    found = {}
    for query in dict.fromkeys(query for query, _ in PAIRS):
        own = list(dict.fromkeys(positive for q, positive in PAIRS if q == query))
        scores = dict(zip(texts, (vectors @ unit(embedder.embed([query]))[0]).tolist(), strict=True))
        closest = sorted(scores, key=lambda t: -scores[t])[:looked_at]
        scores = {text: scores[text] for text in dict.fromkeys([*closest, *own])}
        if scores_of is not None:
            scores = {text: scores_of(query, text) for text in scores}
        least = min(scores[text] for text in own)
        kept = [text for text in scores if text not in own]
        if mining.max_score is not None:
            kept = [text for text in kept if scores[text] <= mining.max_score]
        if mining.min_score is not None:
            kept = [text for text in kept if scores[text] >= mining.min_score]
        if mining.absolute_margin is not None:
            kept = [text for text in kept if scores[text] <= least - mining.absolute_margin]
        if mining.relative_margin is not None:
            kept = [text for text in kept if scores[text] <= least - abs(least) * mining.relative_margin]
        kept.sort(key=lambda text: -scores[text])
        found[query] = [(t, scores[t]) for t in kept[mining.range_min : mining.range_max]][: mining.num_negatives]
    return found


@pytest.mark.parametrize("index", ["exact", "faiss"])
@pytest.mark.parametrize(
    "options, looked_at",
    [
        ({}, 400),
        ({"num_negatives": 1, "range_min": 5}, 400),
        ({"range_min": 3, "range_max": 40, "max_score": 0.9}, 42),  # of which two may be positives
        ({"absolute_margin": 0.05, "range_max": 400}, 400),
        ({"relative_margin": 0.1, "range_max": 400}, 400),
        ({"min_score": 0.5, "range_max": 400, "num_negatives": 20}, 400),
    ],
    ids=str,
)
def test_negatives_are_those_of_brute_force(embedder, options, looked_at, index):
    if index == "faiss":
        pytest.importorskip("faiss")
    mining = Mining(index=index, **options)
    mined = mine(PAIRS, CORPUS, embedder, mining)
    expected = by_hand(embedder, mining, looked_at)
    assert [one.query for one in mined] == list(expected)
    for one in mined:
        assert [s for _, s in one.negatives] == pytest.approx([s for _, s in expected[one.query]], abs=1e-6)
        assert len({t for t, _ in one.negatives} ^ {t for t, _ in expected[one.query]}) <= 2  # of equal scores
        own = {positive for query, positive in PAIRS if query == one.query}
        assert not own & {text for text, _ in one.negatives}
        assert [text for text, _ in one.positives] == list(dict.fromkeys(p for q, p in PAIRS if q == one.query))


def test_random_ones_are_of_the_range_and_the_seed(embedder):
    top = mine(PAIRS, CORPUS, embedder, Mining(num_negatives=20, range_max=40))
    options = {"sampling_strategy": "random", "num_negatives": 4, "range_max": 20}
    found, again, other = (mine(PAIRS, CORPUS, embedder, Mining(seed=s, **options)) for s in (1, 1, 2))
    assert found == again != other
    for one, best in zip(found, top, strict=True):
        assert len(one.negatives) == 4 and {t for t, _ in one.negatives} <= {t for t, _ in best.negatives}
        assert [s for _, s in one.negatives] == sorted((s for _, s in one.negatives), reverse=True)


class CommonWords:
    """A reranker: the number of words in common, and a little that differs from text to text."""

    activation = "sigmoid"

    def __call__(self, pairs, function_to_apply):
        assert function_to_apply == "none"
        return [self.score(*pair) for pair in pairs]

    @staticmethod
    def score(query, text):
        return len(set(query.split()) & set(text.split())) + 0.001 * (crc32(f"{query} {text}".encode()) % 997)


def test_a_cross_encoder_scores_again(embedder):
    """Limits are of its sigmoids; the scores are logits, as a loss of distillation takes them."""
    score, limit = CommonWords.score, 2.5
    mining = Mining(num_negatives=2, max_score=1 / (1 + math.exp(-limit)))
    mined = mine(PAIRS, CORPUS, embedder, mining, reranker=CommonWords())
    expected = by_hand(embedder, Mining(num_negatives=2, max_score=limit), 24, score)  # ten for each, and 2 twice
    assert any(s > 1 for one in mined for _, s in one.negatives)
    for one in mined:
        assert [s for _, s in one.negatives] == pytest.approx([s for _, s in expected[one.query]])
        assert one.positives == [(text, score(one.query, text)) for text, _ in one.positives]


def test_formats_are_read_again(embedder, tmp_path):
    from fastbert.training.finetune.examples import Reading
    from fastbert.training.finetune.pair_examples import read_ranked, read_vectors

    mined = mine(PAIRS, CORPUS, embedder, Mining(num_negatives=2))
    count = len({*PAIRS})
    triplets = read_vectors(write_jsonl(tmp_path / "a.jsonl", rows_of_mined(mined)), Reading())
    assert len(triplets) == 2 * count and {len(e.texts) for e in triplets} == {3}
    tuples = read_vectors(write_jsonl(tmp_path / "b.jsonl", rows_of_mined(mined, "n-tuple")), Reading())
    assert len(tuples) == count and {len(e.texts) for e in tuples} == {4}
    pairs = read_ranked(write_jsonl(tmp_path / "c.jsonl", rows_of_mined(mined, "labeled-pair")), Reading())
    assert len(pairs) == 30 and sum(map(sum, (e.grades for e in pairs))) == count
    lists = read_ranked(write_jsonl(tmp_path / "d.jsonl", rows_of_mined(mined, "labeled-list")), Reading())
    assert {e.query for e in lists} == {query for query, _ in PAIRS}
    scored = list(rows_of_mined(mined, scores=True))
    assert scored[0]["scores"] == [mined[0].positives[0][1], mined[0].negatives[0][1]]
    with pytest.raises(ValueError, match="format is 'pairs'; it must be one of triplet"):
        list(rows_of_mined(mined, "pairs"))


def test_the_command(embedder, tmp_path, capsys):
    save_model(tmp_path / "m")
    (tmp_path / "corpus.txt").write_text("".join(text + "\n" for text in CORPUS))
    queries = write_jsonl(tmp_path / "q.jsonl", [{"anchor": q, "positive": p} for q, p in PAIRS])
    out = tmp_path / "out.jsonl"
    command = ["mine", str(tmp_path / "m"), str(tmp_path / "corpus.txt"), str(queries), "-o", str(out)]
    assert main([*command, "--num-negatives", "2", "--range-min", "1"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows == list(rows_of_mined(mine(PAIRS, CORPUS, embedder, Mining(num_negatives=2, range_min=1))))
    assert "64 rows of 30 queries with 60 negatives" in capsys.readouterr().err
    assert main([*command[:4], "-o", str(queries)]) == 1
    assert "q.jsonl is an input, too" in capsys.readouterr().err
    write_jsonl(tmp_path / "bad.jsonl", [{"anchor": "a", "positive": ""}])
    assert main([*command[:3], str(tmp_path / "bad.jsonl"), "-o", str(out)]) == 1
    assert "bad.jsonl:1: positive is ''" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_negatives": 0}, "num_negatives is 0; it must be at least 1"),
        ({"range_min": -1}, "range_min is -1; it must be at least 0"),
        ({"range_min": 5, "range_max": 6}, "range_max is 6; it must be at least range_min"),
        ({"sampling_strategy": "best"}, "sampling_strategy is 'best'; it must be 'top' or 'random'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Mining(**options)
