"""embed, predict and rerank for Ray Data: columns added to a Dataset by workers; serve's app for Ray Serve.

    import ray
    from fastbert.integrations.ray import embed

    embed(ray.data.read_parquet("texts/"), "path/to/model", workers=8).write_parquet("vectors/")

Each worker is an actor with a model of its own, the light one on a CPU. Ray gives the rows of a worker that dies to
another: an answer does not depend on what it is computed with, so the rows are the same, once each, in their order.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from fastbert.inference.input_files import RecordProblem, Row, no_column
from fastbert.lazy import missing_extra
from fastbert.light.choice import load_embedder, load_pipeline
from fastbert.tasks.names import task_of
from fastbert.tasks.predict import PREDICTED, Predicting, answered, prepared_inputs
from fastbert.tasks.rows import TaskReading, needed, task_input

try:
    import ray.data
except ModuleNotFoundError as error:
    raise missing_extra(__name__, error, "ray") from error

if TYPE_CHECKING:
    from ray.data import Dataset


BATCH = 4096  # rows


def embed(
    dataset: Dataset,
    model: str | Path,
    *,
    column: str = "text",
    output: str = "embedding",
    prompt_name: str | None = None,
    precision: str = "float32",
    skip_bad: bool = False,
    workers: int | tuple[int, int] = 1,
    cpus: float = 1,
    gpus: float = 0,
    batch_size: int = BATCH,
    load: Mapping[str, Any] | None = None,
) -> Dataset:
    """Adds a column of vectors, each a list of E numbers.

    Args:
        dataset: with a column of texts; its order is kept.
        model: a folder that every node can read, or a hub id.
        column, output: the column of texts, and the new one.
        prompt_name: of the model's prompts.
        precision: of the vectors: "float32", "int8", "uint8", "binary" or "ubinary"; see quantize_vectors.
        skip_bad: whether a row without a text gets null, and is no error.
        workers: how many actors, or the fewest and the most of them.
        cpus, gpus: of a worker. It computes with as many threads, or on its GPU by torch.
        batch_size: rows that a worker is given at a time.
        load: options of light.choice.load_embedder: dtype, quantize, or cache, with which the workers of a node share
            one mapped copy of the weights.

    Raises:
        ValueError: an argument is out of range. When the result is read, as ray's UserCodeException: the dataset has no
            such column, or one called as the new one; a row has no text; the model cannot be loaded.
    """
    if precision in ("int8", "uint8"):
        raise ValueError(f"precision is {precision!r}, whose scale would be another for each batch; take 'binary'")
    given = {"model": str(model), "prompt_name": prompt_name, "precision": precision, "load": _load(load, gpus)}
    given |= {"reading": TaskReading(text=column), "prefix": output, "skip_bad": skip_bad}
    return _mapped(dataset, _Embed, given, workers, cpus, gpus, batch_size)


def predict(
    dataset: Dataset,
    model: str | Path,
    *,
    task: str | None = None,
    reading: TaskReading | None = None,
    predicting: Predicting | None = None,
    skip_bad: bool = False,
    workers: int | tuple[int, int] = 1,
    cpus: float = 1,
    gpus: float = 0,
    batch_size: int = BATCH,
    load: Mapping[str, Any] | None = None,
) -> Dataset:
    """Adds the columns of `fastbert predict`: the prediction, its score, and the numbers of windows and tokens.

    Args:
        task: of tasks.predict.PREDICTED; None for that of the model's head.
        reading: the names of the columns that the task reads.
        predicting: which part of the answers is kept, and how the new columns' names begin.
        load: options of light.choice.load_pipeline, among them defaults of the task's arguments.
        others: see `embed`.

    Raises:
        ValueError: the model is for another task; and as `embed`.
    """
    task = task or task_of(str(model), None)
    if task not in PREDICTED:
        raise ValueError(f"task is {task!r}; it must be one of {', '.join(PREDICTED)}")
    given = {"model": str(model), "task": task, "predicting": predicting or Predicting(), "load": _load(load, gpus)}
    given |= {"reading": reading or TaskReading(), "skip_bad": skip_bad}
    return _mapped(dataset, _Predict, given, workers, cpus, gpus, batch_size)


def rerank(
    dataset: Dataset,
    model: str | Path,
    *,
    query: str = "query",
    document: str = "document",
    output: str = "score",
    skip_bad: bool = False,
    workers: int | tuple[int, int] = 1,
    cpus: float = 1,
    gpus: float = 0,
    batch_size: int = BATCH,
    load: Mapping[str, Any] | None = None,
) -> Dataset:
    """Adds the score of each row's document for its query, float64, by a cross-encoder.

    Args:
        query, document, output: the columns of both texts, and the new one.
        others: see `embed`.

    Raises:
        ValueError: as `embed`.
    """
    given = {"model": str(model), "load": _load(load, gpus), "prefix": output, "skip_bad": skip_bad}
    given["reading"] = TaskReading(text=query, pair=document)
    return _mapped(dataset, _Rerank, given, workers, cpus, gpus, batch_size)


def _load(load: Mapping[str, Any] | None, gpus: float) -> dict[str, Any]:
    return {"device": "cuda" if gpus else "cpu", **(load or {})}


def _mapped(
    dataset: Dataset,
    worker: type[_Worker],
    given: dict[str, Any],
    workers: int | tuple[int, int],
    cpus: float,
    gpus: float,
    batch_size: int,
) -> Dataset:
    few, most = (workers, workers) if isinstance(workers, int) else workers
    if not 1 <= few <= most:
        raise ValueError(f"workers is {workers!r}; it must be at least 1, or the fewest and the most")
    found: Dataset = dataset.map_batches(
        worker,
        fn_constructor_kwargs=given,
        compute=ray.data.ActorPoolStrategy(min_size=few, max_size=most),
        batch_size=batch_size,
        batch_format="pyarrow",
        num_cpus=cpus,
        num_gpus=gpus,
    )
    found.context.execution_options.preserve_order = True
    return found


def deployment(settings: ServeSettings, **options: Any) -> Any:
    """The app of `fastbert serve` for Ray Serve: `ray.serve.run(deployment(ServeSettings(models=("path/to/model",))))`.

    A replica takes requests when its models are loaded and have run; one that cannot load them fails.

    Args:
        settings: of each replica; address, port, processes and log level are Ray's to choose.
        options: of ray.serve.deployment: num_replicas, or ray_actor_options={"num_cpus": 4}, with which a replica's
            models compute.

    Raises:
        ImportError: ray[serve], or a package of the extra `serve`, is missing.
    """
    try:
        from ray import serve

        from fastbert.serve.app import make_app
    except ModuleNotFoundError as error:
        raise missing_extra("deployment", error, "ray,serve") from error

    def app() -> Any:
        return make_app(settings, ready_first=True)

    return serve.deployment(**options)(serve.ingress(app)()).bind()


class _Worker:
    """What an actor holds: a model, and what it makes of rows.

    Attributes:
        task: whose columns are read; "text-classification" for texts and pairs.
        prefix: of the new columns' names.
        types: of the new columns, by their names without the prefix; "" is the first.
    """

    task = "text-classification"
    types: Mapping[str, pa.DataType]

    def __init__(self, reading: TaskReading, prefix: str, skip_bad: bool) -> None:
        self.reading, self.prefix, self.skip_bad = reading, prefix, skip_bad

    def columns(self, inputs: list[Any]) -> dict[str, Any]:
        """The new columns of rows with these inputs, each a list or an Arrow array."""
        raise NotImplementedError

    def __call__(self, table: pa.Table) -> pa.Table:
        names = {name: f"{self.prefix}_{name}".rstrip("_") for name in self.types}
        if twice := set(names.values()) & set(table.column_names):
            raise ValueError(f"the dataset has a column {min(twice)!r} already; give the new one another name")
        read = needed(self.task, self.reading, table.column_names) or [self.reading.words]
        if missing := [name for name in read if name not in table.column_names]:
            raise ValueError(f"the dataset has {no_column(missing[0], table.column_names)}")
        inputs, places = [], np.full(len(table), -1)
        for i, values in enumerate(table.select(read).to_pylist()):
            try:
                inputs.append(task_input(self.task, self.reading, Row(i, values), "parquet")[1])
                places[i] = len(inputs) - 1
            except RecordProblem as problem:
                if not self.skip_bad:
                    raise ValueError(f"row {i} of a batch {problem}; with skip_bad it gets null") from None
        made, where = self.columns(inputs), pa.array(places, mask=places < 0)
        for name, kind in self.types.items():
            values = made.get(name, [])
            column = values if isinstance(values, pa.Array) else pa.array(values, kind)
            table = table.append_column(names[name], column.take(where))
        return table


class _Embed(_Worker):
    def __init__(self, model: str, prompt_name: str | None, precision: str, load: dict[str, Any], **own: Any) -> None:
        super().__init__(**own)
        self.embedder, self.prompt_name, self.precision = load_embedder(model, **load), prompt_name, precision
        element = pa.from_numpy_dtype(self._embed(["a"]).dtype)
        self.types = {"": pa.list_(element)}

    def _embed(self, texts: list[str]) -> np.ndarray:
        vectors: np.ndarray = self.embedder.embed(texts, prompt_name=self.prompt_name, precision=self.precision)
        return vectors

    def columns(self, inputs: list[str]) -> dict[str, Any]:
        vectors = self._embed(inputs)
        ends = np.arange(len(vectors) + 1, dtype=np.int32) * vectors.shape[1]
        return {"": pa.ListArray.from_arrays(ends, vectors.reshape(-1))}


class _Rerank(_Worker):
    types: Mapping[str, pa.DataType] = {"": pa.float64()}

    def __init__(self, model: str, load: dict[str, Any], **own: Any) -> None:
        super().__init__(**own)
        self.pipeline = load_pipeline("rerank", model, **load)

    def columns(self, inputs: list[tuple[str, str]]) -> dict[str, Any]:
        return {"": self.pipeline(inputs)}


class _Predict(_Worker):
    def __init__(self, model: str, task: str, predicting: Predicting, load: dict[str, Any], **own: Any) -> None:
        super().__init__(**own, prefix=predicting.prefix)
        self.task, self.predicting = task, predicting
        self.pipeline = load_pipeline(task, model, **load)
        self.types = _types(self.pipeline, predicting)

    def columns(self, inputs: list[Any]) -> dict[str, Any]:
        parts = prepared_inputs(self.pipeline, inputs, self.predicting)
        rows = [row for _, row in sorted(answered(self.pipeline, parts, self.predicting), key=lambda found: found[0])]
        return {name: [row[name] for row in rows] for name in self.types}


_CLASS = pa.struct({"label": pa.string(), "score": pa.float64()})
_PLACE = {"start": pa.int64(), "end": pa.int64()}
_ENTITY = pa.struct({"entity_group": pa.string(), "score": pa.float64(), "word": pa.string(), **_PLACE})
_ANSWER = pa.struct({"answer": pa.string(), "score": pa.float64(), **_PLACE})


def _types(pipeline: Any, predicting: Predicting) -> dict[str, pa.DataType]:
    """Of the columns that tasks.predict.columns makes, by their names."""
    config, task, one = pipeline.runner.config, pipeline.task, {"": pa.string(), "score": pa.float64()}
    scores = {"scores": pa.list_(pa.float64())}
    found: dict[str, pa.DataType] = one
    if task == "token-classification":
        found = {"": pa.list_(_ENTITY)}
    elif task == "question-answering":
        found = one | _PLACE
    elif task == "multiple-choice":
        found = one | scores
    elif config.problem_type == "regression" or config.num_labels == 1:
        found = {"": pa.float64()}
    elif config.problem_type == "multi_label_classification":
        found = {"": pa.list_(pa.string())} | scores
    has_top = predicting.top_k is not None and found.keys() > {""} and task != "multiple-choice"
    top = {"top": pa.list_(_ANSWER if task == "question-answering" else _CLASS)} if has_top else {}
    cut = {"truncated": pa.bool_()} if pipeline.defaults.get("truncation") else {}
    return {**found, **top, "windows": pa.int64(), "tokens": pa.int64(), **cut}
