"""Parquet files in parts, and what workers make of them: columns of vectors, predictions or scores.

A part is written whole, under a name that says its place, with what it was made of. So rows are there once, in their
order, whatever dies, and a run that died continues with the parts that are missing.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from fastbert.inference.input_files import RecordProblem, Row, no_column
from fastbert.light.choice import load_embedder, load_pipeline
from fastbert.tasks.predict import Predicting, answered, prepared_inputs
from fastbert.tasks.rows import TaskReading, needed, task_input

BATCH = 4096  # rows that are run together
_PARTIAL = re.compile(r"\.\d{6,}-[0-9a-f]{32}\.parquet")  # the name of a part while it is written
_KEY = b"fastbert"  # in a part's metadata: what it was made of
Place = str | Path  # of a file or folder: local, or a URI that pyarrow knows


def parts_of(source: Place | Sequence[Place], target: Place, part_rows: int) -> list[dict[str, Any]]:
    """Row groups of files that are run, and written, together.

    Each is {source, size, written, groups, first, rows, target}: the file, its size and time, the row groups, the place
    of their first row in the file, their rows, and the file that the part will be.

    Args:
        source: a file, a folder of files, in the order of their names, or a list of files.
        target: the folder that the parts will be in; it is made.
        part_rows: rows at which a part ends, at the end of a row group of its file.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: the source has no rows, or the target holds parquet files that are no parts of such a run.
    """
    files = list(_files(source))
    groups = list(_groups(files, part_rows))
    if not groups:
        raise ValueError(f"source is {source!s}; it has no rows")
    system, folder = fs.FileSystem.from_uri(_uri(target))
    system.create_dir(folder)
    names = [f"{i:06}.parquet" for i in range(len(groups))]
    of_sources = {path for uri in files for other, path in [fs.FileSystem.from_uri(uri)] if other.equals(system)}
    for path in _listed(system, folder):
        if path in of_sources or posixpath.basename(path) not in names or _label(system, path) is None:
            raise ValueError(f"target holds {path}, which is no part of this run; give an empty folder")
    return [{**group, "target": _within(_uri(target), name)} for group, name in zip(groups, names, strict=True)]


def clear_partial(target: Place) -> None:
    """Deletes what workers that died were writing."""
    system, folder = fs.FileSystem.from_uri(_uri(target))
    for path in _listed(system, folder, partial=True):
        system.delete_file(path)


def _uri(path: Place) -> str:
    return path.rstrip("/") if isinstance(path, str) and "://" in path else str(Path(path).resolve())


def _within(uri: str, name: str) -> str:
    """The path or URI of a file in a folder."""
    if "://" not in uri:
        return posixpath.join(uri, name)
    base, mark, query = uri.partition("?")  # a URI may end with options
    return f"{base}/{quote(name)}{mark}{query}"


def _listed(system: fs.FileSystem, folder: str, *, partial: bool = False) -> list[str]:
    """The parquet files of a folder, by their names; with `partial` those that a worker was writing."""
    found = sorted(system.get_file_info(fs.FileSelector(folder)), key=lambda one: one.base_name)
    if partial:
        return [one.path for one in found if _PARTIAL.fullmatch(one.base_name)]
    return [one.path for one in found if one.base_name.endswith(".parquet") and not one.base_name.startswith(".")]


def _files(source: Place | Sequence[Place]) -> Iterator[str]:
    """The path or URI of each file."""
    for one in [source] if isinstance(source, str | Path) else source:
        uri = _uri(one)
        system, path = fs.FileSystem.from_uri(uri)
        kind = system.get_file_info(path).type
        if kind == fs.FileType.NotFound:
            raise FileNotFoundError(f"source: there is no {one}")
        if kind == fs.FileType.Directory:
            yield from (_within(uri, posixpath.basename(each)) for each in _listed(system, path))
        else:
            yield uri


def _groups(files: Sequence[str], part_rows: int) -> Iterator[dict[str, Any]]:
    for uri in files:
        system, path = fs.FileSystem.from_uri(uri)
        written = system.get_file_info(path).mtime_ns
        with system.open_input_file(path) as file:
            metadata, size = pq.ParquetFile(file).metadata, file.size()
        groups: list[int] = []
        first = rows = 0
        file_of = {"source": uri, "size": size, "written": written}
        for group in range(metadata.num_row_groups):
            groups.append(group)
            rows += metadata.row_group(group).num_rows
            if rows >= part_rows or group == metadata.num_row_groups - 1:
                if rows:
                    yield {**file_of, "groups": groups, "first": first, "rows": rows}
                groups, first, rows = [], first + rows, 0


class Worker:
    """A model, and what it makes of rows.

    Attributes:
        task: whose columns are read; "text-classification" for texts and pairs.
        types: of the new columns, by their names without the prefix; "" is the first.
        digest: of the model and the settings.
    """

    task = "text-classification"
    types: Mapping[str, pa.DataType]

    def __init__(self, reading: TaskReading, prefix: str, skip_bad: bool, made_by: str) -> None:
        self.reading, self.prefix, self.skip_bad = reading, prefix, skip_bad
        self.digest = hashlib.sha256(f"{made_by} {reading} {prefix} {skip_bad}".encode()).hexdigest()

    def columns(self, inputs: list[Any]) -> dict[str, Any]:
        """The new columns of rows with these inputs, each a list or an Arrow array."""
        raise NotImplementedError

    def write(self, part: dict[str, Any]) -> bool:
        """Writes a part of `parts_of`, unless it is there already; returns whether it was.

        Raises:
            ValueError: a column is missing, or has a new one's name; a row is bad, unless `skip_bad`.
        """
        system, path = fs.FileSystem.from_uri(part["target"])
        made_of = {name: part[name] for name in ("source", "size", "written", "groups")} | {"by": self.digest}
        label = json.dumps(made_of, sort_keys=True).encode()
        if _label(system, path) == label:
            return True
        folder, name = posixpath.split(path)
        partial = posixpath.join(folder, f".{name.removesuffix('.parquet')}-{uuid.uuid4().hex}.parquet")
        reading, place = fs.FileSystem.from_uri(part["source"])
        writer, first = None, part["first"]
        try:
            with reading.open_input_file(place) as file, system.open_output_stream(partial) as out:
                for batch in pq.ParquetFile(file).iter_batches(BATCH, part["groups"]):
                    table = self.extended(pa.Table.from_batches([batch]), first)
                    table = table.replace_schema_metadata({**(table.schema.metadata or {}), _KEY: label})
                    writer = writer or pq.ParquetWriter(out, table.schema)
                    writer.write_table(table)
                    first += len(table)
                if writer is not None:
                    writer.close()
        except BaseException as error:
            with suppress(OSError):  # it may not have been begun
                system.delete_file(partial)
            if isinstance(error, ValueError):
                raise ValueError(f"{part['source']}: {error}") from error
            raise
        system.move(partial, path)
        return False

    def extended(self, table: pa.Table, first: int = 0) -> pa.Table:
        """The rows with the new columns; `first` is the first's place in its file. Raises as `write`."""
        names = {name: f"{self.prefix}_{name}".rstrip("_") for name in self.types}
        if twice := set(names.values()) & set(table.column_names):
            raise ValueError(f"there is a column {min(twice)!r} already; give the new one another name")
        read = needed(self.task, self.reading, table.column_names) or [self.reading.words]
        if missing := [name for name in read if name not in table.column_names]:
            raise ValueError(no_column(missing[0], table.column_names))
        inputs, places = [], np.full(len(table), -1)
        for i, values in enumerate(table.select(read).to_pylist()):
            try:
                inputs.append(task_input(self.task, self.reading, Row(i, values), "parquet")[1])
                places[i] = len(inputs) - 1
            except RecordProblem as problem:
                if not self.skip_bad:
                    raise ValueError(f"row {first + i + 1} {problem}; with skip_bad it gets null") from None
        made, where = self.columns(inputs), pa.array(places, mask=places < 0)
        for name, kind in self.types.items():
            values = made.get(name, [])
            column = values if isinstance(values, pa.Array) else pa.array(values, kind)
            table = table.append_column(names[name], column.take(where))
        return table


def _label(system: fs.FileSystem, path: str) -> bytes | None:
    """The input of a part; None where there is none, or a file of someone else's."""
    if system.get_file_info(path).type == fs.FileType.NotFound:
        return None
    with system.open_input_file(path) as file:
        found: bytes | None = (pq.read_schema(file).metadata or {}).get(_KEY)
    return found


class EmbedWorker(Worker):
    def __init__(self, model: str, prompt_name: str | None, precision: str, load: dict[str, Any], **own: Any) -> None:
        self.embedder, self.prompt_name, self.precision = load_embedder(model, **load), prompt_name, precision
        super().__init__(**own, made_by=f"embed {self.embedder.fingerprint()} {prompt_name} {precision}")
        element = pa.from_numpy_dtype(self._embed(["a"]).dtype)
        self.types = {"": pa.list_(element)}

    def _embed(self, texts: list[str]) -> np.ndarray:
        vectors: np.ndarray = self.embedder.embed(texts, prompt_name=self.prompt_name, precision=self.precision)
        return vectors

    def columns(self, inputs: list[str]) -> dict[str, Any]:
        vectors = self._embed(inputs)
        ends = np.arange(len(vectors) + 1, dtype=np.int32) * vectors.shape[1]
        return {"": pa.ListArray.from_arrays(ends, vectors.reshape(-1))}


class RerankWorker(Worker):
    types: Mapping[str, pa.DataType] = {"": pa.float64()}

    def __init__(self, model: str, load: dict[str, Any], **own: Any) -> None:
        self.pipeline = load_pipeline("rerank", model, **load)
        super().__init__(**own, made_by=f"rerank {self.pipeline.runner.fingerprint()} {self.pipeline.settings()}")

    def columns(self, inputs: list[tuple[str, str]]) -> dict[str, Any]:
        return {"": self.pipeline(inputs)}


class PredictWorker(Worker):
    def __init__(self, model: str, task: str, predicting: Predicting, load: dict[str, Any], **own: Any) -> None:
        self.task, self.predicting = task, predicting
        self.pipeline = pipeline = load_pipeline(task, model, **load)
        made_by = f"{task} {pipeline.runner.fingerprint()} {predicting} {pipeline.settings()}"
        super().__init__(**own, prefix=predicting.prefix, made_by=made_by)
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
        found = {"": pa.int64(), "score": pa.float64()} | scores
    elif config.problem_type == "regression" or config.num_labels == 1:
        found = {"": pa.float64()}
    elif config.problem_type == "multi_label_classification":
        found = {"": pa.list_(pa.string())} | scores
    has_top = predicting.top_k is not None and found.keys() > {""} and task != "multiple-choice"
    top = {"top": pa.list_(_ANSWER if task == "question-answering" else _CLASS)} if has_top else {}
    cut = {"truncated": pa.bool_()} if pipeline.defaults.get("truncation") else {}
    return {**found, **top, "windows": pa.int64(), "tokens": pa.int64(), **cut}
