"""The hub's SQLite: a commit for many, each work alone in its failure, and every way a disk can fail."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import apsw
import pytest
from tests.faults.disk import FaultyDisk
from tests.ranges import SiteLedger

from ondol.adapters.database_sqlite import BATCH_WORKS, InlineDatabase, SqliteDatabase
from ondol.adapters.sqlite_transactions import SqliteReader
from ondol.core.ports import Tx
from ondol.errors import SchemaTooNew, StateError, StateUnavailable
from ondol.hub import ingest, usage
from ondol.hub.schema import MIGRATIONS

pytestmark = pytest.mark.anyio

TABLE = (("CREATE TABLE t(a BIGINT NOT NULL PRIMARY KEY, b BLOB)",),)


@pytest.fixture
def disk(request: pytest.FixtureRequest) -> Iterator[FaultyDisk]:
    made = FaultyDisk(f"hub-{request.node.name}")
    yield made
    made.unregister()


@pytest.fixture
async def database(tmp_path: Path, disk: FaultyDisk) -> AsyncIterator[SqliteDatabase]:
    made = SqliteDatabase(tmp_path / "hub.db", migrations=TABLE, vfs=disk.name)
    yield made
    await made.close()


def _put(number: int, size: int = 1) -> Callable[[Tx], int]:
    def work(tx: Tx) -> int:
        tx.run("INSERT INTO t(a, b) VALUES(?,?)", (number, bytes(size)))
        return number

    return work


def _numbers(tx: Tx) -> list[int]:
    return [row[0] for row in tx.run("SELECT a FROM t ORDER BY a")]


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def _until_well(database: SqliteDatabase) -> None:
    async with asyncio.timeout(20):
        while database.problem() is not None:  # noqa: ASYNC110  # it tells by an attribute
            await asyncio.sleep(0.01)


async def test_only_the_owner_may_read_the_files(tmp_path: Path, database: SqliteDatabase) -> None:
    await database.write(_put(1))
    for name in ("hub.db", "hub.db-wal", "hub.db-shm"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600, name


async def test_many_works_share_a_commit_and_each_gets_its_own_result(
    database: SqliteDatabase, disk: FaultyDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    syncs: list[str] = []
    synced = disk.synced

    def note(path: str) -> None:
        syncs.append(path)
        synced(path)

    monkeypatch.setattr(disk, "synced", note)
    busy = threading.Event()
    first = asyncio.create_task(database.write(lambda tx: busy.wait(20)))
    await asyncio.sleep(0.05)
    others = [asyncio.create_task(database.write(_put(n))) for n in range(BATCH_WORKS)]
    await asyncio.sleep(0.05)
    assert not any(one.done() for one in others)
    before = len(syncs)
    busy.set()

    assert await asyncio.gather(*others) == list(range(BATCH_WORKS))
    assert await first
    assert len(syncs) - before <= 3
    assert await database.read(_numbers) == list(range(BATCH_WORKS))


async def test_a_work_that_fails_is_rolled_back_alone(database: SqliteDatabase) -> None:
    def broken(tx: Tx) -> None:
        tx.run("INSERT INTO t(a) VALUES(?)", (1000,))
        raise KeyError("mine")

    def twice(tx: Tx) -> None:
        tx.run("INSERT INTO t(a) VALUES(?)", (1001,))
        tx.many("INSERT INTO t(a) VALUES(?)", [(1002,), (1,)])

    works = [_put(1), broken, _put(2), twice, lambda tx: tx.run("SELECT nonsense"), _put(1 << 63), _put(3)]
    told = await asyncio.gather(*(database.write(work) for work in works), return_exceptions=True)

    assert [type(one) for one in told] == [
        int, KeyError, int, apsw.ConstraintError, apsw.SQLError, OverflowError, int,
    ]  # fmt: skip
    assert await database.read(_numbers) == [1, 2, 3]
    assert database.problem() is None


async def test_a_reader_sees_one_state_and_cannot_write(database: SqliteDatabase) -> None:
    await database.write(_put(1))
    went_on = threading.Event()

    def look_twice(tx: Tx) -> tuple[list[int], list[int]]:
        before = _numbers(tx)
        went_on.wait(20)
        return before, _numbers(tx)

    reading = asyncio.create_task(database.read(look_twice))
    await asyncio.sleep(0.05)
    await database.write(_put(2))
    went_on.set()

    assert await reading == ([1], [1])
    assert await database.read(_numbers) == [1, 2]
    with pytest.raises(StateUnavailable):
        await database.read(_put(3))
    assert await database.read(_numbers) == [1, 2]


async def test_a_waiter_that_is_cancelled_does_not_take_its_work_back(database: SqliteDatabase) -> None:
    busy = threading.Event()
    first = asyncio.create_task(database.write(lambda tx: busy.wait(20)))
    second = asyncio.create_task(database.write(_put(7)))
    await asyncio.sleep(0.05)
    second.cancel()
    await asyncio.sleep(0)
    busy.set()
    await first
    await database.write(_put(8))
    assert await database.read(_numbers) == [7, 8]


async def test_a_full_disk_is_said_and_nothing_is_kept_and_it_goes_on_by_itself(
    database: SqliteDatabase, disk: FaultyDisk
) -> None:
    await database.write(_put(0))
    disk.room = 0
    told = await asyncio.gather(
        *(database.write(_put(n, 5000)) for n in range(1, 20)),
        return_exceptions=True,
    )
    assert {type(one) for one in told} == {StateUnavailable}
    assert "has room" in str(told[0])
    assert "has room" in (database.problem() or "")
    assert await database.read(_numbers) == [0]

    disk.room = None
    await _until_well(database)
    await database.write(_put(50))
    assert await database.read(_numbers) == [0, 50]


async def test_a_work_too_large_for_the_disk_does_not_take_the_small_ones_with_it(
    database: SqliteDatabase, disk: FaultyDisk
) -> None:
    busy = threading.Event()
    first = asyncio.create_task(database.write(lambda tx: busy.wait(20)))
    await asyncio.sleep(0.05)
    disk.room = 200_000
    sizes = {1: 10, 2: 1_000_000, 3: 10}
    others = [asyncio.create_task(database.write(_put(n, size))) for n, size in sizes.items()]
    await asyncio.sleep(0.05)
    busy.set()
    told = await asyncio.gather(first, *others, return_exceptions=True)

    assert [type(one) for one in told[1:]] == [int, StateUnavailable, int]
    assert await database.read(_numbers) == [1, 3]
    disk.room = None
    await _until_well(database)


async def test_a_locked_file_is_waited_for_and_then_said(
    tmp_path: Path, database: SqliteDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = apsw.Connection(str(tmp_path / "hub.db"))
    other.execute("BEGIN IMMEDIATE")
    waiting = asyncio.create_task(database.write(_put(1)))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    other.execute("COMMIT")
    assert await waiting == 1

    await database.write(_set_busy_timeout)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StateUnavailable, match="locked"):
        await database.write(_put(2))
    other.execute("ROLLBACK")
    other.close()
    await _until_well(database)
    assert await database.write(_put(3)) == 3
    assert await database.read(_numbers) == [1, 3]


def _set_busy_timeout(tx: Tx) -> None:
    tx.run("PRAGMA busy_timeout = 50")  # so that the test need not wait for five seconds


async def test_closing_finishes_what_is_queued_and_refuses_what_comes_after(tmp_path: Path) -> None:
    database = SqliteDatabase(tmp_path / "hub.db", migrations=TABLE)
    waiting = [asyncio.create_task(database.write(_put(n))) for n in range(200)]
    await asyncio.sleep(0)
    await database.close()
    await database.close()
    assert await asyncio.gather(*waiting) == list(range(200))
    for call in (database.write, database.read):
        with pytest.raises(StateUnavailable, match="closed"):
            await call(_numbers)
    assert _names(tmp_path) == ["hub.db"]


async def test_a_damaged_file_is_said_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "hub.db"
    path.write_bytes(b"this is no database at all, and long enough to be looked at\n" * 100)
    with pytest.raises(StateError, match="restore it from a backup"):
        SqliteDatabase(path, migrations=TABLE)

    path.unlink()
    database = SqliteDatabase(path, migrations=TABLE)
    for n in range(300):
        await database.write(_put(n, 3000))
    await database.close()
    content = bytearray(path.read_bytes())
    content[8192:40960] = os.urandom(40960 - 8192)
    path.write_bytes(content)
    with pytest.raises(StateError, match="damaged"):
        SqliteDatabase(path, migrations=TABLE)


async def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(StateUnavailable, match="Check that the disk has room"):
        SqliteDatabase(tmp_path / "missing" / "hub.db", migrations=TABLE)


async def test_migrations_go_up_and_never_down(tmp_path: Path) -> None:
    path = tmp_path / "hub.db"
    newer = (*TABLE, ("ALTER TABLE t ADD COLUMN c TEXT", "UPDATE t SET c = 'old'"))
    database = SqliteDatabase(path, migrations=TABLE)
    await database.write(_put(1))
    await database.close()

    database = SqliteDatabase(path, migrations=newer)
    assert await database.read(lambda tx: tx.run("SELECT a, c FROM t")) == [(1, "old")]
    await database.close()

    with pytest.raises(SchemaTooNew, match="version 2; this Ondol knows up to 1"):
        SqliteDatabase(path, migrations=TABLE)
    with pytest.raises(StateError, match="this Ondol reads 1"):
        SqliteReader(path, migrations=TABLE)
    broken = (*newer, ("CREATE TABLE u(x TEXT)", "nonsense"))
    with pytest.raises(apsw.SQLError):
        SqliteDatabase(path, migrations=broken)
    reader = SqliteReader(path, migrations=newer)
    assert reader.read_now(lambda tx: tx.run("SELECT name FROM sqlite_master WHERE name = 'u'")) == []
    reader.close()


async def test_the_inline_form_does_the_same(tmp_path: Path) -> None:
    database = InlineDatabase(tmp_path / "hub.db", migrations=TABLE)
    with pytest.raises(apsw.ConstraintError):
        await database.write(lambda tx: tx.many("INSERT INTO t(a) VALUES(?)", [(1,), (1,)]))
    assert await database.write(_put(2)) == 2
    assert await database.read(_numbers) == [2]
    await database.read(_put(3))
    assert await database.read(_numbers) == [2]
    await database.close()


# ---- whole ranges, and what a crash leaves of them


def _take(ledger: SiteLedger, first: int, last: int) -> Callable[[Tx], int]:
    message = ledger.range(first, last)
    return lambda tx: ingest.take_range(tx, ledger.site, message, site_key=ledger.key, now_ns=1).mark


def _check(path: Path, ledgers: list[SiteLedger], told: dict[str, int]) -> None:
    """Every acknowledged row is there, once, as it was written; mark, rows and sums agree."""
    reader = SqliteReader(path, migrations=MIGRATIONS)
    total = 0
    for ledger in ledgers:
        seq, hash_ = reader.read_now(lambda tx, g=ledger.gateway: ingest.mark_of(tx, g))  # type: ignore[misc]
        rows = reader.read_now(lambda tx, g=ledger.gateway: usage.rows_after(tx, g, 0, 1 << 30))  # type: ignore[misc]
        assert told[ledger.site] <= seq
        assert rows == list(enumerate(ledger.rows[:seq], 1))
        assert hash_ == ledger.hashes[seq]
        total += seq
    sums = reader.read_now(lambda tx: usage.totals(tx, by=""))
    assert sum(row.requests for row in sums) == total
    reader.close()


@pytest.mark.parametrize("seed", range(4))
async def test_a_power_cut_keeps_every_range_that_was_acknowledged(
    tmp_path: Path, disk: FaultyDisk, seed: int
) -> None:
    dice = random.Random(seed)
    ledgers = [SiteLedger(name).fill(120) for name in ("a", "b", "c")]
    told = {ledger.site: 0 for ledger in ledgers}
    database = SqliteDatabase(tmp_path / "hub.db", migrations=MIGRATIONS, vfs=disk.name)

    async def send(ledger: SiteLedger) -> None:
        with contextlib.suppress(StateError):
            while told[ledger.site] < 120:
                first = told[ledger.site] + 1
                work = _take(ledger, first, min(first + dice.randrange(9), 120))
                told[ledger.site] = await database.write(work)
                if len(told) and sum(told.values()) > 40 + 60 * seed and not disk.dead:
                    disk.cut(tmp_path / "after", dice if seed % 2 else None)

    await asyncio.gather(*map(send, ledgers))
    acknowledged = dict(told)
    disk.bury()
    await database.close()

    after = tmp_path / "after" / "hub.db"
    reopened = SqliteDatabase(after, migrations=MIGRATIONS)
    await reopened.close()
    _check(after, ledgers, acknowledged)

    database = SqliteDatabase(after, migrations=MIGRATIONS)
    for ledger in ledgers:
        assert await database.write(_take(ledger, 1, 120)) == 120
    await database.close()
    _check(after, ledgers, {ledger.site: 120 for ledger in ledgers})


TAKER = """
import asyncio, os, sys
from pathlib import Path
from tests.ranges import SiteLedger
from ondol.adapters.database_sqlite import SqliteDatabase
from ondol.hub import ingest
from ondol.hub.schema import MIGRATIONS

async def main():
    database = SqliteDatabase(Path(sys.argv[1]), migrations=MIGRATIONS)
    os.write(1, b"open 0\\n")

    async def send(name):
        ledger = SiteLedger(name, private=bytes(32)).fill(3000)
        seq, _ = await database.read(lambda tx: ingest.mark_of(tx, ledger.gateway))
        while seq < 3000:
            message = ledger.range(seq + 1, min(seq + 7, 3000))
            reply = await database.write(lambda tx: ingest.take_range(
                tx, name, message, site_key=ledger.key, now_ns=1))
            seq = reply.mark
            os.write(1, f"{name} {seq}\\n".encode())

    await asyncio.gather(*map(send, "abcd"))

asyncio.run(main())
"""


@pytest.mark.parametrize("rounds", [6, pytest.param(60, marks=pytest.mark.long)])
def test_a_hub_that_is_killed_has_what_it_acknowledged(tmp_path: Path, rounds: int, root: Path) -> None:
    path = tmp_path / "hub.db"
    dice = random.Random(21)
    ledgers = [SiteLedger(name, private=bytes(32)).fill(3000) for name in "abcd"]
    told = {ledger.site: 0 for ledger in ledgers}
    for _ in range(rounds):
        child = subprocess.Popen(
            [sys.executable, "-c", TAKER, str(path)], stdout=subprocess.PIPE, cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
        )  # fmt: skip
        try:
            assert child.stdout is not None
            said = b"".join(child.stdout.readline() for _ in range(dice.randrange(5, 60)))
            child.kill()
            said += child.stdout.read()
        finally:
            child.kill()
            child.wait()
            if child.stdout is not None:
                child.stdout.close()
        for name, seq in (line.split() for line in said.decode().splitlines() if line.count(" ") == 1):
            if name in told:
                told[name] = max(told[name], int(seq or 0))
        _check(path, ledgers, told)
    assert sum(told.values()) > 20 * rounds


SMALL_DISK = """
import asyncio, json, subprocess, sys
from pathlib import Path
from tests.ranges import SiteLedger
from ondol.adapters.database_sqlite import SqliteDatabase
from ondol.errors import StateUnavailable
from ondol.hub import ingest
from ondol.hub.schema import MIGRATIONS

folder = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], check=True)

async def main():
    ballast = folder / "ballast"
    ballast.write_bytes(bytes(5_000_000))
    database = SqliteDatabase(folder / "hub.db", migrations=MIGRATIONS)
    ledger = SiteLedger("shop", private=bytes(32)).fill(4000)
    told = []

    async def send(last):
        first = (told[-1] if told else 0) + 1
        message = ledger.range(first, last)
        reply = await database.write(lambda tx: ingest.take_range(
            tx, "shop", message, site_key=ledger.key, now_ns=1))
        told.append(reply.mark)

    why = ""
    while not why:
        try:
            await send((told[-1] if told else 0) + 200)
        except StateUnavailable as error:
            why = error.message
    kept = (await database.read(lambda tx: ingest.mark_of(tx, ledger.gateway)))[0]
    problem = database.problem()
    ballast.unlink()
    for _ in range(400):
        if database.problem() is None:
            break
        await asyncio.sleep(0.05)
    well = database.problem() is None
    while told[-1] < 4000 and len(told) < 40 and well:
        await send(min(told[-1] + 200, 4000))
        if told[-1] >= kept + 1000:
            break
    rows = await database.read(lambda tx: tx.run("SELECT count(*), max(seq) FROM usage"))
    await database.close()
    print(json.dumps({"why": why, "kept": kept, "before": told.index(kept), "problem": problem, "well": well,
                      "told": told[-1], "rows": rows[0]}))

asyncio.run(main())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system of its own")
def test_a_real_disk_that_is_full_is_said_and_work_goes_on_when_it_has_room(
    tmp_path: Path, root: Path
) -> None:
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", SMALL_DISK, str(tmp_path)], cwd=root, check=False,
        capture_output=True, text=True, timeout=100, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert "has room" in found["why"]
    assert found["why"] == found["problem"]
    assert found["kept"] > 0
    assert found["well"]
    assert found["told"] > found["kept"]
    assert found["rows"] == [found["told"], found["told"]]
