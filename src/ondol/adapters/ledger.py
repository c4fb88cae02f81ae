"""The ledger of one gateway in SQLite: durable before it is acknowledged, numbered without holes, chained.

WAL with `synchronous=FULL` and group commit: what is queued when the disk is ready is one transaction.
`NORMAL` would lose acknowledged rows at a power cut (tests/integration/test_ledger_powercut.py shows it).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Final, TypeVar

import apsw

from ondol.adapters.ledger_outbox import Mark, hash_at, read_range
from ondol.adapters.ledger_pruning import Pruning
from ondol.adapters.ledger_schema import (
    anchor,
    check_row,
    connect,
    connect_readonly,
    migrate,
    rows_after,
    scan,
    sync_directory,
)
from ondol.adapters.ledger_writer import Entry, LedgerWriter
from ondol.core.ports import LedgerRange
from ondol.core.usage import GENESIS, UsageRecord, decode_record, encode_record
from ondol.errors import LedgerBroken, LedgerUnavailable, RangeRefused

T = TypeVar("T")

TAIL_ROWS: Final = 1_000
"""Rows whose chain is checked at start: some milliseconds.  `ondol ledger verify` checks all."""

QUICK_CHECK_BYTES: Final = 16 * 1024 * 1024
"""Up to this size SQLite's own check runs at start too; above it would take too long."""


class SqliteLedger:
    """`core.ports.Ledger` on one SQLite file.  Made, used and closed on one event loop.

    Opening blocks for some milliseconds.  `append` and `lease` must be called on the loop; `find` leaves
    the loop; `spent` and `leases` block and are for the start.
    """

    _synchronous: ClassVar[str] = "FULL"

    def __init__(
        self,
        path: Path,
        *,
        gateway: str,
        max_bytes: int,
        loop: asyncio.AbstractEventLoop,
        site: str = "",
        vfs: str | None = None,
        pruning: Pruning | None = None,
    ) -> None:
        """Open or make the file, bring its schema up to date, and check the end of its chain.

        Without `pruning` nothing is ever taken out.

        Raises:
            LedgerUnavailable: it cannot be opened, made or written.
            LedgerBroken: it is damaged, or belongs to another gateway.
            SchemaTooNew: a newer Ondol wrote it.
        """
        self._path = path
        self._vfs = vfs
        self._loop = loop
        connection = connect(path, vfs=vfs)
        try:
            connection.execute(f"PRAGMA synchronous={self._synchronous}")
            # Only macOS tells a write barrier from a flush of the disk's cache.
            connection.execute("PRAGMA fullfsync=1; PRAGMA checkpoint_fullfsync=1")
            migrate(connection, path)
            _check_owner(connection, path, gateway, site)
            seq, previous = _check_tail(connection, path)
            sync_directory(path.parent)
            self._writer = LedgerWriter(
                connection, path, seq=seq, previous=previous, max_bytes=max_bytes, loop=loop, pruning=pruning
            )
        except apsw.CorruptError as error:
            connection.close()
            raise LedgerBroken(f"{path}: damaged ({error}). Restore it from a copy.") from error
        except apsw.Error as error:
            connection.close()
            raise LedgerUnavailable(f"{path}: {error}. Check that we may write there.") from error
        except BaseException:
            connection.close()
            raise
        self._queue = self._writer.queue
        self._reader: apsw.Connection | None = None
        self._reading = threading.Lock()
        self._sender: apsw.Connection | None = None  # of its own: a long range never holds `find` up
        self._sending = threading.Lock()
        self._sent = (0, GENESIS)
        self._closed = False
        self._thread = threading.Thread(target=self._writer.run, name="ondol-ledger", daemon=True)
        self._begin_writing()

    def _begin_writing(self) -> None:
        """Let the writer run; a world without threads has another way."""
        self._thread.start()

    def submit(self, record: UsageRecord) -> asyncio.Future[int]:
        """Queue a record; the future gives its number once it is durable.  The hot path: about 5 µs.

        Raises:
            LedgerUnavailable: the ledger is closed.  (From the future: it could not be committed.)
        """
        return self._enqueue(encode_record(record), record.request_id, record.time_ns)

    async def append(self, record: UsageRecord) -> int:
        """Return the record's number once it is durable.  Cancelling does not take the record back.

        Raises:
            LedgerUnavailable: it could not be committed, and nothing of it is kept.
        """
        return await self.submit(record)

    def problem(self) -> str | None:
        """None while billable work may be taken, else a sentence that says why not."""
        return self._writer.problem

    @property
    def full(self) -> bool:
        """Whether the files are at their bound.  What was taken on before that is still committed."""
        return self._writer.full

    async def find(self, request_id: str) -> UsageRecord | None:
        """The newest record of a request that is committed, or None; never waits for the writer.

        Raises:
            LedgerUnavailable: the file cannot be read, or the ledger is closed.
        """
        return await asyncio.to_thread(self._find, request_id)

    async def lease(self, budget: str, period: str, amount: int) -> None:
        """Return once it is durable that `amount` (scaled units, in total) of the period may be spent.

        Raises:
            LedgerUnavailable: it could not be committed.
        """
        await self._enqueue(None, (budget, period, str(amount)), 0)

    async def range_after(self, seq: int, *, rows: int, size: int) -> LedgerRange | None:
        """At most `rows` committed rows after `seq`, of about `size` bytes; None where there are none.

        Raises:
            LedgerUnavailable: the file cannot be read, or rows after `seq` were pruned.
        """
        found = await asyncio.to_thread(self._send, read_range, seq, rows=rows, size=size)
        if found is not None:
            self._sent = (found.first + len(found.rows) - 1, found.last_hash)
        return found

    async def acknowledged(self, seq: int, hash_: bytes, *, hub_ns: int) -> None:
        """Note durably that the hub has all rows up to `seq`, at its time `hub_ns`; a lower number counts too.

        Also for a number that was noted before: its rows age by the hub's clock, and are pruned in the end.

        Raises:
            LedgerUnavailable: it could not be written.
            RangeRefused: row `seq` has another hash here, or there is no such row yet.
        """
        hash_ = hash_ if seq else GENESIS
        if (seq, hash_) != self._sent:
            known = await asyncio.to_thread(self._send, hash_at, seq) if seq <= self.last_seq else b""
            if known is None and seq > self.acknowledged_seq:
                raise LedgerUnavailable(f"row {seq}: it was pruned, and never acknowledged.")
            if known is not None and known != hash_:
                raise RangeRefused(
                    f"the hub has this ledger up to row {seq}, and row {seq} "
                    + ("does not exist here yet" if not known else "is another one here")
                    + ": the data directory was restored from an older copy, or is used twice. Give this site a "
                    "new data directory and join again; its old rows are at the hub."
                )
        await self._enqueue(None, Mark(seq, hash_, hub_ns), 0)

    @property
    def acknowledged_seq(self) -> int:
        """The number that `acknowledged` noted last; 0 before that."""
        marks = self._writer.marks
        return marks[-1].seq if marks else 0

    @property
    def last_seq(self) -> int:
        """The number of the newest committed row; 0 where there is none."""
        return self._writer.seq

    async def grown(self, seq: int) -> None:
        """Return once a row after `seq` is committed; for one waiter at a time."""
        while self.last_seq <= seq:
            committed = asyncio.Event()
            self._writer.grown = committed.set
            if self.last_seq > seq:  # committed before the writer could see who waits
                return
            await committed.wait()

    def leases(self) -> dict[tuple[str, str], int]:
        """What was leased, by (budget, period)."""
        connection = connect_readonly(self._path, vfs=self._vfs)
        try:
            rows = connection.execute("SELECT budget, period, amount FROM leases")
            return {(budget, period): int(amount) for budget, period, amount in rows}
        finally:
            connection.close()

    def spent(self, since_ns: int) -> Iterator[UsageRecord]:
        """The records that arrived at or after a wall-clock time, by number, one at a time in memory.

        Exact also where the wall clock jumped.  Blocks of 4,096 records that are all older are skipped.
        """
        connection = connect_readonly(self._path, vfs=self._vfs)
        try:
            yield from scan(connection, since_ns, None)
        finally:
            connection.close()

    async def close(self) -> None:
        """Commit what is queued, copy the WAL, close.  Closing again does nothing.

        Cancelling the waiter does not stop it: the thread finishes on its own.
        """
        self._closed = True
        await asyncio.to_thread(self._shut)  # off the loop, which the waiters' answers need

    def _enqueue(
        self, payload: bytes | None, subject: str | tuple[str, str, str] | Mark, time_ns: int
    ) -> asyncio.Future[int]:
        if self._closed:
            raise LedgerUnavailable("the ledger is closed: this gateway is stopping.")
        writer = self._writer
        future = self._loop.create_future()
        entry: Entry = (future, payload, subject, time_ns)
        self._queue.append(entry)
        if writer.stopped:  # looked at after queueing: the thread's last look at the queue was before
            future.cancel()
            raise LedgerUnavailable(writer.problem or "the ledger's writer stopped.")
        if writer.idle:  # one wake-up a rest, not one a record
            writer.idle = False
            writer.wake.put(None)
        return future

    def _shut(self) -> None:
        with self._reading:  # before the writer, so that the last to close is one that can copy the WAL
            if self._reader is not None:
                self._reader.close()
                self._reader = None
        with self._sending:
            if self._sender is not None:
                self._sender.close()
                self._sender = None
        self._writer.closing = True
        self._writer.wake.put(None)
        self._thread.join()

    def _send(self, work: Callable[..., T], *args: Any, **options: Any) -> T:
        """Run a read on the connection of the outbox."""
        with self._sending:
            if self._closed:
                raise LedgerUnavailable("the ledger is closed: this gateway is stopping.")
            if self._sender is None:
                self._sender = connect_readonly(self._path, vfs=self._vfs)
            try:
                return work(self._sender, *args, **options)
            except apsw.Error as error:
                raise LedgerUnavailable(f"{self._path}: cannot be read ({error}).") from error

    def _find(self, request_id: str) -> UsageRecord | None:
        with self._reading:
            if self._closed:
                raise LedgerUnavailable("the ledger is closed: this gateway is stopping.")
            if self._reader is None:
                self._reader = connect_readonly(self._path, vfs=self._vfs)
            try:
                payload = self._reader.execute(
                    "SELECT payload FROM usage WHERE request_id = ? ORDER BY seq DESC LIMIT 1", (request_id,)
                ).get
            except apsw.Error as error:
                raise LedgerUnavailable(f"{self._path}: cannot be read ({error}).") from error
        return None if payload is None else decode_record(payload)


def _check_owner(connection: apsw.Connection, path: Path, gateway: str, site: str) -> None:
    """A ledger is one gateway's: the hub knows its rows by (gateway, number)."""
    stored = {str(key): value for key, value in connection.execute("SELECT key, value FROM meta")}
    if "gateway" not in stored:
        values = {"gateway": gateway, "site": site, "created_ns": str(time.time_ns())}
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany("INSERT INTO meta VALUES(?,?)", values.items())
        connection.execute("COMMIT")
    elif stored["gateway"] != gateway:
        raise LedgerBroken(
            f"{path}: it is the ledger of gateway {stored['gateway']!r}, and this is {gateway!r}. "
            "Use the name that it was made with, or give this gateway a data directory of its own."
        )


def _check_tail(connection: apsw.Connection, path: Path) -> tuple[int, bytes]:
    """The number and hash of the last row, after the last TAIL_ROWS were checked against the chain."""
    if path.stat().st_size <= QUICK_CHECK_BYTES:
        verdict = connection.execute("PRAGMA quick_check(1)").get
        if verdict != "ok":
            raise LedgerBroken(f"{path}: SQLite's check says: {verdict}. Restore the file from a copy.")
    seq, previous = anchor(connection)
    last = connection.execute("SELECT coalesce(max(seq), 0) FROM usage").get
    if last - seq > TAIL_ROWS:
        seq = last - TAIL_ROWS
        previous = connection.execute("SELECT hash FROM usage WHERE seq = ?", (seq,)).get
        if previous is None:
            raise LedgerBroken(f"{path}: record {seq} is missing. Run `ondol ledger verify`.")
    while rows := rows_after(connection, seq, 256):
        for row in rows:
            seq += 1
            _, why = check_row(row, seq, previous)
            if why is not None:
                raise LedgerBroken(
                    f"{path}: {why}. Run `ondol ledger verify`; keep the file, and restore it from a copy."
                )
            previous = row.hash
    return seq, previous
