"""Output files of vectors: .npy, .parquet and jsonl. A run that was killed at any moment can be resumed.

A run writes two files next to its output: OUT.partial, and OUT.journal.json with the committed length of
OUT.partial. Each commit appends to OUT.partial, then replaces the journal. When the run is complete, OUT appears
by a rename. A resumed run truncates the partial file to the committed length and continues from there.
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

OutputError = RunError  # an output that cannot be started, resumed or written
JOURNAL_VERSION = 3
_LENGTHS = struct.Struct("<qq")  # bytes of a window's ids and of its rows
ROW_GROUP = 16384  # rows of a parquet row group


class Format(Protocol):
    """One file format. `encode` returns the bytes to append to a partial file; `finish` makes the output from it."""

    def prefix(self) -> bytes: ...

    def encode(self, records: Sequence[Record], made: Any, /) -> bytes:
        """The bytes of n records and what was made of them: vectors (n, E), say; a skipped record has one of NaN."""
        ...

    def finish(self, partial: Path, out: Path, records: int) -> None: ...


class NpyFormat:
    """A float32 matrix (N, E): row i is the input's record i; a skipped record is a row of NaN.

    The matrix has no line numbers, so rows of NaN keep rows and records aligned.
    """

    def __init__(self, width: int) -> None:
        self._width = width

    def prefix(self) -> bytes:
        return self._header(0)

    def _header(self, rows: int) -> bytes:
        # numpy pads the header for any number of rows, so its length does not depend on that number.
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
    """Objects {"line": 3, "embedding": [...]}, with "file" if there are several inputs and "id" if a record has one.

    A skipped line has no row.
    """

    def __init__(self, width: int, files: Sequence[str]) -> None:
        self._row = "[" + ",".join(["%.9g"] * width) + "]"  # nine digits represent every float32 exactly
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
    """Columns line (int64), embedding (list of E float32), file (string) if there are several inputs, id (string).

    Skipped lines have no row. A parquet file cannot be truncated and extended, so rows are spooled raw and
    converted to parquet at the end, one row group at a time. In the spool, each window is the byte lengths of its two
    parts, then a JSON list of ids, then the rows.
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
        """The ids and rows of each row group: whole windows, until there are at least ROW_GROUP rows."""
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
            # Vectors gain nothing from compression or dictionaries.
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
    # In a file name that is not UTF-8, the invalid bytes become escapes.
    files = [name.encode("utf-8", "backslashreplace").decode() for name in files]
    return ParquetFormat(width, files, ids=ids) if name == "parquet" else JsonlFormat(width, files)


class StreamOutput:
    """Writes rows to a stream after each window. Such a run cannot be resumed."""

    resumed, done = None, False

    def __init__(self, format: Format, stream: BinaryIO) -> None:
        self._format, self._stream = format, stream

    def append(self, records: Sequence[Record], made: Any, progress: Progress) -> None:
        self._stream.write(self._format.encode(records, made))
        self._stream.flush()

    def finish(self, progress: Progress) -> None:
        self._stream.flush()

    def close(self) -> None:
        pass


@dataclass
class Progress:
    """How far a run has come; stored in the journal."""

    records: int = 0  # of the input, including bad ones
    skipped: int = 0
    tokens: int = 0
    words: int = 0  # tokens without [CLS], [SEP] and the prompt
    unknown: int = 0  # [UNK] among them
    cut: int = 0  # texts longer than the maximum length
    input_sha256: str = ""  # of the bytes of those records
    bytes: int = 0  # of the partial file
    complete: bool = False


class FileOutput:
    """The output file of a resumable run.

    Args:
        out: path of the output file.
        format: how rows are written.
        settings: JSON values by name that, with the input, determine the rows. A run is resumed only with equal
            settings.
        resume: whether to resume an interrupted run, if there is one.
        restart: whether to discard an interrupted run.

    Raises:
        OutputError: there is an interrupted run and neither resume nor restart is set; its settings differ
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
        self.done = False  # whether that run was complete and only its journal is left to remove
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
            self._file.seek(0, os.SEEK_END)  # truncate does not move the position, on which commits rely
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

    def append(self, records: Sequence[Record], made: Any, progress: Progress) -> None:
        """Appends rows and commits them: after this returns, a kill does not lose them."""
        with naming(self.partial):
            self._file.write(self._format.encode(records, made))
        self._commit(progress)

    def _commit(self, progress: Progress) -> None:
        with naming(self.partial):
            self._file.flush()
            os.fsync(self._file.fileno())
        progress.bytes = self._file.tell()
        self._journal.write(**asdict(progress))

    def finish(self, progress: Progress) -> None:
        """Makes the output file from the partial file and removes the journal."""
        if not self.done:
            progress.complete = True
            self._commit(progress)
            self._format.finish(self.partial, self.out, progress.records)
        self._journal.path.unlink()
        self.close()

    def close(self) -> None:
        """Closes the partial file; without a journal, nothing in it is committed and it is removed."""
        if not self._file.closed:
            if not self._journal.path.exists() and _is(self._file, self.partial):
                self.partial.unlink()
            with naming(self.partial):
                self._file.close()  # releases the lock


def journal_path(out: Path) -> Path:
    return out.with_name(out.name + ".journal.json")


def _is(file: BinaryIO, path: Path) -> bool:
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
