"""AutoTokenizer against transformers' fast tokenizers of every kind."""

import json
import random

import pytest
import transformers
from made_tokenizers import LINES, as_the_file_says, camembert, mpnet, roberta, xlm_roberta
from tokenizers import Tokenizer as Backend
from tokenizers import models

from fastbert.tokenizer.auto import AutoTokenizer
from fastbert.tokenizer.bert import BertTokenizer

TEXTS = [
    *LINES,
    *("", " ", "\t\n", "a", "<s> the </s> <pad> <mask> [MASK] [CLS]", "the <mask> sat", "the<mask> sat", "x" * 200),
    *("control\x00char \x01\x7f\x85 \u200b zero\u200dwidth \ufeff bom \ufffd soft\u00adhyphen", "the " * 80),
    *(
        "http://a.b/c?d=e&f=g#h user@example.com $1,234.56 50% C++ <b>a</b>",
        "“quotes” — dash… 𝒜 𠀀 𝟘",
        "  leading",
        "trailing  ",
    ),
]
PAIRS = list(zip(TEXTS, TEXTS[5:] + TEXTS[:5], strict=True))
KINDS = {
    **{"roberta": roberta, "xlm-roberta": xlm_roberta, "camembert": camembert, "mpnet": mpnet},
    "file": as_the_file_says,
    "roberta-prefix": lambda: roberta(add_prefix_space=True),
}


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
    """Ours and transformers' tokenizer of one folder."""
    folder = tmp_path_factory.mktemp("tokenizer")
    theirs = KINDS[request.param]()
    theirs.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder), type(theirs).from_pretrained(folder)


def same(ours, theirs, *inputs, **options):
    mine, other = ours(*inputs, **options), theirs(*inputs, **options)
    assert dict(mine) == {name: other[name] for name in other}, inputs
    return mine


OPTIONS = {"return_offsets_mapping": True, "return_special_tokens_mask": True}


def test_ids_offsets_and_masks(both):
    same(*both, TEXTS, **OPTIONS)
    for text in TEXTS:
        same(*both, text)


def test_pairs(both):
    firsts, seconds = map(list, zip(*PAIRS, strict=True))
    same(*both, firsts, seconds, **OPTIONS)


@pytest.mark.parametrize("truncation", [True, "only_first", "only_second"])
def test_truncation(both, truncation):
    firsts = ["a"] * len(LINES) if truncation == "only_second" else [text * 9 for text in LINES]
    seconds = ["a"] * len(LINES) if truncation == "only_first" else [text * 7 for text in reversed(LINES)]
    same(*both, firsts, seconds, truncation=truncation, max_length=20, **OPTIONS)
    if truncation is True:
        same(*both, firsts, truncation=True, **OPTIONS)
        same(*both, firsts, truncation=True, max_length=16, stride=4, return_overflowing_tokens=True)


def test_padding_and_words(both):
    same(*both, TEXTS, padding=True, truncation=True)
    same(*both, TEXTS, padding="max_length", max_length=40, truncation=True)
    same(*both, [line.split() for line in LINES], is_split_into_words=True, **OPTIONS)


def test_special_tokens(both):
    ours, theirs = both
    for name in ("unk", "sep", "pad", "cls", "mask"):
        assert getattr(ours, f"{name}_token") == getattr(theirs, f"{name}_token")
        assert getattr(ours, f"{name}_token_id") == getattr(theirs, f"{name}_token_id")
    assert set(ours.all_special_ids) == set(theirs.all_special_ids)
    assert ours.get_vocab() == theirs.get_vocab()
    assert tuple(ours.model_input_names) == tuple(theirs.model_input_names)
    assert len(ours) == len(theirs)


def test_decoding(both):
    ours, theirs = both
    for text in TEXTS:
        ids = ours(text)["input_ids"]
        for skip in (False, True):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip, clean_up_tokenization_spaces=False)


def test_ten_thousand_random_strings(both):
    draw = random.Random(0)
    ranges = [(32, 127)] * 6 + [(1, 0x250), (0x370, 0x780), (0x900, 0xE80), (0x3040, 0x30FF), (0x4E00, 0x9FFF)]
    ranges += [(0xAC00, 0xD7A3), (0x2000, 0x2BFF), (0xF900, 0xFFFD), (0x1D400, 0x1D7FF), (0x1F300, 0x1FAFF)]
    texts = []
    for _ in range(10_000):
        low, high = draw.choice(ranges)
        texts.append("".join(chr(draw.randint(low, high)) for _ in range(draw.randint(0, 12))))
    same(*both, texts, **OPTIONS)


def test_saving_and_reading_back(both, tmp_path):
    ours, theirs = both
    ours.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    back = type(theirs).from_pretrained(tmp_path)
    same(ours, again, TEXTS, **OPTIONS)
    same(ours, back, TEXTS, **OPTIONS)
    assert again.special_tokens_map == ours.special_tokens_map


def test_a_wordpiece_is_a_bert_tokenizer(tmp_path):
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat"]
    for named, types in (("BertTokenizer", True), ("DistilBertTokenizer", False), ("ElectraTokenizer", True)):
        BertTokenizer(vocab).save_pretrained(tmp_path)
        config = tmp_path / "tokenizer_config.json"
        names = ["input_ids", *(["token_type_ids"] if types else []), "attention_mask"]
        config.write_text(
            json.dumps(json.loads(config.read_text()) | {"tokenizer_class": named, "model_input_names": names})
        )
        ours = AutoTokenizer.from_pretrained(tmp_path)
        assert type(ours) is BertTokenizer
        assert list(ours("the cat")) == names


def test_older_files_of_a_byte_bpe(tmp_path):
    theirs = roberta()
    state = json.loads(theirs.backend_tokenizer.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(state["vocab"]))
    merges = "".join(f"{a} {b}\n" for a, b in state["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "RobertaTokenizer"}))
    ours = AutoTokenizer.from_pretrained(tmp_path)
    same(ours, transformers.RobertaTokenizer.from_pretrained(tmp_path), TEXTS, **OPTIONS)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"vocab.json is there, but no merges.txt"):
        AutoTokenizer.from_pretrained(tmp_path)


def test_older_files_of_mpnet(tmp_path):
    theirs = mpnet()
    theirs.save_pretrained(tmp_path)
    vocab = theirs.get_vocab()
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in sorted(vocab, key=vocab.get)))
    (tmp_path / "tokenizer.json").unlink()
    ours = AutoTokenizer.from_pretrained(tmp_path)
    same(ours, transformers.MPNetTokenizer.from_pretrained(tmp_path), TEXTS, **OPTIONS)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "has no tokenizer.json, vocab.txt, or vocab.json with merges.txt"),
        (["sentencepiece.bpe.model"], "sentencepiece.bpe.model is there, but no tokenizer.json, which is needed"),
        (["merges.txt"], "merges.txt is there, but no vocab.json, nor a tokenizer.json"),
    ],
)
def test_a_missing_file_is_named(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_bytes(b"")
    for kind in (FileNotFoundError, ValueError):
        with pytest.raises(kind, match=message):
            AutoTokenizer.from_pretrained(tmp_path)


def test_a_broken_file_is_named(tmp_path):
    roberta().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model": {"type": "BPE", "vocab": 3}}))
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        AutoTokenizer.from_pretrained(tmp_path)


def test_a_tokenizer_without_a_pad_token_is_refused(tmp_path):
    backend = Backend(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"there is no pad_token; tokenizer_config\.json can name one"):
        AutoTokenizer.from_pretrained(tmp_path)


def test_words_get_the_tokens_of_words_after_a_space(tmp_path):
    roberta().save_pretrained(tmp_path)
    ours = AutoTokenizer.from_pretrained(tmp_path)
    plain, prefixed = ours("the dog")["input_ids"], ours.with_prefix_space()("the dog")["input_ids"]
    spaced = ours(" the dog")["input_ids"]
    assert prefixed == spaced != plain
    assert ours("the dog")["input_ids"] == plain  # unchanged
    words = ours.with_prefix_space()([["the", "dog"]], is_split_into_words=True)["input_ids"][0]
    assert words == spaced
    assert ours.with_prefix_space().with_prefix_space()("the dog")["input_ids"] == spaced


MODELS = {"roberta": roberta, "xlm-roberta": xlm_roberta, "camembert": camembert, "mpnet": mpnet}


@pytest.mark.parametrize("files", ["settings", "no settings"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_class_that_is_not_named_is_that_of_the_model(kind, files, tmp_path):
    """config.json's model_type, as transformers' AutoTokenizer goes by it."""
    theirs = MODELS[kind]()
    theirs.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["tokenizer_class"]
    if files == "no settings":
        settings = {}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    ours = AutoTokenizer.from_pretrained(tmp_path)
    for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"):
        assert getattr(ours, f"{name}_token") == getattr(theirs, f"{name}_token"), name
    firsts, seconds = map(list, zip(*PAIRS[:20], strict=True))
    assert ours(firsts, seconds)["input_ids"] == theirs(firsts, seconds)["input_ids"]
    assert tuple(ours.model_input_names) == tuple(theirs.model_input_names)


def test_distilbert_has_no_token_types(tmp_path):
    transformers.DistilBertTokenizer(
        vocab={t: i for i, t in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"))}
    ).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("model_input_names", None)
    for named in ({}, {"tokenizer_class": "DistilBertTokenizer"}):
        settings.pop("tokenizer_class", None)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | named))
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "distilbert"}))
        assert set(AutoTokenizer.from_pretrained(tmp_path)("a a")) == {"input_ids", "attention_mask"}


def test_null_and_unmarked_special_tokens(tmp_path):
    """A null is no token; a piece of the vocabulary that looks like one is not made special."""
    as_the_file_says().save_pretrained(tmp_path)
    file, settings_file = tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"
    content, settings = json.loads(file.read_text()), json.loads(settings_file.read_text())
    before = AutoTokenizer.from_pretrained(tmp_path)
    settings |= {"bos_token": None, "eos_token": None, "cls_token": None}
    settings_file.write_text(json.dumps(settings))
    ours = AutoTokenizer.from_pretrained(tmp_path)
    assert ours.cls_token is None and ours.pad_token == before.pad_token and "bos_token" not in ours.special_tokens_map
    for name in ("cls_token", "sep_token", "mask_token", "bos_token", "eos_token"):
        settings.pop(name, None)
    for token in content["added_tokens"]:
        token["special"] = token["content"] == before.pad_token
    file.write_text(json.dumps(content))
    settings_file.write_text(json.dumps(settings | {"pad_token": before.pad_token}))
    ours = AutoTokenizer.from_pretrained(tmp_path)
    assert ours.sep_token is None and ours.cls_token is None
