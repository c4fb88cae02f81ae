"""The hub's state in one SQLite file: durable before it is told, with one writer and a commit for many.

WAL with `synchronous=FULL`.  What is queued when the disk is ready runs in one transaction, each work in a
savepoint of its own: a work that raises is rolled back alone, and the others share one sync of the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Final, NamedTuple, TypeVar

import apsw

from ondol.adapters.migrations import Migrations
from ondol.adapters.sqlite_transactions import (
    UNWELL,
    Raised,
    as_state_error,
    commit,
    connect,
    is_unwell,
    prepare,
    read_on,
)
from ondol.core.ports import Tx
from ondol.errors import StateError, StateUnavailable

T = TypeVar("T")

_LOG = logging.getLogger("ondol.hub.database")

BATCH_WORKS: Final = 64
"""Works of one commit at most: the first of them waits for the last."""

READERS: Final = 4
CHECKPOINT_PAGES: Final = 4_096
"""WAL pages (16 MiB) after which they are copied into the database, after the waiters were told."""
IDLE_S: Final = 0.25
"""After this long without work the WAL is copied while nobody waits for it."""
PROBE_MIN_S: Final = 0.1
PROBE_MAX_S: Final = 5.0


class SqliteDatabase:
    """`core.ports.Database` on one file.  Opening blocks for some milliseconds; made and used on a loop.

    A waiter that is cancelled does not take its work back.
    """

    def __init__(self, path: Path, *, migrations: Migrations, vfs: str | None = None) -> None:
        """Open or make the file (mode 0600) and bring its schema up to date.

        Raises:
            StateError: it is damaged, or no database.
            StateUnavailable: it cannot be opened, made or written now.
            SchemaTooNew: a newer Ondol wrote it.
        """
        connection = connect(path, vfs=vfs, synchronous="FULL")
        try:
            prepare(connection, path, migrations)
        except BaseException:
            connection.close()
            raise
        self._writer = _Writer(connection, path)
        self._path = path
        self._vfs = vfs
        self._closed = False
        self._idle_readers: SimpleQueue[apsw.Connection] = SimpleQueue()
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="ondol-hub-read")
        self._thread = threading.Thread(target=self._writer.run, name="ondol-hub-write", daemon=True)
        self._thread.start()

    def problem(self) -> str | None:
        """None while commits work, else a sentence that says why the last one did not."""
        return self._writer.problem

    async def write(self, work: Callable[[Tx], T]) -> T:
        """Run `work` in the writer's thread; returns once what it wrote is durable.

        Raises:
            StateUnavailable: it could not be committed (full disk, locked file, …); nothing of it is kept.
            StateError: the file is damaged.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._writer.submit(_Entry(work, future, loop))
        return await future

    async def read(self, work: Callable[[Tx], T]) -> T:
        """Run `work` on the newest committed state, in a thread of its own; at most four at once.

        Raises:
            StateUnavailable, StateError: the file cannot be read.
        """
        if self._closed:
            raise StateUnavailable(f"{self._path}: closed; the hub is stopping.")
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._read, work)

    async def close(self) -> None:
        """Finish what is queued, copy the WAL, close.  Closing again does nothing."""
        self._closed = True
        await asyncio.to_thread(self._shut)  # off the loop, which the waiters' answers need

    def _read(self, work: Callable[[Tx], T]) -> T:
        try:
            connection = self._idle_readers.get_nowait()
        except Empty:
            connection = connect(self._path, vfs=self._vfs, synchronous="FULL")
            connection.execute("PRAGMA query_only=1")
        try:
            result = read_on(connection, work)
        except apsw.Error as error:
            connection.close()  # a new one has a better chance, where the file was put back
            if isinstance(error, UNWELL):
                raise as_state_error(self._path, error) from error
            raise
        except BaseException:
            self._idle_readers.put(connection)
            raise
        self._idle_readers.put(connection)
        return result

    def _shut(self) -> None:
        self._readers.shutdown(wait=True)  # before the writer, so that the last to close can copy the WAL
        with contextlib.suppress(Empty):
            while True:
                self._idle_readers.get_nowait().close()
        self._writer.stop()
        self._thread.join()


class InlineDatabase:
    """The same on the calling loop, without threads: a work runs between two turns of the loop.

    For simulated time and for tests; a hub that serves would stand still at every commit.  `durable=False`
    leaves the syncs out, where nobody cuts the power.  A task that is cancelled while it waits may have
    committed already, as with a real hub.
    """

    def __init__(
        self, path: Path | str, *, migrations: Migrations, vfs: str | None = None, durable: bool = True
    ) -> None:
        """Open or make the file, or `:memory:`.  Raises as `SqliteDatabase`."""
        self._path = Path(path)
        self._connection = connect(self._path, vfs=vfs, synchronous="FULL" if durable else "OFF")
        try:
            prepare(self._connection, self._path, migrations)
        except BaseException:
            self._connection.close()
            raise

    async def write(self, work: Callable[[Tx], T]) -> T:
        """As `SqliteDatabase.write`, alone in its transaction."""
        await asyncio.sleep(0)
        result = self.write_now(work)
        await asyncio.sleep(0)
        return result

    def write_now(self, work: Callable[[Tx], T]) -> T:
        """The same without a turn of the loop, for tests of plain functions."""
        outcome = commit(self._connection, self._path, [work])[0]
        if isinstance(outcome, Raised):
            raise outcome.error
        result: T = outcome
        return result

    async def read(self, work: Callable[[Tx], T]) -> T:
        """As `SqliteDatabase.read`."""
        await asyncio.sleep(0)
        try:
            result = read_on(self._connection, work)
        except UNWELL as error:
            raise as_state_error(self._path, error) from error
        await asyncio.sleep(0)
        return result

    async def close(self) -> None:
        """Close the file."""
        self.close_now()

    def close_now(self) -> None:
        """The same without a loop."""
        self._connection.close()


class _Entry(NamedTuple):
    work: Callable[[Tx], Any]
    future: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop


class _Writer:
    """The one thread that writes.  `submit` and `stop` are called from outside, `problem` is read there."""

    def __init__(self, connection: apsw.Connection, path: Path) -> None:
        self.problem: str | None = None
        self._connection = connection
        self._path = path
        self._queue: deque[_Entry] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._pages = 0
        self._pause_s = PROBE_MIN_S
        self._probe_at = 0.0
        connection.wal_autocheckpoint(0)
        connection.set_wal_hook(self._note_pages)

    def submit(self, entry: _Entry) -> None:
        with self._wake:
            if self._closing:
                raise StateUnavailable(f"{self._path}: closed; the hub is stopping.")
            self._queue.append(entry)
            self._wake.notify()

    def stop(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()

    def run(self) -> None:
        """Serve the queue until `stop` was called and nothing is queued; then copy the WAL and close."""
        while True:
            batch, is_over = self._take()
            if batch:
                self._serve(batch)
            elif is_over:
                break
            else:
                self._rest()
        try:
            self._copy_wal(apsw.SQLITE_CHECKPOINT_TRUNCATE)
            self._connection.close()
        except apsw.Error as error:  # closing copies the WAL too, and says so when it cannot
            _LOG.warning("%s: the WAL stays beside it, nothing is lost: %s", self._path, error)
            self._connection.close(True)

    def _take(self) -> tuple[list[_Entry], bool]:
        with self._wake:
            if not self._queue and not self._closing:
                pause = self._pause_s if self.problem else (IDLE_S if self._pages else None)
                self._wake.wait(pause)
            batch = [self._queue.popleft() for _ in range(min(len(self._queue), BATCH_WORKS))]
            return batch, self._closing and not self._queue

    def _serve(self, batch: list[_Entry]) -> None:
        outcomes = commit(self._connection, self._path, [entry.work for entry in batch])
        unwell = next((one.error for one in outcomes if is_unwell(one)), None)
        if unwell is not None:
            self._failed(unwell)
        elif self.problem is not None:
            self._recovered()
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Any]]] = {}
        for entry, outcome in zip(batch, outcomes, strict=True):
            by_loop.setdefault(entry.loop, []).append((entry.future, outcome))
        for loop, told in by_loop.items():
            try:
                loop.call_soon_threadsafe(_tell, told)
            except RuntimeError:  # the loop is closed: nobody waits any more, what is committed stays
                _LOG.warning("%s: the event loop ended before the database was closed", self._path)
        if self._pages >= CHECKPOINT_PAGES:
            self._copy_wal(apsw.SQLITE_CHECKPOINT_PASSIVE)

    def _rest(self) -> None:
        """Nothing is queued: copy the WAL while nobody waits, or find out whether commits work again."""
        if self.problem is None:
            self._copy_wal(apsw.SQLITE_CHECKPOINT_PASSIVE)
            return
        if time.monotonic() < self._probe_at:
            return
        # A commit of its own also overwrites the pages of the one that failed: after a crash they could
        # otherwise come back as a transaction that was reported as not kept.
        outcome = commit(self._connection, self._path, [_probe])[0]
        if isinstance(outcome, Raised):
            self._failed(outcome.error)
        else:
            self._recovered()

    def _failed(self, error: BaseException) -> None:
        sentence = error.message if isinstance(error, StateError) else str(error)
        if self.problem is None:
            _LOG.error("%s", sentence)
            self._pause_s = PROBE_MIN_S
        else:
            self._pause_s = min(self._pause_s * 2, PROBE_MAX_S)
        self._probe_at = time.monotonic() + self._pause_s
        self.problem = sentence

    def _recovered(self) -> None:
        _LOG.warning("%s can be written again", self._path)
        self.problem = None
        self._pause_s = PROBE_MIN_S

    def _note_pages(self, _connection: apsw.Connection, _name: str, pages: int) -> int:
        self._pages = pages
        return apsw.SQLITE_OK

    def _copy_wal(self, mode: int) -> None:
        self._pages = 0
        try:
            self._connection.wal_checkpoint(mode=mode)
        except apsw.Error as error:  # nothing is lost: the WAL keeps what was not copied
            _LOG.warning("%s: the WAL could not be copied yet: %s", self._path, error)


def _probe(tx: Tx) -> None:
    tx.run("UPDATE schema_version SET version = version")


def _tell(told: list[tuple[asyncio.Future[Any], Any]]) -> None:
    for future, outcome in told:
        if future.done():  # cancelled: what it wrote is kept all the same
            continue
        if isinstance(outcome, Raised):
            future.set_exception(outcome.error)
        else:
            future.set_result(outcome)
