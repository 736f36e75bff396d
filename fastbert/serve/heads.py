"""Several heads over one encoder, which runs once for what waits for any of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fastbert.inference.windows import Window
from fastbert.light.classifiers import Runner
from fastbert.light.heads import FIRST, Head
from fastbert.tasks.base import Pipeline

Work = tuple[Window, tuple[str, ...]]  # what runs, and the heads that read it
# In a config, what is of a head.
_OF_A_HEAD = {"architectures", "id2label", "label2id", "num_labels", "problem_type", "sentence_transformers"}
# The tasks whose heads may share an encoder.
SHARING = ("text-classification", "token-classification", "question-answering", "rerank")


class Heads:
    """Pipelines by their names. Of several, the encoder is one: see `grouped`."""

    def __init__(self, pipelines: Mapping[str, Pipeline]) -> None:
        self.pipelines = dict(pipelines)

    def run(self, works: Sequence[Work]) -> list[dict[str, np.ndarray]]:
        """Of each work, the numbers that each of its heads makes answers of."""
        windows = [window for window, _ in works]
        if len(self.pipelines) == 1:
            ((name, pipeline),) = self.pipelines.items()
            return [{name: rows} for rows in pipeline.run(windows)]
        found: list[dict[str, np.ndarray]] = [{} for _ in works]
        runner = next(iter(self.pipelines.values())).runner
        for batch, inputs in runner.batches(windows):
            wanted = {name: [i for i, place in enumerate(batch) if name in works[place][1]] for name in self.pipelines}
            for name, rows in _one_pass(runner, self._of(wanted), inputs):
                for i, row in zip(wanted[name], rows, strict=True):
                    found[batch[i]][name] = row
        return found

    def _of(self, wanted: Mapping[str, list[int]]) -> dict[str, tuple[Any, list[int]]]:
        return {name: (self.pipelines[name].runner, texts) for name, texts in wanted.items() if texts}


def _one_pass(
    runner: Any, wanted: Mapping[str, tuple[Any, list[int]]], inputs: dict[str, Any]
) -> Iterable[tuple[str, Sequence[np.ndarray]]]:
    """The rows of each head, of the texts that it is wanted for, by their places in the batch."""
    encoder, cu_seqlens = runner.model.encoder, inputs["cu_seqlens"]
    if all(not own.of_tokens and own.model.parts.reads in FIRST for own, _ in wanted.values()):
        states = encoder(**inputs, picked=cu_seqlens[:-1].astype(np.int64))
        for name, (own, texts) in wanted.items():
            yield name, own.model.of_first(states[texts])
        return
    states = encoder(**inputs)
    for name, (own, texts) in wanted.items():
        parts = [states[cu_seqlens[i] : cu_seqlens[i + 1]] for i in texts]
        starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int32)
        x = np.concatenate(parts)
        if own.of_tokens:
            yield name, np.split(encoder.float32(own.model(x)), starts[1:-1])
        else:
            yield name, own.model.of_states(x, starts)


def grouped(pipelines: Mapping[str, Pipeline]) -> list[Heads]:
    """Pipelines whose encoders are the same, bit for bit, together; they hold its weights once from now on."""
    found: list[dict[str, Pipeline]] = []
    for name, pipeline in pipelines.items():
        for group in found:
            if _joins(pipeline, next(iter(group.values()))):
                group[name] = pipeline
                break
        else:
            found.append({name: pipeline})
    return [Heads(group) for group in found]


def _joins(pipeline: Pipeline, first: Pipeline) -> bool:
    """True if the encoder is the first's, which it then has."""
    own, base = pipeline.runner, first.runner
    if not (isinstance(own, Runner) and isinstance(base, Runner)) or {pipeline.task, first.task} - set(SHARING):
        return False
    settings = [{k: v for k, v in of.config.to_dict().items() if k not in _OF_A_HEAD} for of in (own, base)]
    if settings[0] != settings[1] or _reads(own) != _reads(base):
        return False
    if (encoder := own.model.encoder.over(base.model.encoder)) is None:
        return False
    own.model = Head(encoder, own.model.parts)
    return True


def _reads(runner: Runner) -> tuple[Any, ...]:
    """The settings that determine the tokens that a runner makes of texts."""
    tokenizer = runner.tokenizer
    special, backend = sorted(tokenizer.special_tokens_map.items()), tokenizer.as_json()
    return backend, special, tokenizer.truncation_side, runner.max_length, runner.has_types, runner.types_of_one
