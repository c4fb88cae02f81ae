"""The hub on PostgreSQL: two replicas at once, a server that goes away, and the same SQL as on SQLite."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import count

import psycopg
import pytest
from tests.postgres import Server, running_server
from tests.ranges import SiteLedger

from ondol.adapters.database_postgres import PostgresDatabase
from ondol.core.ports import Tx
from ondol.errors import Forbidden, SchemaTooNew, StateError, StateUnavailable
from ondol.hub import ingest, usage
from ondol.hub.schema import MIGRATIONS
from ondol.wire import sync

pytestmark = pytest.mark.anyio

TABLE = (
    (
        "CREATE TABLE t(a BIGINT NOT NULL PRIMARY KEY, b BLOB, c TEXT)",
        "CREATE TABLE counter(name TEXT NOT NULL PRIMARY KEY, n BIGINT NOT NULL)",
    ),
)
_NUMBERS = count(1)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as running:
        yield running


@pytest.fixture
def dsn(server: Server) -> str:
    """A fresh database of the server."""
    name = f"test{next(_NUMBERS)}"
    with psycopg.connect(server.dsn, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return server.dsn.replace("dbname=postgres", f"dbname={name}")


@pytest.fixture
async def database(dsn: str) -> AsyncIterator[PostgresDatabase]:
    made = await PostgresDatabase.open(dsn, migrations=TABLE)
    yield made
    await made.close()


async def test_values_come_back_as_from_sqlite(database: PostgresDatabase) -> None:
    def write(tx: Tx) -> None:
        tx.run("INSERT INTO t(a, b, c) VALUES(?,?,?)", (-(1 << 63), b"\0\xff", "it's 100 % ? – 온돌"))
        tx.many("INSERT INTO t(a, b, c) VALUES(?,?,?)", [(True, None, None), ((1 << 63) - 1, b"", "")])

    await database.write(write)
    rows = await database.read(
        lambda tx: tx.run("SELECT a, b, c FROM t WHERE c IS NULL OR c <> '?%' ORDER BY a")
    )
    assert rows == [
        (-(1 << 63), b"\0\xff", "it's 100 % ? – 온돌"), (1, None, None), ((1 << 63) - 1, b"", ""),
    ]  # fmt: skip
    assert all(isinstance(row[1], bytes | None) for row in rows)
    ((total, number),) = await database.read(lambda tx: tx.run("SELECT sum(a), count(*) FROM t WHERE a < 9"))
    assert (type(total), total, number) == (int, 1 - (1 << 63), 2)
    assert await database.read(lambda tx: tx.run("SELECT avg(a), sum(a) FROM t WHERE a = 1")) == [(1.0, 1)]


async def test_what_a_work_raises_rolls_back_alone_and_comes_out(database: PostgresDatabase) -> None:
    def broken(tx: Tx) -> None:
        tx.run("INSERT INTO t(a) VALUES(?)", (1,))
        raise KeyError("mine")

    told = await asyncio.gather(
        database.write(broken),
        database.write(lambda tx: tx.run("SELECT nonsense")),
        database.write(lambda tx: tx.run("INSERT INTO t(a) VALUES(?)", (1 << 63,))),
        database.write(lambda tx: tx.run("INSERT INTO t(a) VALUES(?)", (2,))),
        return_exceptions=True,
    )
    assert isinstance(told[0], KeyError)
    assert all(isinstance(one, psycopg.Error) for one in told[1:3])
    assert told[3] == []
    assert await database.read(lambda tx: tx.run("SELECT a FROM t")) == [(2,)]
    with pytest.raises(psycopg.errors.UniqueViolation):
        await database.write(lambda tx: tx.run("INSERT INTO t(a) VALUES(?)", (2,)))
    with pytest.raises(StateUnavailable):
        await database.read(lambda tx: tx.run("DELETE FROM t"))


async def test_transactions_run_as_if_each_were_alone(dsn: str) -> None:
    """Read, think, write: without serialisability and its retries, some of the additions would be lost."""
    replicas = [await PostgresDatabase.open(dsn, migrations=TABLE) for _ in range(2)]
    runs = []

    def add(tx: Tx) -> None:
        runs.append(1)
        rows = tx.run("SELECT n FROM counter WHERE name = 'x'")
        n = rows[0][0] if rows else 0
        tx.run(
            "INSERT INTO counter(name, n) VALUES('x', ?) ON CONFLICT(name) DO UPDATE SET n = excluded.n",
            (n + 1,),
        )

    try:
        await asyncio.gather(*(replicas[n % 2].write(add) for n in range(60)))
        assert await replicas[0].read(lambda tx: tx.run("SELECT n FROM counter")) == [(60,)]
        assert len(runs) > 60, "no two of them met; the test shows nothing"
    finally:
        for one in replicas:
            await one.close()


async def test_two_that_write_skewed_cannot_both_commit(dsn: str) -> None:
    """Each takes the last place if it sees none taken: SERIALIZABLE lets only one of them."""
    replicas = [await PostgresDatabase.open(dsn, migrations=TABLE) for _ in range(2)]
    meeting = threading.Barrier(2, timeout=20)

    def take(number: int) -> Callable[[Tx], bool]:
        met: list[int] = []

        def work(tx: Tx) -> bool:
            is_free = not tx.run("SELECT a FROM t")
            if not met:
                met.append(1)
                meeting.wait()
            if is_free:
                tx.run("INSERT INTO t(a) VALUES(?)", (number,))
            return is_free

        return work

    try:
        took = await asyncio.gather(*(one.write(take(n)) for n, one in enumerate(replicas)))
        assert sorted(took) == [False, True]
        assert len(await replicas[0].read(lambda tx: tx.run("SELECT a FROM t"))) == 1
    finally:
        for one in replicas:
            await one.close()


async def test_replicas_that_start_together_make_the_schema_once(dsn: str) -> None:
    replicas = await asyncio.gather(*(PostgresDatabase.open(dsn, migrations=MIGRATIONS) for _ in range(4)))
    rows = await replicas[0].read(lambda tx: tx.run("SELECT version FROM schema_version"))
    assert rows == [(len(MIGRATIONS),)]
    for one in replicas:
        await one.close()
    with pytest.raises(SchemaTooNew, match="knows up to 0"):
        await PostgresDatabase.open(dsn, migrations=())


# ---- ranges


def _ledgers(rows: int) -> list[SiteLedger]:
    return [SiteLedger(name).fill(rows) for name in ("a", "b", "c")]


async def _send_all(database: PostgresDatabase, ledger: SiteLedger, dice: random.Random) -> None:
    """As a site does: from the mark on, in ranges of any size, until all is there; errors are tried again."""
    seq, last = 0, len(ledger.rows)
    while seq < last:
        message = ledger.range(seq + 1, min(seq + dice.randrange(1, 40), last))
        try:
            reply = await database.write(
                lambda tx, message=message: ingest.take_range(  # type: ignore[misc]  # bound now
                    tx, ledger.site, message, site_key=ledger.key, now_ns=1
                )
            )
        except StateError:
            await asyncio.sleep(0.05)
        else:
            seq = max(seq, reply.mark)


async def _check(database: PostgresDatabase, ledgers: list[SiteLedger]) -> None:
    for ledger in ledgers:
        mark = await database.read(lambda tx, g=ledger.gateway: ingest.mark_of(tx, g))  # type: ignore[misc]
        assert mark == (len(ledger.rows), ledger.hashes[-1])
        rows = await database.read(lambda tx, g=ledger.gateway: usage.rows_after(tx, g, 0, 1 << 30))  # type: ignore[misc]
        assert rows == list(enumerate(ledger.rows, 1))
    (total,) = await database.read(lambda tx: usage.totals(tx, by=""))
    assert total.requests == sum(len(ledger.rows) for ledger in ledgers)
    spent = sum(one.cost for ledger in ledgers for one in ledger.records)
    assert total.cost == f"{spent / 10**9:.9f}".rstrip("0")


async def test_two_replicas_that_are_sent_the_same_ranges_store_each_row_once(dsn: str) -> None:
    replicas = [await PostgresDatabase.open(dsn, migrations=MIGRATIONS) for _ in range(2)]
    ledgers = _ledgers(300)
    try:
        await asyncio.gather(
            *(
                _send_all(one, ledger, random.Random(n))
                for n in range(2)
                for one in replicas
                for ledger in ledgers
            )
        )
        await _check(replicas[0], ledgers)
        thief = SiteLedger("thief", ledgers[0].gateway).fill(1)
        with pytest.raises(Forbidden):
            await replicas[1].write(
                lambda tx: ingest.take_range(tx, "thief", thief.range(1, 1), site_key=thief.key, now_ns=1)
            )
    finally:
        for one in replicas:
            await one.close()


async def test_events_and_reports_are_taken_by_two_replicas_once(dsn: str) -> None:
    replicas = [await PostgresDatabase.open(dsn, migrations=MIGRATIONS) for _ in range(2)]
    events = tuple(sync.Event(id=n, time_ns=n, kind="k", fields={"a\0": "ü\0"}) for n in range(1, 30))
    message = sync.Events(instance="i", audit=events, telemetry=events)
    report = sync.Report(instance="i", generation=1, epoch=0, last_seq=0, acknowledged=0, wall_ns=1)
    try:
        for _ in range(3):
            await asyncio.gather(
                *(one.write(lambda tx: ingest.take_events(tx, "a", message, now_ns=1)) for one in replicas),
                *(one.write(lambda tx: ingest.take_report(tx, "a", report, now_ns=1)) for one in replicas),
            )
        found = await replicas[0].read(
            lambda tx: tx.run("SELECT class, count(*), max(id) FROM events GROUP BY class")
        )
        assert sorted(found) == [("audit", 29, 29), ("telemetry", 29, 29)]
        assert await replicas[1].read(ingest.reports) == {"a": (1, report)}
    finally:
        for one in replicas:
            await one.close()


@pytest.mark.parametrize("rounds", [3, pytest.param(30, marks=pytest.mark.long)])
async def test_a_server_that_is_killed_and_one_replica_that_dies_lose_and_double_nothing(rounds: int) -> None:
    with running_server() as server:
        dice = random.Random(5)
        replicas = [await PostgresDatabase.open(server.dsn, migrations=MIGRATIONS) for _ in range(2)]
        ledgers = _ledgers(200 * rounds)
        sending = [
            asyncio.create_task(_send_all(replicas[n], ledger, random.Random(n)))
            for n in range(2)
            for ledger in ledgers
        ]
        try:
            for _ in range(rounds):
                await asyncio.sleep(dice.uniform(0.05, 0.3))
                await asyncio.to_thread(server.kill)
                await asyncio.to_thread(server.start)
            await replicas[1].close()
            for task in sending[len(ledgers) :]:
                task.cancel()
            await asyncio.wait_for(asyncio.gather(*sending[: len(ledgers)]), 90)
            await _check(replicas[0], ledgers)
        finally:
            for task in sending:
                task.cancel()
            await asyncio.gather(*sending, return_exceptions=True)
            for one in replicas:
                await one.close()


async def test_a_server_that_is_away_is_said_and_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ondol.adapters.database_postgres.PATIENCE_S", 0.5)
    with running_server() as server:
        secret = f"{server.dsn} password=verysecret"
        database = await PostgresDatabase.open(secret, migrations=TABLE)
        try:
            await database.write(lambda tx: tx.run("INSERT INTO t(a) VALUES(?)", (1,)))
            server.kill()
            for call in (database.write, database.read):
                with pytest.raises(StateUnavailable, match="Check that the server runs") as told:
                    await call(lambda tx: tx.run("SELECT a FROM t"))
                assert "verysecret" not in str(told.value)
            assert database.problem() is not None
            server.start()
            assert await database.read(lambda tx: tx.run("SELECT a FROM t")) == [(1,)]
            assert database.problem() is None
        finally:
            await database.close()
        with pytest.raises(StateUnavailable, match="closed"):
            await database.write(lambda tx: None)


async def test_a_commit_whose_answer_was_lost_is_looked_up_and_not_done_twice(
    database: PostgresDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line breaks after the server committed: the work must not run again, and its result comes out."""
    commit = psycopg.Connection.commit
    broken: list[int] = []

    def commit_and_lose(connection: psycopg.Connection[object]) -> None:
        commit(connection)
        if not broken:
            broken.append(1)
            connection.close()
            raise psycopg.OperationalError("the line broke")

    runs = []

    def add(tx: Tx) -> str:
        runs.append(1)
        tx.run("INSERT INTO counter(name, n) VALUES(?, 1)", (f"run{len(runs)}",))
        return "done"

    monkeypatch.setattr(psycopg.Connection, "commit", commit_and_lose)
    assert await database.write(add) == "done"
    assert (len(runs), len(broken)) == (1, 1)
    assert await database.read(lambda tx: tx.run("SELECT name FROM counter")) == [("run1",)]


async def test_a_replica_that_freezes_holds_up_the_others_for_a_moment_alone(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds a row and does nothing (its machine sleeps, or is gone): the server ends that, and it works anew."""
    monkeypatch.setattr("ondol.adapters.database_postgres.PATIENCE_S", 30.0)
    replicas = [await PostgresDatabase.open(dsn, migrations=TABLE) for _ in range(2)]
    runs: list[str] = []
    frozen, thawed = threading.Event(), threading.Event()

    def add(name: str, pause: Callable[[], object]) -> Callable[[Tx], None]:
        def work(tx: Tx) -> None:
            runs.append(name)
            tx.run("UPDATE counter SET n = n + 1 WHERE name = 'x'")
            pause()

        return work

    def freeze() -> None:
        if not frozen.is_set():
            frozen.set()
            assert thawed.wait(60)

    try:
        await replicas[0].write(lambda tx: tx.run("INSERT INTO counter(name, n) VALUES('x', 0)"))
        sleeper = asyncio.create_task(replicas[0].write(add("sleeper", freeze)))
        await asyncio.to_thread(frozen.wait, 60)
        await replicas[1].write(add("other", lambda: None))
        assert not sleeper.done()
        thawed.set()
        await sleeper
        assert await replicas[1].read(lambda tx: tx.run("SELECT n FROM counter")) == [(2,)]
        assert runs.count("sleeper") == 2
    finally:
        thawed.set()
        for one in replicas:
            await one.close()


async def test_a_commit_that_did_not_arrive_is_done_again(
    database: PostgresDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = psycopg.Connection.commit
    broken: list[int] = []

    def lose(connection: psycopg.Connection[object]) -> None:
        if not broken:
            broken.append(1)
            connection.close()
            raise psycopg.OperationalError("the line broke")
        commit(connection)

    monkeypatch.setattr(psycopg.Connection, "commit", lose)
    await database.write(lambda tx: tx.run("INSERT INTO counter(name, n) VALUES('x', 1)"))
    assert await database.read(lambda tx: tx.run("SELECT name FROM counter")) == [("x",)]
