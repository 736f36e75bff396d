"""BertTokenizer against transformers' on real and hand-made vocabularies, and its files."""

import json
import pickle

import pytest
import torch

from fastbert.tokenizer.bert import BertTokenizer

transformers = pytest.importorskip("transformers")

WORDS = [
    "the",
    "cat",
    "sat",
    "##s",
    "on",
    "mat",
    "un",
    "##believ",
    "##able",
    "caf",
    "##e",
    ",",
    ".",
    "!",
    "?",
]
WORDS += ["'", "s", "t", "n", "a", "b", "c", "##a", "##b", "##c", "中", "文", "é", "Cat", "ab", "[", "]", "m"]
VOCAB = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]

TEXTS = [
    "",
    " ",
    "\t\n",
    "The cat sat on the mat.",
    "Unbelievable, cats! Don't the cat's mats sat?",
    "CAFÉ café cafe\u0301 naïve Ångström İstanbul ß ﬁ Œuvre",
    "中文 the cat 中cat文 日本語 한국어 ทดสอบ हिन्दी",
    "emoji 😀 👩‍👩‍👧‍👦 🇫🇷 ☕️ the👍cat",
    "control\x00char \x01\x02\x7f\x85 \u200b zero\u200dwidth \ufeff bom \ufffd soft\u00adhyphen",
    "spaces\u00a0no-break\u2003em\u3000ideographic\u2028line",
    "[MASK] the [CLS] cat [SEP] [PAD] [UNK] [mask] [Mask] [unused0]",
    "the " * 60,
    "x" * 101 + " " + "a" * 100,
    "http://a.b/c?d=e&f=g#h user@example.com $1,234.56 50% C++ <b>a</b>",
    "“quotes” — dash… ‘a’ «b» ¿c? ¡t! 、。",
    "𝒜 mathematical 𠀀 plane two 𝟘",
]
PAIRS = [(a, b) for a, b in zip(TEXTS, TEXTS[3:] + TEXTS[:3], strict=True)]


def write(folder, vocab=VOCAB, **config):
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in vocab), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def small(tmp_path):
    return write(tmp_path / "small", model_max_length=64)


@pytest.fixture(scope="module", params=["small", "minilm", "chinese_bert"])
def both(request, tmp_path_factory):
    """Ours and transformers' tokenizer of one folder."""
    if request.param == "small":
        folder = write(tmp_path_factory.mktemp("tokenizer") / "small", model_max_length=64)
    else:
        folder = request.getfixturevalue(request.param)
    return BertTokenizer.from_pretrained(folder), transformers.BertTokenizer.from_pretrained(folder)


def plain(value):
    if hasattr(value, "tolist"):
        return value.tolist()
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def same(ours, theirs):
    assert list(ours) == list(theirs)
    for name in theirs:
        assert plain(ours[name]) == plain(theirs[name]), name
        assert type(ours[name]) is type(theirs[name])
        assert getattr(ours[name], "dtype", None) == getattr(theirs[name], "dtype", None)


ALL = dict(return_offsets_mapping=True, return_special_tokens_mask=True)


def test_texts(both):
    ours, theirs = both
    for text in TEXTS:
        same(ours(text, **ALL), theirs(text, **ALL))
        same(ours(text, add_special_tokens=False), theirs(text, add_special_tokens=False))
        assert ours.tokenize(text) == theirs.tokenize(text)
        assert ours.encode(text) == theirs.encode(text)
    same(ours(TEXTS, **ALL), theirs(TEXTS, **ALL))


def test_pairs(both):
    ours, theirs = both
    for first, second in PAIRS:
        same(ours(first, second, **ALL), theirs(first, second, **ALL))
    first, second = [list(side) for side in zip(*PAIRS, strict=True)]
    same(ours(first, second, **ALL), theirs(first, second, **ALL))
    same(ours(PAIRS), theirs(PAIRS))
    same(ours([*PAIRS[:2], TEXTS[3]]), theirs([*PAIRS[:2], TEXTS[3]]))


@pytest.mark.parametrize("tensors", [None, "np", "pt"])
@pytest.mark.parametrize(
    "setting",
    [
        dict(padding=True),
        dict(padding="longest", pad_to_multiple_of=8),
        dict(padding="max_length", max_length=512),
        dict(padding=True, truncation=True),
        dict(padding=True, truncation=True, max_length=7),
        dict(padding="max_length", truncation="longest_first", max_length=32, pad_to_multiple_of=16),
        dict(padding="max_length", truncation=True, max_length=3),
    ],
)
def test_padding(both, setting, tensors):
    ours, theirs = both
    for text in ((TEXTS,), (TEXTS[4],), (PAIRS,), ([""],), (TEXTS[3], TEXTS[4])):
        same(
            ours(*text, return_tensors=tensors, **setting, **ALL),
            theirs(*text, return_tensors=tensors, **setting, **ALL),
        )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tensors", [None, "np"])
def test_sides(tmp_path, side, tensors):
    folder = write(tmp_path / "model", padding_side=side, truncation_side=side, model_max_length=9)
    ours, theirs = BertTokenizer.from_pretrained(folder), transformers.BertTokenizer.from_pretrained(folder)
    setting = dict(padding=True, truncation=True, return_tensors=tensors, **ALL)
    same(ours(TEXTS, **setting), theirs(TEXTS, **setting))
    same(ours(PAIRS, **setting), theirs(PAIRS, **setting))


@pytest.mark.parametrize("strategy", ["longest_first", "only_first", "only_second", "do_not_truncate", False])
@pytest.mark.parametrize("max_length", [8, 13, 20])
@pytest.mark.parametrize("stride", [0, 2])
def test_truncation(both, strategy, max_length, stride):
    ours, theirs = both
    setting = dict(truncation=strategy, max_length=max_length, stride=stride, **ALL)
    long = [text for text in TEXTS if len(theirs(text)["input_ids"]) > 12]
    short = [text for text in TEXTS if len(theirs(text)["input_ids"]) <= 5]
    pairs = [(a, b) for a in long for b in short]
    if strategy == "only_second":
        pairs = [(b, a) for a, b in pairs]
    for overflow in (False, True):
        same(
            ours(pairs, return_overflowing_tokens=overflow, **setting),
            theirs(pairs, return_overflowing_tokens=overflow, **setting),
        )
        if strategy != "only_second":
            same(
                ours(TEXTS, return_overflowing_tokens=overflow, **setting),
                theirs(TEXTS, return_overflowing_tokens=overflow, **setting),
            )


def test_overflow_as_tensors(both):
    ours, theirs = both
    setting = dict(truncation="only_second", max_length=16, stride=4, padding="max_length", **ALL)
    for tensors in (None, "np", "pt"):
        setting |= dict(return_overflowing_tokens=True, return_tensors=tensors)
        same(ours("the cat", TEXTS[11], **setting), theirs("the cat", TEXTS[11], **setting))
    a, b = ours("the cat", TEXTS[11], **setting), theirs("the cat", TEXTS[11], **setting)
    for row in range(len(a["input_ids"])):
        assert a.word_ids(row) == b.word_ids(row) and a.sequence_ids(row) == b.sequence_ids(row)
        assert a.tokens(row) == b.tokens(row)


def test_max_length_alone_truncates(both):
    ours, theirs = both
    same(ours(TEXTS, max_length=6), theirs(TEXTS, max_length=6))
    expected = theirs(TEXTS, padding=True)  # not with padding
    same(ours(TEXTS, max_length=6, padding=True), expected)


def test_split_into_words(both):
    ours, theirs = both
    words = [text.split(" ") for text in TEXTS if text.strip()]
    setting = dict(is_split_into_words=True, **ALL)
    same(ours(words, **setting), theirs(words, **setting))
    same(ours(words[0], **setting), theirs(words[0], **setting))
    same(ours(words[0], words[1], **setting), theirs(words[0], words[1], **setting))
    same(ours(words, words[::-1], **setting), theirs(words, words[::-1], **setting))
    a, b = ours(words, padding=True, **setting), theirs(words, padding=True, **setting)
    for row in range(len(words)):
        assert a.word_ids(row) == b.word_ids(row)


def test_decode(both):
    ours, theirs = both
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        for skip in (False, True):
            expected = theirs.decode(ids, skip_special_tokens=skip)
            assert ours.decode(ids, skip_special_tokens=skip) == expected
            assert ours.decode(torch.tensor(ids), skip_special_tokens=skip) == expected
            assert ours.convert_ids_to_tokens(ids, skip) == theirs.convert_ids_to_tokens(ids, skip)
            cleaned = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=True)
            assert ours.decode(ids, skip, clean_up_tokenization_spaces=True) == cleaned
    batch = theirs(TEXTS, padding=True, return_tensors="pt")["input_ids"]
    for rows in (batch, batch.numpy(), batch.tolist()):
        expected = theirs.batch_decode(batch, skip_special_tokens=True)
        assert ours.batch_decode(rows, skip_special_tokens=True) == expected
        assert ours.decode(rows, skip_special_tokens=True) == expected
    assert ours.decode(ids[0]) == theirs.decode(ids[0])


def test_vocabulary(both):
    ours, theirs = both
    assert (len(ours), ours.vocab_size) == (len(theirs), theirs.vocab_size)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.model_max_length == theirs.model_max_length
    for name in ("unk", "sep", "pad", "cls", "mask"):
        for kind in (f"{name}_token", f"{name}_token_id"):
            assert getattr(ours, kind) == getattr(theirs, kind)
    assert sorted(ours.all_special_tokens) == sorted(theirs.all_special_tokens)
    assert sorted(ours.all_special_ids) == sorted(theirs.all_special_ids)
    tokens = ["the", "[MASK]", "no such token"]
    assert ours.convert_tokens_to_ids(tokens) == theirs.convert_tokens_to_ids(tokens)
    assert ours.convert_tokens_to_ids("the") == theirs.convert_tokens_to_ids("the")
    assert ours.convert_ids_to_tokens(5) == theirs.convert_ids_to_tokens(5)


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("accents", [True, False, None])
@pytest.mark.parametrize("chinese", [True, False])
def test_normalization(tmp_path, lower, accents, chinese):
    config = dict(do_lower_case=lower, strip_accents=accents, tokenize_chinese_chars=chinese)
    folder = write(tmp_path / "model", **config)
    theirs = transformers.BertTokenizer.from_pretrained(folder)
    expected = theirs(TEXTS, **ALL)
    same(BertTokenizer.from_pretrained(folder)(TEXTS, **ALL), expected)
    same(BertTokenizer(VOCAB, **config)(TEXTS, **ALL), expected)
    same(BertTokenizer({token: i for i, token in enumerate(VOCAB)}, **config)(TEXTS, **ALL), expected)
    same(BertTokenizer(folder / "vocab.txt", **config)(TEXTS, **ALL), expected)
    # tokenizer.json keeps the options too; where it disagrees with tokenizer_config.json, that one wins
    theirs.save_pretrained(folder)
    same(BertTokenizer.from_pretrained(folder)(TEXTS, **ALL), expected)
    write(folder, do_lower_case=not lower)
    same(
        BertTokenizer.from_pretrained(folder)(TEXTS, **ALL),
        transformers.BertTokenizer.from_pretrained(folder)(TEXTS, **ALL),
    )
    (folder / "tokenizer_config.json").unlink()
    same(
        BertTokenizer.from_pretrained(folder)(TEXTS, **ALL),
        transformers.BertTokenizer.from_pretrained(folder)(TEXTS, **ALL),
    )


@pytest.mark.parametrize("lower", [True, False])
def test_a_class_that_takes_tokenizer_json_as_it_stands(tmp_path, lower):
    folder = tmp_path / "model"
    BertTokenizer(VOCAB, do_lower_case=lower).save_pretrained(folder)
    write(folder, tokenizer_class="PreTrainedTokenizerFast", do_lower_case=not lower, pad_token="[PAD]")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    for _ in range(2):
        ours = BertTokenizer.from_pretrained(folder)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert ours(TEXTS)["input_ids"] == theirs(TEXTS)["input_ids"]
        assert ("Cat" in ours.tokenize("Cat")) is not lower
        ours.save_pretrained(folder)
    same(ours(PAIRS, **ALL), transformers.AutoTokenizer.from_pretrained(folder)(PAIRS, **ALL))


def test_special_tokens_by_other_names(tmp_path):
    names = {"pad_token": "<p>", "unk_token": "<u>", "cls_token": "<c>", "sep_token": "<s>"}
    vocab = ["<p>", "<u>", "<c>", "<s>", "<m>", *WORDS]
    mask = {"__type": "AddedToken", "content": "<m>", "lstrip": True, "rstrip": False, "normalized": True}
    folder = write(tmp_path / "model", vocab, **names, mask_token=mask)
    text = ["the <m> cat   <m><m> <s> zzz", "<c>"]
    ours, theirs = BertTokenizer.from_pretrained(folder), transformers.BertTokenizer.from_pretrained(folder)
    same(ours(text, padding=True, **ALL), theirs(text, padding=True, **ALL))
    assert ours.mask_token == "<m>" and ours.pad_token_id == 0
    ours.save_pretrained(tmp_path / "saved")
    same(BertTokenizer.from_pretrained(tmp_path / "saved")(text, **ALL), theirs(text, **ALL))


def test_special_tokens_map_and_added_tokens(tmp_path):
    folder = write(tmp_path / "model", [token for token in VOCAB if token != "[MASK]"])
    mask = dict(content="[MASK]", lstrip=False, rstrip=True, normalized=False, single_word=False)
    extra = dict(mask_token=mask, additional_special_tokens=["<e1>", "<e2>"], bos_token="[CLS]")
    (folder / "special_tokens_map.json").write_text(json.dumps(extra))
    size = len(VOCAB) - 1
    (folder / "added_tokens.json").write_text(json.dumps({"New": size + 1, "[MASK]": size}))
    text = ["the new New <e2>cat [MASK] sat<e1> [mask]", "NEWcat"]
    ours, theirs = BertTokenizer.from_pretrained(folder), transformers.BertTokenizer.from_pretrained(folder)
    same(ours(text, **ALL), theirs(text, **ALL))
    assert ours.get_vocab() == theirs.get_vocab() and ours.mask_token_id == size
    assert ours.decode(ours.encode(text[0]), True) == theirs.decode(theirs.encode(text[0]), skip_special_tokens=True)


def test_added_tokens_decoder(tmp_path):
    decoder = {
        str(i): dict(content=t, lstrip=False, rstrip=False, normalized=False, single_word=False, special=True)
        for i, t in [*enumerate(VOCAB[:6]), (len(VOCAB), "<x>")]
        if t != "[unused0]"
    }
    folder = write(tmp_path / "model", added_tokens_decoder=decoder)
    ours, theirs = BertTokenizer.from_pretrained(folder), transformers.BertTokenizer.from_pretrained(folder)
    text = ["the<x>cat [MASK]"]
    same(ours(text, **ALL), theirs(text, **ALL))
    decoder["999"] = decoder[str(len(VOCAB))] | {"content": "<y>"}
    write(folder, added_tokens_decoder=decoder)
    with pytest.raises(ValueError, match=r"'<y>' cannot have id 999"):
        BertTokenizer.from_pretrained(folder)


def test_add_tokens(small):
    ours, theirs = BertTokenizer.from_pretrained(small), transformers.BertTokenizer.from_pretrained(small)
    before = ours("the <new> cat", truncation=True)
    for tokens, special in ((["<new>", "Cats"], False), ("<s1>", True), (["<new>"], False)):
        assert ours.add_tokens(tokens, special_tokens=special) == theirs.add_tokens(tokens, special_tokens=special)
    text = ["the <new> cat <s1>", "CATS cats Cats<new>"]
    same(ours(text, **ALL), theirs(text, **ALL))
    same(ours(text, truncation=True, max_length=6), theirs(text, truncation=True, max_length=6))
    assert ours("the <new> cat", truncation=True) != before
    assert ours.get_vocab() == theirs.get_vocab()
    assert (len(ours), ours.vocab_size) == (len(theirs), theirs.vocab_size)
    ours.save_pretrained(small)
    same(BertTokenizer.from_pretrained(small)(text, **ALL), theirs(text, **ALL))
    same(ours(text, **ALL), transformers.BertTokenizer.from_pretrained(small)(text, **ALL))


def test_save_and_load_both_ways(both, tmp_path):
    ours, theirs = both
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "ours" / "config.json").write_text('{"model_type": "bert"}')
    expected = theirs(PAIRS, **ALL)
    for cls in (BertTokenizer, transformers.BertTokenizer, transformers.AutoTokenizer):
        loaded = cls.from_pretrained(tmp_path / "ours")
        same(loaded(PAIRS, **ALL), expected)
        assert loaded.model_max_length == theirs.model_max_length
    same(BertTokenizer.from_pretrained(tmp_path / "theirs")(PAIRS, **ALL), expected)
    (tmp_path / "ours" / "tokenizer.json").unlink()
    for cls in (BertTokenizer, transformers.BertTokenizer):
        same(cls.from_pretrained(tmp_path / "ours")(PAIRS, **ALL), expected)
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == [
        "config.json",
        "special_tokens_map.json",
        "tokenizer_config.json",
        "vocab.txt",
    ]


def test_vocab_txt_as_the_library_reads_it(tmp_path):
    folder = write(tmp_path / "model")
    text = "\r\n".join([*VOCAB, "twice", "", "twice", "　", "last"])  # line ends, gaps, no final line end
    (folder / "vocab.txt").write_bytes(text.encode())
    ours, theirs = BertTokenizer.from_pretrained(folder), transformers.BertTokenizer.from_pretrained(folder)
    assert ours.get_vocab() == theirs.get_vocab()
    same(ours("twice last the"), theirs("twice last the"))
    ours.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "vocab.txt").exists()  # ids with gaps do not fit in one
    assert BertTokenizer.from_pretrained(tmp_path / "saved").get_vocab() == ours.get_vocab()


def test_protein(antiberty):
    ours = BertTokenizer.from_pretrained(antiberty)
    assert len(ours) == 25 and ours.tokenize("E V Q L", add_special_tokens=True)[0] == "[CLS]"
    assert ours.tokenize("E V Q L") == ["[UNK]"] * 4  # lower-casing is the default: nothing here turns it off
    ours = BertTokenizer(antiberty / "vocab.txt", do_lower_case=False)
    assert ours.decode(ours.encode("E V Q [MASK] L"), skip_special_tokens=True) == "E V Q L"


def test_encoding_object(small):
    tokenizer = BertTokenizer.from_pretrained(small)
    batch = tokenizer(["the cat", "a"], padding=True, return_tensors="pt")
    assert batch.input_ids is batch["input_ids"] and dict(**batch).keys() == batch.keys()
    assert batch.to("meta") is batch and batch.input_ids.device.type == "meta"
    assert batch.tokens(1) == ["[CLS]", "a", "[SEP]", "[PAD]"]
    assert batch.word_ids(1) == [None, 0, None, None]
    with pytest.raises(AttributeError, match=r"'labels'.*input_ids"):
        _ = batch.labels
    assert not hasattr(tokenizer, "bos_token")
    again = pickle.loads(pickle.dumps(tokenizer(["the cat", "a"], padding=True)))
    assert again == tokenizer(["the cat", "a"], padding=True) and again.tokens(1) == batch.tokens(1)
    other = pickle.loads(pickle.dumps(tokenizer))
    assert other(TEXTS, truncation=True) == tokenizer(TEXTS, truncation=True)


def test_columns_can_be_left_out(small):
    tokenizer = BertTokenizer.from_pretrained(small)
    only = tokenizer("the cat", return_token_type_ids=False, return_attention_mask=False)
    assert list(only) == ["input_ids"]


@pytest.mark.parametrize("tensors", [None, "np", "pt"])
def test_empty_batch(small, tensors):
    batch = BertTokenizer.from_pretrained(small)([], padding=True, return_tensors=tensors)
    assert len(batch["input_ids"]) == 0
    if tensors:
        assert tuple(batch["input_ids"].shape) == (0, 0)


def test_input_is_not_changed(small):
    tokenizer = BertTokenizer.from_pretrained(small)
    words = [["the", "cat"], ["a"]]
    tokenizer(words, is_split_into_words=True, padding=True)
    assert words == [["the", "cat"], ["a"]]
    vocab = {token: i for i, token in enumerate(VOCAB)}
    BertTokenizer(vocab).add_tokens("<new>")
    assert vocab == {token: i for i, token in enumerate(VOCAB)}
