"""Which task a model's head is for. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastbert.config import BertConfig

ALIASES = {"sentiment-analysis": "text-classification", "ner": "token-classification"}
# By the last word of the class in a config's `architectures`.
_BY_HEAD = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "multiple-choice",
    "ForMaskedLM": "fill-mask",
    "ForPreTraining": "fill-mask",
}


def task_of(model: Any, revision: str | None = None) -> str:
    """The task of a model's head, by its class or by `architectures` in its folder.

    Raises:
        ValueError: it has none of the heads that have a task.
    """
    if isinstance(model, str | Path):
        config = BertConfig.from_pretrained(model, revision=revision)
        names = config.extra.get("architectures") or []
    else:
        names = [type(model).__name__]
    if (found := head_task(names)) is not None:
        return found
    shown = ", ".join(map(str, names)) or "no architectures in config.json"
    raise ValueError(
        f"the model has no head of a task ({shown}); the tasks are {', '.join(dict.fromkeys(_BY_HEAD.values()))}"
    )


def head_task(names: Sequence[Any]) -> str | None:
    """The task of the first of these classes whose head has one."""
    return next((task for name in names for head, task in _BY_HEAD.items() if str(name).endswith(head)), None)
