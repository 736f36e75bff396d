"""Texts that are longer than the model takes: windows and their places, the mean of their vectors."""

import itertools

import numpy as np
import pytest
from tasks_support import KINDS, LENGTH, make_texts, save

from fastbert.inference import Embedder
from fastbert.inference.base_embedder import TokenCounts
from fastbert.inference.windows import central_tokens, windows_of

LONG = make_texts()[8][:3000]
TEXTS = [*make_texts(30, longest=5)[9:], LONG]


@pytest.fixture(scope="module", params=KINDS)
def embedder(request, tmp_path_factory):
    return Embedder.from_pretrained(save(tmp_path_factory.mktemp(request.param), request.param, "Model"))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("overlap", [None, 0, 7])
def test_windows_cover_the_text(embedder, overlap, side):
    """Each token once, in order, from the window that has the most around it; offsets into the whole text."""
    tokenizer = embedder.tokenizer
    before, tokenizer.truncation_side = tokenizer.truncation_side, side
    windows = windows_of(tokenizer, [LONG], LENGTH, overlap=overlap)
    tokenizer.truncation_side = before
    whole = tokenizer(LONG, add_special_tokens=False).encodings[0]
    places = central_tokens(windows)
    assert [windows[n].encoding.ids[i] for n, i in places] == whole.ids
    assert [windows[n].encoding.offsets[i] for n, i in places] == whole.offsets
    stride = (LENGTH - 2) // 4 if overlap is None else overlap
    for first, second in itertools.pairwise(windows):
        assert second.start == first.start + first.text_tokens - stride
    for number, place in places[LENGTH:-LENGTH]:
        assert stride // 2 <= place - 1 < windows[number].text_tokens - stride // 2 + 1


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("prompt", ["", "the fox: "])
def test_the_mean_of_windows_by_hand(embedder, normalize, prompt):
    embedder.normalize = normalize
    counts = TokenCounts()
    found = embedder.embed(TEXTS, prompt=prompt, long="mean", counts=counts)
    cut = embedder.embed(TEXTS, prompt=prompt)
    assert np.array_equal(found[:-1], cut[:-1]) and not np.allclose(found[-1], cut[-1]) and counts.cut == 1
    vectors, spans = embedder.embed_windows(LONG, prompt=prompt)
    room = embedder.max_length - (len(embedder.tokenizer(prompt)["input_ids"]) - 2 if prompt else 0)
    windows = windows_of(embedder.tokenizer, [LONG], room)
    assert len(vectors) == len(spans) == len(windows) > 5 and spans[0][0] == 0 and spans[-1][1] == len(LONG.rstrip())
    assert all(a[0] < b[0] <= a[1] < b[1] for a, b in itertools.pairwise(spans))
    weights = np.array([[window.text_tokens] for window in windows], np.float32)
    embedder.normalize = False
    plain, _ = embedder.embed_windows(LONG, prompt=prompt)
    mean = (plain * weights).sum(0) / weights.sum()
    np.testing.assert_allclose(found[-1], mean / np.linalg.norm(mean) if normalize else mean, rtol=1e-4, atol=1e-5)
    if normalize:
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_a_window_is_the_vector_of_its_stretch(embedder):
    """Where the tokenizer cuts between words, the stretch alone has the same tokens."""
    vectors, spans = embedder.embed_windows(LONG, overlap=0)
    same = 0
    for vector, (begin, end) in zip(vectors, spans, strict=True):
        if begin and LONG[begin - 1] != " " and LONG[begin] != " ":
            continue
        if end < len(LONG) and LONG[end] != " ":
            continue
        alone = embedder.embed([LONG[begin:end]])[0]
        same += np.allclose(alone, vector, atol=1e-5)
    assert same


def test_bad_input(embedder):
    with pytest.raises(ValueError, match="long is 'max'; it must be 'cut' or 'mean'"):
        embedder.embed(TEXTS, long="max")
    with pytest.raises(ValueError, match="stride is 99; it must be 0 to 61"):
        embedder.embed_windows(LONG, overlap=99)
