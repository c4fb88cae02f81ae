"""Transactions on a SQLite file: how the hub opens one, and how works run in one that is durable."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import apsw

from ondol.adapters.ledger_schema import sync_directory
from ondol.adapters.migrations import Migrations, migrate
from ondol.adapters.privatedb import make_private
from ondol.core.ports import Tx
from ondol.errors import StateError, StateUnavailable

T = TypeVar("T")

_LOG = logging.getLogger("ondol.hub.database")

OLDEST_SQLITE: Final = 3_051_003
"""Before 3.51.3 a checkpoint and a commit at the same time could lose rows of a WAL that restarts."""

BUSY_MS: Final = 5_000
"""How long a transaction waits for another process that holds the file."""

QUICK_CHECK_BYTES: Final = 32 * 1024 * 1024
"""Up to this size SQLite's own check runs at start: some tenths of a second."""

WAL_KEPT_BYTES: Final = 64 * 1024 * 1024

UNWELL: Final = (
    apsw.FullError, apsw.IOError, apsw.BusyError, apsw.LockedError, apsw.CantOpenError, apsw.ReadOnlyError,
    apsw.PermissionsError, apsw.NoMemError, apsw.ProtocolError, apsw.CorruptError, apsw.NotADBError,
    apsw.AuthError, apsw.NoLFSError, apsw.InterruptError, apsw.ThreadingViolationError,
)  # fmt: skip
"""What the disk, the file or another process does to us.  All other errors of SQLite are mistakes in a statement."""


class Raised(NamedTuple):
    """What a work raised instead of a result."""

    error: BaseException


class SqliteTx:
    """`core.ports.Tx` on one connection, which has a transaction open."""

    __slots__ = ("_cursor",)

    def __init__(self, connection: apsw.Connection) -> None:
        self._cursor = connection.cursor()

    def run(self, sql: str, params: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """Run one statement; its rows, if it has any."""
        return self._cursor.execute(sql, params).fetchall()

    def many(self, sql: str, rows: Iterable[Sequence[object]]) -> None:
        """Run one statement for each row of parameters."""
        self._cursor.executemany(sql, rows)


class SqliteReader:
    """The hub's file from another process: reads beside a running hub, and writes nothing."""

    def __init__(self, path: Path, *, migrations: Migrations) -> None:
        """Open the file, which must have this program's schema.

        Raises:
            StateUnavailable: there is no such file, or it cannot be read.
            StateError: it is damaged, or of another version.
        """
        if not path.is_file():
            raise StateUnavailable(
                f"{path}: no such file. Expected the database of a hub that was started once."
            )
        self._path = path
        try:
            self._connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
            self._connection.set_busy_timeout(BUSY_MS)
            has_table = self._connection.table_exists(None, "schema_version")
            found = self._connection.execute("SELECT version FROM schema_version").get if has_table else 0
        except apsw.Error as error:
            raise as_state_error(path, error) from error
        if found != len(migrations):
            self._connection.close()
            raise StateError(
                f"{path} has schema version {found}; this Ondol reads {len(migrations)}. Start the hub once with "
                "this version, or use the one that wrote the file."
            )

    def read_now(self, work: Callable[[Tx], T]) -> T:
        """Run `work` on one consistent state."""
        try:
            return read_on(self._connection, work)
        except UNWELL as error:
            raise as_state_error(self._path, error) from error

    def close(self) -> None:
        """Close the file."""
        self._connection.close()


def connect(path: Path, *, vfs: str | None, synchronous: str) -> apsw.Connection:
    """A connection in WAL mode to a file that only its owner may read; `:memory:` has no WAL.

    Raises:
        StateError, StateUnavailable: as `SqliteDatabase`.
    """
    if apsw.SQLITE_VERSION_NUMBER < OLDEST_SQLITE:
        raise StateError(
            f"SQLite {apsw.sqlite_lib_version()} has a known WAL race; the hub needs 3.51.3 or later. "
            "Install the apsw package that bundles it."
        )
    is_file = str(path) != ":memory:"
    connection = None
    try:
        if is_file:
            make_private(path)
        connection = apsw.Connection(str(path), vfs=vfs)
        connection.set_busy_timeout(BUSY_MS)
        mode = connection.pragma("journal_mode", "wal")
        if is_file and mode != "wal":
            raise StateError(f"{path}: expected journal mode wal, the file system gives {mode}.")
        # Only macOS tells a write barrier from a flush of the disk's cache.
        connection.execute("PRAGMA fullfsync=1; PRAGMA checkpoint_fullfsync=1; PRAGMA temp_store=MEMORY")
        connection.execute(f"PRAGMA synchronous={synchronous}; PRAGMA journal_size_limit={WAL_KEPT_BYTES}")
    except (apsw.Error, OSError) as error:
        if connection is not None:
            connection.close()
        raise as_state_error(path, error) from error
    except StateError:
        if connection is not None:
            connection.close()
        raise
    return connection


def as_state_error(path: Path, error: Exception) -> StateError:
    """What SQLite or the system says, as a sentence with what to do."""
    if isinstance(error, apsw.CorruptError | apsw.NotADBError):
        return StateError(
            f"{path}: damaged, or not a database ({error}). Keep the file, and restore it from a backup: sites "
            "send again what the backup does not have."
        )
    if isinstance(error, apsw.BusyError | apsw.LockedError):
        return StateUnavailable(f"{path}: another process holds it locked ({error}). End that process.")
    return StateUnavailable(
        f"{path}: {error}. Check that the disk has room and that we may write there; work goes on by itself "
        "when it is so."
    )


def prepare(connection: apsw.Connection, path: Path, migrations: Migrations) -> None:
    """Check a small file, and bring its schema up to date.

    Raises:
        StateError, StateUnavailable, SchemaTooNew: as `SqliteDatabase`.
    """
    try:
        if str(path) != ":memory:" and path.stat().st_size <= QUICK_CHECK_BYTES:
            verdict = connection.execute("PRAGMA quick_check(1)").get
            if verdict != "ok":
                raise apsw.CorruptError(str(verdict))
    except apsw.Error as error:
        raise as_state_error(path, error) from error

    def step(tx: Tx) -> int:
        return migrate(
            tx, migrations, has_table=lambda name: connection.table_exists(None, name), where=str(path)
        )

    outcome = commit(connection, path, [step])[0]
    if isinstance(outcome, Raised):
        raise outcome.error
    if str(path) != ":memory:":
        sync_directory(path.parent)


def read_on(connection: apsw.Connection, work: Callable[[Tx], T]) -> T:
    """Run `work` on one consistent state; what it writes is rolled back.

    Raises:
        apsw.Error, and whatever `work` raises.
    """
    connection.execute("BEGIN")
    try:
        return work(SqliteTx(connection))
    finally:
        _roll_back(connection)


def commit(connection: apsw.Connection, path: Path, works: Sequence[Callable[[Tx], Any]]) -> list[Any]:
    """Run the works in one durable transaction: for each its result, or what it raised.

    Where the disk or the file fails, nothing of any of them is kept.  On a full disk each is tried alone
    after that, so that a large one does not take the small ones with it.
    """
    try:
        return _commit_once(connection, works)
    except apsw.Error as error:  # a work's own mistakes do not come here
        _roll_back(connection)
        if isinstance(error, apsw.FullError) and len(works) > 1:
            return [commit(connection, path, [work])[0] for work in works]
        return [Raised(_caused(as_state_error(path, error), error))] * len(works)


def _commit_once(connection: apsw.Connection, works: Sequence[Callable[[Tx], Any]]) -> list[Any]:
    outcomes: list[Any] = []
    connection.execute("BEGIN IMMEDIATE")
    tx = SqliteTx(connection)
    for work in works:
        connection.execute("SAVEPOINT work")
        try:
            outcomes.append(work(tx))
        except UNWELL:
            raise
        except BaseException as error:  # whatever it is, its waiter gets it
            connection.execute("ROLLBACK TO work")
            outcomes.append(Raised(error))
        connection.execute("RELEASE work")
    connection.execute("COMMIT")
    return outcomes


def _roll_back(connection: apsw.Connection) -> None:
    if connection.in_transaction:
        try:
            connection.execute("ROLLBACK")
        except apsw.Error as error:
            _LOG.warning("rollback: %s", error)


def _caused(error: StateError, cause: apsw.Error) -> StateError:
    error.__cause__ = cause
    return error


def is_unwell(outcome: object) -> bool:
    """Whether the file or the disk failed, and not the work."""
    return isinstance(outcome, Raised) and isinstance(outcome.error.__cause__, apsw.Error)
