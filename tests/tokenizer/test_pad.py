"""BertTokenizer in transformers' data collators: `pad`, and an encoding's ways between characters, words and tokens."""

import copy
import json

import numpy as np
import pytest
import torch

from fastbert.tokenizer.bert import BertTokenizer
from fastbert.tokenizer.encoding import BatchEncoding

transformers = pytest.importorskip("transformers")

VOCAB = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "sat", "un", "##able", "a"]
VOCAB += ["##a", "b", "##b", "c", "##c", "caf", "##e", "中", "文", "[", "]", "mask", ",", ".", "!", "'", "s"]
TEXTS = [
    "",
    " \t\n",
    "The cats sat, unable!",
    "a ab  abc\u00a0c",
    "CAFÉ cafe\u0301 中文 the中cat",
    "[MASK] the [CLS] cat [SEP][PAD] [mask]",
    "emoji 😀👍 \x00 x\u200bab 𝒜",
    "the " * 30,
]
PAIRS = list(zip(TEXTS, TEXTS[3:] + TEXTS[:3], strict=True))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Ours and transformers' tokenizer of one folder."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in VOCAB), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 64}))
    return BertTokenizer.from_pretrained(folder), transformers.BertTokenizer.from_pretrained(folder)


@pytest.fixture(params=["right", "left"])
def sided(both, request):
    """The same two with pads on one side."""
    ours, theirs = map(copy.copy, both)
    ours.padding_side = theirs.padding_side = request.param
    return ours, theirs


def same(ours, theirs):
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert type(ours[name]) is type(value), name
        if isinstance(value, list | int):
            assert ours[name] == value, name
        else:
            assert ours[name].dtype == value.dtype, name
            assert ours[name].tolist() == value.tolist(), name


def features(tokenizer, texts, **options):
    columns = tokenizer(texts, **options)
    return [{name: rows[i] for name, rows in columns.items()} for i in range(len(texts))]


@pytest.mark.filterwarnings("ignore:.*is ignored when")
@pytest.mark.parametrize("tensors", [None, "np", "pt"])
@pytest.mark.parametrize(
    "setting",
    [
        {},
        dict(padding="longest", pad_to_multiple_of=8),
        dict(padding="max_length"),
        dict(padding="max_length", max_length=70, pad_to_multiple_of=16),
        dict(padding=True, max_length=3),
        dict(padding_side="left", return_attention_mask=True),
        dict(padding=transformers.utils.PaddingStrategy.LONGEST),
    ],
)
def test_pad(sided, setting, tensors):
    ours, theirs = sided
    for texts in (TEXTS, PAIRS, TEXTS[2:3]):
        rows = features(theirs, texts, return_special_tokens_mask=True, truncation=True, max_length=40)
        for i, row in enumerate(rows):
            row |= {"labels": i, "score": i / 4, "vector": [0.5, i]}
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        for given in (rows, columns, [{"input_ids": row["input_ids"]} for row in rows]):
            before = copy.deepcopy(given)
            got = ours.pad(given, return_tensors=tensors, **setting)
            assert given == before
            same(got, theirs.pad(given, return_tensors=tensors, **setting))
    enum = None if tensors is None else transformers.utils.TensorType(tensors)
    same(ours.pad(rows, return_tensors=enum), theirs.pad(rows, return_tensors=enum))


def test_pad_without_padding_and_without_a_mask(sided):
    ours, theirs = sided
    rows = features(theirs, TEXTS)
    for setting in (dict(padding=False), dict(padding="do_not_pad"), dict(return_attention_mask=False)):
        same(ours.pad(rows, **setting), theirs.pad(rows, **setting))
    bare = [{"input_ids": row["input_ids"]} for row in rows]
    same(ours.pad(bare, return_attention_mask=False), theirs.pad(bare, return_attention_mask=False))


@pytest.mark.parametrize("tensors", [None, "np", "pt"])
def test_pad_one_text(sided, tensors):
    ours, theirs = sided
    for setting in ({}, dict(padding="max_length", max_length=9), dict(pad_to_multiple_of=8)):
        for given in (theirs("the cats"), dict(theirs("a"), labels=1 if tensors is None else [1])):
            same(
                ours.pad(dict(given), return_tensors=tensors, **setting),
                theirs.pad(dict(given), return_tensors=tensors, **setting),
            )


@pytest.mark.parametrize("kind", ["np", "pt"])
def test_pad_keeps_arrays_and_tensors(sided, kind):
    ours, theirs = sided
    make = np.array if kind == "np" else torch.tensor
    rows = [{name: make(value) for name, value in row.items()} for row in features(theirs, TEXTS)]
    for i, row in enumerate(rows):
        row |= {"labels": make(i), "score": make(i / 4)}
    for tensors in (None, "np", "pt"):
        same(ours.pad(rows, return_tensors=tensors), theirs.pad(rows, return_tensors=tensors))
    batch = theirs(TEXTS, padding=True, return_tensors=kind)
    same(ours.pad(dict(batch), pad_to_multiple_of=32), theirs.pad(dict(batch), pad_to_multiple_of=32))
    same(ours.pad(dict(theirs("a", return_tensors=kind))), theirs.pad(dict(theirs("a", return_tensors=kind))))
    row = {name: value[0] for name, value in theirs("a", return_tensors=kind).items()}
    got = ours.pad(dict(row), pad_to_multiple_of=8)
    same(got, theirs.pad(theirs("a"), pad_to_multiple_of=8, return_tensors=kind))  # given an array, theirs raises


def test_pad_rows_without_tokens(both):
    ours, theirs = both
    for given in ({"input_ids": [[], []]}, {"input_ids": [[], [7]]}):
        for setting in ({}, dict(padding="max_length", max_length=3)):
            for tensors in (None, "np", "pt"):
                same(
                    ours.pad(dict(given), return_tensors=tensors, **setting),
                    theirs.pad(dict(given), return_tensors=tensors, **setting),
                )


@pytest.mark.parametrize(
    ("given", "options", "error", "message"),
    [
        ([], {}, TypeError, r"features must be a mapping, or a list of one or more, got \[\]"),
        (None, {}, TypeError, r"features must be a mapping.*None"),
        ([[1, 2]], {}, TypeError, r"feature 0 must be a mapping with input_ids, got \[1, 2\]"),
        ([{"labels": 1}], {}, ValueError, r"must have input_ids; they have 'labels'"),
        ([{"input_ids": [1], "x": 1}, {"input_ids": [1]}], {}, ValueError, r"feature 1 has no 'x'"),
        ({"input_ids": None}, {}, TypeError, r"input_ids must be a list, array or tensor, got None"),
        ({"input_ids": [1.5]}, {}, ValueError, r"input_ids must be a list of integers, got 1\.5"),
        ([{"input_ids": [1]}, {"input_ids": ["a"]}], {}, ValueError, r"input_ids\[1\].*integers, got 'a'"),
        ({"input_ids": [[1], 2]}, {}, ValueError, r"input_ids\[1\] must be a list of integers, got 2"),
        ({"input_ids": [[1], [2]], "labels": [1]}, {}, ValueError, r"input_ids has 2 rows, labels 1"),
        ({"input_ids": [[1], [2]], "labels": 1}, {}, ValueError, r"input_ids has 2 rows, labels 1 \(int\)"),
        ({"input_ids": [[1, 2]], "token_type_ids": [[0]]}, {}, ValueError, r"row 0: input_ids has 2 .*_ids 1"),
        ({"input_ids": [1]}, dict(padding="left"), ValueError, r"padding must be one of.*'left'"),
        ({"input_ids": [1]}, dict(padding_side="up"), ValueError, r"padding_side must be 'left' or 'right', got 'up'"),
        ({"input_ids": [1]}, dict(return_tensors="tf"), ValueError, r"return_tensors must be None, 'np' or 'pt'"),
        ({"input_ids": [1]}, dict(pad_to_multiple_of=0), ValueError, r"pad_to_multiple_of must be.*0"),
        ({"input_ids": [1]}, dict(padding="max_length", max_length=0), ValueError, r"max_length must be.*got 0"),
        ({"input_ids": [[1], [1, 2]]}, dict(padding=False, return_tensors="pt"), ValueError, "input_ids makes no"),
        (
            {"input_ids": [[1], [1, 2]], "labels": [[1], [1, 2]]},
            dict(return_tensors="np"),
            ValueError,
            "labels makes no tensor.*padding fills up input_ids",
        ),
        ({"input_ids": [[1]], "x": ["a"]}, dict(return_tensors="pt"), ValueError, "x makes no tensor"),
    ],
)
def test_pad_refuses(both, given, options, error, message):
    with pytest.raises(error, match=message):
        both[0].pad(given, **options)


def test_pad_needs_a_length(both):
    with pytest.raises(ValueError, match=r"padding='max_length' needs max_length"):
        BertTokenizer(VOCAB).pad({"input_ids": [1]}, padding="max_length")


@pytest.mark.parametrize("tensors", ["np", "pt"])
def test_data_collators(sided, tensors):
    """Each of transformers' own that BERT is trained with."""
    collators = [
        (transformers.DataCollatorWithPadding, dict(pad_to_multiple_of=4), lambda i, n: {"label": i}),
        (transformers.DataCollatorWithPadding, dict(padding="max_length", max_length=50), lambda i, n: {}),
        (transformers.DataCollatorForTokenClassification, {}, lambda i, n: {"labels": list(range(n))}),
        (transformers.DataCollatorForLanguageModeling, dict(seed=3), lambda i, n: {}),
        (transformers.DataCollatorForLanguageModeling, dict(mlm=False), lambda i, n: {}),
    ]
    for make, options, labels in collators:
        for with_mask in (True, False):
            batches = []
            for tokenizer in sided:
                rows = features(tokenizer, TEXTS, return_special_tokens_mask=with_mask)
                rows = [row | labels(i, len(row["input_ids"])) for i, row in enumerate(rows)]
                batches.append(make(tokenizer, return_tensors=tensors, **options)(rows))
            same(*batches)


def test_whole_words_are_masked(both):
    batches = []
    for tokenizer in both:
        rows = features(
            tokenizer, TEXTS, return_special_tokens_mask=True, return_offsets_mapping=True, padding="max_length"
        )
        collator = transformers.DataCollatorForLanguageModeling(
            tokenizer, whole_word_mask=True, mask_replace_prob=1.0, random_replace_prob=0.0, seed=0
        )
        batches.append(collator(rows))
    same(*batches)


def test_multiple_choice_collator(both):
    batches = []
    for tokenizer in both:
        rows = [dict(tokenizer(["the", "the"], [text, "a cat"]), label=i % 2) for i, text in enumerate(TEXTS)]
        batches.append(transformers.DataCollatorForMultipleChoice(tokenizer)(rows))
    same(*batches)


def test_a_loader_with_a_collator(both):
    """What a training loop does with the batches: workers pickle them, the host pins and moves them."""
    ours = both[0]
    collator = transformers.DataCollatorWithPadding(ours)
    loader = torch.utils.data.DataLoader(features(ours, TEXTS), batch_size=3, collate_fn=collator, num_workers=1)
    batches = list(loader)
    assert [len(batch["input_ids"]) for batch in batches] == [3, 3, 2]
    assert batches[0].to("meta", non_blocking=True).input_ids.device.type == "meta"
    again = BatchEncoding({name: value * 2 for name, value in batches[1].items()})
    assert again["attention_mask"].max() == 2
    with pytest.raises(ValueError, match="padded from features"):
        again.char_to_token(0)


def test_special_tokens_mask(both):
    ours, theirs = both
    ids = [*range(len(VOCAB)), 0, 4]
    expected = theirs.get_special_tokens_mask(ids, already_has_special_tokens=True)
    assert ours.get_special_tokens_mask(ids, already_has_special_tokens=True) == expected
    assert ours.get_special_tokens_mask(torch.tensor(ids), already_has_special_tokens=True) == expected
    for tokenizer in both:
        with pytest.raises(NotImplementedError):
            tokenizer.get_special_tokens_mask([7])
    assert [*ours.model_input_names] == theirs.model_input_names and ours.is_fast and theirs.is_fast


def places(batch, rows):
    """Every way between characters, words and tokens of a batch, past the ends of its texts as well."""
    found = []
    for row in range(rows):
        for i in range(75):
            found += [batch.token_to_chars(row, i), batch.token_to_word(row, i), batch.token_to_sequence(row, i)]
            for text in (0, 1):
                found.append(batch.char_to_token(row, i, sequence_index=text))
                found.append(batch.char_to_word(row, i, sequence_index=text))
                span = batch.word_to_tokens(row, i, sequence_index=text)
                found.append(span)
                if span is not None:  # transformers fails where there is no such word
                    found.append(batch.word_to_chars(row, i, sequence_index=text))
    return found


@pytest.mark.parametrize(
    "setting",
    [
        {},
        dict(padding=True),
        dict(padding="max_length", max_length=70, return_tensors="np"),
        dict(truncation=True, max_length=9, stride=2, return_overflowing_tokens=True, padding=True),
    ],
)
def test_places(sided, setting):
    ours, theirs = sided
    words = [["the", "unable", "", "cats"], ["中文", "a!"]]
    for text, options in ((TEXTS, {}), (PAIRS, {}), (words, dict(is_split_into_words=True))):
        got, expected = (tokenizer(text, **options, **setting) for tokenizer in (ours, theirs))
        rows = len(expected.encodings)
        assert len(got.encodings) == rows
        assert places(got, rows) == places(expected, rows)
        assert got.n_sequences == expected.n_sequences


def test_places_of_one_text(both):
    got, expected = (tokenizer("The cats", "sat, un", padding="max_length", max_length=12) for tokenizer in both)
    for name in ("char_to_token", "char_to_word", "token_to_chars", "token_to_word", "word_to_tokens"):
        assert [getattr(got, name)(i) for i in range(7)] == [getattr(expected, name)(i) for i in range(7)]
    assert got.char_to_token(1, sequence_index=1) == expected.char_to_token(1, sequence_index=1)
    assert got.token_to_chars(2) == (4, 7) and got.token_to_chars(2).end == 7
    assert got.word_to_tokens(1).start == 2 and got.word_to_tokens(9) is None and got.word_to_chars(9) is None
    assert got.word_to_chars(1) == expected.word_to_chars(1) == (4, 8)
    with pytest.raises(ValueError, match="char_index must be at least 0, got -1"):
        got.char_to_token(-1)
    with pytest.raises(IndexError, match="batch_index is 1; there are 1 rows"):
        got.token_to_chars(1, 0)
    with pytest.raises(IndexError, match="batch_index is 5; there are 1 rows"):
        got.tokens(5)


def test_split_special_tokens(both, tmp_path):
    ours, theirs = both
    setting = dict(return_special_tokens_mask=True, return_offsets_mapping=True)
    for split in (True, False):
        for options in ({}, dict(truncation=True, max_length=8), dict(padding=True)):
            for text in (TEXTS, PAIRS):
                same(
                    ours(text, split_special_tokens=split, **options, **setting),
                    theirs(text, split_special_tokens=split, **options, **setting),
                )
        assert ours.tokenize(TEXTS[5], split_special_tokens=split) == theirs.tokenize(
            TEXTS[5], split_special_tokens=split
        )
        assert ours.encode(TEXTS[5], split_special_tokens=split) == theirs.encode(TEXTS[5], split_special_tokens=split)
    assert ours.encode_plain(["[MASK] a"]) == [ours("[MASK] a", split_special_tokens=True)["input_ids"][1:-1]]
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in VOCAB), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"split_special_tokens": True}))
    ours, theirs = BertTokenizer.from_pretrained(tmp_path), transformers.BertTokenizer.from_pretrained(tmp_path)
    same(ours(TEXTS), theirs(TEXTS))
    same(ours(TEXTS, split_special_tokens=False), theirs(TEXTS, split_special_tokens=False))
    ours.save_pretrained(tmp_path / "saved")
    again = BertTokenizer.from_pretrained(tmp_path / "saved")
    assert again.split_special_tokens and again(TEXTS) == ours(TEXTS)


@pytest.mark.parametrize("tensors", [None, "np", "pt"])
def test_lengths(sided, tensors):
    ours, theirs = sided
    settings = [dict(padding=True), dict(padding="max_length", max_length=70), dict(padding=True, pad_to_multiple_of=8)]
    settings.append(dict(truncation=True, max_length=9, padding=True, return_overflowing_tokens=True))
    if tensors is None:
        settings += [{}, dict(truncation=True, max_length=9)]
    for setting in settings:
        for text in (TEXTS, PAIRS, "the cats"):
            options = dict(return_length=True, return_tensors=tensors, return_offsets_mapping=True, **setting)
            same(ours(text, **options), theirs(text, **options))


def test_padding_side_of_one_call(both):
    ours, theirs = both
    for side in ("left", "right", None):
        same(ours(TEXTS, padding=True, padding_side=side), theirs(TEXTS, padding=True, padding_side=side))
    got = ours(TEXTS, padding=True, padding_side="left")
    assert got.tokens(2) == theirs(TEXTS, padding=True, padding_side="left").tokens(2)
    with pytest.raises(ValueError, match="padding_side must be 'left' or 'right', got 1"):
        ours("a", padding_side=1)
