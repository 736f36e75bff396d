"""The same recipe in transformers: tiny models follow it step by step, real tasks reach its scores."""

import json
import time
from pathlib import Path

import finetune_data
import finetune_reference
import pytest
import torch
from finetune_support import make_recipe

from fastbert.cli.finetune import read_recipe
from fastbert.cli.main import build_parser, main
from fastbert.training.finetune.loop import Finetuning

ROOT = Path(__file__).resolve().parents[2]
SLOW = ["multi-label", "regression", "multiple-choice"]  # tests/training/test_finetune_loop.py trains them, too
TASKS = ["classification", "token-classification", *(pytest.param(task, marks=pytest.mark.slow) for task in SLOW)]


@pytest.mark.parametrize("task", TASKS)
def test_a_tiny_model_trains_as_transformers_does(tmp_path, task):
    """Same weights, batches and optimizer: after 30 epochs, scores and losses of the best epochs agree."""
    options = {"epochs": 30, "evaluate_every": None, "batch_size": 6, "tokens": 4096, "lr": 1e-3}
    recipe = make_recipe(tmp_path, task, **options)
    theirs = finetune_reference.finetune(recipe, tmp_path / "model")["dev"]
    run = Finetuning(recipe, recipe.fresh_model(tmp_path / "model"), tmp_path / "out")
    run.run()
    run.load_best()
    mine = run.evaluate(recipe.dev)
    assert theirs.scores[recipe.task.scores[0]] > 0.9
    for name, score in theirs.scores.items():
        assert mine.scores[name] == pytest.approx(score, rel=1e-3, abs=1e-4), name


def test_a_tiny_model_learns_questions_as_transformers_does(tmp_path):
    """Not step by step: transformers lets pads into the softmax over positions, with states of their own."""
    recipe = make_recipe(tmp_path, "question-answering", epochs=20, evaluate_every=None, max_length=32)
    theirs = finetune_reference.finetune(recipe, tmp_path / "model")["dev"]
    run = Finetuning(recipe, recipe.fresh_model(tmp_path / "model"), tmp_path / "out")
    run.run()
    run.load_best()
    assert run.evaluate(recipe.dev).scores["f1"] >= 0.9 and theirs.scores["f1"] >= 0.9


def test_the_reference_refuses_what_it_does_not_know(tmp_path):
    recipe = make_recipe(tmp_path, "classification", layer_decay=0.9, evaluate_every=None)
    with pytest.raises(ValueError, match=r"layer_decay is 0\.9; the reference knows 1\.0 alone"):
        finetune_reference.finetune(recipe, tmp_path / "model")


def test_the_recipes_are_those_of_the_documentation():
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for name in finetune_data.REAL_TASKS:
        assert f"```sh\n{finetune_data.command(name)}```" in text, f"docs/recipes.md: {name}"


def run_real(name: str, folder: Path, model: Path) -> tuple[dict, dict]:
    """Test scores of fastbert and of transformers."""
    from assets import AssetUnavailable

    try:
        data = finetune_data.write_task(name, folder / "data")
    except AssetUnavailable as reason:
        pytest.skip(str(reason))
    arguments = finetune_data.REAL_TASKS[name].arguments(data, model, folder / "out")
    assert main(arguments) == 0
    metrics = json.loads((folder / "out" / "report" / "metrics.json").read_text())
    recipe = read_recipe(build_parser().parse_args(arguments))
    start = time.perf_counter()
    theirs = finetune_reference.finetune(recipe, model)
    took = time.perf_counter() - start
    print(f"{name}: fastbert {metrics['test']}, trained in {metrics['training_seconds']:.0f} s")
    print(f"{name}: transformers {theirs['test'].scores}, with evaluations {took:.0f} s")
    return metrics["test"], theirs["test"].scores


@pytest.mark.slow
@pytest.mark.usefixtures("all_cores")
@pytest.mark.parametrize(
    "name, score, least, margin",
    [
        ("rotten-tomatoes", "accuracy", 0.80, 0.01),
        ("bbc", "accuracy", 0.95, 0.01),
        ("conll2003", "f1", 0.0, 0.005),
        ("squad", "f1", 0.0, 0.02),
    ],
)
def test_a_real_task_reaches_the_score_of_transformers(tmp_path, minilm, name, score, least, margin):
    mine, theirs = run_real(name, tmp_path, minilm)
    assert mine[score] >= least
    assert mine[score] >= theirs[score] - margin, (mine, theirs)


@pytest.mark.slow
@pytest.mark.usefixtures("all_cores")
def test_stsb_is_not_below_where_it_began(tmp_path, minilm):
    """That of the sentence vectors' cosines, before any training on pairs."""
    import csv

    from scipy.stats import spearmanr

    from fastbert.inference import Embedder

    mine, theirs = run_real("stsb", tmp_path, minilm)
    with open(tmp_path / "data" / "stsb" / "test.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    embedder = Embedder.from_pretrained(minilm)
    first, second = (torch.from_numpy(embedder.embed([row[f"sentence{i}"] for row in rows])) for i in (1, 2))
    start = spearmanr((first * second).sum(dim=1), [float(row["score"]) for row in rows]).statistic
    assert start > 0.8
    assert mine["spearman"] >= start, (mine, theirs)
