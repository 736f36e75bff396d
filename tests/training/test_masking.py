"""Counter-based random numbers, permutations, and masks: their statistics, and what they may depend on."""

import made_tokenizers
import numpy as np
import pytest
from scipy import stats
from training_text import SPECIALS, VOCAB, keys, sequences, within

from fastbert.tokenizer.auto import tokenizer_of
from fastbert.tokenizer.bert import BertTokenizer
from fastbert.training.counter_random import Permutation, draws, key_of
from fastbert.training.masking import IGNORED, Masker, Masking

TOKENIZER = BertTokenizer(VOCAB)
CLS, SEP, MASK = (VOCAB.index(token) for token in ("[CLS]", "[SEP]", "[MASK]"))
CONTINUES = np.array([token.startswith("##") for token in VOCAB])


def test_draws_are_those_of_splitmix64():
    # The first outputs of the reference implementation seeded with 1234567 (prng.di.unimi.it/splitmix64.c).
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    np.testing.assert_array_equal(draws(1234567, np.arange(4)), np.array(expected, dtype=np.uint64))


def test_draws_are_uniform_over_counters_and_over_keys():
    counters = np.arange(1 << 16)
    for sample in (draws(key_of(1), counters), draws(draws(key_of(2), counters), np.zeros_like(counters))):
        for bits in (sample >> np.uint64(56), sample & np.uint64(255)):
            assert stats.chisquare(np.bincount(bits.astype(int), minlength=256)).pvalue > 1e-4
    assert len({key_of(a, b) for a in range(-2, 9) for b in range(9)}) == 99


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 65, 1000, 4097])
def test_a_permutation_holds_each_number_once_and_any_part_alone(n):
    whole = Permutation(n, 3)(np.arange(n))
    np.testing.assert_array_equal(np.sort(whole), np.arange(n))
    part = np.array([n - 1, 0, n // 2])
    np.testing.assert_array_equal(Permutation(n, 3)(part), whole[part])
    if n > 60:
        assert (whole != Permutation(n, 4)(np.arange(n))).mean() > 0.8
        assert abs(np.corrcoef(whole, np.arange(n))[0, 1]) < 5 / np.sqrt(n)


@pytest.mark.parametrize("n", [5, 11])
def test_permutations_are_uniform_over_keys(n):
    seen = np.stack([Permutation(n, key_of(1, k))(np.arange(n)) for k in range(3000)])
    for position in range(n):  # what stands there, and what follows on a number
        assert stats.chisquare(np.bincount(seen[:, position], minlength=n)).pvalue > 1e-5
    follows = (seen[:, 1:] - seen[:, :-1]) % n
    assert stats.chisquare(np.bincount(follows.reshape(-1), minlength=n)[1:]).pvalue > 1e-5


def test_a_permutation_of_billions_takes_no_memory():
    n = 3_000_000_000
    there = Permutation(n, 1)(np.arange(n - 50_000, n))
    assert len(np.unique(there)) == 50_000 and there.min() >= 0 and there.max() < n
    assert stats.kstest(there / n, "uniform").pvalue > 1e-4


@pytest.mark.parametrize("whole_words", [False, True])
def test_shares(whole_words):
    tokens, offsets = sequences(4000, 100)
    seen, labels = Masker(TOKENIZER, Masking(whole_words=whole_words))(tokens, offsets, keys(4000))
    chosen = labels != IGNORED
    special = np.isin(tokens, [CLS, SEP, VOCAB.index("[UNK]")])
    assert special.sum() > 19_000 and not chosen[special].any()
    np.testing.assert_array_equal(labels[chosen], tokens[chosen])
    np.testing.assert_array_equal(seen[~chosen], tokens[~chosen])
    # Tokens of a word fall together: fewer independent draws.
    within(chosen[~special].mean(), 0.15, (~special).sum(), sigmas=4.5 * (1.5 if whole_words else 1))
    count = chosen.sum()
    within((seen[chosen] == MASK).mean(), 0.8, count)
    other = chosen & (seen != MASK)
    # One of the ordinary tokens that stand in another's place is the same again.
    ordinary = len(VOCAB) - len(SPECIALS)
    within((seen[other] != tokens[other]).sum() / count, 0.1 * (1 - 1 / ordinary), count)
    replaced = seen[other][seen[other] != tokens[other]]
    assert not np.isin(replaced, np.arange(len(SPECIALS))).any()
    assert stats.chisquare(np.bincount(replaced, minlength=len(VOCAB))[len(SPECIALS) :]).pvalue > 1e-4


def words_of(tokens, offsets):
    """The word each token belongs to, counted through; a loop, to hold the vectors against."""
    words, word = np.zeros(len(tokens), dtype=int), -1
    special = np.isin(tokens, np.arange(len(SPECIALS)))
    for i, token in enumerate(tokens):
        if i in set(offsets.tolist()) or special[i] or special[i - 1] or not CONTINUES[token]:
            word += 1
        words[i] = word
    return words


def test_whole_words_are_whole_and_single_tokens_are_not():
    tokens, offsets = sequences(40, 60)
    words = words_of(tokens, offsets)
    sizes = np.bincount(words)
    assert (sizes > 2).sum() > 50
    for whole_words in (True, False):
        _, labels = Masker(TOKENIZER, Masking(whole_words=whole_words))(tokens, offsets, keys(40))
        share = np.bincount(words, weights=labels != IGNORED) / sizes
        assert (np.isin(share, [0, 1]).all()) == whole_words


def test_a_mask_depends_on_its_sequences_key_alone():
    rng = np.random.default_rng(1)
    rows = [np.array([CLS, *rng.integers(5, len(VOCAB), n), SEP]) for n in (3, 40, 1, 17, 80)]
    mask, row_keys = Masker(TOKENIZER, Masking(whole_words=True)), keys(5)

    def together(order):
        offsets = np.cumsum([0, *(len(rows[i]) for i in order)])
        tokens = np.concatenate([rows[i] for i in order])
        before = tokens.copy()
        seen, labels = mask(tokens, offsets, row_keys[order])
        np.testing.assert_array_equal(tokens, before)
        cuts = offsets[1:-1]
        return dict(zip(order, zip(np.split(seen, cuts), np.split(labels, cuts), strict=True), strict=True))

    whole = together([0, 1, 2, 3, 4])
    for order in ([4, 2, 0], [1], [3, 1]):
        for i, (seen, labels) in together(order).items():
            np.testing.assert_array_equal(seen, whole[i][0])
            np.testing.assert_array_equal(labels, whole[i][1])
    assert not np.array_equal(mask(*sequences(5, 60), keys(5))[1], mask(*sequences(5, 60), keys(5, epoch=1))[1])


def test_each_sequence_has_something_to_predict_unless_it_is_all_special():
    tokens, offsets = sequences(500, 6)
    tokens[:6] = [CLS, SEP, SEP, SEP, SEP, SEP]
    _, labels = Masker(TOKENIZER, Masking())(tokens, offsets, keys(500))
    counts = np.add.reduceat(labels != IGNORED, offsets[:-1])
    ordinary = np.add.reduceat(tokens >= len(SPECIALS), offsets[:-1])
    assert counts[0] == 0 and (counts[ordinary > 0] >= 1).all()
    assert (counts == 1).mean() > 0.7  # the lowest alone where none is chosen


def test_settings():
    tokens, offsets = sequences(50, 40)
    ordinary = tokens >= len(SPECIALS)
    seen, labels = Masker(TOKENIZER, Masking(probability=1, mask_share=1, random_share=0))(tokens, offsets, keys(50))
    assert (seen[ordinary] == MASK).all() and (labels[ordinary] == tokens[ordinary]).all()
    assert (seen[~ordinary] == tokens[~ordinary]).all()
    seen, _ = Masker(TOKENIZER, Masking(probability=1, mask_share=0, random_share=0))(tokens, offsets, keys(50))
    np.testing.assert_array_equal(seen, tokens)
    with pytest.raises(ValueError, match="probability of masking is 0; it must be above 0"):
        Masking(probability=0)
    with pytest.raises(ValueError, match=r"mask_share 0.8 and random_share 0.3 must not be negative, nor above 1"):
        Masking(random_share=0.3)
    with pytest.raises(ValueError, match="the tokenizer has no mask token"):
        Masker(BertTokenizer(VOCAB, mask_token=None), Masking())


def test_whole_words_need_a_tokenizer_that_tells_them():
    with pytest.raises(ValueError, match="whole_words is true; the tokenizer has no tokens with ##"):
        Masker(tokenizer_of(made_tokenizers.roberta()), Masking(whole_words=True))
