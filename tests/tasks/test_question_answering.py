"""question-answering: the answers of transformers' pipeline before 5.3, by a reference written from its rules."""

import random

import numpy as np
import pytest
import transformers
from question_answering_reference import Reference
from tasks_support import KINDS, make_texts, same, save

import fastbert

TEXTS = make_texts(60)
LONG = TEXTS[8][:1500]
WORDS = ["the", "quick", "brown", "fox", "lazy", "dog", "foxes", "dogs", "l'été", "and"]


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    return save(tmp_path_factory.mktemp(request.param), request.param, "ForQuestionAnswering")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save(tmp_path_factory.mktemp("bert"), "bert", "ForQuestionAnswering")


def questions(count, seed=0):
    draw = random.Random(seed)
    contexts = [text for text in TEXTS if len(text.split()) > 3 and len(text) < 1000] + [LONG]
    return [
        {"question": " ".join(draw.choices(WORDS, k=draw.randint(1, 5))), "context": draw.choice(contexts)}
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 3},
        {"max_answer_len": 4, "handle_impossible_answer": True, "top_k": 2},
        {"max_seq_len": 40, "doc_stride": 8},
        {"align_to_words": False, "top_k": 2},
    ],
    ids=str,
)
def test_as_the_pipeline_was(folder, options):
    reference, ours = Reference(folder), fastbert.pipeline("question-answering", folder)
    asked = questions(25)
    found = ours(asked, **options)
    several = 0
    for answer in (a for each in found for a in (each if isinstance(each, list) else [each])):
        windows, tokens = answer.pop("windows", 1), answer.pop("tokens", 0)
        several += windows > 1 and tokens > 0
    assert several > 0  # the long context ran in windows, and its answers say so
    compared = 0
    for ours_, each in zip(found, asked, strict=True):
        theirs = reference(**each, **options)
        if not reference.is_close:
            same(ours_, theirs)
            compared += 1
    assert compared >= 20


def test_ways_to_ask(bert):
    ours = fastbert.pipeline("question-answering", bert)
    asked = questions(3)
    answers = [ours(question=each["question"], context=each["context"]) for each in asked]
    assert all(isinstance(answer, dict) for answer in answers)
    assert ours(asked) == ours(*asked) == answers
    assert ours(asked[0]) == ours(asked[:1]) == answers[0]
    columns = {name: [each[name] for each in asked] for name in asked[0]}
    assert ours(**columns) == answers
    one = ours(question=columns["question"], context=asked[0]["context"])
    assert one == [ours(question=q, context=asked[0]["context"]) for q in columns["question"]]


def test_live(bert):
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(bert)
    ours = fastbert.pipeline("question-answering", model, tokenizer=transformers.AutoTokenizer.from_pretrained(bert))
    asked = questions(10)
    same(ours(asked), fastbert.pipeline("question-answering", bert)(asked))


def test_a_window_never_hides_the_answer(bert):
    """The offsets are those of the whole context, whichever window holds the answer."""
    answer = fastbert.pipeline("question-answering", bert)(question="the fox", context=LONG, top_k=5)
    assert all(LONG[each["start"] : each["end"]] == each["answer"] for each in answer)
    assert np.all(np.diff([each["score"] for each in answer]) <= 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"question": "who?"}, "context is missing; a question needs its context"),
        ({"question": "", "context": "a"}, r"inputs\[0\]: the question is empty"),
        ({"question": ["a", "b"], "context": ["a", "b", "c"]}, "question has 2 texts, context 3"),
        ({}, "no question is given"),
        ({"question": "who?", "context": "a", "top_k": 0}, "top_k is 0"),
        ({"question": "the fox " * 40, "context": "a"}, "tokens, which leave no room for windows of its context"),
        ({"question": "who?", "context": "a", "doc_stride": 99}, "doc_stride is 99; it must be at most max_seq_len"),
    ],
)
def test_bad_input(bert, given, message):
    with pytest.raises((TypeError, ValueError), match=message):
        fastbert.pipeline("question-answering", bert)(**given)


def test_a_long_question_can_be_cut(bert):
    ours = fastbert.pipeline("question-answering", bert, max_question_len=6)
    text = "the quick brown fox " * 20
    assert ours(question=text, context=LONG) == ours(question="the quick brown fox the quick", context=LONG)
