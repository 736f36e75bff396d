"""token-classification: transformers' spans, offsets and scores; words, long texts, scripts."""

import numpy as np
import pytest
import torch
import transformers
from tasks_support import KINDS, LENGTH, labels, make_texts, same, save

import fastbert
from fastbert.inference.windows import central_tokens

TAGS = labels("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
# Where transformers' rule for words fails, as of lengths that lower-casing or accents change: see test_words.
PLAIN = [text for text in make_texts(60) if text.isascii()]


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    return save(tmp_path_factory.mktemp(request.param), request.param, "ForTokenClassification", num_labels=5, **TAGS)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save(tmp_path_factory.mktemp("bert"), "bert", "ForTokenClassification", num_labels=5, **TAGS)


def theirs_of(folder, **options):
    return transformers.pipeline("token-classification", folder, device="cpu", **options)


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
def test_as_transformers(folder, strategy):
    texts = make_texts(200) if strategy in ("none", "simple") else PLAIN
    theirs = theirs_of(folder, aggregation_strategy=strategy)
    ours = fastbert.pipeline("ner", folder, aggregation_strategy=strategy)
    same(ours(texts, truncation=True), theirs(texts))
    same(ours(texts[-1], ignore_labels=["B-PER", "PER"]), theirs(texts[-1], ignore_labels=["B-PER", "PER"]))


@pytest.mark.parametrize("strategy", ["none", "simple"])
def test_live(folder, strategy):
    texts = make_texts(30)
    model = transformers.AutoModelForTokenClassification.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ours = fastbert.pipeline("token-classification", model, tokenizer=tokenizer, aggregation_strategy=strategy)
    same(ours(texts, truncation=True), theirs_of(folder, aggregation_strategy=strategy)(texts))


def test_stride_is_transformers(folder):
    text = make_texts()[8]
    options = {"aggregation_strategy": "simple", "stride": 16, "ignore_labels": []}
    found = fastbert.pipeline("ner", folder)(text, **options)
    assert found and all(entity.pop("windows") > 50 and entity.pop("tokens") for entity in found)
    same(found, theirs_of(folder)(text, **options))


def test_each_token_of_a_long_text_is_taken_where_it_is_most_central(folder):
    """Every token once, in order, with a context of half the overlap at least, and the numbers of that window."""
    text = make_texts()[8]
    ours = fastbert.pipeline("ner", folder, ignore_labels=[])
    tokenizer = ours.tokenizer
    whole = tokenizer(text, add_special_tokens=False).encodings[0]
    windows = ours.prepare([text], ours.settings())
    places = central_tokens(windows)
    assert [windows[n].encoding.ids[i] for n, i in places] == whole.ids
    assert [windows[n].encoding.offsets[i] for n, i in places] == whole.offsets
    stride = (LENGTH - 2) // 4
    for number, place in places[LENGTH:-LENGTH]:
        assert stride // 2 <= place < len(windows[number]) - stride // 2
    model = transformers.AutoModelForTokenClassification.from_pretrained(folder)
    found = ours(text)
    for at in (0, 100, 1000, len(places) - 1):
        number, place = places[at]
        with torch.no_grad():
            scores = model(torch.tensor([windows[number].encoding.ids])).logits[0, place].softmax(-1)
        same(found[at]["score"], scores.max().item())
        assert (found[at]["start"], found[at]["end"]) == whole.offsets[at]
        assert found[at]["windows"] == len(windows) and found[at]["tokens"] == len(whole.ids)


def test_words(bert):
    """A list of words: transformers' answer; and words of accents, one-character scripts, and both directions."""
    words = ["the", "quick", "brown", "fox", "jumps", "over"]
    options = {"aggregation_strategy": "first", "is_split_into_words": True}
    ours = fastbert.pipeline("ner", bert, ignore_labels=[], **options)
    same(ours(words), theirs_of(bert)(words, ignore_labels=[], **options))
    same(ours([words, words[:2]]), theirs_of(bert)([words, words[:2]], ignore_labels=[], **options))
    for words in (["cafe\u0301", "Å", "ﬁ"], list("中文没有空格"), ["שלום", "عالم"], ["😀", "ｈａｌｆ"]):
        text, (entities,) = " ".join(words), ours(words)
        assert entities and entities[-1]["end"] == len(text)
        for entity in entities:
            before, stretch = text[: entity["start"]].split(), text[entity["start"] : entity["end"]].split()
            assert stretch == words[len(before) : len(before) + len(stretch)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_word_is_whole(tmp_path, kind):
    """An answer never begins or ends within a word; a Chinese character is a word of its own."""
    folder = save(tmp_path, kind, "ForTokenClassification", num_labels=5, **TAGS)
    ours = fastbert.pipeline("ner", folder, aggregation_strategy="first", ignore_labels=[])
    text = "le cafe\u0301 Å été"
    for entity in ours(text):
        before, after = text[: entity["start"]], text[entity["end"] :]
        assert not before.strip() or before.endswith(" ") or text[entity["start"]] == " "
        assert not after or after.startswith(" ") or after.startswith("\u0301") is False
    chinese = "中文没有空格"
    windows = ours.prepare([chinese], ours.settings())
    rows = np.tile(np.float32([0, 0, 5, 0, 0]), (len(windows[0]), 1))  # I-PER each: one entity, of whole words
    ((entities, _),) = ours.answers([chinese], windows, [rows], ours.settings())
    assert "".join(chinese[each["start"] : each["end"]] for each in entities) == chinese
    found = {n: np.float32([0, 5, 0, 0, 0]) for n in range(len(windows[0]))}  # B-PER each: an entity for each word
    ((entities, _),) = ours.answers([chinese], windows, [np.stack(list(found.values()))], ours.settings())
    assert len(entities) == sum(part is not None for part in windows[0].encoding.sequence_ids) > 1


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ("cat", {"aggregation_strategy": "middle"}, "aggregation_strategy is 'middle'; it must be one of none, simple"),
        (["a", 1], {}, r"inputs\[1\] is a int; token-classification takes a str"),
        ("cat", {"is_split_into_words": True}, "it must be a list of words, as is_split_into_words is True"),
    ],
)
def test_bad_input(bert, given, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        fastbert.pipeline("ner", bert)(given, **options)


SCRIPTS = {
    "Chinese": ("我在北京和上海工作。", ["北京", "上海"]),
    "Japanese": ("東京から京都へ行った。", ["東京", "京都"]),
    "full width": ("ＩＢＭ の本社", ["ＩＢＭ"]),
    "Hebrew": ("דוד גר ליד תל אביב היום", ["דוד", "תל אביב"]),
    "Arabic, and left to right within": ("يعمل محمد في IBM منذ 2019", ["محمد", "IBM"]),
    "combining marks": ("Ame\u0301lie zog nach Zu\u0308rich.", ["Ame\u0301lie", "Zu\u0308rich"]),
    "emoji": ("👩‍👩‍👧‍👦 sah Ötzi 😀 in Bozen", ["Ötzi", "Bozen"]),
}


@pytest.mark.parametrize("strategy", ["simple", "first", "average", "max"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_entities_of_other_scripts(folder, request, script, strategy):
    """With the logits of a model that is right, each entity is one, and its place is that in the text."""
    text, names = SCRIPTS[script]
    kind = request.node.callspec.params["folder"]
    ours = fastbert.pipeline("ner", folder, aggregation_strategy=strategy)
    settings = ours.settings()
    windows = ours.prepare([text], settings)
    rows, before = np.zeros((len(windows[0]), 5), np.float32), None
    for token, (start, end) in enumerate(windows[0].encoding.offsets):
        letters = {i for i in range(start, end) if not text[i].isspace()}
        spans = [range(text.index(name), text.index(name) + len(name)) for name in names]
        inside = next((span for span in spans if {*range(start, max(end, start + 1))} & {*span}), None)
        unknown = inside is not None and windows[0].encoding.ids[token] == ours.tokenizer.unk_token_id
        if inside is not None and (not letters <= {*inside} or (unknown and kind != "bert")):
            assert kind != "bert"
            pytest.skip("a character of a name is unknown to this tokenizer")
        rows[token, 0 if inside is None else 4 if inside == before else 3] = 5.0 if inside is None else 9.0
        before = inside
    ((found, _),) = ours.answers([text], windows, [rows], settings)
    # Words of tokenizers that go by spaces hold the punctuation after them, as in transformers.
    assert [text[each["start"] : each["end"]].strip(" .。") for each in found] == names
    assert {each["entity_group"] for each in found} == {"LOC"}


def test_a_generator_of_word_lists(bert):
    ours = fastbert.pipeline("ner", bert, ignore_labels=[], is_split_into_words=True)
    lists = [["the", "fox"], ["a", "lazy", "dog"], ["cat"]]
    assert list(ours(words for words in lists)) == ours(lists)
