"""text-classification and zero-shot-classification: transformers' numbers and fields; long texts in windows."""

import pytest
import transformers
from tasks_support import KINDS, LENGTH, labels, make_texts, same, save

import fastbert

TOPICS = labels("sport", "news", "art")
INFERENCE = labels("contradiction", "neutral", "entailment")
PAIRS = [
    {"text": a, "text_pair": b}
    for a, b in zip(make_texts(30, longest=9), make_texts(30, seed=1, longest=9), strict=True)
]
PAIRS = [pair for pair in PAIRS if len(pair["text"]) < 1000 and len(pair["text_pair"]) < 1000]


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    home = tmp_path_factory.mktemp(request.param)
    return save(home, request.param, "ForSequenceClassification", num_labels=3, **TOPICS)


@pytest.fixture(scope="module")
def inference(tmp_path_factory):
    return save(tmp_path_factory.mktemp("nli"), "bert", "ForSequenceClassification", num_labels=3, **INFERENCE)


def live(folder):
    """A live model of transformers with its tokenizer, accelerated."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    return {"model": model, "tokenizer": transformers.AutoTokenizer.from_pretrained(folder)}


@pytest.mark.parametrize("way", ["own", "live"])
@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": None}, {"top_k": 2, "function_to_apply": "sigmoid"}, {"function_to_apply": "none"}],
    ids=str,
)
def test_as_transformers(folder, way, options):
    texts = make_texts(200 if way == "own" and not options else 40)
    theirs = transformers.pipeline("text-classification", folder, device="cpu")
    ours = fastbert.pipeline("text-classification", **({"model": folder} if way == "own" else live(folder)))
    same(ours(texts, truncation=True, **options), theirs(texts, truncation=True, **options))
    same(ours(texts[0], **options), theirs(texts[0], **options))


def test_pairs(folder):
    theirs = transformers.pipeline("text-classification", folder, device="cpu")
    ours = fastbert.pipeline("text-classification", folder)
    answers = theirs(PAIRS, truncation=True)
    same(ours(PAIRS, truncation=True), answers)
    same(
        ours([(p["text"], p["text_pair"]) for p in PAIRS if p["text_pair"]], truncation=True),
        [a for a, p in zip(answers, PAIRS, strict=True) if p["text_pair"]],
    )
    same(ours(PAIRS[0]), theirs(PAIRS[0]))
    same(ours([PAIRS[0], "cat"]), [theirs(PAIRS[0]), theirs(["cat"])[0]])


@pytest.mark.parametrize(
    ("settings", "count"),
    [({"problem_type": "multi_label_classification"}, 3), ({"problem_type": "regression"}, 1), ({}, 1)],
)
def test_kinds_of_problem(tmp_path, settings, count):
    folder = save(tmp_path, "bert", "ForSequenceClassification", num_labels=count, **settings)
    texts = make_texts(20)
    theirs = transformers.pipeline("text-classification", folder, device="cpu")
    same(fastbert.pipeline(None, folder)(texts, truncation=True), theirs(texts, truncation=True))


@pytest.mark.parametrize("long", ["mean", "max"])
def test_a_long_text_runs_in_windows(folder, long):
    """By hand: the windows of the tokenizer, the mean or the largest of their logits."""
    text = make_texts()[8]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    stride = (LENGTH - tokenizer.num_special_tokens_to_add()) // 4
    windows = tokenizer(
        text, truncation=True, stride=stride, return_overflowing_tokens=True, padding=True, return_tensors="pt"
    )
    windows.pop("overflow_to_sample_mapping")
    logits = transformers.AutoModelForSequenceClassification.from_pretrained(folder)(**windows).logits.detach()
    scores = (logits.mean(0) if long == "mean" else logits.max(0).values).softmax(-1)
    answer = fastbert.pipeline("text-classification", folder, long=long)(["cat", text], top_k=None)[1]
    same(sorted(each["score"] for each in answer), sorted(scores.tolist()))
    tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert answer[0]["windows"] == len(logits) and answer[0]["tokens"] == tokens


def test_a_long_pair_splits_its_longer_text(folder):
    text = make_texts()[8]
    ours = fastbert.pipeline("text-classification", folder)
    for pair in ((text, "the cat"), ("the cat", text)):
        answer = ours(pair)
        assert answer["windows"] > 50 and answer["tokens"] == sum(
            len(ids) for ids in ours.tokenizer(list(pair), add_special_tokens=False)["input_ids"]
        )


def test_a_stream_is_answered_in_order(folder):
    texts = make_texts(60)
    ours = fastbert.pipeline("text-classification", folder, max_tokens=100)
    answers = ours(text for text in texts)
    assert iter(answers) is answers
    same(list(answers), [ours([text])[0] for text in texts])


@pytest.mark.parametrize("options", [{}, {"multi_label": True}, {"hypothesis_template": "It is about {}."}], ids=str)
@pytest.mark.parametrize("candidates", [["fox", "dog", "straße"], "fox, dog", ["fox"]], ids=str)
def test_zero_shot(inference, options, candidates):
    theirs = transformers.pipeline("zero-shot-classification", inference, device="cpu")
    ours = fastbert.pipeline("zero-shot-classification", inference)
    texts = [text for text in make_texts(200 if not options and len(candidates) == 3 else 20) if text]  # theirs fails
    same(ours(texts, candidates, truncation=True, **options), theirs(texts, candidates, **options))
    same(ours(texts[0], candidate_labels=candidates, **options), theirs(texts[0], candidates, **options))
    long = ours(make_texts()[8], candidates)
    assert long["windows"] > 50 and sorted(long["labels"]) == sorted(ours.settings(candidate_labels=candidates).labels)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([1], {}, r"inputs\[0\] is 1; text-classification takes a str"),
        ("cat", {"top_k": 0}, "top_k is 0; it must be at least 1"),
        ("cat", {"function_to_apply": "tanh"}, "function_to_apply is 'tanh'; it must be softmax, sigmoid, none"),
        ("cat", {"long": "median"}, "long is 'median'; it must be 'mean' or 'max'"),
        ("cat", {"max_length": 4000}, r"max_length is 4000; it must be \d to \d+, as the model has positions"),
        ("cat", {"max_length": 8, "stride": 6}, "stride is 6; it must be 0 to 5"),
        ("cat", {"depth": 3}, "text-classification takes no depth; it takes truncation"),
    ],
)
def test_bad_input(folder, given, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        fastbert.pipeline("text-classification", folder)(given, **options)


def test_bad_doors(folder, inference):
    with pytest.raises(ValueError, match="task is 'translation'; it must be one of text-classification"):
        fastbert.pipeline("translation", folder)
    with pytest.raises(ValueError, match="model is missing"):
        fastbert.pipeline("ner")
    with pytest.raises(ValueError, match="candidate_labels is empty"):
        fastbert.pipeline("zero-shot-classification", inference)("cat", [])
    with pytest.raises(ValueError, match="hypothesis_template is 'no place'"):
        fastbert.pipeline("zero-shot-classification", inference, hypothesis_template="no place")


def test_top_k_of_the_pipeline_and_of_the_call(folder):
    """As transformers: one text's answer is in a list unless the call itself has a top_k."""
    for made, called in (({"top_k": 2}, {}), ({}, {"top_k": 2}), ({"top_k": None}, {}), ({}, {})):
        theirs = transformers.pipeline("text-classification", folder, device="cpu", **made)
        ours = fastbert.pipeline("text-classification", folder, **made)
        same(ours("the fox", **called), theirs("the fox", **called))


def test_a_live_model_is_for_inference(folder):
    model = fastbert.AutoModelForSequenceClassification.from_pretrained(folder).train()
    ours = fastbert.pipeline("text-classification", model, tokenizer=folder, device=-1)
    assert not model.training and ours("fox") == ours("fox")
    with pytest.raises(ValueError, match="dtype is given, but the model is loaded already"):
        fastbert.pipeline("text-classification", model, tokenizer=folder, torch_dtype="bfloat16")
    same(fastbert.pipeline(None, folder, torch_dtype="float32", use_fast=True)("fox"), ours("fox"))


def test_zero_shot_without_a_class_called_entailment(folder):
    with pytest.warns(UserWarning, match="no class of the model is named entailment; of 'sport', 'news', 'art' the"):
        ours = fastbert.pipeline("zero-shot-classification", folder)
    theirs = transformers.pipeline("zero-shot-classification", folder, device="cpu")
    same(ours("the fox", ["a", "b"]), theirs("the fox", ["a", "b"]))
