"""BertTokenizer: bad calls, bad files, and many threads at once, on a hand-made vocabulary."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from fastbert.tokenizer.bert import BertTokenizer

VOCAB = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "##s", "a", "b", "c"]
TEXTS = ["", "The cats sat.", "a b c " * 9, "the " * 60, "[MASK] the [SEP] cat", "中文 café 😀"]


def write(folder, vocab=VOCAB, **config):
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in vocab), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def small(tmp_path):
    return write(tmp_path / "small", model_max_length=64)


def test_threads_with_different_settings(small):
    """Each call must be as if it were alone: the library keeps truncation in the tokenizer itself."""
    tokenizer = BertTokenizer.from_pretrained(small)
    settings = [
        dict(truncation=True, max_length=n, stride=stride, return_overflowing_tokens=True)
        for n in range(8, 20)
        for stride in (0, 1, 4)
    ]
    settings += [dict(padding="max_length", max_length=n, truncation=False) for n in (40, 50)] + [{}]
    expected = [BertTokenizer.from_pretrained(small)(TEXTS, **setting) for setting in settings]
    order = np.random.default_rng(0).integers(len(settings), size=1000)
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda i: tokenizer(TEXTS, **settings[i]), order))
    assert all(result == expected[i] for result, i in zip(got, order, strict=True))
    assert len(tokenizer._views) <= 8


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((None,), {}, TypeError, r"^text must be a string.*None"),
        ((3,), {}, TypeError, r"^text must be a string.*3 \(int\)"),
        ((b"the",), {}, TypeError, r"bytes"),
        ((["the", None],), {}, TypeError, r"text\[1\].*None"),
        ((["the", float("nan")],), {}, TypeError, r"text\[1\].*nan"),
        (([("a", "b", "c")],), {}, TypeError, r"text\[0\] must be a string, or a pair"),
        (([["a", 1]],), {}, TypeError, r"text\[0\]"),
        ((["a"], "b"), {}, TypeError, r"text_pair must be a list"),
        (("a", 3), {}, TypeError, r"text, text_pair"),
        ((["a"], ["b", "c"]), {}, ValueError, r"text_pair has 2 entries, text has 1"),
        (("the",), dict(is_split_into_words=True), TypeError, r"text must be a list of words"),
        ((["a", 1],), dict(is_split_into_words=True), TypeError, r"list of words"),
        (("\ud800",), {}, ValueError, r"text\[0\].*'\\ud800' at position 0"),
        ((["the", "a \udfff"],), {}, ValueError, r"text\[1\].*position 2"),
        (([["a", "\ud800"]],), dict(is_split_into_words=True), ValueError, r"\\ud800"),
        (("a",), dict(padding="right"), ValueError, r"padding must be one of.*'max_length'.*'right'"),
        (("a",), dict(padding=1), ValueError, r"padding must be one of.*got 1"),
        (("a",), dict(padding=None), ValueError, r"padding must be one of.*got None"),
        (("a",), dict(truncation="end"), ValueError, r"truncation must be one of.*'only_second'.*'end'"),
        (("a",), dict(truncation=[]), ValueError, r"truncation must be one of"),
        (("a",), dict(return_tensors="tf"), ValueError, r"return_tensors must be None, 'np' or 'pt'.*'tf'"),
        (("a",), dict(max_length=0), ValueError, r"max_length must be an integer of at least 1, got 0"),
        (("a",), dict(max_length=2.0, truncation=True), ValueError, r"max_length.*2\.0"),
        (("a",), dict(max_length=True), ValueError, r"max_length.*True"),
        (("a",), dict(stride=-1), ValueError, r"stride must be an integer of at least 0, got -1"),
        (("a",), dict(pad_to_multiple_of=0), ValueError, r"pad_to_multiple_of.*0"),
        (("a",), dict(truncation=True, max_length=1), ValueError, r"max_length=1.*2 special tokens"),
        (("a", "b"), dict(truncation=True, max_length=2), ValueError, r"max_length=2.*3 special tokens"),
        (("a",), dict(truncation=True, max_length=6, stride=4), ValueError, r"max_length=6.*stride=4"),
        (
            ("a",),
            dict(truncation=True, max_length=6, padding=True, pad_to_multiple_of=4),
            ValueError,
            r"6.*4",
        ),
        (
            ("the " * 9, "a"),
            dict(truncation="only_second", max_length=6),
            ValueError,
            r"only_second.*max_length=6",
        ),
        ((["a", "a b"],), dict(return_tensors="pt"), ValueError, r"3 to 4 tokens.*padding=True"),
        (
            (["a", "the " * 9],),
            dict(return_tensors="np", padding="max_length", max_length=5),
            ValueError,
            "5 to 11",
        ),
    ],
)
def test_bad_calls(small, arguments, options, error, message):
    tokenizer = BertTokenizer.from_pretrained(small)
    with pytest.raises(error, match=message):
        tokenizer(*arguments, **options)
    assert tokenizer("the")["input_ids"] == [3, 6, 4]


def test_a_stride_that_does_not_fit_the_pair(small):
    """The library panics here, which Python would not catch as an Exception."""
    tokenizer = BertTokenizer.from_pretrained(small)
    with pytest.raises(ValueError, match=r"max_length=12, stride=6 cannot be met"):
        tokenizer("the cat sat on", "the " * 20, truncation="only_second", max_length=12, stride=6)


def test_no_model_max_length(tmp_path):
    tokenizer = BertTokenizer(VOCAB)
    assert tokenizer.model_max_length == int(1e30)
    with pytest.raises(ValueError, match=r"truncation=True needs max_length"):
        tokenizer("a", truncation=True)
    with pytest.raises(ValueError, match=r"padding='max_length' needs max_length"):
        tokenizer("a", padding="max_length")
    tokenizer.save_pretrained(tmp_path)
    assert BertTokenizer.from_pretrained(tmp_path).model_max_length == int(1e30)


@pytest.mark.parametrize("ids", [[-1], [len(VOCAB)], [3, 2**40], torch.tensor([99])])
def test_ids_outside_the_vocabulary(small, ids):
    tokenizer = BertTokenizer.from_pretrained(small)
    for method in (tokenizer.decode, tokenizer.convert_ids_to_tokens):
        with pytest.raises(ValueError, match=rf"id -?\d+ is not in the vocabulary of {len(VOCAB)}"):
            method(ids)


@pytest.mark.parametrize("missing", ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"])
def test_vocabulary_without_a_special_token(tmp_path, missing):
    vocab = [token for token in VOCAB if token != missing]
    folder = write(tmp_path / "model", vocab)
    message = rf"_token '\[{missing[1:-1]}\]'"
    with pytest.raises(ValueError, match=rf"vocab\.txt.*{message}"):
        BertTokenizer.from_pretrained(folder)
    with pytest.raises(ValueError, match=rf"vocab\.txt.*{message}"):
        BertTokenizer(folder / "vocab.txt")
    with pytest.raises(ValueError, match=message):
        BertTokenizer(vocab)
    if missing == "[MASK]":
        tokenizer = BertTokenizer(vocab, mask_token=None)
        assert tokenizer.mask_token is None and tokenizer.mask_token_id is None
        tokenizer.save_pretrained(tmp_path / "saved")
        assert BertTokenizer.from_pretrained(tmp_path / "saved").mask_token is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.txt", b"", r"vocab\.txt: the vocabulary is empty"),
        ("vocab.txt", b"[PAD]\ncaf\xe9\n", r"vocab\.txt: not UTF-8 text, at byte 9"),
        ("tokenizer.json", b"{", r"tokenizer\.json is not a JSON file"),
        ("tokenizer.json", b"\xff", r"tokenizer\.json is not a JSON file"),
        ("tokenizer.json", b"[]", r"tokenizer\.json holds a list, not a JSON object"),
        ("tokenizer.json", b"{}", r"tokenizer\.json: no model section"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {}}}', r"tokenizer\.json: a BPE tokenizer"),
        ("tokenizer.json", b'{"model": {"type": "WordPiece"}}', r"tokenizer\.json: .*no vocab"),
        ("tokenizer.json", b'{"model": {"type": "WordPiece", "vocab": {}}}', r"tokenizer\.json: .*empty"),
        (
            "tokenizer.json",
            b'{"model": {"type": "WordPiece", "vocab": {"a": "b"}}}',
            r"tokenizer\.json: .*'a': 'b'",
        ),
        ("tokenizer_config.json", b"{'a': 1}", r"tokenizer_config\.json is not a JSON file"),
        (
            "tokenizer_config.json",
            b'{"padding_side": "up"}',
            r"tokenizer_config\.json: padding_side is 'up'; it must be 'left' or 'right'",
        ),
        (
            "tokenizer_config.json",
            b'{"mask_token": {"context": "x"}}',
            r"tokenizer_config\.json: mask_token is {'context': 'x'}; it must be a token",
        ),
        ("special_tokens_map.json", b'{"unk_token": "<unk>"}', r"no unk_token '<unk>'"),
        ("added_tokens.json", b"[1]", r"added_tokens\.json holds a list, not a JSON object"),
    ],
)
def test_bad_files(small, name, content, message):
    (small / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        BertTokenizer.from_pretrained(small)


@pytest.mark.parametrize("vocab", [None, 3, {"a": -1}, ["[PAD]", 3], [], {}])
def test_bad_vocab_argument(vocab):
    with pytest.raises((TypeError, ValueError), match="vocab"):
        BertTokenizer(vocab)


def test_no_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"vocab\.txt"):
        BertTokenizer.from_pretrained(tmp_path)


def test_importing_fastbert_loads_no_tokenizers():
    code = "import sys, fastbert.tokenizer.bert; sys.exit('tokenizers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
