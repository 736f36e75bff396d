"""Distillation on plain text and for a task: losses, fixed points, learning, going on, and the command."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from finetune_support import READING, make_recipe, save_model, write, write_csv
from safetensors.torch import load_file
from training_support import SIZES, MadeUpBatches, assert_same_weights, make_run, make_settings, write_run

import fastbert
from fastbert.cli.finetune_arguments import DISTILLED_TASKS
from fastbert.cli.main import main
from fastbert.training.distill.losses import choice_loss
from fastbert.training.distill.settings import DistillationSettings, TextSettings
from fastbert.training.distill.student import make_student, spread
from fastbert.training.distill.task import SOFT, TaskDistillation
from fastbert.training.distill.text import TextDistillation
from fastbert.training.loop import TrainingError
from fastbert.training.objective import MODELS, MicroBatch
from fastbert.training.settings import SettingsError, read_section, read_settings
from fastbert.training.training_state import CheckpointError

EVERYTHING = {"alpha": 0.3, "hidden_weight": 0.5, "relation_weight": 0.7, "temperature": 3.0}


def a_model(objective="mlm_nsp", seed=0, layers=4):
    torch.manual_seed(seed)
    sizes = {**SIZES, "num_hidden_layers": layers, "initializer_range": 0.2}
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return MODELS[objective](fastbert.BertConfig(**sizes))


def micro_batch(model, objective="mlm_nsp", index=1, **options):
    return MicroBatch.of(MadeUpBatches(**options).batch(index), model.config, objective, "cpu")


# On plain text.


@pytest.mark.parametrize("objective", MODELS)
def test_the_parts_are_what_padded_models_and_all_their_logits_make(objective):
    """In float64, from hidden states and logits of every token as (B, S, ...)."""
    teacher = a_model(objective).double().eval()
    student = make_student(teacher, num_layers=2, hidden_size=24).double()
    settings = DistillationSettings("t", **EVERYTHING)
    objective_ = TextDistillation(student, teacher, settings)
    for p in objective_.layers.double().parameters():
        torch.nn.init.normal_(p)
    whole = micro_batch(student, objective)
    got = dict(zip(objective_.parts, objective_(whole, whole.counts).tolist(), strict=True))

    batch = whole.batch
    given = dict(input_ids=batch.input_ids, token_type_ids=batch.token_type_ids, cu_seqlens=batch.cu_seqlens)
    own, theirs = (m(**given, max_seqlen=batch.max_seqlen, output_hidden_states=True) for m in (student, teacher))
    asked = batch.labels != -100
    expected = {"mlm_loss": 0.0, "nsp_loss": 0.0, "soft_loss": 0.0}
    if objective != "nsp":
        name = "logits" if objective == "mlm" else "prediction_logits"
        a, b = own[name][asked], theirs[name][asked]
        expected["mlm_loss"] = 0.3 * F.cross_entropy(a, batch.labels[asked]).item()
        expected["soft_loss"] += 0.7 * choice_loss(a, b, 3.0).item() / len(a)
    if objective != "mlm":
        name = "logits" if objective == "nsp" else "seq_relationship_logits"
        a, b = own[name], theirs[name]
        expected["nsp_loss"] = 0.3 * F.cross_entropy(a, batch.next_sentence_label).item()
        expected["soft_loss"] += 0.7 * choice_loss(a, b, 3.0).item() / len(a)
    pairs = zip(own.hidden_states[1:], (theirs.hidden_states[2], theirs.hidden_states[4]), strict=True)
    projected = [(p(x), y) for p, (x, y) in zip(objective_.layers.projections, pairs, strict=True)]
    expected["hidden_loss"] = 0.5 * sum((x - y).square().mean() for x, y in projected).item() / 2
    assert got.keys() == expected.keys() | {"relation_loss"} and got["relation_loss"] > 1e-3
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=1e-5), name  # logits are float32


def test_a_step_in_micro_batches_is_the_step_in_one():
    teacher = a_model()
    student = make_student(teacher, num_layers=2)
    distillation = TextDistillation(student, teacher, DistillationSettings("t", **EVERYTHING))
    parts = [micro_batch(student, index=i) for i in (1, 2)]
    total = parts[0].counts + parts[1].counts
    batches = [part.batch for part in parts]
    joined = type(batches[0])(
        *(torch.cat([getattr(b, n) for b in batches]) for n in ("input_ids", "token_type_ids")),
        cu_seqlens=torch.cat([batches[0].cu_seqlens, batches[1].cu_seqlens[1:] + batches[0].cu_seqlens[-1]]),
        max_seqlen=max(b.max_seqlen for b in batches),
        labels=torch.cat([b.labels for b in batches]),
        next_sentence_label=torch.cat([b.next_sentence_label for b in batches]),
    )
    one = MicroBatch.of(joined, student.config, "mlm_nsp", "cpu")
    torch.testing.assert_close(
        distillation(one, one.counts), sum(distillation(part, total) for part in parts), rtol=1e-5, atol=1e-6
    )


def test_the_words_logits_in_chunks_are_those_at_once(monkeypatch):
    """Values and gradients; and there are never more rows of logits than a chunk has."""
    from fastbert.training.distill import text

    teacher, results = a_model("mlm"), []
    student = make_student(teacher, num_layers=2)
    distillation = TextDistillation(student, teacher, DistillationSettings("t", **EVERYTHING))
    batch = micro_batch(student, "mlm", sequences=8)
    assert len(batch.labelled) > 14
    for rows in (512, 7):
        monkeypatch.setattr(text, "_LOGIT_ROWS", rows)
        seen = []
        monkeypatch.setattr(
            text, "choice_loss", lambda a, *more, seen=seen: seen.append(len(a)) or choice_loss(a, *more)
        )
        distillation.zero_grad()
        loss = distillation(batch, batch.counts).sum()
        loss.backward()
        assert max(seen) <= rows
        results.append([loss.detach(), *(p.grad for p in distillation.parameters() if p.grad is not None)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective", MODELS)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(objective):
    teacher = a_model(objective)
    student = make_student(teacher)
    settings = DistillationSettings("t", alpha=0, hidden_weight=1, relation_weight=1)
    distillation = TextDistillation(student, teacher, settings)
    batch = micro_batch(student, objective)
    parts = distillation(batch, batch.counts)
    parts.sum().backward()
    assert parts.abs().max() < 1e-6
    assert max(p.grad.abs().max() for p in student.parameters()) < 1e-6
    with torch.no_grad():
        student.bert.encoder.layer[1].output.dense.bias[0] += 0.1
    assert distillation(batch, batch.counts)[2:].min() > 1e-6  # and each loss sees a student that differs


@pytest.mark.parametrize("options", [{"output_weight": 0.0}, {"hidden_weight": 0.0, "relation_weight": 1.0}])
def test_every_parameter_has_a_gradient_and_the_teacher_none(options):
    """Else DDP waits for the one without; also where nothing is asked of the output."""
    teacher = a_model()
    student = make_student(teacher, num_layers=2, hidden_size=24)
    distillation = TextDistillation(student, teacher, DistillationSettings("t", **options)).train()
    names = dict(distillation.named_parameters())
    assert not any(p is q for p in names.values() for q in teacher.parameters()) and not teacher.training
    batch = micro_batch(student)
    distillation(batch, batch.counts).sum().backward()
    assert all(p.grad is not None for p in names.values())
    assert all(p.grad is None for p in teacher.parameters())
    assert student.bert.encoder.layer[0].output.dense.weight.grad.abs().max() > 0
    heads = [p.grad.abs().max() for n, p in names.items() if ".cls." in n]
    assert (max(heads) == 0) == ("output_weight" in options)


def test_a_teacher_in_bf16_stays_in_it_under_autocast():
    from fastbert.training.distill.teacher import in_precision

    teacher = a_model("mlm")
    student = make_student(teacher, num_layers=2)
    seen = []
    teacher.cls.predictions.transform.dense.register_forward_hook(lambda _, x, y: seen.append((x[0].dtype, y.dtype)))
    distillation = TextDistillation(student, in_precision(teacher, "bf16"), DistillationSettings("t", **EVERYTHING))
    batch = micro_batch(student, "mlm")
    exact = TextDistillation(student, a_model("mlm"), DistillationSettings("t", **EVERYTHING))(batch, batch.counts)
    rounded = distillation(batch, batch.counts)
    assert seen == [(torch.bfloat16, torch.bfloat16)] and student.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.01)
    assert not torch.equal(rounded, exact)


def text_run(folder, **overrides):
    """A run of a student half as wide as its teacher, from the newest checkpoint where there is one."""
    teacher = a_model()
    settings = DistillationSettings("t", **EVERYTHING)
    student = make_student(teacher, num_layers=2, hidden_size=24, dropout=0.1)
    run_settings = make_settings(folder, **overrides)
    newest = make_run(run_settings).checkpoints.newest()
    if newest is not None:
        student = MODELS["mlm_nsp"].from_pretrained(newest)
    run = make_run(run_settings, model=student, objective=TextDistillation(student, teacher, settings))
    if newest is not None:
        run.resume(newest)
    return run


def test_a_run_on_text_learns_and_goes_on_bit_for_bit(tmp_path):
    options = {"training__steps": 30, "training__save_every": 10, "training__log_every": 5, "optimizer__lr": 3e-3}
    whole = text_run(tmp_path / "a", **options)
    whole.run()
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    train, heldout = ([line for line in lines if line["kind"] == kind] for kind in ("train", "heldout"))
    for name in ("soft_loss", "hidden_loss"):
        assert train[-1][name] < 0.7 * train[0][name], [line[name] for line in train]
    assert train[-1]["loss"] == pytest.approx(sum(train[-1][name] for name in whole.objective.parts))
    assert {"mlm_loss", "nsp_loss", "mlm_accuracy"} <= heldout[-1].keys() and "soft_loss" not in heldout[-1]

    first = text_run(tmp_path / "b", **{**options, "training__steps": 10, "schedule__total_steps": 30})
    first.run()
    names = {path.name for path in first.checkpoints.newest().iterdir()}
    assert "projections.safetensors" in names
    assert not any("projections" in name for name in load_file(first.checkpoints.newest() / "model.safetensors"))
    again = text_run(tmp_path / "b", **options)
    assert again.step == 10
    again.run()
    ends = [folder / "checkpoints" / "step-00000030" for folder in (tmp_path / "a", tmp_path / "b")]
    assert_same_weights(*ends)
    for name in ("projections.safetensors", "optimizer.safetensors"):
        a, b = (load_file(end / name) for end in ends)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name
    projections = load_file(ends[0] / "projections.safetensors")
    assert not torch.equal(projections["0.weight"], torch.eye(48, 24))  # they learn
    (ends[1] / "projections.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"projections\.safetensors cannot be read"):
        text_run(tmp_path / "b", **options)


def test_a_teacher_that_says_nothing_is_named(tmp_path):
    run = text_run(tmp_path)
    with torch.no_grad():
        run.objective.teacher.cls.predictions.bias.fill_(torch.nan)
    with pytest.raises(TrainingError, match="soft loss is nan"):
        run.run()


# For a task.


def task_run(folder, task, student=None, more=None, **settings):
    """A run with a teacher that is fine-tuned for nothing: its answers are as good as any."""
    path = folder / "model"
    if not path.exists():
        save_model(path, num_hidden_layers=3, initializer_range=0.3)  # answers far from even
    recipe = make_recipe(folder, task, path, **settings)
    teacher = recipe.fresh_model(path)
    teacher.requires_grad_(False)
    student = make_student(teacher, **(student or {}))
    return TaskDistillation(recipe, student, teacher, DistillationSettings("t", **(more or {})), folder / "out")


def train_batch(run):
    run.model.train()
    return run._loss([run.recipe.train.features[i] for i in run.plan[0][0]])[0]


@pytest.mark.parametrize("task", DISTILLED_TASKS)
def test_a_task_whose_student_is_its_teacher(tmp_path, task):
    assert set(SOFT) == set(DISTILLED_TASKS)
    run = task_run(tmp_path, task, more={"alpha": 0.0, "hidden_weight": 1.0, "relation_weight": 1.0})
    loss = train_batch(run)
    loss.backward()
    assert 0 <= loss.item() + 1e-6 < 1e-5
    assert max(p.grad.abs().max() for p in run.model.parameters()) < 1e-5
    for weights in ({"hidden_weight": 0.0}, {"output_weight": 0.0}, {"output_weight": 0.0, "hidden_weight": 0.0}):
        run = task_run(tmp_path, task, more={"alpha": 0.0, "relation_weight": 1.0, **weights})
        with torch.no_grad():
            run.model.bert.encoder.layer[1].output.dense.weight[0, 0] += 1.0
        assert train_batch(run).item() > 1e-5, weights


def padded_logits(run, features, model):
    """transformers' way: a row of its own for each sequence."""
    rows = []
    for feature in features:
        ids, types = (torch.tensor([x.tolist() for x in column]) for column in zip(*feature.sequences, strict=True))
        with torch.no_grad():
            output = model(ids[None], token_type_ids=types[None]) if len(ids) > 1 else model(ids, token_type_ids=types)
        if "logits" in output:
            rows.append(output.logits[0])
        else:
            rows.append(torch.stack([output.start_logits[0], output.end_logits[0]]))
    return rows


@pytest.mark.parametrize("task", DISTILLED_TASKS)
def test_the_soft_targets_of_a_task_are_those_of_each_example(tmp_path, task):
    """alpha 0 and nothing else: T^2 KL of each decision on its own, and their mean."""
    options = {"alpha": 0.0, "hidden_weight": 0.0, "temperature": 3.0}
    run = task_run(tmp_path, task, student={"num_layers": 1}, more=options)
    got = train_batch(run).item()
    features = [run.recipe.train.features[i] for i in run.plan[0][0]]
    losses = []
    for feature, s, t in zip(
        features, *(padded_logits(run, features, m.eval()) for m in (run.model, run.teacher)), strict=True
    ):
        if task == "regression":
            losses.append((s - t).square().mean())
        elif task == "multi-label":
            q, p = (s / 3).sigmoid(), (t / 3).sigmoid()
            losses.append(9 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean())
        else:
            if task == "token-classification":
                asked = torch.tensor(feature.label) != -100
                s, t = s[asked], t[asked]
            kl = 9 * F.kl_div((s / 3).log_softmax(-1), (t / 3).log_softmax(-1), reduction="none", log_target=True).sum(
                -1
            )
            losses.append(kl.mean() if task == "question-answering" else kl)
    losses = [loss.reshape(-1) for loss in losses]
    assert got == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)
    assert got > 1e-4


def test_states_and_relations_of_choices_are_those_of_their_tokens(tmp_path):
    """Their batches are padded, which changes nothing: the same sequences as texts of one class each."""
    options = {"output_weight": 0.0, "hidden_weight": 1.0, "relation_weight": 1.0}
    run = task_run(tmp_path, "multiple-choice", student={"num_layers": 1}, more=options)
    got = train_batch(run).item()
    features = [run.recipe.train.features[i] for i in run.plan[0][0]]
    from fastbert.training.finetune.features import packed

    arguments = packed(features)
    states = [m.bert(**arguments, output_hidden_states=True).hidden_states for m in (run.model, run.teacher)]
    parts = run.layers(run.model, run.teacher, *states, arguments["cu_seqlens"])
    assert got == pytest.approx(sum(parts.values()).item() / len(arguments["input_ids"]), rel=1e-5)


def test_a_student_of_a_task_learns_its_teachers_answers(tmp_path):
    """Nothing but soft targets, on data whose labels say something else; evaluations are of the labels."""
    run = task_run(
        tmp_path,
        "classification",
        student={"num_layers": 1, "hidden_size": 24},
        more={"alpha": 0.0, "hidden_weight": 0.0},
        epochs=120,
    )
    before = train_batch(run).item()
    run.run()
    assert train_batch(run).item() < 0.2 * before
    same = []
    for model in (run.model, run.teacher):
        run_model, run.model = run.model, model
        same.append([p["predicted"] for p in run.evaluate(run.recipe.dev).predictions])
        run.model = run_model
    assert sum(a == b for a, b in zip(*same, strict=True)) >= 19
    assert len({*same[1]}) > 1


def test_a_task_goes_on_bit_for_bit_with_its_projections(tmp_path):
    def begin(name):
        (tmp_path / name).mkdir(exist_ok=True)
        return task_run(
            tmp_path / name,
            "classification",
            student={"num_layers": 1, "hidden_size": 24},
            more=EVERYTHING,
            epochs=6,
            tokens=64,
            evaluate_every=4,
            dropout=0.1,
        )

    whole, part = begin("a"), begin("b")
    whole.run()
    train = part._train

    def stop(*args):
        train(*args)
        if part.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    part._train = stop
    assert part.run().signal == signal.SIGTERM and part.step == 7
    again = begin("b")
    again.resume(again.checkpoints.newest())
    assert again.step == 7
    again.run()
    for kind in ("model", "layers"):
        a, b = (dict(getattr(run, kind).named_parameters()) for run in (whole, again))
        assert a and all(torch.equal(a[name], b[name]) for name in a), kind
    other = task_run(
        tmp_path / "b", "classification", student={"num_layers": 1, "hidden_size": 24}, epochs=6, tokens=64
    )
    with pytest.raises(CheckpointError, match=r"distillation\.temperature was 3\.0 and is 2\.0"):
        other.resume(again.checkpoints.newest())


# Settings and the command.


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0}, "distillation.temperature is 0.0; it must be above 0"),
        ({"alpha": 1.5}, "distillation.alpha is 1.5; it must be at least 0 and at most 1"),
        ({"relations": ["qz"]}, "distillation.relations holds 'qz'; a relation is one of qq, qk, qv, kq, kk"),
        ({"relations": []}, "distillation.relations is empty"),
        ({"layers": [0, "1"]}, "distillation.layers[1] is '1'; it must be a whole number"),
        ({"layers": 3}, "distillation.layers is 3; it must be a list"),
        ({"output_weight": 0, "hidden_weight": 0}, "distillation: all weights are 0; there is nothing to learn"),
        ({"heat": 1}, "unknown key distillation.heat"),
    ],
)
def test_settings_out_of_range(values, message):
    with pytest.raises(SettingsError) as error:
        read_section("distillation", DistillationSettings, {"teacher": "t", **values})
    assert str(error.value).startswith(message)


def test_settings_of_text_are_pretrainings_and_more():
    values = {"data": {"shards": "s"}, "training": {"steps": 1}, "output": {"folder": "o"}}
    settings = read_settings({**values, "distillation": {"teacher": "t", "layers": [0, 2]}}, TextSettings)
    assert settings.distillation.layers == (0, 2)
    assert json.loads(json.dumps(settings.decisive())) == settings.decisive()
    assert settings.decisive()["distillation.layers"] == [0, 2]
    with pytest.raises(SettingsError, match=r"distillation\.teacher is missing"):
        read_settings(values, TextSettings)
    with pytest.raises(SettingsError, match=r"model\.config is given"):
        read_settings({**values, "model": {"config": "c"}, "distillation": {"teacher": "t"}}, TextSettings)


def test_the_documented_settings_are_all_there_are_at_their_defaults():
    text = (Path(__file__).resolve().parents[2] / "docs" / "distill.toml").read_text()
    given = load_settings_of(text)
    section = text[text.index("\n[distillation]") : text.index("\n[model]")]
    commented = load_settings_of(text.replace(section, re.sub(r"(?m)^# (?=\w+ = )", "", section))).distillation
    names = set(re.findall(r"(?m)^(?:# )?(\w+) = ", section))
    assert names == set(vars(commented))
    free = ("layers", "hidden_layers", "relation_heads", "relation_layer")  # their defaults depend on the teacher
    for name in names:
        assert getattr(given.distillation, name) == getattr(commented, name) or name in free, name
    assert list(commented.layers) == list(commented.hidden_layers) == spread(6, 12)


def load_settings_of(text):
    return read_settings(tomllib.loads(text), TextSettings)


def test_the_recipe_is_the_one_that_is_tested():
    recipes = (Path(__file__).resolve().parents[2] / "docs" / "recipes.md").read_text()
    assert f"fastbert distill --task classification --teacher out/rotten-tomatoes \\\n    {STUDENT} \\\n" in recipes


def distill(*arguments):
    return main(["distill", *map(str, arguments)])


def finetuned(folder, task="classification"):
    """A teacher, and what to tell the command."""
    data = write(folder, task)
    files = ["--train", data, "--dev", data, *(["--pair-column", READING[task].pair] if task in READING else [])]
    model = save_model(folder / "model", num_hidden_layers=3)
    quick = ["--epochs", "12", "--tokens", "128", "--lr", "2e-3"]
    teacher = folder / "teacher"
    assert (
        main([str(part) for part in ["finetune", "--task", task, "--model", model, *files, *quick, "-o", teacher]]) == 0
    )
    return teacher, ["--task", task, *files, *quick]


def test_the_command_for_a_task(tmp_path, capsys):
    teacher, options = finetuned(tmp_path)
    out = tmp_path / "student"
    narrow = ["--layers", "0,2", "--hidden-size", "24", "--temperature", "4", "--relation-weight", "1"]
    assert distill(*options, "--teacher", teacher, *narrow, "-o", out) == 0, capsys.readouterr().err
    metrics = json.loads((out / "report" / "metrics.json").read_text())
    assert metrics["settings"]["distillation"]["temperature"] == 4.0
    assert metrics["settings"]["distillation"]["layers"] == [0, 2]
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    assert theirs.config.num_hidden_layers == 2 and theirs.config.hidden_size == 24
    assert theirs.config.id2label == {0: "a", 1: "b", 2: "c"}
    inputs = transformers.AutoTokenizer.from_pretrained(out)("anna saw rome", return_tensors="pt")
    mine = fastbert.BertForSequenceClassification.from_pretrained(out)
    torch.testing.assert_close(mine(**inputs).logits, theirs(**inputs).logits, rtol=1e-4, atol=1e-5)
    assert not (out / "checkpoints").exists() and not list(out.glob("projections*"))

    # A student that there is already, such as one distilled on text.
    again = tmp_path / "again"
    general = save_model(tmp_path / "general", num_hidden_layers=1)
    assert distill(*options, "--teacher", teacher, "--student", general, "-o", again) == 0, capsys.readouterr().err
    assert fastbert.BertConfig.from_pretrained(again).num_hidden_layers == 1


def test_what_the_command_says_of_bad_input(tmp_path, capsys):
    teacher, options = finetuned(tmp_path)
    capsys.readouterr()

    def said(*arguments):
        code = distill(*arguments)
        error = capsys.readouterr().err
        assert code == 1 and error.startswith("fastbert: error: ") and error.count("\n") == 1, error
        return error

    out = ["-o", tmp_path / "out"]
    with_teacher = [*options, "--teacher", teacher, *out]
    assert "layers: 3 is no layer of the teacher, which has 0 to 2" in said(*with_teacher, "--layers", "0,3")
    assert "no multiple of the 12 units" in said(*with_teacher, "--hidden-size", "30")
    assert "relation_heads is 5" in said(*with_teacher, "--relation-weight", "1", "--relation-heads", "5")
    assert "temperature is 0.0; it must be above 0" in said(*with_teacher, "--temperature", "0")
    bare = tmp_path / "model"
    assert f"{bare} has no classifier.weight: a teacher of BertForSequenceClassification" in said(
        *options, "--teacher", bare, *out
    )
    assert "--teacher is missing" in said(*options, *out)
    assert "--student has sizes of its own; --num-layers" in said(*with_teacher, "--student", bare, "--num-layers", "1")
    other = save_model(tmp_path / "other")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "x"]
    fastbert.BertModel(fastbert.BertConfig.from_pretrained(other, vocab_size=6)).save_pretrained(other)
    for file in ("vocab.txt", "tokenizer.json"):
        (other / file).unlink(missing_ok=True)
    fastbert.BertTokenizer(vocabulary).save_pretrained(other)
    assert "teacher and student have different vocabularies, of" in said(*with_teacher, "--student", other)
    strange = write_csv(tmp_path / "strange.csv", [("anna saw rome", "a"), ("bob left oslo", "z")])
    assert "label 'z' is none of the model's 3: a, b, c" in said(*with_teacher, "--train", strange)
    assert "CONFIG and --task are both given" in said("some.toml", *with_teacher)
    for option in ("--teacher", "--epochs", "--output", "--text-column", "--alpha"):
        assert f"CONFIG and {option} are both given" in said("some.toml", option, "1")
    assert "--set training.steps=1 is given and no CONFIG" in said(*with_teacher, "--set", "training.steps=1")
    assert not (tmp_path / "out" / "report").exists()


def test_the_command_on_text(tmp_path, capsys):
    """write_run's text and settings: a pre-trained teacher, then its student, cut short and continued."""
    config = write_run(tmp_path)
    assert main(["pretrain", str(config), "--set", "model.num_hidden_layers=4"]) == 0
    teacher = tmp_path / "out" / "checkpoints" / "step-00000008"
    text = config.read_text()
    sections = text[: text.index("[model]")].replace(str(tmp_path / "out"), str(tmp_path / "student"))
    student = tmp_path / "student.toml"
    student.write_text(
        f'{sections}\n[model]\nnum_hidden_layers = 2\nhidden_size = 24\n[distillation]\nteacher = "{teacher}"\n'
        "relation_weight = 1\n"
    )
    assert distill(student, "--set", "training.steps=2", "--set", "schedule.total_steps=8") == 0
    assert distill(student, "--resume") == 0, capsys.readouterr().err
    assert "resuming from" in capsys.readouterr().err
    done = tmp_path / "student" / "checkpoints" / "step-00000008"
    theirs = transformers.BertForPreTraining.from_pretrained(done)
    assert (theirs.config.num_hidden_layers, theirs.config.hidden_size) == (2, 24)
    line = json.loads((tmp_path / "student" / "log.jsonl").read_text().splitlines()[0])
    assert {"mlm_loss", "nsp_loss", "soft_loss", "hidden_loss", "relation_loss"} <= line.keys()

    capsys.readouterr()

    # Two processes, each with its own teacher, train as one.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = [
        *launch,
        "-m",
        "fastbert",
        "distill",
        str(student),
        "--device",
        "cpu",
        "--set",
        "training.dropout=0.0",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*two, "--set", f"output.folder={tmp_path / 'two'}"], capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    assert distill(student, "--set", "training.dropout=0.0", "--set", f"output.folder={tmp_path / 'one'}") == 0
    for name in ("model.safetensors", "projections.safetensors"):
        one, other = (load_file(tmp_path / x / "checkpoints/step-00000008" / name) for x in ("one", "two"))
        for key in one:
            torch.testing.assert_close(other[key], one[key], rtol=0, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
    capsys.readouterr()

    def said(*arguments):
        code = distill(student, "--set", f"output.folder={tmp_path / 'x'}", *arguments)
        error = capsys.readouterr().err
        assert code == 1 and error.count("\n") == 1, error
        return error

    assert "layers: 9 is no layer of the teacher" in said(
        "--set", "distillation.layers=[0, 9]", "--set", "model.num_hidden_layers=2"
    )
    assert "model.vocab_size is given" in said("--set", "model.vocab_size=99")
    fastbert.BertTokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "x"]).save_pretrained(tmp_path / "no")
    fastbert.BertForPreTraining(fastbert.BertConfig.from_pretrained(teacher)).save_pretrained(tmp_path / "no")
    assert "another vocabulary" in said("--set", f"distillation.teacher={tmp_path / 'no'}")
    fastbert.BertModel.from_pretrained(teacher).save_pretrained(tmp_path / "bare")
    assert "has no cls." in said("--set", f"distillation.teacher={tmp_path / 'bare'}")


# Real data.

STUDENT = "--num-layers 3 --epochs 5 --batch-size 32 --lr 1e-4 --dropout 0.1 --alpha 0.3"


def real_distillation(folder: Path, minilm: Path, *, examples: int | None = None) -> tuple[dict, dict, float]:
    """Test scores of MiniLM fine-tuned for Rotten Tomatoes and of its student, and how much faster the latter is.

    `examples`: of each split, at most.
    """
    import finetune_data
    from assets import AssetUnavailable

    try:
        data = finetune_data.write_task("rotten-tomatoes", folder / "data")
    except AssetUnavailable as reason:
        pytest.skip(str(reason))
    if examples is not None:
        for path in data.iterdir():
            with open(path, newline="", encoding="utf-8") as file:
                header, *rows = csv.reader(file)
            write_csv(path, rows[:examples], header)
    teacher, student = folder / "teacher", folder / "student"
    assert main(finetune_data.REAL_TASKS["rotten-tomatoes"].arguments(data, minilm, teacher)) == 0
    files = [part for split in ("train", "dev", "test") for part in (f"--{split}", data / f"{split}.csv")]
    arguments = ["--task", "classification", "--teacher", teacher, *files, *STUDENT.split(), "-o", student]
    assert distill(*arguments) == 0
    scores = [json.loads((path / "report" / "metrics.json").read_text())["test"] for path in (teacher, student)]
    print(f"teacher {scores[0]}, student {scores[1]}")
    return *scores, speedup(teacher, student, data / "test.csv")


def speedup(teacher: Path, student: Path, file: Path) -> float:
    """Of a classification of all texts of a file, in batches; the two in turns, the best of five."""
    with open(file, newline="", encoding="utf-8") as opened:
        texts = sorted((row["text"] for row in csv.DictReader(opened)), key=len)
    tokenizer = fastbert.BertTokenizer.from_pretrained(teacher)
    batches = [tokenizer(texts[i : i + 64], padding=True, return_tensors="pt") for i in range(0, len(texts), 64)]
    models = [fastbert.BertForSequenceClassification.from_pretrained(path) for path in (teacher, student)]
    times: list[list[float]] = [[], []]
    for _ in range(6):
        for model, taken in zip(models, times, strict=True):
            start = time.perf_counter()
            with torch.inference_mode():
                for batch in batches:
                    model(**batch)
            taken.append(time.perf_counter() - start)
    slow, fast = (min(taken[1:]) for taken in times)  # the first pass packs the weights
    print(f"teacher {slow:.3f} s, student {fast:.3f} s: {slow / fast:.2f} times as fast")
    return slow / fast


@pytest.mark.slow
@pytest.mark.usefixtures("all_cores")
def test_half_the_layers_keep_97_percent_and_are_1_8_times_as_fast(tmp_path, minilm):
    teacher, student, faster = real_distillation(tmp_path, minilm)
    assert teacher["accuracy"] >= 0.8
    assert student["accuracy"] >= 0.97 * teacher["accuracy"]
    assert faster >= 1.8
