"""The hub's state in PostgreSQL, for any number of hub replicas at once: the same SQL as on SQLite.

Every transaction is SERIALIZABLE and runs again where the server says that another came between.  Each runs in
a thread of a bounded pool, on a connection of its own; the server commits many with one sync by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Final, TypeVar

from ondol.adapters.migrations import Migrations, migrate
from ondol.adapters.postgres_dialect import TWIN, open_connection, place_of, translate, verdict_of
from ondol.core.ports import Tx
from ondol.errors import StateError, StateUnavailable

if TYPE_CHECKING:
    import psycopg

T = TypeVar("T")

_LOG = logging.getLogger("ondol.hub.database")

CONNECTIONS: Final = 8
PATIENCE_S: Final = 10.0
"""For so long a transaction is run again, or the server looked for, before its caller is told."""
PAUSE_MIN_S: Final = 0.002
PAUSE_MAX_S: Final = 0.5
TWIN_PAUSE_S: Final = PAUSE_MIN_S * 16
"""A unique value that is taken four times in a row was not a race: the work is wrong."""

MIGRATION_LOCK: Final = 0x6F6E646F6C
"""Replicas that start together bring the schema up one after the other (an advisory lock: "ondol")."""


class PostgresTx:
    """`core.ports.Tx` on one connection."""

    __slots__ = ("_cursor",)

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._cursor = connection.cursor()

    def run(self, sql: str, params: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """Run one statement; its rows, if it has any."""
        cursor = self._cursor.execute(translate(sql), params)
        return cursor.fetchall() if cursor.description is not None else []

    def many(self, sql: str, rows: Iterable[Sequence[object]]) -> None:
        """Run one statement for each row of parameters, sent together."""
        self._cursor.executemany(translate(sql), rows)


class PostgresDatabase:
    """`core.ports.Database` on a PostgreSQL server, 13 or later.  Opening blocks until the server answered.

    A waiter that is cancelled does not take its work back.
    """

    def __init__(self, dsn: str, *, migrations: Migrations, connections: int = CONNECTIONS) -> None:
        """Connect (`dsn` as libpq has it: a URL or `key=value` words), and bring the schema up to date.

        Raises:
            ConfigError: the driver is not installed (`ondol[postgres]`), or `dsn` is not one.
            StateUnavailable: the server cannot be reached, or does not let us in.
            SchemaTooNew: a newer Ondol wrote the database.
        """
        self._dsn = dsn
        self._where = place_of(dsn)
        self._problem: str | None = None
        self._closed = False
        self._idle: SimpleQueue[psycopg.Connection[Any]] = SimpleQueue()
        self._threads = ThreadPoolExecutor(connections, thread_name_prefix="ondol-hub-pg")
        try:
            self._migrate(migrations)
        except BaseException:
            self.close_now()
            raise

    @classmethod
    async def open(cls, dsn: str, *, migrations: Migrations) -> PostgresDatabase:
        """The same, off the loop."""
        return await asyncio.to_thread(lambda: cls(dsn, migrations=migrations))

    def problem(self) -> str | None:
        """None while the server works for us, else a sentence that says why it did not the last time."""
        return self._problem

    async def write(self, work: Callable[[Tx], T]) -> T:
        """Run `work`, again where it must be, until it is committed.

        Raises:
            StateUnavailable: the server did not commit it within ten seconds of trying.  Nothing of it is kept,
                save where the message says that the server was lost while it committed.
        """
        return await self._in_thread(work, writes=True)

    async def read(self, work: Callable[[Tx], T]) -> T:
        """Run `work` on one consistent state, in a transaction that cannot write."""
        return await self._in_thread(work, writes=False)

    def write_now(self, work: Callable[[Tx], T]) -> T:
        """As `write`, on the calling thread."""
        return self._patiently(work, writes=True)

    def read_now(self, work: Callable[[Tx], T]) -> T:
        """As `read`, on the calling thread, for commands."""
        return self._patiently(work, writes=False)

    async def close(self) -> None:
        """Finish what runs, close the connections.  Closing again does nothing."""
        self._closed = True
        await asyncio.to_thread(self.close_now)

    def close_now(self) -> None:
        """The same, blocking."""
        self._closed = True
        self._threads.shutdown(wait=True)
        with contextlib.suppress(Empty):
            while True:
                self._idle.get_nowait().close()

    async def _in_thread(self, work: Callable[[Tx], T], *, writes: bool) -> T:
        if self._closed:
            raise StateUnavailable(f"{self._where}: closed; the hub is stopping.")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: self._patiently(work, writes=writes))

    def _patiently(self, work: Callable[[Tx], T], *, writes: bool) -> T:
        end = time.monotonic() + PATIENCE_S
        pause_s = PAUSE_MIN_S
        while True:
            try:
                result = self._once(work, writes=writes, end=end)
            except _Again as again:
                if again.is_twin and pause_s >= TWIN_PAUSE_S:
                    raise again.cause from None
                if time.monotonic() + pause_s > end:
                    raise self._failed(again.cause) from again.cause
                time.sleep(pause_s * random.uniform(0.5, 1.5))  # noqa: S311  # so that two do not meet again
                pause_s = min(pause_s * 2, PAUSE_MAX_S)
            else:
                if self._problem is not None:
                    _LOG.warning("%s works again", self._where)
                    self._problem = None
                return result

    def _once(self, work: Callable[[Tx], T], *, writes: bool, end: float) -> T:
        connection = self._connection()
        try:
            connection.read_only = not writes
            try:
                result = work(PostgresTx(connection))
                xact = _xact_of(connection) if writes else None
            except Exception as error:
                self._judge(connection, error)
                raise
            try:
                connection.commit()
            except Exception as error:
                if xact is not None and connection.closed and self._committed(xact, error, end):
                    return result
                self._judge(connection, error)
                raise
        finally:
            self._give_back(connection)
        return result

    def _judge(self, connection: psycopg.Connection[Any], error: Exception) -> None:
        """Raise what an error of the server means; other errors are the work's own, for the caller to raise."""
        verdict = verdict_of(error, is_closed=bool(connection.closed))
        if verdict == "again":
            raise _Again(error) from error
        if verdict == "unwell":
            raise self._failed(error) from error

    def _committed(self, xact: str, lost: Exception, end: float) -> bool:
        """The server went away while it committed: ask it what became of the transaction."""
        while True:
            try:
                connection = self._connection()
                try:
                    row = connection.execute("SELECT pg_xact_status(%s::xid8)", (xact,)).fetchone()
                finally:
                    self._give_back(connection)
                if row is not None and row[0] != "in progress":
                    return bool(row[0] == "committed")
            except Exception as error:
                if not isinstance(error, _Again) and verdict_of(error, is_closed=True) != "again":
                    raise
            if time.monotonic() > end:
                raise StateUnavailable(
                    f"{self._where}: lost while it committed ({lost}); whether the change is kept is not known. "
                    "Look when the server is back, and do it again if it is not there."
                ) from lost
            time.sleep(PAUSE_MAX_S / 4)

    def _connection(self) -> psycopg.Connection[Any]:
        with contextlib.suppress(Empty):
            while True:
                connection = self._idle.get_nowait()
                if not connection.closed:
                    return connection
        try:
            return open_connection(self._dsn)
        except Exception as error:
            if verdict_of(error, is_closed=True) == "again":
                raise _Again(error) from error
            raise self._failed(error) from error

    def _give_back(self, connection: psycopg.Connection[Any]) -> None:
        try:
            connection.rollback()
        except Exception as error:  # the connection is gone; the next one is new
            _LOG.debug("%s: %s", self._where, error)
            connection.close()
        if connection.closed:
            return
        self._idle.put(connection)

    def _failed(self, error: Exception) -> StateError:
        if isinstance(error, StateError):
            return error
        why = " ".join(str(error).split()) or type(error).__name__
        sentence = (
            f"{self._where}: {why}. Check that the server runs, has room and lets us in; work goes on by itself "
            "when it does."
        )
        if self._problem is None:
            _LOG.error("%s", sentence)
        self._problem = sentence
        return StateUnavailable(sentence)

    def _migrate(self, migrations: Migrations) -> None:
        def step(tx: Tx) -> int:
            # Read committed, so that who waited for the lock sees what the other has done.
            tx.run("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
            tx.run("SELECT pg_advisory_xact_lock(?)", (MIGRATION_LOCK,))

            def has_table(name: str) -> bool:
                sql = "SELECT 1 FROM pg_tables WHERE schemaname = current_schema() AND tablename = ?"
                return bool(tx.run(sql, (name,)))

            return migrate(tx, migrations, has_table=has_table, where=self._where)

        self._patiently(step, writes=True)


class _Again(Exception):
    """Another transaction came between, or the connection was lost before the commit: run it again."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause
        self.is_twin = getattr(cause, "sqlstate", None) == TWIN


def _xact_of(connection: psycopg.Connection[Any]) -> str | None:
    """The server's number of the transaction, by which its end can be asked for; None if it wrote nothing."""
    row = connection.execute("SELECT pg_current_xact_id_if_assigned()::text").fetchone()
    return None if row is None or row[0] is None else str(row[0])
