"""The tables of a ledger file, the steps that lead to them, and how a file is opened.

Invariant: rows of `usage` are numbered from 1 without holes and are never changed.  Triggers refuse it
to every program that opens the file; the one exception is deleting rows that a `checkpoint` covers.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import quote

import apsw
import msgspec

from ondol.core.usage import GENESIS, UsageRecord, decode_record, link
from ondol.errors import LedgerBroken, LedgerUnavailable, SchemaTooNew

SPAN_ROWS: Final = 4096
"""Rows that one row of `span` sums up: small enough to scan, large enough to cost nothing to keep."""

OLDEST_SQLITE: Final = 3_051_003
"""Before 3.51.3 a checkpoint and a commit at the same time could lose rows of a WAL that restarts."""

_V1: Final = """
CREATE TABLE usage(
  seq INTEGER PRIMARY KEY,
  request_id TEXT NOT NULL,
  time_ns INTEGER NOT NULL,
  payload BLOB NOT NULL,
  hash BLOB NOT NULL
) STRICT;
CREATE INDEX usage_request ON usage(request_id);
CREATE TRIGGER usage_no_update BEFORE UPDATE ON usage
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER usage_no_delete BEFORE DELETE ON usage
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE leases(
  budget TEXT NOT NULL, period TEXT NOT NULL,
  amount TEXT NOT NULL,  -- decimal text: nano-won of a big company pass 63 bits
  PRIMARY KEY(budget, period)
) STRICT, WITHOUT ROWID;
"""

_V2: Final = f"""
CREATE TABLE checkpoint(
  seq INTEGER PRIMARY KEY,
  hash BLOB NOT NULL,
  time_ns INTEGER NOT NULL,
  signature BLOB
) STRICT;
DROP TRIGGER usage_no_delete;
CREATE TRIGGER usage_no_delete BEFORE DELETE ON usage
WHEN OLD.seq > (SELECT coalesce(max(seq), 0) FROM checkpoint)
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only: no checkpoint covers this row'); END;
CREATE TABLE span(block INTEGER PRIMARY KEY, min_ns INTEGER NOT NULL, max_ns INTEGER NOT NULL) STRICT;
INSERT INTO span SELECT (seq - 1) / {SPAN_ROWS}, min(time_ns), max(time_ns) FROM usage
  GROUP BY 1 HAVING count(*) = {SPAN_ROWS};
"""  # noqa: S608  # a constant of ours

_V3: Final = """
CREATE TABLE mark(
  seq INTEGER PRIMARY KEY,  -- the hub had every row up to it, at this time of its clock
  hash BLOB NOT NULL,
  hub_ns INTEGER NOT NULL
) STRICT;
"""

MIGRATIONS: Final[tuple[str, ...]] = (_V1, _V2, _V3)
"""Step n leads from schema version n to n + 1.  A step that has been released is never edited."""

SPAN_INSERT: Final = (
    "INSERT OR IGNORE INTO span SELECT (seq - 1) / :rows, min(time_ns), max(time_ns) FROM usage"
    " WHERE seq > :block * :rows AND seq <= (:block + 1) * :rows GROUP BY 1 HAVING count(*) = :rows"
)


class Row(msgspec.Struct, frozen=True, array_like=True):
    """One row of `usage` as it lies in the file, unchecked."""

    seq: int
    request_id: str
    time_ns: int
    payload: bytes
    hash: bytes


def connect(path: Path, *, vfs: str | None = None) -> apsw.Connection:
    """A connection that may write, in WAL mode, without a checkpoint of its own accord.

    Raises:
        LedgerUnavailable: the file cannot be opened or made.
        LedgerBroken: it is no SQLite file, or damaged.
    """
    if apsw.SQLITE_VERSION_NUMBER < OLDEST_SQLITE:
        raise LedgerUnavailable(
            f"SQLite {apsw.sqlite_lib_version()} has a known WAL race; the ledger needs 3.51.3 or later. "
            "Install the apsw package that bundles it."
        )
    if not path.exists():  # teams, tags and pseudonyms are nobody else's business; -wal and -shm follow suit
        with contextlib.suppress(OSError):
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    connection = None
    try:
        connection = apsw.Connection(str(path), vfs=vfs)
        connection.set_busy_timeout(5_000)
        mode = connection.pragma("journal_mode", "wal")
        if mode != "wal":
            raise LedgerUnavailable(f"{path}: expected journal mode wal, the file system gives {mode}.")
        connection.wal_autocheckpoint(0)
    except apsw.Error as error:
        if connection is not None:
            connection.close()
        raise _as_ledger_error(path, error) from error
    except LedgerUnavailable:
        if connection is not None:
            connection.close()
        raise
    return connection


def connect_readonly(path: Path, *, vfs: str | None = None) -> apsw.Connection:
    """A connection that cannot write; works while a gateway writes, and on a read-only disk.

    Raises:
        LedgerUnavailable: there is no such file, or it cannot be read.
        LedgerBroken: it is no ledger.
        SchemaTooNew: a newer Ondol wrote it.
    """
    if not path.is_file():
        raise LedgerUnavailable(f"{path}: no such ledger file.")
    connection = None
    try:
        try:
            connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY, vfs=vfs)
            connection.set_busy_timeout(5_000)
            found = int(connection.pragma("user_version"))
        except (apsw.CantOpenError, apsw.ReadOnlyError):
            # A WAL file wants its index beside it.  Where no file may be made there can be no writer
            # either, so the file does not change under us.
            if os.access(path.parent, os.W_OK) or Path(f"{path}-wal").exists():
                raise
            if connection is not None:
                connection.close()
            flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
            connection = apsw.Connection(
                f"file:{quote(str(path.absolute()))}?immutable=1", flags=flags, vfs=vfs
            )
            found = int(connection.pragma("user_version"))
        _check_version(path, found)
        if found < 1:
            raise LedgerBroken(f"{path}: it has no ledger in it (schema version 0).")
    except apsw.Error as error:
        if connection is not None:
            connection.close()
        raise _as_ledger_error(path, error) from error
    except (LedgerBroken, SchemaTooNew):
        if connection is not None:
            connection.close()
        raise
    return connection


def migrate(connection: apsw.Connection, path: Path) -> int:
    """Bring the file to the newest schema, all steps in one transaction; return the version found.

    Raises:
        SchemaTooNew: the file is newer than this program.
        LedgerBroken, LedgerUnavailable: a step failed, and nothing of it is kept.
    """
    try:
        found = int(connection.pragma("user_version"))
        _check_version(path, found)
        if found == len(MIGRATIONS):
            return found
        connection.execute("BEGIN IMMEDIATE")
        try:
            for step in MIGRATIONS[found:]:
                connection.execute(step)
            connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
            connection.execute("COMMIT")
        except apsw.Error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
    except apsw.Error as error:
        raise _as_ledger_error(path, error) from error
    return found


def rows_after(connection: apsw.Connection, seq: int, limit: int) -> list[Row]:
    """At most `limit` rows after `seq`, in order, read in one short transaction."""
    cursor = connection.execute(
        "SELECT seq, request_id, time_ns, payload, hash FROM usage WHERE seq > ? ORDER BY seq LIMIT ?",
        (seq, limit),
    )
    return [Row(*row) for row in cursor]


def anchor(connection: apsw.Connection) -> tuple[int, bytes]:
    """Where the chain starts: the newest checkpoint whose row was pruned, else number 0 and GENESIS."""
    if not connection.table_exists(None, "checkpoint"):
        return 0, GENESIS
    row = connection.execute(
        "SELECT seq, hash FROM checkpoint WHERE seq < (SELECT coalesce(min(seq), 1 << 62) FROM usage)"
        " ORDER BY seq DESC LIMIT 1"
    ).get
    return row if row is not None else (0, GENESIS)


def check_row(row: Row, seq: int, previous: bytes) -> tuple[UsageRecord | None, str | None]:
    """The record of a row that must be number `seq` after hash `previous`; else why it is broken."""
    if row.seq != seq:
        return None, f"record {seq} is missing: the next one there is {row.seq}"
    if link(previous, seq, row.payload) != row.hash:
        return None, f"the hash of record {seq} does not match what it covers"
    try:
        record = decode_record(row.payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return None, f"record {seq} cannot be decoded: {error}"
    if record.request_id != row.request_id or record.time_ns != row.time_ns:
        return None, f"the columns of record {seq} differ from the record that the hash covers"
    return record, None


def spans(connection: apsw.Connection) -> dict[int, tuple[int, int]]:
    """For each block of SPAN_ROWS rows that is summed up: the earliest and latest time in it."""
    if not connection.table_exists(None, "span"):
        return {}
    rows = connection.execute("SELECT block, min_ns, max_ns FROM span")
    return {block: (low, high) for block, low, high in rows}


def scan(
    connection: apsw.Connection, since_ns: int | None, until_ns: int | None, *, chunk: int = 512
) -> Iterator[UsageRecord]:
    """Records with since <= time_ns < until, by number.

    Exact whatever the wall clock did: blocks of rows are skipped by their earliest and latest time,
    never by order.  Each chunk is one short read, so a writer's WAL can restart in between.
    """
    skippable = spans(connection)
    seq = 0
    while True:
        low, high = skippable.get(seq // SPAN_ROWS, (None, None))
        past = low is not None and until_ns is not None and low >= until_ns
        before = high is not None and since_ns is not None and high < since_ns
        if seq % SPAN_ROWS == 0 and (past or before):
            seq += SPAN_ROWS
            continue
        rows = rows_after(connection, seq, min(chunk, SPAN_ROWS - seq % SPAN_ROWS))
        if not rows:
            return
        for row in rows:
            if (since_ns is None or row.time_ns >= since_ns) and (until_ns is None or row.time_ns < until_ns):
                yield decode_record(row.payload)
        seq = rows[-1].seq


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable: a new file's data is not enough after a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # Some file systems (overlays, network mounts) refuse it for directories and need none.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_version(path: Path, found: int) -> None:
    if found > len(MIGRATIONS):
        raise SchemaTooNew(
            f"{path}: found schema version {found}, this Ondol knows up to {len(MIGRATIONS)}. "
            "Start the newer Ondol that wrote it, or restore the copy from before the upgrade."
        )


def _as_ledger_error(path: Path, error: apsw.Error) -> LedgerBroken | LedgerUnavailable:
    if isinstance(error, apsw.NotADBError | apsw.CorruptError):
        return LedgerBroken(
            f"{path}: damaged, or not a ledger ({error}). Move it aside (keep it) and start again, "
            "or restore it from a copy."
        )
    return LedgerUnavailable(f"{path}: {error}. Check that the disk has room and that we may write there.")
