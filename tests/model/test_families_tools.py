"""What stands above the model takes every family: vectors, masks filled, fine-tuning, pre-training, distillation."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from finetune_support import NAMES, PLACES, VERBS, write
from made_tokenizers import roberta, xlm_roberta
from test_families_live import CONFIGS, make
from tiny_bert import VOCAB

import fastbert
from fastbert.cli.main import main

TEXTS = ["The quick brown fox", "", "the lazy dog, doesn't it?", "Быстрая лиса прыгает через ленивую собаку. " * 3, "a"]


def tokenizer_of(name):
    """transformers' tokenizer of the family's kind, trained on some lines."""
    if name in ("roberta",):
        return roberta()
    if name in ("xlm-roberta", "camembert"):
        return xlm_roberta()
    vocab = {token: i for i, token in enumerate([*VOCAB, "quick", "brown", "fox", "lazy"])}
    return transformers.BertTokenizer(vocab=vocab, model_max_length=64)


@pytest.fixture
def folder_of(tmp_path):
    def save(name, head="Model", **sizes):
        tokenizer, folder = tokenizer_of(name), tmp_path / name
        make(name, head, **{"vocab_size": len(tokenizer), **sizes}).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


FAMILIES = [name for name in CONFIGS if " " not in name]


@pytest.mark.parametrize("name", FAMILIES)
def test_vectors(name, folder_of):
    folder = folder_of(name, max_position_embeddings=40)
    embedder = fastbert.Embedder.from_pretrained(folder)
    limit = 40 - (2 if fastbert.families.FAMILIES[name].counts_tokens else 0)
    assert embedder.max_length == limit
    model, tokenizer = (
        transformers.AutoModel.from_pretrained(folder),
        transformers.AutoTokenizer.from_pretrained(folder),
    )
    batch = tokenizer(TEXTS, padding=True, truncation=True, max_length=limit, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"][:, :, None]
    expected = (states * mask).sum(1) / mask.sum(1)
    np.testing.assert_allclose(embedder.embed(TEXTS), expected.numpy(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_masks_are_filled_as_transformers_fills_them(name, folder_of):
    folder = folder_of(name, "ForMaskedLM")
    ours = fastbert.FillMask.from_pretrained(folder)
    pipeline = transformers.pipeline("fill-mask", model=str(folder))
    text = f"the {ours.tokenizer.mask_token} fox"
    expected = pipeline(text, top_k=4)
    found = ours(text, top_k=4)[0]
    assert [c.token.strip() for c in found] == [e["token_str"].strip() for e in expected]
    np.testing.assert_allclose([c.probability for c in found], [e["score"] for e in expected], atol=1e-5)


@pytest.mark.parametrize("task", ["classification", "token-classification", "question-answering"])
@pytest.mark.parametrize("name", ["roberta", "distilbert", "electra"])
def test_finetuning(name, task, tmp_path, capsys):
    words = {token: i for i, token in enumerate(VOCAB + NAMES + PLACES + VERBS)}
    folder = tmp_path / "model"
    tokenizer = roberta() if name == "roberta" else transformers.BertTokenizer(vocab=words, model_max_length=64)
    make(name, vocab_size=len(tokenizer), max_position_embeddings=66).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    data, out = write(tmp_path, task), tmp_path / "out"
    options = ["--epochs", "1", "--tokens", "128", "--lr", "1e-3", "--max-length", "60"]
    options += ["--stride", "4", "--max-question", "8"] if task == "question-answering" else []
    files = ["--train", str(data), "--dev", str(data)]
    assert main(["finetune", "--task", task, "--model", str(folder), *files, "-o", str(out), *options]) == 0
    kind = {"classification": "SequenceClassification", "token-classification": "TokenClassification"}
    head = f"AutoModelFor{kind.get(task, 'QuestionAnswering')}"
    theirs = getattr(transformers, head).from_pretrained(out)
    ours = getattr(fastbert, head).from_pretrained(out)
    inputs = fastbert.AutoTokenizer.from_pretrained(out)(["anna saw rome", "bob"], padding=True, return_tensors="pt")
    with torch.no_grad():
        a, b = ours(**inputs), theirs(**{k: v for k, v in inputs.items()})
    mask = inputs["attention_mask"] == 1
    for field in b:
        x, y = (z[mask] if z.shape[:2] == mask.shape else z for z in (a[field], b[field]))
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n".join(f"the cat sat on the mat . a dog ran under the mat {i} ." for i in range(40)))
    return file


def pretrain_config(folder, shards, **sections):
    values = {
        "data": {"shards": str(shards), "tokens_per_batch": 256},
        "training": {"objective": "mlm", "steps": 2, "precision": "fp32"},
        "output": {"folder": str(folder / "out"), "tensorboard": False},
        **sections,
    }
    text = "".join(
        f"[{section}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in fields.items()) + "\n"
        for section, fields in values.items()
    )
    (folder / "run.toml").write_text(text)
    return folder / "run.toml"


def prepared(tmp_path, lines, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    arguments = ["--vocab", str(tmp_path / "tokenizer"), "--no-pairs", "--max-length", "32"]
    assert main(["prepare", str(lines), "-o", str(tmp_path / "shards"), *arguments]) == 0
    return tmp_path / "shards"


@pytest.mark.parametrize("name", ["roberta", "distilbert", "electra"])
def test_pretraining_by_a_config_that_names_the_family(name, tmp_path, lines):
    tokenizer = tokenizer_of(name)
    shards = prepared(tmp_path, lines, tokenizer)
    make(name, vocab_size=len(tokenizer)).config.save_pretrained(tmp_path / "config")
    config = pretrain_config(tmp_path, shards, model={"config": str(tmp_path / "config")})
    assert main(["pretrain", str(config), "--device", "cpu"]) == 0
    [checkpoint] = (tmp_path / "out" / "checkpoints").glob("step-*2")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(checkpoint)
    assert theirs.config.model_type == name
    assert fastbert.BertConfig.from_pretrained(checkpoint).extra["architectures"] == [type(theirs).__name__]
    assert main(["pretrain", str(config), "--device", "cpu", "--resume", "--set", "training.steps=3"]) == 0


def test_next_sentences_are_for_bert_alone(tmp_path, lines, capsys):
    tokenizer = tokenizer_of("roberta")
    shards = prepared(tmp_path, lines, tokenizer)
    make("roberta", vocab_size=len(tokenizer)).config.save_pretrained(tmp_path / "config")
    config = pretrain_config(tmp_path, shards, model={"config": str(tmp_path / "config")})
    assert main(["pretrain", str(config), "--device", "cpu", "--set", "training.objective=nsp"]) == 1
    assert (
        "training.objective is 'nsp', and the model a 'roberta'; only a 'bert' has the head" in capsys.readouterr().err
    )


def test_a_distilbert_is_the_student_of_a_bert(tmp_path, lines, folder_of):
    teacher, student = folder_of("bert", "ForMaskedLM"), folder_of("distilbert", "ForMaskedLM")
    shards = prepared(tmp_path, lines, tokenizer_of("bert"))
    distillation = {"teacher": str(teacher), "hidden_weight": 1.0, "relation_weight": 0.5}
    config = pretrain_config(tmp_path, shards, model={"checkpoint": str(student)}, distillation=distillation)
    assert main(["distill", str(config), "--device", "cpu"]) == 0
    [checkpoint] = (tmp_path / "out" / "checkpoints").glob("step-*2")
    assert transformers.AutoConfig.from_pretrained(checkpoint).model_type == "distilbert"


@pytest.mark.parametrize("name", ["roberta", "distilbert"])
def test_a_student_with_fewer_layers_of_the_teachers_family(name, folder_of):
    from fastbert.training.distill.student import make_student

    teacher = fastbert.AutoModelForMaskedLM.from_pretrained(folder_of(name, "ForMaskedLM"))
    student = make_student(teacher, layers=[0, 2])
    assert type(student) is type(teacher) and student.config.num_hidden_layers == 2
    own, theirs = (student.family.layers(m.base_model) for m in (student, teacher))
    for i, j in ((0, 0), (1, 2)):
        for a, b in zip(own[i].parameters(), theirs[j].parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", FAMILIES)
def test_explain_names_the_class(name, folder_of):
    folder = folder_of(name)
    kind = type(transformers.AutoModel.from_pretrained(folder)).__name__
    assert str(fastbert.explain(fastbert.AutoModel.from_pretrained(folder))).splitlines()[1].startswith(kind)
    live = fastbert.accelerate(transformers.AutoModel.from_pretrained(folder))
    assert str(fastbert.explain(live)).splitlines()[1].startswith(kind)


def test_doctor_lists_the_model_types(capsys):
    assert main(["doctor"]) == 0
    assert ", ".join(fastbert.families.FAMILIES) in capsys.readouterr().out
