"""The examples that `fastbert COMMAND --help` shows run as they are written."""

import csv
import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from glob import glob
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from finetune_support import NAMES, PLACES, VERBS, VOCAB, save_model

import fastbert
from fastbert.cli.main import build_parser, main

# prepare and pretrain, whose examples are of whole books and of eight GPUs: tests/training runs both commands; and
# serve, whose run until they are stopped: tests/serve runs it.
COMMANDS = [
    "embed",
    "predict",
    "evaluate",
    "zero-shot",
    "search",
    "rerank",
    "mine",
    "summarize",
    "explain-text",
    "fill-mask",
    "finetune",
    "distill",
    "doctor",
]
NOT_HERE = {"prepare", "pretrain", "serve"}
PLAIN_TEXT = "fastbert distill distill.toml"  # shards of pre-training; tests/training/test_distill.py
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
SIZES = {"hidden_size": 288, "num_attention_heads": 9, "max_position_embeddings": 512}
SENTENCES = [f"{(NAMES, PLACES)[i % 2][i % 8]} {VERBS[i % 6]} the {PLACES[i % 7]} ." for i in range(24)]


def parsers():
    """Each command's parser by name."""
    (commands,) = (a for a in build_parser()._actions if hasattr(a, "choices") and isinstance(a.choices, dict))
    return commands.choices


def examples_of(command):
    """The lines under `example:` or `examples:`, each with those that continue it."""
    shown = re.search(r"^examples?:\n((?:  .*\n)+)", parsers()[command].epilog, re.M)[1]
    return [" ".join(line.split()) for line in shown.replace("\\\n", " ").splitlines()]


def classifier(folder, labels, kind="ForSequenceClassification"):
    config = fastbert.BertConfig.from_pretrained(save_model(folder, num_hidden_layers=6, **SIZES))
    config.id2label, config.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.1
    torch.manual_seed(0)
    getattr(fastbert, f"Bert{kind}")(config).save_pretrained(folder)


def write_csv(path, rows, **options):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), **options)
        writer.writeheader()
        writer.writerows(rows)


def make_models(command):
    for path in ("path/to/model", "path/to/teacher"):
        if command in ("predict", "explain-text") or path.endswith("teacher"):
            classifier(Path(path), ["positive", "negative"])
        elif command == "fill-mask":
            classifier(Path(path), ["a", "b"], "ForMaskedLM")
        else:
            save_model(Path(path), **SIZES)
        fastbert.BertTokenizer(VOCAB, model_max_length=512).save_pretrained(path)
    prompts = {"prompts": {"query": "who ? "}}
    Path("path/to/model/config_sentence_transformers.json").write_text(json.dumps(prompts))
    classifier(Path("path/to/nli-model"), ["contradiction", "neutral", "entailment"])
    classifier(Path("path/to/cross-encoder"), ["score"])
    if command == "evaluate":
        classifier(Path("out"), ["positive", "negative"])


def make_files():
    """What the examples read."""
    for name in ("sentences", "mail", "texts", "queries", "documents", "article", "a", "b"):
        Path(f"{name}.txt").write_text("\n".join(SENTENCES) + "\n")
    Path("mail.txt.gz").write_bytes(gzip.compress("\n".join(SENTENCES).encode()))
    bodies = "".join(json.dumps({"body": text}) + "\n" for text in SENTENCES)
    Path("big.jsonl.gz").write_bytes(gzip.compress(bodies.encode()))
    Path("messages.jsonl").write_text(bodies.replace("body", "text"))
    write_csv("reviews.csv", [{"review": text, "stars": i} for i, text in enumerate(SENTENCES)])
    labelled = [
        {"text": text, "label": ("positive", "negative")[i % 2], "first": text, "second": SENTENCES[i - 1]}
        for i, text in enumerate(SENTENCES)
    ]
    for name in ("train", "dev", "test", "all"):
        write_csv(f"{name}.csv", labelled)
    for name in ("pairs", "dev"):
        rows = [{"first": row["first"], "second": row["second"], "score": i} for i, row in enumerate(labelled)]
        write_csv(f"{name}.tsv", rows, delimiter="\t")
    for name in ("train", "dev"):
        tagged = (
            "\n".join(f"{word} {'B-LOC' if word in PLACES else 'O'}" for word in text.split()) for text in SENTENCES
        )
        Path(f"{name}.conll").write_text("\n\n".join(tagged) + "\n")
    for name in ("squad", "dev"):
        paragraphs = [
            {
                "context": text,
                "qas": [{"id": f"{i}", "question": "who ?", "answers": [{"text": text[:3], "answer_start": 0}]}],
            }
            for i, text in enumerate(SENTENCES)
        ]
        Path(f"{name}.json").write_text(json.dumps({"data": [{"title": name, "paragraphs": paragraphs}]}))

    triplets = [{"anchor": a, "positive": f"{a} today", "negative": f"the {b}"} for a, b in pairwise(SENTENCES)]
    for name in ("pairs", "triplets"):
        kept = [
            {key: row[key] for key in ("anchor", "positive", "negative")[: 2 + (name == "triplets")]}
            for row in triplets
        ]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        write_csv(f"{name}.csv", kept)


def test_every_command_has_examples():
    assert set(parsers()) == {*COMMANDS, *NOT_HERE}
    assert all(examples_of(command) for command in parsers())


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_run(command, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    make_models(command)
    make_files()
    for number, line in enumerate(examples_of(command)):
        line = re.sub(r"-o out\b", f"-o out-{number}", line)  # each trains into a folder of its own
        if line == PLAIN_TEXT:
            continue
        if "|" in line or "=" in line.split()[0]:
            done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
            assert done.returncode == 0, f"{line}\n{done.stderr}"
            continue
        program, *words = shlex.split(line)
        epochs = ["--epochs", "1"] if command in ("finetune", "distill") else []
        assert program == "fastbert"
        assert main([*words, *epochs]) == 0, f"{line}\n{capfd.readouterr().err}"
        if "-o" in words:
            assert glob(words[words.index("-o") + 1]), line
