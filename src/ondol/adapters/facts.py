"""The hub's usage as Parquet, for questions in SQL: a derived copy that may be thrown away and made again.

A file holds one block of one gateway's records and is named after them, `<gateway>/<first>-<last>.parquet`; blocks
begin at fixed numbers.  The same records give the same bytes (with the same DuckDB), so two copies can be compared by
digest.  No acknowledgement rests on any of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import duckdb
import msgspec

from ondol.adapters.fact_columns import COLUMNS, EMPTY, JSON_TYPES, SELECT, line_of
from ondol.core.usage import decode_record
from ondol.errors import InvalidRequest, StateError, StateUnavailable

BLOCK_ROWS: Final = 65_536
"""Records of one file at most: some 4 MB."""
PAGE_ROWS: Final = 4_096
QUERY_S: Final = 30.0
QUERY_ROWS: Final = 10_000
QUERY_MEMORY: Final = "512MB"

Rows = Callable[[str, int, int], Sequence[tuple[int, bytes]]]
"""(gateway, after, limit) → the next records as they are stored, by number: `hub.usage.rows_after`."""

_NAME: Final = re.compile(r"(\d{12,19})-(\d{12,19})\.parquet")


class Built(msgspec.Struct, frozen=True, kw_only=True):
    """What a `build` did: files it wrote, files that were right already, records in all of them."""

    written: int
    kept: int
    records: int


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """Rows of a question; `cut` where there were more than may be given."""

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    cut: bool = False


class FactStore:
    """A folder of Parquet files.  Blocks; one process at a time builds, any number ask."""

    def __init__(self, folder: Path) -> None:
        """Use a folder, which is made when something is built."""
        self._folder = folder

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self._folder

    def build(
        self,
        marks: Sequence[tuple[str, int]],
        rows: Rows,
        *,
        again: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Built:
        """Bring the files up to `marks`, (gateway, number of its last record); about 60,000 records a second.

        Files of whole blocks that are there are kept, save with `again`.  Files of gateways that are not named, or
        of more records than their mark, are removed: they are of another history.

        Raises:
            StateUnavailable: the folder cannot be written.
            StateError: the source does not have a record that its mark says.
        """
        wanted = [
            (gateway, first, min(first + BLOCK_ROWS - 1, last))
            for gateway, last in sorted(marks)
            for first in range(1, last + 1, BLOCK_ROWS)
        ]
        total = sum(last - first + 1 for _, first, last in wanted)
        written = kept = done = 0
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for left in self._folder.glob(".building-*"):  # of a build that was killed
                shutil.rmtree(left)
            for gateway, first, last in wanted:
                path = self._path(gateway, first, last)
                if path.exists() and not again:
                    kept += 1
                else:
                    self._write(path, gateway, first, last, rows)
                    written += 1
                done += last - first + 1
                if progress is not None:
                    progress(done, total)
            self._forget_others({self._path(*one) for one in wanted})
        except OSError as error:
            raise StateUnavailable(
                f"{self._folder}: {error.strerror or error}. Check that the disk has room; build again."
            ) from error
        return Built(written=written, kept=kept, records=total)

    def files(self) -> list[Path]:
        """The files, by gateway and number."""
        return sorted(path for path in self._folder.glob("*/*.parquet") if _NAME.fullmatch(path.name))

    def query(
        self, sql: str, *, rows_max: int = QUERY_ROWS, timeout_s: float = QUERY_S, memory: str = QUERY_MEMORY
    ) -> Answer:
        """Answer one SELECT about the view `usage`, bounded in rows, seconds and memory.

        It can read nothing but the files of this folder, write nothing, and change no setting.

        Raises:
            InvalidRequest: it is not one SELECT, is wrong, or takes more than it may.
            StateUnavailable: nothing is built yet.
            StateError: a file is damaged; build again.
        """
        files = self.files()
        if not self._folder.is_dir():
            raise StateUnavailable(
                f"{self._folder}: no facts are built yet. Run `ondol facts rebuild` first."
            )
        with contextlib.closing(duckdb.connect(":memory:")) as connection:
            _lock_down(connection, files, memory)
            _check_select(connection, sql)
            timer = threading.Timer(timeout_s, connection.interrupt)
            timer.start()
            try:
                cursor = connection.execute(sql)
                found = cursor.fetchmany(rows_max + 1)
                columns = tuple(str(one[0]) for one in cursor.description or ())
            except duckdb.InterruptException as error:
                raise InvalidRequest(
                    f"facts: the question took more than {timeout_s:g} s. Ask for less."
                ) from error
            except duckdb.OutOfMemoryException as error:
                raise InvalidRequest(
                    f"facts: the question needs more than {memory}. Ask for less."
                ) from error
            except (duckdb.IOException, duckdb.InternalException) as error:
                raise StateError(
                    f"{self._folder}: {_first_line(error)}. Run `ondol facts rebuild --again`."
                ) from error
            except duckdb.Error as error:
                raise InvalidRequest(f"facts: {_first_line(error)}") from error
            finally:
                timer.cancel()
                timer.join()
        return Answer(columns=columns, rows=found[:rows_max], cut=len(found) > rows_max)

    def _path(self, gateway: str, first: int, last: int) -> Path:
        return self._folder / _folder_name(gateway) / f"{first:012}-{last:012}.parquet"

    def _write(self, path: Path, gateway: str, first: int, last: int, rows: Rows) -> None:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._folder, prefix=".building-") as name:
            lines, made = Path(name) / "rows.json", Path(name) / "rows.parquet"
            with lines.open("wb") as file:
                for line in _lines(gateway, first, last, rows):
                    file.write(line)
            _to_parquet(lines, made)
            _sync(made)
            made.replace(path)
        _sync(path.parent)

    def _forget_others(self, wanted: set[Path]) -> None:
        for path in self.files():
            if path not in wanted:
                path.unlink()
        for folder in self._folder.iterdir():
            if folder.is_dir() and not folder.name.startswith(".") and not any(folder.iterdir()):
                folder.rmdir()


def _folder_name(gateway: str) -> str:
    """The gateway's id as a file system takes it: no separators, not hidden, at most 200 bytes."""
    name = quote(gateway, safe="")
    if len(name) > 200:
        name = f"{name[:120]}-{hashlib.sha256(gateway.encode()).hexdigest()[:32]}"
    return f"%2E{name[1:]}" if name.startswith(".") else name


def _lines(gateway: str, first: int, last: int, rows: Rows) -> Iterator[bytes]:
    seq = first - 1
    while seq < last:
        page = rows(gateway, seq, min(PAGE_ROWS, last - seq))
        for number, payload in page:
            if number != seq + 1:
                break
            seq = number
            yield line_of(seq, decode_record(payload))
        else:
            if page:
                continue
        raise StateError(
            f"usage of gateway {gateway}: record {seq + 1} is missing, and the hub's mark is {last} or more. "
            "The database is not whole: restore it from a backup; sites send again what that does not have."
        )


def _to_parquet(lines: Path, target: Path) -> None:
    """One thread and the order of the lines, so that the bytes depend on nothing else."""
    types = ", ".join(f"'{name}': '{kind}'" for name, kind in JSON_TYPES.items())
    with contextlib.closing(duckdb.connect(":memory:", config={"threads": 1})) as connection:
        connection.execute("SET preserve_insertion_order = true")
        try:
            connection.execute(
                f"COPY (SELECT {SELECT} FROM read_json({_quoted(lines)}, format='newline_delimited',"  # noqa: S608
                f" columns={{{types}}})) TO {_quoted(target)}"
                " (FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE 122880)"
            )
        except duckdb.IOException as error:
            raise OSError(0, _first_line(error)) from error


def _lock_down(connection: duckdb.DuckDBPyConnection, files: Sequence[Path], memory: str) -> None:
    listed = ", ".join(_quoted(path) for path in files)
    names = ", ".join(COLUMNS)
    source = f"SELECT {names} FROM read_parquet([{listed}])" if files else EMPTY  # noqa: S608  # our own names
    for setting in (
        f"SET memory_limit = '{memory}'", "SET threads = 2", "SET temp_directory = ''",
        "SET autoinstall_known_extensions = false", "SET autoload_known_extensions = false",
        f"SET allowed_paths = [{listed}]", "SET enable_external_access = false",
    ):  # fmt: skip
        connection.execute(setting)
    try:
        connection.execute(f"CREATE VIEW usage AS {source}")
    except duckdb.Error as error:
        raise StateError(f"{_first_line(error)}. Run `ondol facts rebuild --again`.") from error
    connection.execute("SET lock_configuration = true")


def _check_select(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    try:
        statements = connection.extract_statements(sql)
    except duckdb.Error as error:
        raise InvalidRequest(f"facts: {_first_line(error)}") from error
    if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
        kinds = ", ".join(one.type.name for one in statements) or "nothing"
        raise InvalidRequest(f"facts: found {kinds[:80]}; expected one SELECT about `usage`.")


def _quoted(path: Path) -> str:
    return "'" + str(path.absolute()).replace("'", "''") + "'"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems refuse it for folders, and need none
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
