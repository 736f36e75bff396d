"""attribute: captum's numbers, completeness, occlusion by hand; the page; and augment."""

import re
import statistics
import time

import numpy as np
import pytest
import torch
import transformers
from captum import attr as captum
from cli_support import run
from tasks_support import KINDS, labels, make_texts, save

import fastbert
from fastbert.tasks.attribution import attention_maps, nearest_tokens
from fastbert.tasks.attribution_page import page
from fastbert.tasks.augmentation import augment

TOPICS = labels("sport", "news", "art")
TEXT = "the quick brown fox jumps over the lazy dog"


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    home = tmp_path_factory.mktemp(request.param)
    return save(home, request.param, "ForSequenceClassification", num_labels=3, **TOPICS)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save(tmp_path_factory.mktemp("bert"), "bert", "ForSequenceClassification", num_labels=3, **TOPICS)


@pytest.mark.parametrize("target", [None, 1, "art"])
def test_as_captum(folder, target):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    found = fastbert.attribute(folder, TEXT, target=target)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(TEXT, return_tensors="pt", return_special_tokens_mask=True)
    ids, special = batch["input_ids"], batch["special_tokens_mask"]
    base = torch.where(special == 1, ids, tokenizer.pad_token_id)
    positions = {}
    if model.config.model_type != "bert":  # else they would be counted without the baseline's pads
        positions["position_ids"] = torch.arange(2, 2 + ids.shape[1])[None]

    def forward(ids):
        return model(ids, **{n: p.expand(len(ids), -1) for n, p in positions.items()}).logits

    gradients = captum.LayerIntegratedGradients(forward, model.get_input_embeddings())
    scores, delta = gradients.attribute(
        ids, base, target=found.target, n_steps=50, internal_batch_size=None, return_convergence_delta=True
    )
    np.testing.assert_allclose(found.scores, scores.sum(-1)[0].numpy(), atol=1e-4)
    assert found.delta == pytest.approx(delta.item(), abs=1e-4)
    assert found.tokens == tokenizer.convert_ids_to_tokens(ids[0])
    assert target is None or found.label == (target if isinstance(target, str) else "news")


def test_completeness_and_batches(bert):
    found = fastbert.attribute(bert, TEXT)
    assert found.completeness_error < 0.01
    pipe = fastbert.pipeline("text-classification", bert)
    (answer,) = pipe(TEXT)
    assert answer["label"] == found.label and answer["score"] == pytest.approx(found.score, abs=1e-5)
    parts = fastbert.attribute(pipe, TEXT, internal_batch_size=7)
    np.testing.assert_allclose(parts.scores, found.scores, atol=1e-5)
    assert all(parameter.requires_grad for parameter in pipe.model.parameters())
    assert fastbert.attribute(pipe, TEXT, n_steps=2).completeness_error > found.completeness_error
    assert sorted(map(abs, found.scores.tolist()), reverse=True) == [abs(score) for _, score in found.ranked()]


def test_occlusion(bert):
    """By hand: each token in turn replaced by [PAD]."""
    found = fastbert.attribute(bert, TEXT, method="occlusion")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(bert)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        whole = model(ids).logits[0, found.target]
        for i in range(ids.shape[1]):
            without = ids.clone()
            without[0, i] = ids[0, i] if i in (0, ids.shape[1] - 1) else tokenizer.pad_token_id
            assert found.scores[i] == pytest.approx(float(whole - model(without).logits[0, found.target]), abs=1e-5)
    assert found.delta is None


def test_attention_and_nearest(bert):
    tokens, maps = attention_maps(bert, TEXT)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(bert, attn_implementation="eager")
    batch = transformers.AutoTokenizer.from_pretrained(bert)(TEXT, return_tensors="pt")
    with torch.no_grad():
        theirs = torch.cat(model(**batch, output_attentions=True).attentions).numpy()
    np.testing.assert_allclose(maps, theirs, atol=1e-5)
    assert maps.shape == (2, 4, len(tokens), len(tokens))
    near = nearest_tokens(bert, "fox", 3)
    table = model.get_input_embeddings().weight.detach()
    index = transformers.AutoTokenizer.from_pretrained(bert).get_vocab()["fox"]
    cosines = torch.nn.functional.cosine_similarity(table, table[index][None])
    assert [score for _, score in near] == pytest.approx(cosines.topk(4).values[1:].tolist(), abs=1e-5)
    with pytest.raises(ValueError, match="token is 'foxes and dogs'; the vocabulary has none such"):
        nearest_tokens(bert, "foxes and dogs")


def test_the_command_and_its_page(bert, tmp_path, capsys):
    page = tmp_path / "why.html"
    text = "the <b>quick</b> brown fox & café"
    code, out, err = run(capsys, "explain-text", bert, text, "--html", page)
    assert code == 0 and re.search(r"completeness error 0\.\d+% after 50 steps", out) and "the page is" in err
    shown = page.read_text()
    assert "<b>quick" not in shown and "&lt;" in shown and not re.search(r"https?://", shown)
    assert shown.count("<span style") == len(fastbert.attribute(bert, text).tokens) - 2
    code, out, _ = run(capsys, "explain-text", bert, "a fox", "--target", "art", "--method", "occlusion", "--json")
    assert code == 0 and '"label": "art"' in out
    code, _, err = run(capsys, "explain-text", bert, "a fox", "--target", "arts")
    assert code == 1 and "target is 'arts'; it must be one of 'sport', 'news', 'art', or its number" in err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "guess"}, "method is 'guess'; it must be integrated_gradients or occlusion"),
        ({"n_steps": 0}, "n_steps is 0; it must be at least 1"),
        ({"target": 3}, "target is 3; it must be one of"),
        ({"text": make_texts()[8]}, "the text has more tokens than the model takes, 64"),
    ],
)
def test_bad_input(bert, given, message):
    with pytest.raises(ValueError, match=message):
        fastbert.attribute(bert, **{"text": TEXT, **given})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("action", ["substitute", "insert"])
def test_augment(tmp_path, kind, action):
    folder = save(tmp_path, kind, "ForMaskedLM")
    found = augment(TEXT, model=folder, action=action, n=4, aug_p=0.3, stopwords=["the"])
    words = TEXT.split()
    assert found == augment(TEXT, model=folder, action=action, n=4, aug_p=0.3, stopwords=["the"])
    assert len(set(found)) > 1 and found != augment(TEXT, model=folder, action=action, n=4, seed=1, stopwords=["the"])
    for text in found:
        changed = text.split()
        if action == "insert":
            assert len(changed) == len(words) + 3 and [w for w in changed if w in words].count("fox") >= 1
        else:
            assert len(changed) == len(words) and sum(a != b for a, b in zip(changed, words, strict=True)) == 3
            assert changed[0] == changed[6] == "the"
    several = augment([TEXT, "", "...", make_texts()[8]], model=folder, action=action)
    assert [len(variants) for variants in several] == [1] * 4 and several[1:3] == [[""], ["..."]]
    assert several[3] == [make_texts()[8]]


def test_augment_keeps_what_is_no_word(tmp_path):
    """Punctuation, white space, and the other characters of a text without spaces."""
    folder = save(tmp_path, "bert", "ForMaskedLM")
    text = 'The (quick)  fox,\n"jumps" over: dogs!'
    for variant in augment(text, model=folder, n=5, aug_p=0.5):
        assert re.sub(r"[\w'-]+", "x", variant) == re.sub(r"\w+", "x", text) and variant != text
    (chinese,) = augment("快速的棕色狐狸", model=folder, aug_p=0.2)
    assert sum(a not in chinese for a in "快速的棕色狐狸") == 1
    (only,) = augment("fox", model=folder, top_k=1)
    assert only != "fox"


def test_augment_refuses(tmp_path):
    folder = save(tmp_path, "bert", "ForMaskedLM")
    for given, message in (
        ({"action": "swap"}, "action is 'swap'"),
        ({"aug_p": 0}, "aug_p is 0"),
        ({"n": 0}, "n is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            augment(TEXT, model=folder, **given)


@pytest.mark.slow
@pytest.mark.usefixtures("all_cores")
def test_time_against_captum(minilm, tmp_path):
    """On the real MiniLM with a random head; prints both times, by turns."""
    config = transformers.BertConfig.from_pretrained(minilm, num_labels=3)
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification.from_pretrained(minilm, config=config).eval()
    model.save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    tokenizer.save_pretrained(tmp_path)
    pipe = fastbert.pipeline("text-classification", tmp_path)
    gradients = captum.LayerIntegratedGradients(lambda ids: model(ids).logits, model.get_input_embeddings())
    for words in (9, 90):
        text = " ".join((TEXT.split() * 10)[:words])
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        base = torch.where((ids == 101) | (ids == 102), ids, 0)
        ways = {
            "fastbert": lambda text=text: fastbert.attribute(pipe, text, target=1).scores,
            "captum": lambda ids=ids, base=base: gradients.attribute(
                ids, base, target=1, n_steps=50, return_convergence_delta=True
            )[0].sum(-1)[0],
        }
        np.testing.assert_allclose(ways["fastbert"](), ways["captum"]().detach().numpy(), atol=1e-4)
        times = {name: [] for name in ways}
        for _ in range(7):
            for name, run_once in ways.items():
                begin = time.perf_counter()
                run_once()
                times[name].append(time.perf_counter() - begin)
        median = {name: statistics.median(values) for name, values in times.items()}
        ratio = median["captum"] / median["fastbert"]
        print(f"{ids.shape[1]} tokens: {median['fastbert'] * 1e3:.0f} ms, captum {ratio:.2f} times that")
        assert ratio > 1.2


def test_names_before_numbers_and_the_scores_of_the_problem(tmp_path):
    names = labels("1", "2", "3")
    folder = save(tmp_path, "bert", "ForSequenceClassification", problem_type="multi_label_classification", **names)
    found, delta = fastbert.attribute(folder, TEXT, target="1", return_convergence_delta=True)
    assert found.target == 0 and found.label == "1" and delta == found.delta
    assert found.score == pytest.approx(1 / (1 + np.exp(-found.logit)), abs=1e-6)
    assert found.attributions == list(zip(found.tokens, found.scores.tolist(), strict=True))
    with pytest.raises(TypeError, match="device is given, but model is a pipeline already"):
        fastbert.attribute(fastbert.pipeline(None, folder), TEXT, device="cpu")


def test_a_character_of_several_tokens_is_shown_once(tmp_path):
    folder = save(tmp_path, "roberta", "ForSequenceClassification", num_labels=3, **TOPICS)
    found = fastbert.attribute(folder, "😀 fox")
    assert len(set(found.offsets)) < len(found.offsets)
    shown = page(found, np.ones((2, 4, len(found.tokens), len(found.tokens))), {})
    assert shown.split("<h2>")[0].count("😀") == 1
