"""Where vectors go: .npy, .parquet and jsonl, written so that a run killed at any moment can go on.

A run writes two files next to its output: OUT.partial, and OUT.journal.json, which says how much of it
counts. Each commit appends to the first, then replaces the second; OUT itself appears, by a rename, when
the run is complete. A rerun cuts the partial file to what the journal says and goes on from there.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from glob import escape
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from fastbert.checkpoint.files import atomic_path, naming
from fastbert.checkpoint.journal import Journal, RunError, lock
from fastbert.inference.records import Record

OutputError = RunError  # an output that cannot be begun, continued or written
JOURNAL_VERSION = 3
_LENGTHS = struct.Struct("<qq")  # of ids and rows of a window, in bytes
ROW_GROUP = 16384  # rows of a parquet row group


class Format(Protocol):
    """One file format. `encode` makes what a partial file grows by, `finish` the output from all of it."""

    def prefix(self) -> bytes: ...

    def encode(self, records: Sequence[Record], vectors: np.ndarray) -> bytes:
        """records (n) and their vectors (n, E), NaN throughout for a skipped one."""
        ...

    def finish(self, partial: Path, out: Path, records: int) -> None: ...


class NpyFormat:
    """A float32 matrix (N, E): row i is the input's record i, and a skipped one is a row of NaN.

    A matrix has no room for line numbers; this keeps rows and records in step.
    """

    def __init__(self, width: int) -> None:
        self._width = width

    def prefix(self) -> bytes:
        return self._header(0)

    def _header(self, rows: int) -> bytes:
        # numpy leaves room for any number of rows, so that the length does not depend on it.
        buffer = BytesIO()
        np.lib.format.write_array_header_1_0(
            buffer, {"descr": "<f4", "fortran_order": False, "shape": (rows, self._width)}
        )
        return buffer.getvalue()

    def encode(self, records: Sequence[Record], vectors: np.ndarray) -> bytes:
        return vectors.astype("<f4", copy=False).tobytes()

    def finish(self, partial: Path, out: Path, records: int) -> None:
        with open(partial, "rb+") as file:
            file.write(self._header(records))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, out)


class JsonlFormat:
    """Objects {"line": 3, "embedding": [...]}, "file" with several inputs, "id" of records that have one.

    A skipped line has no row.
    """

    def __init__(self, width: int, files: Sequence[str]) -> None:
        self._row = "[" + ",".join(["%.9g"] * width) + "]"  # nine digits bring back every float32
        self._files = [json.dumps(name, ensure_ascii=False) for name in files]

    def prefix(self) -> bytes:
        return b""

    def encode(self, records: Sequence[Record], vectors: np.ndarray) -> bytes:
        lines = []
        for record, vector in zip(records, vectors, strict=True):
            if record.problem is None:
                file = f'"file": {self._files[record.file]}, ' if len(self._files) > 1 else ""
                numbers = self._row % tuple(vector.tolist())
                id = "" if record.id is None else f'"id": {json.dumps(record.id, ensure_ascii=False)}, '
                lines.append(f'{{{file}"line": {record.line}, {id}"embedding": {numbers}}}\n')
        return "".join(lines).encode()

    def finish(self, partial: Path, out: Path, records: int) -> None:
        os.replace(partial, out)


class ParquetFormat:
    """Columns line (int64), embedding (a list of E float32), file (string) where inputs are several, id (string).

    Skipped lines have no row. A parquet file cannot be cut and grown, so rows are spooled as they are and
    become parquet, a row group at a time, at the end. In the spool, each window is the lengths of its two parts, a JSON
    list of ids, and rows.
    """

    def __init__(self, width: int, files: Sequence[str], *, ids: bool = False) -> None:
        self._width, self._files, self._ids = width, list(files), ids
        self._dtype = np.dtype([("file", "<i4"), ("line", "<i8"), ("embedding", "<f4", (width,))])
        try:
            import pyarrow.parquet  # noqa: F401
        except ModuleNotFoundError:
            raise OutputError("parquet output needs pyarrow: pip install pyarrow, or write .npy or .jsonl") from None

    def prefix(self) -> bytes:
        return b""

    def encode(self, records: Sequence[Record], vectors: np.ndarray) -> bytes:
        good = [i for i, record in enumerate(records) if record.problem is None]
        rows = np.empty(len(good), dtype=self._dtype)
        rows["file"] = [records[i].file for i in good]
        rows["line"] = [records[i].line for i in good]
        rows["embedding"] = vectors[good]
        ids = json.dumps([str(records[i].id) for i in good] if self._ids else []).encode()
        return _LENGTHS.pack(len(ids), rows.nbytes) + ids + rows.tobytes()

    def _groups(self, spool: BinaryIO) -> Iterator[tuple[list[str], np.ndarray]]:
        """The ids and rows of each row group to be, of ROW_GROUP rows and what is left of the last window."""
        ids: list[str] = []
        held: list[np.ndarray] = []
        while header := spool.read(_LENGTHS.size):
            of_ids, of_rows = _LENGTHS.unpack(header)
            ids += json.loads(spool.read(of_ids))
            held.append(np.frombuffer(spool.read(of_rows), self._dtype))
            if sum(map(len, held)) >= ROW_GROUP:
                yield ids, np.concatenate(held)
                ids, held = [], []
        if held:
            yield ids, np.concatenate(held)

    def finish(self, partial: Path, out: Path, records: int) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = [("line", pa.int64()), ("embedding", pa.list_(pa.float32(), self._width))]
        columns[1:1] = [("id", pa.string())] if self._ids else []
        columns[:0] = [("file", pa.string())] if len(self._files) > 1 else []
        schema = pa.schema(columns)
        with (
            atomic_path(out) as temporary,
            open(partial, "rb") as spool,
            # Vectors neither repeat nor compress.
            pq.ParquetWriter(temporary, schema, compression="none", use_dictionary=["file"]) as writer,
        ):
            for ids, rows in self._groups(spool):
                flat = pa.array(np.ascontiguousarray(rows["embedding"]).reshape(-1))
                found = {
                    "file": [self._files[i] for i in rows["file"]],
                    "line": np.ascontiguousarray(rows["line"]),
                    "id": ids,
                    "embedding": pa.FixedSizeListArray.from_arrays(flat, self._width),
                }
                writer.write_table(pa.table({name: found[name] for name in schema.names}, schema=schema))
        partial.unlink()


def make_format(name: str, width: int, files: Sequence[str], *, ids: bool = False) -> Format:
    """The format called "npy", "parquet" or "jsonl", for vectors of `width` from the inputs `files`."""
    if name == "npy":
        return NpyFormat(width)
    # A file name that is not UTF-8 has its odd bytes shown as escapes.
    files = [name.encode("utf-8", "backslashreplace").decode() for name in files]
    return ParquetFormat(width, files, ids=ids) if name == "parquet" else JsonlFormat(width, files)


class StreamOutput:
    """Rows to a stream, each window as it is done; nothing is kept and nothing can be resumed."""

    resumed, done = None, False

    def __init__(self, format: Format, stream: BinaryIO) -> None:
        self._format, self._stream = format, stream

    def append(self, records: Sequence[Record], vectors: np.ndarray, progress: Progress) -> None:
        self._stream.write(self._format.encode(records, vectors))
        self._stream.flush()

    def finish(self, progress: Progress) -> None:
        self._stream.flush()

    def close(self) -> None:
        pass


@dataclass
class Progress:
    """How far a run has come: what the journal keeps."""

    records: int = 0  # of the input, bad ones too
    skipped: int = 0
    tokens: int = 0
    words: int = 0  # tokens without [CLS], [SEP] and the prompt's
    unknown: int = 0  # [UNK] among them
    cut: int = 0  # texts longer than the maximum length
    input_sha256: str = ""  # of the bytes of those records
    bytes: int = 0  # of the partial file
    complete: bool = False


class FileOutput:
    """The output file of a resumable run.

    Args:
        out: the file to be.
        format: how rows are written.
        settings: what the rows follow from in addition to the input: JSON values by name. A run is continued only
            by the same settings.
        resume: whether to continue an interrupted run, where there is one.
        restart: whether to throw an interrupted run away.

    Raises:
        OutputError: there is an interrupted run and neither resume nor restart is asked; its settings differ
            or its files do not fit together; another process is writing it.
    """

    def __init__(
        self,
        out: Path,
        format: Format,
        settings: dict[str, Any],
        *,
        resume: bool = False,
        restart: bool = False,
    ) -> None:
        self.out, self._format = out, format
        self.partial = out.with_name(out.name + ".partial")
        self._journal = Journal(
            journal_path(out), self.partial, version=JOURNAL_VERSION, asked=settings, key="settings"
        )
        self.resumed: Progress | None = None  # where an interrupted run stood
        out.parent.mkdir(parents=True, exist_ok=True)
        self.done = False  # whether that run was complete, and only its journal is left to clear up
        self._renamed = not self.partial.exists()
        self._file = open(self.partial, "ab")  # noqa: SIM115
        try:
            lock(self._file, self.partial)
            if not _is(self._file, self.partial):
                raise OutputError(f"another process has just finished with {self.partial}; try again")
            for stale in out.parent.glob(f".{escape(out.name)}.*.tmp"):  # of a run that was killed
                stale.unlink()
            if restart:
                self._journal.path.unlink(missing_ok=True)
            if (before := self._journal.read(resume=resume)) is not None:
                self.resumed = self._checked(before)
            self._file.truncate(self.resumed.bytes if self.resumed else 0)
            self._file.seek(0, os.SEEK_END)  # truncating leaves the position, which commits rely on, behind
            if not self.resumed:
                self._file.write(self._format.prefix())
        except BaseException:
            self.close()
            raise

    def _checked(self, journal: dict[str, Any]) -> Progress:
        try:
            progress = Progress(**journal)
        except TypeError:
            raise self._journal.damaged() from None
        size = os.fstat(self._file.fileno()).st_size
        if progress.complete and self._renamed and self.out.exists():
            self.done, progress.bytes = True, 0
        elif size < progress.bytes:
            raise OutputError(
                f"cannot continue {self.partial}: it has {size} bytes and the journal speaks of "
                f"{progress.bytes}; --restart begins again"
            )
        return progress

    def append(self, records: Sequence[Record], vectors: np.ndarray, progress: Progress) -> None:
        """Adds rows and commits: after this returns, a kill at any moment does not lose them."""
        with naming(self.partial):
            self._file.write(self._format.encode(records, vectors))
        self._commit(progress)

    def _commit(self, progress: Progress) -> None:
        with naming(self.partial):
            self._file.flush()
            os.fsync(self._file.fileno())
        progress.bytes = self._file.tell()
        self._journal.write(**asdict(progress))

    def finish(self, progress: Progress) -> None:
        """Makes the output from the partial file, under its own name, and clears up."""
        if not self.done:
            progress.complete = True
            self._commit(progress)
            self._format.finish(self.partial, self.out, progress.records)
        self._journal.path.unlink()
        self.close()

    def close(self) -> None:
        """Lets go of the partial file; without a journal, nothing in it counts, and it goes."""
        if not self._file.closed:
            if not self._journal.path.exists() and _is(self._file, self.partial):
                self.partial.unlink()
            with naming(self.partial):
                self._file.close()  # and with it goes the lock


def journal_path(out: Path) -> Path:
    return out.with_name(out.name + ".journal.json")


def _is(file: BinaryIO, path: Path) -> bool:
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
