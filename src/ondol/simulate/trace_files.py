"""Traces from files, CSV, JSONL or Parquet, and to CSV."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import msgspec

from ondol.simulate.trace import FIELDS, OPTIONAL, REQUIRED, Trace, TraceError, build


def read_trace(path: Path, *, repair: bool = False) -> Trace:
    """The trace of a file: `.csv`, `.jsonl` (both also with `.gz`) or `.parquet`.

    `repair` leaves out the rows that are wrong and sorts by time what is not in order, and says so in `repairs`.

    Raises:
        TraceError: with the first problems, each with row and column; or it is no trace at all.
        OSError: it cannot be read.
    """
    kind = [part.lower() for part in path.suffixes if part.lower() != ".gz"]
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".ndjson": _jsonl_rows, ".parquet": _parquet_rows}
    reader = readers.get(kind[-1]) if kind else None
    if reader is None:
        raise TraceError(
            f"{path}: found the name {path.name!r}; allowed: names ending in .csv, .jsonl or .parquet"
        )
    return build(reader(path), name=path.name, repair=repair)


def as_csv(trace: Trace) -> str:
    """The trace as CSV, with the columns that it has; what was read from it reads back the same."""
    text = io.StringIO()
    optional = [name for name in OPTIONAL if getattr(trace, FIELDS[name]) is not None]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*REQUIRED, *optional])
    columns = [
        trace.times,
        trace.prompts,
        trace.outputs,
        *(getattr(trace, FIELDS[name]) for name in optional),
    ]
    for row in zip(*columns, strict=True):
        writer.writerow([_cell(value) for value in row])
    return text.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    if isinstance(value, bool):
        return int(value)
    return "" if value is None else value


def _opened(path: Path) -> io.TextIOWrapper:
    if path.suffix.lower() == ".gz":
        return io.TextIOWrapper(gzip.open(path), encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    number = 0
    with _opened(path) as file:
        try:
            for number, row in enumerate(csv.DictReader(file, strict=True), 1):
                if None in row:
                    raise TraceError(
                        f"{path.name}: row {number}: found more cells than columns; allowed: as many"
                    )
                yield row
        except (csv.Error, UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
            raise TraceError(f"{path.name}: after row {number}: {error}; allowed: CSV in UTF-8") from error


def _jsonl_rows(path: Path) -> Iterator[dict[str, Any]]:
    number = 0
    decoder = msgspec.json.Decoder(dict[str, Any])
    with _opened(path) as file:
        try:
            for line in file:
                number += 1
                if line.strip():
                    yield decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
            raise TraceError(
                f"{path.name}: row {number}: {error}; allowed: one JSON object a line"
            ) from error


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    path.open("rb").close()  # says plainly when there is no such file
    with duckdb.connect(config={"threads": 1}) as database:
        try:
            found = database.execute("SELECT * FROM read_parquet(?)", [str(path)])
            names = [column[0] for column in found.description or ()]
            while batch := found.fetchmany(10_000):
                for row in batch:
                    yield dict(zip(names, row, strict=True))
        except duckdb.Error as error:
            raise TraceError(f"{path.name}: {str(error).splitlines()[0]}; allowed: a Parquet file") from error
