"""The report on a model that is trained already: finetune's scores, of a file of examples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastbert.config import BertConfig
from fastbert.model import BertPreTrainedModel
from fastbert.model.outputs import ModelOutput
from fastbert.precision import LoadOptions
from fastbert.tasks.names import head_task
from fastbert.tokenizer.auto import AutoTokenizer
from fastbert.training.finetune.examples import Reading
from fastbert.training.finetune.features import Feature
from fastbert.training.finetune.recipe import Dataset, Evaluation, Recipe, read_examples
from fastbert.training.finetune.report import versions
from fastbert.training.finetune.settings import FinetuneSettings
from fastbert.training.finetune.tasks import TASKS

_BY_PROBLEM = {"regression": "regression", "multi_label_classification": "multi-label"}


@dataclass(frozen=True)
class Evaluated:
    """A model's scores and predictions, and what they were made with."""

    recipe: Recipe
    evaluation: Evaluation
    source: str  # the model's folder or id

    @property
    def metrics(self) -> dict[str, Any]:
        """As in the report of finetune, of the test examples alone."""
        recipe, data = self.recipe, self.recipe.test
        assert data is not None, "it was evaluated"
        details = recipe.task.details(self.evaluation.predictions, recipe.labels)
        return {
            "test": self.evaluation.scores,
            "classes": {"test": details} if details else {},
            "model": self.source,
            "task": recipe.settings.task,
            "labels": recipe.labels,
            "data": {"test": {"file": str(data.path), "examples": len(data.examples), "truncated": data.truncated}},
            "versions": versions(),
        }


def finetuned_task(config: BertConfig) -> str:
    """The task of TASKS that a model was trained for, by its head and `problem_type`.

    Raises:
        ValueError: its head is for none.
    """
    names = [str(name) for name in config.extra.get("architectures") or []]
    found = head_task(names)
    if found == "text-classification":
        usual = "regression" if config.num_labels == 1 else "classification"
        return _BY_PROBLEM.get(str(config.problem_type), usual)
    if found in TASKS:
        return str(found)
    shown = ", ".join(names) or "no architectures in config.json"
    raise ValueError(f"the model has no head of a task ({shown}); the tasks are {', '.join(TASKS)}")


def evaluate(
    model: str | Path,
    test: Path,
    reading: Reading | None = None,
    options: LoadOptions | None = None,
    **settings: Any,
) -> Evaluated:
    """Evaluates a model on labelled examples.

    Args:
        model: the folder or hub id of a model with a head.
        reading: how the file is read.
        options: how the model is loaded.
        settings: those of FinetuneSettings that concern texts: max_length, say.

    Raises:
        DataError: the file or a line of it is wrong, or has a label that the model has not; names both.
        ValueError: the model has no head of a task, or a setting does not fit.
    """
    options = options or LoadOptions()
    config = BertConfig.from_pretrained(model, revision=options.revision)
    wanted = FinetuneSettings(task=finetuned_task(config), **settings)
    task = TASKS[wanted.task]
    tokenizer = AutoTokenizer.from_pretrained(model, revision=options.revision)
    tokenizer = tokenizer.with_prefix_space() if task.splits_words else tokenizer
    if wanted.max_length is not None and wanted.max_length > config.max_length:
        raise ValueError(f"max_length is {wanted.max_length}; the model takes {config.max_length} tokens")
    limit = min(tokenizer.model_max_length, config.max_length, task.max_length or config.max_length)
    examples = read_examples(task, test, reading or Reading())
    no_answer = wanted.no_answer
    if no_answer is None:
        no_answer = any(getattr(example, "answers", None) == [] for example in examples)
    wanted = replace(wanted, max_length=wanted.max_length or limit, no_answer=no_answer)
    has_labels = task.problem_type is not None or wanted.task == "token-classification"
    labels = [str(config.id2label[i]) for i in range(config.num_labels)] if has_labels else []
    labels = [] if wanted.task == "regression" else labels
    data = Dataset(test, examples, task.encode(examples, tokenizer, labels, wanted))
    none = Dataset(test, [], [])
    recipe = Recipe(wanted, task, tokenizer, labels, none, none, data)
    loaded: BertPreTrainedModel = task.model.from_pretrained(model, **vars(options)).eval()

    @torch.inference_mode()
    def run(features: list[Feature]) -> tuple[float, float, ModelOutput]:
        given = {
            name: value.to(loaded.device) if isinstance(value, Tensor) else value
            for name, value in task.collate(features).items()
        }
        output = loaded(**given, return_dict=True)
        return float(output.loss), sum(feature.weight for feature in features), output

    return Evaluated(recipe, recipe.evaluate(data, run), str(model))
