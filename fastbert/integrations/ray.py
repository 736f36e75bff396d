"""embed, predict and rerank over parquet files by Ray's workers; serve's app for Ray Serve.

    from fastbert.integrations.ray import embed

    embed("texts/", "vectors/", "path/to/model", workers=8)

Each worker is an actor with a model of its own, the light one on a CPU. Ray gives the part of a worker that died to
another, and a run that died continues with the parts that are missing: see integrations.parquet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastbert.integrations.parquet import (
    EmbedWorker,
    Place,
    PredictWorker,
    RerankWorker,
    clear_partial,
    parts_of,
)
from fastbert.lazy import missing_extra
from fastbert.tasks.names import task_of
from fastbert.tasks.predict import PREDICTED, Predicting
from fastbert.tasks.rows import TaskReading

try:
    import ray.data
except ModuleNotFoundError as error:
    raise missing_extra(__name__, error, "ray") from error

if TYPE_CHECKING:
    from fastbert.serve.settings import ServeSettings

PART = 65_536  # rows at which a part ends, at a row group's end


class Outcome(NamedTuple):
    """The result of a run: rows in all, parts in all, and those of them that were there already."""

    rows: int
    parts: int
    kept: int


def embed(
    source: Place | Sequence[Place],
    target: Place,
    model: str | Path,
    *,
    column: str = "text",
    output: str = "embedding",
    prompt_name: str | None = None,
    precision: str = "float32",
    skip_bad: bool = False,
    workers: int = 1,
    cpus: float = 1,
    gpus: float = 0,
    part_rows: int = PART,
    load: Mapping[str, Any] | None = None,
) -> Outcome:
    """Adds a column of vectors, lists of E numbers.

    Args:
        source: a parquet file, a folder of them, in the order of their names, or a list of files; local, or a URI that
            pyarrow knows (s3://, gs://, hdfs://). Every node must reach them, as the target and the model.
        target: the folder that the parts are written to, 000000.parquet and so on. Parts that it has already are kept
            if they were made of the same rows by the same model and settings.
        model: a folder or hub id.
        column: of the texts.
        output: the new column.
        prompt_name: of the model's prompts.
        precision: of the vectors: "float32", "binary" or "ubinary".
        skip_bad: whether a row without a text gets null, and is no error.
        workers: how many actors.
        cpus: of a worker, which computes with as many threads.
        gpus: of a worker; with one it computes there, by torch.
        part_rows: rows at which a part ends, at the end of a row group of its file.
        load: options of light.choice.load_embedder: dtype, quantize, or cache, with which the workers of a node share
            one mapped copy of the weights.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: an argument is out of range, or the target holds other parquet files. In a worker, as ray's
            UserCodeException: there is no such column, or one called as the new one; a row has no text; the model
            cannot be loaded.
    """
    if precision not in ("float32", "binary", "ubinary"):
        raise ValueError(f"precision is {precision!r}; it must be 'float32', 'binary' or 'ubinary'")
    given: dict[str, Any] = {
        "model": str(model),
        "prompt_name": prompt_name,
        "precision": precision,
        "load": _load(load, gpus),
    }
    given |= {"reading": TaskReading(text=column), "prefix": output, "skip_bad": skip_bad}
    return _run(source, target, EmbedWorker, given, workers, cpus, gpus, part_rows)


def predict(
    source: Place | Sequence[Place],
    target: Place,
    model: str | Path,
    *,
    task: str | None = None,
    reading: TaskReading | None = None,
    predicting: Predicting | None = None,
    skip_bad: bool = False,
    workers: int = 1,
    cpus: float = 1,
    gpus: float = 0,
    part_rows: int = PART,
    load: Mapping[str, Any] | None = None,
) -> Outcome:
    """Adds the columns of `fastbert predict`: the prediction, its score, and the numbers of windows and tokens.

    The arguments that are not listed are those of `embed`.

    Args:
        task: of tasks.predict.PREDICTED; None for that of the model's head.
        reading: the names of the columns that the task reads.
        predicting: which part of the answers is kept, and how the new columns' names begin.
        load: options of light.choice.load_pipeline, among them defaults of the task's arguments.

    Raises:
        ValueError: the model is for another task; and as `embed`.
    """
    task = task or task_of(str(model), None)
    if task not in PREDICTED:
        raise ValueError(f"task is {task!r}; it must be one of {', '.join(PREDICTED)}")
    given = {"model": str(model), "task": task, "predicting": predicting or Predicting(), "load": _load(load, gpus)}
    given |= {"reading": reading or TaskReading(), "skip_bad": skip_bad}
    return _run(source, target, PredictWorker, given, workers, cpus, gpus, part_rows)


def rerank(
    source: Place | Sequence[Place],
    target: Place,
    model: str | Path,
    *,
    query: str = "query",
    document: str = "document",
    output: str = "score",
    skip_bad: bool = False,
    workers: int = 1,
    cpus: float = 1,
    gpus: float = 0,
    part_rows: int = PART,
    load: Mapping[str, Any] | None = None,
) -> Outcome:
    """Adds the score of each row's document for its query, float64, by a cross-encoder.

    The arguments that are not listed are those of `embed`.

    Args:
        query: the column of the queries.
        document: the column of the documents.
        output: the new column.

    Raises:
        ValueError: as `embed`.
    """
    given = {"model": str(model), "load": _load(load, gpus), "prefix": output, "skip_bad": skip_bad}
    given["reading"] = TaskReading(text=query, pair=document)
    return _run(source, target, RerankWorker, given, workers, cpus, gpus, part_rows)


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


def _load(load: Mapping[str, Any] | None, gpus: float) -> dict[str, Any]:
    return {"device": "cuda" if gpus else "cpu", **(load or {})}


def _run(
    source: Place | Sequence[Place],
    target: Place,
    worker: type[Any],
    given: dict[str, Any],
    workers: int,
    cpus: float,
    gpus: float,
    part_rows: int,
) -> Outcome:
    for name, value in (("workers", workers), ("part_rows", part_rows)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    parts = parts_of(source, target, part_rows)
    made = ray.data.from_items(parts, override_num_blocks=min(len(parts), 10_000)).map_batches(
        _Actor,
        fn_constructor_args=(worker, given),
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(parts))),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=cpus,
        num_gpus=gpus,
    )
    done = made.take_all()
    clear_partial(target)
    return Outcome(sum(part["rows"] for part in parts), len(parts), sum(one["kept"] for one in done))


class _Actor:
    """A worker of integrations.parquet, as Ray calls it."""

    def __init__(self, worker: type[Any], given: dict[str, Any]) -> None:
        self.worker = worker(**given)

    def __call__(self, parts: Any) -> Any:
        return {"kept": [self.worker.write(part) for part in parts.to_pylist()]}
