"""The models of a server: texts are tokenized in threads, their tokens run in batches of all that waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fastbert.checkpoint.hub import resolve_file
from fastbert.config import BertConfig
from fastbert.inference.base_embedder import BaseEmbedder
from fastbert.inference.pooling import unit
from fastbert.light.choice import embedder_of, has_masked_lm, load_embedder, load_pipeline
from fastbert.serve.batcher import Batch, Batcher
from fastbert.serve.heads import SHARING, Heads, grouped
from fastbert.serve.settings import ServeSettings
from fastbert.tasks.fill_mask import FillMaskPipeline, TooLongTextError
from fastbert.tasks.names import head_task
from fastbert.tasks.sparse import SparseEmbedding, check_pooling

Result = TypeVar("Result")
EMBEDDING = "embedding"
MODULES, SPARSE = "modules.json", "SpladePooling"  # of sentence-transformers, and the module of sparse vectors
_SHORT = 2000  # characters


class InputError(ValueError):
    """A request that no model could answer: its message is for the client."""


class TooLongError(InputError):
    """A text with more tokens than the model takes, where it must not be cut."""


@dataclass(frozen=True)
class Embedded:
    """Vectors of texts, (N, E) float32, and their number of tokens with the special ones."""

    vectors: np.ndarray
    tokens: int


class Embedding:
    """An embedder behind a queue."""

    kind = EMBEDDING

    def __init__(self, name: str, embedder: BaseEmbedder, batcher: Callable[..., Batcher]) -> None:
        self.name, self.embedder = name, embedder
        self.batcher = batcher(self._run)

    @property
    def max_length(self) -> int:
        return self.embedder.max_length

    @property
    def dtype(self) -> str:
        return self.embedder.dtype

    @property
    def tokenizer(self) -> Any:
        return self.embedder.tokenizer

    async def embed(
        self,
        texts: Sequence[str],
        *,
        prompt_name: str | None = None,
        truncate: bool = True,
        side: str | None = None,
        normalize: bool | None = None,
        dimensions: int | None = None,
    ) -> Embedded:
        """Vectors of texts.

        Args:
            prompt_name: of the folder's prompts.
            truncate: whether a long text is cut.
            side: which end is cut; None as the tokenizer's folder says.
            normalize: whether vectors are scaled to length 1 at last; None as the model's folder says.
            dimensions: the first numbers of a vector that are kept.

        Raises:
            InputError: no such prompt, dimensions out of range.
            TooLongError: a text is too long, and not cut.
        """
        embedder, width = self.embedder, self.embedder.width
        if dimensions is not None and not 1 <= dimensions <= width:
            raise InputError(f"dimensions is {dimensions}; it must be 1 to {width}")
        try:
            prompt = embedder.prompt_of(prompt_name)
        except ValueError as error:
            raise InputError(str(error)) from None
        rows, skip = await aside(texts, self._tokenize, texts, prompt, truncate, side)
        found = await self.batcher.submit([((ids, skip), len(ids)) for ids in rows])
        vectors = np.stack(found) if found else np.empty((0, width), np.float32)
        if embedder.normalize:
            vectors = unit(vectors)
        vectors = vectors[:, :width][:, :dimensions]
        cut = embedder.normalize and dimensions is not None
        if cut if normalize is None else normalize:
            vectors = unit(vectors)
        return Embedded(vectors, sum(map(len, rows)))

    async def states(self, texts: Sequence[str], *, truncate: bool = True, side: str | None = None) -> list[np.ndarray]:
        """The states of each text's tokens, (T, E) float32."""
        rows, _ = await aside(texts, self._tokenize, texts, "", truncate, side)
        return await self.batcher.submit([((ids, None), len(ids)) for ids in rows])

    def _tokenize(
        self, texts: Sequence[str], prompt: str, truncate: bool, side: str | None
    ) -> tuple[list[list[int]], int]:
        embedder = self.embedder
        if side is not None and side != embedder.tokenizer.truncation_side:
            embedder = copy(embedder)
            embedder.tokenizer = copy(embedder.tokenizer)
            embedder.tokenizer.truncation_side = side
        tokenized = embedder.tokenize_block(texts, prompt)
        if tokenized.cut and not truncate:
            raise TooLongError(
                f"text {min(tokenized.cut)} has more than {embedder.max_length} tokens; truncate=true cuts it"
            )
        return tokenized.ids, embedder.skipped_tokens(prompt)

    def _run(self, works: list[Any]) -> list[np.ndarray]:
        """Vectors before they are scaled, or states where a work's number of tokens to skip is None."""
        found: list[np.ndarray] = [np.empty(0)] * len(works)
        for skip in dict.fromkeys(skip for _, skip in works):
            places = [i for i, work in enumerate(works) if work[1] == skip]
            batch = [works[i][0] for i in places]
            made = self.embedder.states(batch) if skip is None else self.embedder.pooled(batch, skip)
            for i, one in zip(places, made, strict=True):
                found[i] = one
        return found

    def warm_up(self) -> None:
        self.embedder.embed(["warm"])


class Answering:
    """A pipeline behind a queue, which those over the same encoder share."""

    def __init__(self, name: str, heads: Heads, batcher: Batcher) -> None:
        self.name, self.heads, self.batcher = name, heads, batcher
        self.pipeline = heads.pipelines[name]
        self.kind = self.pipeline.task

    @property
    def max_length(self) -> int:
        return self.pipeline.runner.max_length

    @property
    def dtype(self) -> str:
        return self.pipeline.runner.dtype

    @property
    def tokenizer(self) -> Any:
        return self.pipeline.tokenizer

    async def answers(self, items: Sequence[Any], **given: Any) -> tuple[list[Any], int]:
        """The answers to inputs, and their number of tokens.

        Args:
            given: arguments of the pipeline's call.

        Raises:
            InputError: an input or an argument that the task does not take.
        """
        try:
            settings = self.pipeline.settings(**given)
            checked = [self.pipeline.check(item, i) for i, item in enumerate(items)]
            windows = await aside(checked, self.pipeline.prepare, checked, settings)
        except TooLongTextError as error:
            raise TooLongError(str(error)) from None
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from None
        rows = await self.batcher.submit([((window, (self.name,)), len(window)) for window in windows])

        def answers() -> list[Any]:
            own = [row[self.name] for row in rows]
            return [answer for answer, _ in self.pipeline.answers(checked, windows, own, settings)]

        return await aside(checked, answers), sum(map(len, windows))

    async def answers_of(self, names: Sequence[str], texts: Sequence[str]) -> dict[str, list[Any]]:
        """The answers of several heads of this encoder to texts, which it runs over once."""
        runner, given = self.pipeline.runner, tuple(names)
        windows = await aside(texts, runner.windows, list(texts))
        rows = await self.batcher.submit([((window, given), len(window)) for window in windows])

        def answers(name: str) -> list[Any]:
            pipeline, own = self.heads.pipelines[name], [row[name] for row in rows]
            settings = pipeline.settings(**ALL_ANSWERS.get(pipeline.task, {}))
            return [answer for answer, _ in pipeline.answers(list(texts), windows, own, settings)]

        return {name: await aside(texts, answers, name) for name in names}

    def warm_up(self) -> None:
        texts = {"question": "warm", "context": "warm"}
        items: dict[str, Any] = {"rerank": ("warm", "up"), "question-answering": texts}
        self.pipeline(items.get(self.kind, f"warm {self.tokenizer.mask_token}"))


Served = Embedding | Answering
# Arguments of a call that asks for all that there is to answer.
ALL_ANSWERS: dict[str, dict[str, Any]] = {
    "text-classification": {"top_k": None},
    "token-classification": {"aggregation_strategy": "simple"},
}


async def aside(texts: Sequence[Any], function: Callable[..., Result], *arguments: Any) -> Result:
    """The result of a function of texts, in a thread where they are long: going there takes as long as a short one."""
    if len(texts) == 1 and len(str(texts[0])) <= _SHORT:
        return function(*arguments)
    return await asyncio.to_thread(function, *arguments)


def load(settings: ServeSettings, told: Callable[[str, Batch], None]) -> list[Served]:
    """The models of a server; the first is the default one. A masked-language model is one for its vectors, too.

    Args:
        told: is called with a model's name and each batch; of several heads over one encoder, with the first's.

    Raises:
        ValueError: no model, two of one name, or one whose head has no route.
    """
    paths: dict[str, str] = {}
    for given in settings.models:
        name, separator, path = given.partition("=")
        path = path if separator else given
        name = name if separator else Path(given).name
        if name in paths:
            raise ValueError(f"two models are called {name!r}; name one as NAME={path}")
        paths[name] = path
    if not paths:
        raise ValueError("there is no model to serve: give a folder or a hub id")

    def batcher(name: str, run: Callable[[list[Any]], Sequence[Any]]) -> Batcher:
        return Batcher(
            run,
            max_batch_tokens=settings.max_batch_tokens,
            max_latency=settings.max_latency,
            max_queue_tokens=settings.max_queue_tokens,
            told=lambda batch: told(name, batch),
        )

    made: dict[tuple[str, str], Any] = {}  # embedders and pipelines, by name and kind
    for name, path in paths.items():
        made |= {(name, kind): one for kind, one in _load(path, settings).items()}
    served: dict[tuple[str, str], Served] = {}
    for (name, kind), embedder in made.items():
        if kind == EMBEDDING:
            served[name, kind] = Embedding(name, embedder, partial(batcher, name))
    for kinds in ((*SHARING,), ("fill-mask",), ("sparse-embedding",)):
        for heads in grouped({name: one for (name, kind), one in made.items() if kind in kinds}):
            queue = batcher(next(iter(heads.pipelines)), heads.run)
            for name, pipeline in heads.pipelines.items():
                served[name, pipeline.task] = Answering(name, heads, queue)
    return [served[key] for key in made]


def _load(path: str, settings: ServeSettings) -> dict[str, Any]:
    """The answers of a model, by kind: an embedder's, or pipelines'."""
    asked = ("device", "dtype", "precision", "quantize", "revision", "threads")
    options: dict[str, Any] = {name: getattr(settings, name) for name in asked}
    options["cache"] = False if settings.cache is None else settings.cache or True
    task = _task_of(path, settings.revision)
    if task is None:
        return {EMBEDDING: _on_device(load_embedder(path, **options))}
    if task not in (*SHARING, "fill-mask", "sparse-embedding"):
        raise ValueError(
            f"{path}: the model's head is for {task}; the server embeds, and is for {', '.join(SHARING)} and fill-mask"
        )
    pipeline = load_pipeline(task, path, **options)
    _on_device(pipeline.runner)
    if task in SHARING:
        return {task: pipeline}
    runner = pipeline.runner
    found: dict[str, Any] = {} if task == "sparse-embedding" else {EMBEDDING: _on_device(embedder_of(runner))}
    found["sparse-embedding"] = SparseEmbedding(runner)
    if runner.tokenizer.mask_token is not None:
        found["fill-mask"] = FillMaskPipeline(runner)
    return found


def _on_device(model: Any) -> Any:
    """An embedder or a runner, by CUDA graphs where it is on a GPU."""
    if model.device == "cuda":
        model.compile()
    return model


def _task_of(path: str, revision: str | None) -> str | None:
    """The task of a folder's model; None for vectors."""
    config = BertConfig.from_pretrained(path, revision=revision)
    if (modules := resolve_file(path, MODULES, revision=revision, required=False)) is not None:
        if SPARSE not in modules.read_text(encoding="utf-8"):
            return None
        check_pooling(path, revision)
        return "sparse-embedding"
    task = head_task(config.extra.get("architectures") or [])
    if task == "fill-mask" and not has_masked_lm(path, config, revision):
        return None  # its encoder's vectors
    return "rerank" if task == "text-classification" and config.num_labels == 1 else task
