"""The fine-tuning loop: every task can be learned by heart; what is frozen stays; runs stop and go on."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from finetune_support import make_recipe, make_run, save_model, write

from fastbert.training.finetune.features import plan_epoch
from fastbert.training.finetune.layers import depth_of, layer_groups
from fastbert.training.finetune.loop import Finetuning
from fastbert.training.finetune.recipe import Evaluation, Recipe
from fastbert.training.finetune.settings import VECTOR_TASKS, FinetuneSettings
from fastbert.training.finetune.tasks import TASKS
from fastbert.training.loop import AUTOCAST, TrainingError
from fastbert.training.objective import Counts
from fastbert.training.training_state import CheckpointError

LEARNED = {
    "classification": ("accuracy", 1.0),
    "multi-label": ("accuracy", 1.0),
    "regression": ("spearman", 0.95),
    "token-classification": ("f1", 1.0),
    "question-answering": ("exact_match", 1.0),
    "multiple-choice": ("accuracy", 1.0),
    "embedding": ("mrr_at_10", 0.95),
    "sparse-embedding": ("mrr_at_10", 0.8),
    "rerank": ("ndcg_at_10", 0.95),
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_learns_twenty_examples_by_heart(tmp_path, task):
    run = make_run(tmp_path, task, max_length=24 if task == "question-answering" else None)
    assert (len(run.recipe.train.features) > 20) == (task == "question-answering")
    before = run.evaluate(run.recipe.dev).scores
    outcome = run.run()
    after = run.evaluate(run.recipe.dev).scores
    name, least = LEARNED[task]
    assert after["loss"] < 0.3 * before["loss"], (before, after)
    assert after[name] >= least > before[name], (before, after)
    assert outcome.step == len(run.plan) == run.best_step
    scored_pairs = {"spearman", "pearson"} if task in VECTOR_TASKS else set()  # of other data than these
    assert set(TASKS[task].scores) - scored_pairs < set(after)


@pytest.mark.parametrize("task", ["classification", "token-classification", "question-answering", "multiple-choice"])
def test_batches_in_a_step_make_one_batch(tmp_path, task):
    """Two, of 12 and 8 examples with unlike numbers of labels, have the gradient of one of 20."""
    gradients = []
    for options in ({"batch_size": 64}, {"batch_size": 12, "accumulate": 2}):
        run = make_run(tmp_path, task, epochs=1, max_grad_norm=0, **options)
        steps = []
        run.optimizer.register_step_pre_hook(
            lambda *_, run=run, steps=steps: steps.append({n: p.grad.clone() for n, p in run.model.named_parameters()})
        )
        batches = run.next_step()
        assert len(batches) == options.get("accumulate", 1)
        run._train(batches, sum((batch.counts for batch in batches), Counts()))
        gradients.append(steps[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_frozen_parts_do_not_move(tmp_path):
    run = make_run(tmp_path, "classification", epochs=2, freeze_embeddings=True, freeze_layers=1, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.run()
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    frozen = {n for n in before if ".embeddings." in n or ".layer.0." in n}
    assert frozen and moved == set(before) - frozen


def test_only_the_layers_asked_for_are_frozen(tmp_path):
    run = make_run(tmp_path, "classification", freeze_layers=2)
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert {depth_of(name, 2) for name in trained} == {0, 3}
    with pytest.raises(ValueError, match="freeze_layers is 3; the model has 2 layers"):
        make_run(tmp_path, "classification", freeze_layers=3)


def test_layer_decay_gives_each_layer_its_rate(tmp_path):
    run = make_run(tmp_path, "classification", layer_decay=0.5, epochs=1, schedule="constant", warmup_share=0, lr=0.1)
    (batch,) = run.next_step()
    run._train([batch], batch.counts)
    names = {id(p): name for name, p in run.model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
    assert rates.keys() == set(names.values())
    expected = {
        "bert.embeddings.word_embeddings.weight": 0.0125,
        "bert.embeddings.LayerNorm.bias": 0.0125,
        "bert.encoder.layer.0.attention.self.query.weight": 0.025,
        "bert.encoder.layer.1.output.LayerNorm.weight": 0.05,
        "bert.pooler.dense.weight": 0.1,
        "classifier.bias": 0.1,
    }
    assert {name: rates[name] for name in expected} == pytest.approx(expected)
    decays = {names[id(p)]: group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    assert decays["classifier.weight"] == 0.01 and decays["classifier.bias"] == 0
    assert decays["bert.encoder.layer.1.output.LayerNorm.weight"] == 0


def test_without_layer_decay_there_is_one_rate(tmp_path):
    run = make_run(tmp_path, "classification")
    assert {group["rate"] for group in layer_groups(run.model, 0.01, 1.0)} == {1.0}


@pytest.mark.parametrize("losses, best", [([5, 3, 2, 4, 1], 2), ([5, 3, 2, 3, 1], 2), ([5, 3, 2, 2.5, 1], 4)])
def test_early_stopping_ends_the_run_and_keeps_the_best_of_lower_loss(tmp_path, monkeypatch, losses, best):
    run = make_run(tmp_path, "classification", evaluate_every=1, patience=3, epochs=20)
    scores = iter([0.2, 0.5, 0.4, 0.5, 0.3])
    losses = iter(losses)
    weights = []
    whole = run.evaluate

    def evaluate(data):
        evaluation = whole(data)
        weights.append({name: p.detach().clone() for name, p in run.model.named_parameters()})
        evaluation.scores.update({"f1_macro": next(scores), "loss": next(losses)})
        return evaluation

    monkeypatch.setattr(run, "evaluate", evaluate)
    outcome = run.run()
    assert (outcome.step, run.best_step) == (5, best)  # three evaluations without a better score
    assert [path.name for path in run.checkpoints.complete()] == [f"step-0000000{best}", "step-00000005"]
    run.load_best()
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, weights[best - 1][name]), name


def test_the_best_may_be_the_least_loss(tmp_path, monkeypatch):
    run = make_run(tmp_path, "regression", evaluate_every=1, epochs=4, best="mse")
    run.run()
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    errors = {line["step"]: line["mse"] for line in lines if line["kind"] == "dev"}
    assert len(errors) == len(run.plan) and run.best_step == min(errors, key=errors.get)
    with pytest.raises(ValueError, match="best is 'f1'; regression has the scores spearman, pearson, mse, mae and"):
        make_run(tmp_path, "regression", best="f1")


def test_a_model_of_one_class_is_not_the_best_though_most_accurate(tmp_path, monkeypatch):
    """One class everywhere has the accuracy of its share; a model that finds the rare ones may have less."""
    run = make_run(tmp_path, "classification", evaluate_every=1, epochs=3, batch_size=20)
    gold = "a" * 17 + "bbc"
    steps = iter(["a" * 20, "a" * 13 + "bbcc" + "bbc", "a" * 20])
    evaluated = []

    def evaluate(data):
        pairs = zip(gold, next(steps), strict=True)
        predictions = [{"gold": g, "predicted": p, "probabilities": {}} for g, p in pairs]
        evaluated.append({"loss": 1.0, **run.task.score(predictions, run.recipe.labels)})
        return Evaluation(evaluated[-1], predictions)

    monkeypatch.setattr(run, "evaluate", evaluate)
    run.run()
    assert run.best_step == 2
    assert [scores["accuracy"] for scores in evaluated] == [0.85, 0.8, 0.85]
    assert [path.name for path in run.checkpoints.complete()] == ["step-00000002", "step-00000003"]


def test_few_examples_are_seen_more_often():
    """Steps of an epoch: 150 in all, between 3 and 20 epochs."""
    epochs = FinetuneSettings(task="classification").default_epochs
    assert [epochs(steps) for steps in (1, 7, 8, 19, 49, 50, 51, 10_000)] == [20, 20, 19, 8, 4, 3, 3, 3]


class Killed(Exception):
    pass


def test_batches_default_to_sixteen_examples_within_the_token_budget():
    bounds = lambda **given: FinetuneSettings(task="classification", **given).batch_bounds  # noqa: E731
    assert bounds() == (16, 2048)
    assert bounds(tokens=4096) == (16, 4096)
    assert bounds(batch_size=64) == (64, None)
    assert bounds(batch_size=64, tokens=512) == (64, 512)
    batches = plan_epoch(LENGTHS, seed=0, epoch=0, order="random", batch_size=16, tokens=600)
    sums = [sum(LENGTHS[i] for i in batch) for batch in batches]
    assert max(map(len, batches)) == 16 and 500 < max(sums) <= 600 and len(set(map(len, batches))) > 2


def test_an_evaluation_of_one_class_is_told(tmp_path, capsys):
    run = make_run(tmp_path, "classification", epochs=1, batch_size=20, lr=0.0)
    with torch.no_grad():
        run.model.classifier.bias[2] = 100
    run.run()
    data = run.recipe.dev.path
    assert f"warning: step 1: the model predicts 'c' for every example of {data}" in capsys.readouterr().err


@pytest.mark.parametrize("kill_at, save_every, start", [(3, None, 2), (5, None, 4), (3, 3, 3), (5, 1, 5)])
def test_a_run_that_was_killed_goes_on_to_the_same_weights(tmp_path, kill_at, save_every, start):
    options = {
        "save_every": save_every,
        "epochs": 3,
        "batch_size": 6,
        "evaluate_every": 2,
        "accumulate": 2,
        "layer_decay": 0.9,
    }
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()

    def make(folder):
        recipe = make_recipe(
            folder, "token-classification", save_model(folder / "model", hidden_dropout_prob=0.1), **options
        )
        return Finetuning(recipe, recipe.fresh_model(folder / "model"), folder / "out")

    whole = make(tmp_path / "a")
    whole.run()
    killed = make(tmp_path / "b")

    def kill(*_):
        if killed.step == kill_at:
            raise Killed

    killed.optimizer.register_step_pre_hook(kill)
    with pytest.raises(Killed):
        killed.run()
    again = make(tmp_path / "b")
    again.resume(again.checkpoints.newest())
    assert again.step == start
    assert again.where() == f"next is epoch {start // 2 + 1} of 3, step {start % 2 + 1} in it"
    outcome = again.run()
    assert outcome.step == len(whole.plan)
    for (name, p), q in zip(again.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    figures = [
        [json.loads(line) for line in (tmp_path / x / "out" / "log.jsonl").read_text().splitlines()] for x in "ab"
    ]
    for log in figures:
        for line in log:
            line.pop("seconds", None), line.pop("tokens_per_second", None)
    assert figures[0] == figures[1]


def test_a_signal_ends_the_run_with_a_checkpoint(tmp_path):
    run = make_run(tmp_path, "classification", epochs=3)
    run.optimizer.register_step_post_hook(lambda *_: run.step == 1 and os.kill(os.getpid(), signal.SIGTERM))
    outcome = run.run()
    assert (outcome.signal, outcome.step) == (signal.SIGTERM, 2)
    assert run.checkpoints.newest().name == "step-00000002"


def test_a_run_goes_on_under_the_same_settings_and_data_only(tmp_path):
    run = make_run(tmp_path, "classification", epochs=1)
    run.run()
    newest = run.checkpoints.newest()
    with pytest.raises(CheckpointError, match=r"other settings: lr was 0\.002 and is 0\.1"):
        make_run(tmp_path, "classification", epochs=1, lr=0.1).resume(newest)
    recipe = make_recipe(tmp_path, "classification", tmp_path / "model", epochs=1)
    changed = write(tmp_path, "classification", "changed", n=19)
    other = type(recipe).read(recipe.settings, tmp_path / "model", {"train": changed, "dev": recipe.dev.path})
    with pytest.raises(CheckpointError, match="training data was"):
        Finetuning(other, other.fresh_model(tmp_path / "model"), tmp_path / "out").resume(newest)


def test_balanced_classes_count_alike(tmp_path):
    """A class of 4 among 20 weighs 16 / 4 times as much, and the loss is the mean by those weights."""
    from finetune_support import sentence, write_csv

    data = write_csv(tmp_path / "data.csv", [(" ".join(sentence(i)), "ab"[i < 4]) for i in range(20)])
    save_model(tmp_path / "model")
    settings = FinetuneSettings(task="classification", class_weights="balanced", batch_size=64)
    recipe = Recipe.read(settings, tmp_path / "model", {"train": data, "dev": data})
    torch.testing.assert_close(recipe.class_weights(), torch.tensor([20 / 32, 20 / 8]))
    run = Finetuning(recipe, recipe.fresh_model(tmp_path / "model"), tmp_path / "out")
    arguments = recipe.task.collate(recipe.train.features)
    logits = run.model.eval()(**arguments).logits.detach()
    losses = torch.nn.functional.cross_entropy(logits, arguments["labels"], reduction="none")
    weights = recipe.class_weights()[arguments["labels"]]
    expected = (losses * weights).sum() / weights.sum()
    assert run.evaluate(recipe.train).scores["loss"] == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ValueError, match="class_weights is 'balanced'; regression has no classes to weigh"):
        make_run(tmp_path, "regression", class_weights="balanced")


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    run = make_run(tmp_path, "classification")
    with torch.no_grad():
        run.model.classifier.bias.fill_(float("nan"))
    with pytest.raises(TrainingError, match="step 1: the loss is nan"):
        run.run()


def test_a_dev_loss_that_is_not_finite_ends_the_run(tmp_path):
    run = make_run(tmp_path, "classification", epochs=1, evaluate_every=None)
    train = run._train

    def poisoned(*args):
        train(*args)
        run.model.classifier.bias.data[0] = float("nan")

    run._train, run.epoch_ends = poisoned, {1}
    with pytest.raises(TrainingError, match="step 1: the dev loss is nan"):
        run.run()
    assert run.checkpoints.newest() is None


def test_dropout_is_there_in_training_and_not_in_evaluation(tmp_path):
    run = make_run(tmp_path, "classification", epochs=2, batch_size=10, evaluate_every=1, dropout=0.5)
    modes = []
    run.model.dropout.register_forward_hook(lambda module, args, out: modes.append((module.training, module.p)))
    run.run()
    assert modes == [(True, 0.5), (False, 0.5)] * 4
    assert run.evaluate(run.recipe.dev).scores == run.evaluate(run.recipe.dev).scores


def test_bf16_runs_by_autocast_and_keeps_weights_in_fp32(tmp_path):
    run = make_run(tmp_path, "classification", precision="bf16", epochs=2)
    seen = set()
    run.model.classifier.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    run.run()
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert AUTOCAST["bf16"] is torch.bfloat16 and seen <= {torch.bfloat16}


LENGTHS = np.random.default_rng(0).integers(3, 60, 500).tolist()


@pytest.mark.parametrize("order", ["random", "length"])
@pytest.mark.parametrize("batch_size", [None, 7])
def test_an_epoch_takes_each_feature_once_in_an_order_of_its_own(order, batch_size):
    options = {"seed": 3, "order": order, "batch_size": batch_size, "tokens": None if batch_size else 200}
    batches = plan_epoch(LENGTHS, epoch=0, **options)
    assert sorted(i for batch in batches for i in batch) == list(range(500))
    if batch_size:
        assert [len(batch) for batch in batches].count(7) == 500 // 7
    else:
        assert max(sum(LENGTHS[i] for i in batch) for batch in batches) <= 200
    assert batches == plan_epoch(LENGTHS, epoch=0, **options)
    assert batches != plan_epoch(LENGTHS, epoch=1, **options)
    assert batches != plan_epoch(LENGTHS, epoch=0, **{**options, "seed": 4})
    spread = np.mean([np.ptp([LENGTHS[i] for i in batch]) for batch in batches])
    assert spread < 8 if order == "length" else spread > 30
    firsts = [LENGTHS[batch[0]] for batch in batches]
    assert firsts != sorted(firsts) and firsts != sorted(firsts, reverse=True)


def test_a_batch_may_be_full_to_the_last_token():
    batches = plan_epoch([5, 5, 5], seed=0, epoch=0, order="random", batch_size=None, tokens=10)
    assert list(map(len, batches)) == [2, 1]


def test_a_feature_above_the_budget_has_a_batch_of_its_own():
    options = {"seed": 0, "epoch": 0, "order": "random", "batch_size": None}
    batches = plan_epoch([5, 50, 5], tokens=10, **options)
    assert [1] in batches and sorted(map(sorted, batches)) in ([[0, 2], [1]], [[0], [1], [2]])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"epochs": 0}, "epochs is 0; it must be at least 1"),
        ({"layer_decay": 1.5}, "layer_decay is 1.5; it must be above 0 and at most 1"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"dropout": 1.0}, "dropout is 1.0; it must be at least 0 and below 1"),
        ({"class_weights": "heavy"}, "class_weights is 'heavy'"),
        ({"warmup_share": 1.1}, "warmup_share is 1.1; it must be at least 0 and at most 1"),
        ({"weight_decay": float("inf")}, "weight_decay is inf; it must be finite"),
        ({"null_threshold": float("nan")}, "null_threshold is nan; it must be finite"),
        ({"seed": 2**63}, f"seed is {2**63}; it must be at least 0 and at most {2**63 - 1}"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        FinetuneSettings(task="classification", **settings)
