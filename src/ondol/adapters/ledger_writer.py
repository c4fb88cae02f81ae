"""The one thread that writes a ledger: takes what is queued, chains it, commits it, tells the waiters.

Everything queued goes into one transaction, and a batch of records is ONE statement.  That is not about
SQLite: each statement gives the GIL up and has to win it back from a busy event loop, which under load
costs more than the statement itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Final

import apsw

from ondol.adapters.ledger_outbox import Mark, load_marks, marked, prunable, write_marks
from ondol.adapters.ledger_pruning import Pruning, take_step
from ondol.adapters.ledger_schema import SPAN_INSERT, SPAN_ROWS
from ondol.core.usage import link
from ondol.errors import LedgerUnavailable
from ondol.units import NS_PER_S

_LOG = logging.getLogger("ondol.ledger")

GATHER_FROM: Final = 12
GATHER_S: Final = 0.001
"""After a batch of that many another is likely on its way: waiting a millisecond makes commits fewer and
larger, and takes the interpreter's lock from the loop less often: 13 % less processor time a request at 32
at once, the pipeline alone in a harness; no change of the whole gateway's throughput was seen.  A lone
request never waits.  PostgreSQL's `commit_delay` and `commit_siblings` do the same.
"""
BATCH_ROWS: Final = 512
"""Rows a transaction at most: 2,560 bindings, far below SQLite's 32,766."""

CHECKPOINT_PAGES: Final = 1_000
"""WAL pages after which they are copied into the database (SQLite's own default): about 5 ms of work."""

IDLE_S: Final = 0.25
"""After this long without work the WAL is copied while nobody waits for it."""

PROBE_MIN_S: Final = 0.1
PROBE_MAX_S: Final = 5.0
PROBE_BYTES: Final = 65_536
"""A probe must find room for this much, else work would be taken that the next commit cannot keep."""

MEASURE_BYTES: Final = 262_144
"""Payload after which the size of the files is looked at again."""

PRUNE_PAUSE_S: Final = 0.02
"""Between two steps of pruning, so that commits hardly ever wait for one."""
PRUNE_RETRY_S: Final = 60.0
NS_PER_DAY: Final = 86_400 * NS_PER_S

Lease = tuple[str, str, str]
Entry = tuple["asyncio.Future[int]", bytes | None, "str | Lease | Mark", int]
"""A waiter with a record (payload, request id, time), or with a lease or a mark (None, that, 0)."""


def insert_sql(rows: int) -> str:
    """The statement that inserts up to `rows` rows; those whose number is NULL are padding."""
    if rows == 1:
        return "INSERT INTO usage VALUES(?,?,?,?,?)"
    values = ",".join(["(?,?,?,?,?)"] * rows)
    return f"INSERT INTO usage SELECT * FROM (VALUES {values}) WHERE column1 IS NOT NULL"  # noqa: S608  # placeholders only


class LedgerWriter:
    """Owns the writing connection and the end of the chain.  Only its thread touches them.

    `queue`, `idle` and `wake` are shared with the event loop; `problem` and `full` are read there.
    """

    def __init__(
        self,
        connection: apsw.Connection,
        path: Path,
        *,
        seq: int,
        previous: bytes,
        max_bytes: int,
        loop: asyncio.AbstractEventLoop,
        pruning: Pruning | None = None,
    ) -> None:
        """Take over an open, migrated and checked connection whose last row is `seq` with that hash."""
        self.queue: deque[Entry] = deque()
        self.wake: SimpleQueue[None] = SimpleQueue()
        self.idle = False
        self.closing = False
        self.stopped = False
        self.problem: str | None = None
        self.full = False
        self.grown: Callable[[], None] | None = None
        """Called on the loop after the next commit of records, once."""
        self.marks = load_marks(connection)
        self._hub_ns = self.marks[-1].hub_ns if self.marks else 0
        self._pruning = pruning
        self._prune_at: float | None = 0.0
        self._connection = connection
        self._cursor = connection.cursor()
        self._path = path
        self._wal = Path(f"{path}-wal")
        self.seq = seq
        self._previous = previous
        self._max_bytes = max_bytes
        self._loop = loop
        self._insert = {1 << n: insert_sql(1 << n) for n in range(BATCH_ROWS.bit_length())}
        self._failure: str | None = None
        self._full: str | None = None
        self._back_off_s = PROBE_MIN_S
        self._probe_at = 0.0
        self._rested = False
        self._batch: list[Entry] = []
        self._unmeasured = 0
        self._copied_at = self._pages_written()
        self._measure()

    def run(self) -> None:
        """Serve the queue until `closing` is set and nothing is queued; then copy the WAL and close."""
        try:
            while True:
                self._batch = self._take()
                if self._batch:
                    self._commit(self._batch)
                elif self.closing:
                    break
                elif self._rested:
                    self._rest()
                self._prune()
        except Exception as error:  # the task's top: said once, and every waiter gets an answer
            _LOG.exception("the ledger's writer stopped")
            self.problem = f"the ledger's writer stopped ({type(error).__name__}). Restart the gateway."
            self.stopped = True
            self._reject([*self._batch, *self.queue], self.problem)
        finally:
            self.stopped = True
            try:
                if self._failure is None:
                    self._connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
                self._cursor.close()
                self._connection.close()
            except apsw.Error as error:  # closing copies the WAL too, and says so when it cannot
                _LOG.warning("the WAL stays beside the ledger, nothing is lost: %s", error)
                self._connection.close(True)

    def _take(self) -> list[Entry]:
        queue = self.queue
        self._rested = False
        if len(self._batch) >= GATHER_FROM and not self.closing:
            time.sleep(GATHER_S)
        if not queue and not self.closing:
            self.idle = True
            if not queue and not self.closing:  # else it came between, and its wake-up is on its way
                try:
                    self.wake.get(timeout=self._pause_s())
                except Empty:
                    self._rested = True
            self.idle = False
        return [queue.popleft() for _ in range(min(len(queue), BATCH_ROWS))]

    def _pause_s(self) -> float | None:
        if self._prune_at is not None and self._failure is None:
            return max(PRUNE_PAUSE_S, self._prune_at - time.monotonic())
        if self._failure is not None or self._full is not None:
            return self._back_off_s
        return IDLE_S if self._pages_written() != self._copied_at else None

    def _commit(self, batch: list[Entry]) -> None:
        seq, previous, size = self.seq, self._previous, 0
        rows: list[object] = []
        leases: list[Lease] = []
        marks = self.marks
        for _, payload, subject, time_ns in batch:
            if payload is None:
                if isinstance(subject, Mark):
                    marks = self._marked(marks, subject)
                else:
                    leases.append(subject)  # type: ignore[arg-type]  # no payload: not a request id, by Entry
                continue
            seq += 1
            previous = link(previous, seq, payload)
            size += len(payload)
            rows += (seq, subject, time_ns, payload, previous)
        try:
            if leases or marks is not self.marks:
                self._write_all(rows, leases, marks)
            else:
                self._write_rows(rows)
        except (apsw.Error, OverflowError, TypeError, ValueError) as error:
            self._failed(batch, error)
            return
        first, self.seq, self._previous = self.seq + 1, seq, previous
        self.marks = marks
        self._call_loop(_resolve, batch, first)
        if rows and self.grown is not None:
            grown, self.grown = self.grown, None
            self._call_loop(grown)
        if self._failure is not None:
            self._recovered()
        self._unmeasured += size
        if self._unmeasured >= MEASURE_BYTES or self._full is not None:
            self._measure()
        if (first - 1) // SPAN_ROWS != seq // SPAN_ROWS:
            self._sum_up((first - 1) // SPAN_ROWS)
        if self._pages_written() - self._copied_at >= CHECKPOINT_PAGES:
            self._copy_wal()

    def _write_rows(self, rows: list[object]) -> None:
        """One statement, which is its own transaction: it returns after the WAL is synced."""
        count = len(rows) // 5
        capacity = 1 << (count - 1).bit_length()
        rows.extend([None] * (5 * (capacity - count)))
        self._cursor.execute(self._insert[capacity], rows)

    def _write_all(self, rows: list[object], leases: Sequence[Lease], marks: tuple[Mark, ...]) -> None:
        self._cursor.execute("BEGIN IMMEDIATE")
        if rows:
            self._write_rows(rows)
        self._cursor.executemany("INSERT OR REPLACE INTO leases VALUES(?,?,?)", leases)
        write_marks(self._cursor, self.marks, marks)
        self._cursor.execute("COMMIT")

    def _marked(self, marks: tuple[Mark, ...], new: Mark) -> tuple[Mark, ...]:
        """The marks with a new one, without those that no decision needs any more."""
        self._hub_ns = new.hub_ns
        later = marked(marks, new)
        if self._pruning is None:
            return marks if later == marks else later
        upto = prunable(later, self._pruning.keep_ns, self._hub_ns)
        self._prune_at = self._prune_at or time.monotonic()
        later = tuple(one for one in later if one.seq >= upto)
        return marks if later == marks else later

    def _prune(self) -> None:
        """One step, where one is due: between commits, and with pauses, so that none waits for long."""
        if self._pruning is None or self._failure is not None:
            self._prune_at = None
        if self._pruning is None or self._prune_at is None or time.monotonic() < self._prune_at:
            return
        upto = prunable(self.marks, self._pruning.keep_ns, self._hub_ns)
        try:
            gone = take_step(self._cursor, self._pruning, upto) if upto else 0
        except Exception as error:  # whatever it is, also the signer's: no pruning is worth the ledger
            self._roll_back()
            _LOG.warning("the ledger could not be pruned, tried again in a minute: %s", error)
            self._prune_at = time.monotonic() + PRUNE_RETRY_S
            return
        self._prune_at = time.monotonic() + PRUNE_PAUSE_S if gone else None
        if gone and self._full is not None:
            self._measure()

    def _failed(self, batch: list[Entry], error: Exception) -> None:
        """Keep nothing of the batch.  The chain's end is unchanged, so the numbers have no hole."""
        self._roll_back()
        sentence = (
            f"the ledger at {self._path} cannot be written ({error}). "
            "Check that the disk has room and is writable; work goes on by itself when it is."
        )
        if self._failure is None:
            _LOG.error("%s", sentence)
            self._back_off_s = PROBE_MIN_S
        self._failure = self.problem = sentence
        self._probe_at = time.monotonic() + self._back_off_s
        self._reject(batch, sentence)

    def _recovered(self) -> None:
        _LOG.warning("the ledger at %s can be written again", self._path)
        self._failure = None
        self._back_off_s = PROBE_MIN_S
        self._measure()

    def _rest(self) -> None:
        """Nothing is queued: find out whether commits work again, or copy the WAL while nobody waits."""
        if self._failure is not None:
            if time.monotonic() < self._probe_at:
                return
            self._back_off_s = min(self._back_off_s * 2, PROBE_MAX_S)
            self._probe_at = time.monotonic() + self._back_off_s
            try:
                # A commit of its own also overwrites the pages of the one that failed: after a crash
                # they could otherwise come back as a record that was reported as not kept.
                self._cursor.execute(
                    "INSERT OR REPLACE INTO meta VALUES('probe', hex(zeroblob(?)))", (PROBE_BYTES // 2,)
                )
                self._cursor.execute("DELETE FROM meta WHERE key = 'probe'")
            except apsw.Error:
                self._roll_back()
                return
            self._recovered()
        elif self._full is not None:
            self._back_off_s = min(self._back_off_s * 2, PROBE_MAX_S)
            self._copy_wal(truncate=True)
            self._measure()
        else:
            self._copy_wal()

    def _roll_back(self) -> None:
        if self._connection.in_transaction:
            try:
                self._cursor.execute("ROLLBACK")
            except apsw.Error as error:
                _LOG.warning("rollback: %s", error)

    def _copy_wal(self, *, truncate: bool = False) -> None:
        mode = apsw.SQLITE_CHECKPOINT_TRUNCATE if truncate else apsw.SQLITE_CHECKPOINT_PASSIVE
        self._copied_at = self._pages_written()
        try:
            self._connection.wal_checkpoint(mode=mode)
        except apsw.Error as error:  # nothing is lost: the WAL keeps what was not copied
            _LOG.warning("the ledger's WAL could not be copied yet: %s", error)

    def _sum_up(self, block: int) -> None:
        """Note the times of a block that is complete, so that readers can skip it.  Not having it is safe."""
        try:
            self._cursor.execute(SPAN_INSERT, {"rows": SPAN_ROWS, "block": block})
        except apsw.Error as error:
            self._roll_back()
            _LOG.warning("block %d of the ledger is not summed up: %s", block, error)

    def _measure(self) -> None:
        self._unmeasured = 0
        try:
            used = self._path.stat().st_size
            with contextlib.suppress(FileNotFoundError):
                used += self._wal.stat().st_size
            used -= self._free_bytes()
        except OSError as error:  # commits would go on into a file that has no name
            self._full = f"the ledger file is gone ({error}). Put it back, or restart the gateway."
        else:
            self.full = used >= self._max_bytes
            self._full = self._why_full(used) if self.full else None
        self.problem = self._failure or self._full

    def _free_bytes(self) -> int:
        """What pruning has freed within the file: later rows go there, and the file does not grow."""
        try:
            free = self._cursor.execute(
                "SELECT freelist_count * page_size FROM pragma_freelist_count, pragma_page_size"
            ).get
        except apsw.Error:  # a disk that cannot be read is said by what writes to it
            return 0
        return int(free)

    def _why_full(self, used: int) -> str:
        sentence = f"the ledger has {used} bytes and its bound is {self._max_bytes} (ledger_bytes)."
        if self._pruning is None:
            return f"{sentence} Raise the bound in the site's file and restart, or move the ledger away and keep it."
        has = self.marks[-1].seq if self.marks else 0
        return (
            f"{sentence} Of its records up to {self.seq} the hub has those up to {has}, and they stay for "
            f"{self._pruning.keep_ns / NS_PER_DAY:g} days more (ledger_keep_days). Raise the bound in the site's file "
            "and restart, or let the site reach its hub."
        )

    def _pages_written(self) -> int:
        return self._connection.status(apsw.SQLITE_DBSTATUS_CACHE_WRITE)[0]

    def _reject(self, batch: list[Entry], sentence: str) -> None:
        self._call_loop(_refuse, batch, sentence)

    def _call_loop(self, function: object, *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)  # type: ignore[arg-type]
        except RuntimeError:  # the loop is closed: nobody waits any more, what is committed stays
            _LOG.warning("the event loop ended before the ledger was closed")


def _resolve(batch: list[Entry], first: int) -> None:
    """On the loop: each record's waiter gets its number, each lease's waiter 0."""
    seq = first
    for future, payload, _, _ in batch:
        if payload is None:
            if not future.done():
                future.set_result(0)
            continue
        if not future.done():  # a waiter that was cancelled is done; its record is kept all the same
            future.set_result(seq)
        seq += 1


def _refuse(batch: list[Entry], sentence: str) -> None:
    for future, *_ in batch:
        if not future.done():
            future.set_exception(LedgerUnavailable(sentence))
