"""The ledger by itself: a backlog for a site, and eight writers that each wait for their own record."""

from __future__ import annotations

import asyncio
import statistics
import time
from pathlib import Path

import apsw
import uvloop

from benchmarks.disk import fdatasync_us
from benchmarks.fleet_figures import Figure, Say, Sizes, at_least
from ondol.adapters.ledger import SqliteLedger
from ondol.adapters.ledger_schema import connect, migrate
from ondol.adapters.ledger_writer import insert_sql
from ondol.adapters.secrets import gateway_id
from ondol.core.usage import UsageRecord, encode_record

WRITERS = 8
AT_ONCE = 1000
BYTES_MAX = 1 << 34


async def fill(data: Path, rows: int) -> None:
    """Append that many records to the ledger of a site that does not run."""
    name, now_ns = gateway_id(data), time.time_ns()
    book = SqliteLedger(
        data / "ledger.db", gateway=name, max_bytes=BYTES_MAX, loop=asyncio.get_running_loop(), site="shop-1"
    )
    try:
        for first in range(0, rows, AT_ONCE):
            numbers = range(first, min(rows, first + AT_ONCE))
            await asyncio.gather(*(book.submit(_record(name, number, now_ns)) for number in numbers))
    finally:
        await book.close()


def _record(gateway: str, number: int, now_ns: int) -> UsageRecord:
    return UsageRecord(
        request_id=f"req_{number:026d}", time_ns=now_ns, site="shop-1", gateway=gateway, tenant="default", team="tour",
        key_id="abcdefghij", route="assistant", task="chat", outcome="completed", status=200, model="helper",
        deployment="helper-fake", answered_by="shop-1", cost=number, total_ns=10**9, overhead_ns=10**5,
    )  # fmt: skip


def ledger(place: Path, sizes: Sizes, say: Say) -> list[Figure]:
    """Durable appends a second, beside what this disk's sync allows one writer of its own; syncs before and after."""
    say("fdatasync")
    syncs = fdatasync_us(place)
    say("eight writers")
    rate = uvloop.run(_writers(place, sizes.ledger_s))  # as a site runs it
    say("the same rows in SQLite alone")
    bare = _bare(place, sizes.ledger_s)
    syncs += fdatasync_us(place)
    sync_us = statistics.median(syncs)
    bound = WRITERS / (sync_us / 1e6)
    return [
        at_least(
            f"ledger appends, durable, {WRITERS} writers", rate / bound, 1.0, goal="≥ 1.0 × writers ÷ fdatasync p50",
            measured=f"{rate / bound:.2f} × ({rate:,.0f}/s; fdatasync p50 {sync_us:.0f} µs, so {bound:,.0f}/s; "
            f"SQLite alone, {WRITERS} rows a commit, nobody waiting: {bare / bound:.2f} ×)",
            appends_s=rate, fdatasync_p50_us=sync_us, bare_rows_s=bare,
        )
    ]  # fmt: skip


def _bare(place: Path, seconds: float) -> float:
    """Rows a second where nobody waits and nothing is chained: commits of as many rows as there are writers."""
    path = place / "bare.db"
    connection = connect(path)
    connection.execute("PRAGMA synchronous=FULL")
    migrate(connection, path)
    cursor, statement = connection.cursor(), insert_sql(WRITERS)
    payload, seq = encode_record(_record("g", 1, 1)), 0
    began = time.monotonic()
    while time.monotonic() < began + seconds:
        values: list[object] = []
        for _ in range(WRITERS):
            seq += 1
            values += (seq, f"req_{seq:026d}", 1, payload, b"h" * 32)
        cursor.execute(statement, values)
        if seq % (WRITERS * 256) == 0:
            connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
    took_s = time.monotonic() - began
    connection.close()
    return seq / took_s


async def _writers(place: Path, seconds: float) -> float:
    book = SqliteLedger(
        place / "ledger.db", gateway="g", max_bytes=BYTES_MAX, loop=asyncio.get_running_loop(), site="shop-1"
    )
    began = time.monotonic()
    end = began + seconds

    async def write(writer: int) -> int:
        count = 0
        while time.monotonic() < end:
            await book.append(_record("g", count * WRITERS + writer, 1))
            count += 1
        return count

    counts = await asyncio.gather(*(write(writer) for writer in range(WRITERS)))
    took_s = time.monotonic() - began
    await book.close()
    return sum(counts) / took_s
