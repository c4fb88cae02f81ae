"""The ledger on real SQLite: numbers, chain, bound, schema, readers."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import apsw
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ondol.adapters.ledger import SqliteLedger
from ondol.adapters.ledger_reader import records, verify
from ondol.adapters.ledger_schema import MIGRATIONS, SPAN_ROWS, spans
from ondol.adapters.ledger_writer import BATCH_ROWS
from ondol.adapters.lock import lock_directory
from ondol.core.usage import GENESIS, UsageRecord, encode_record, link
from ondol.errors import DirectoryLocked, LedgerBroken, LedgerUnavailable, SchemaTooNew

pytestmark = pytest.mark.anyio


def _record(number: int, time_ns: int | None = None) -> UsageRecord:
    return UsageRecord(
        request_id=f"r{number}", time_ns=number if time_ns is None else time_ns, site="s", gateway="g",
        tenant="default", team="a", key_id="k", route="assistant", task="chat", outcome="completed",
        status=200,
    )  # fmt: skip


@asynccontextmanager
async def _open(path: Path, *, max_bytes: int = 1 << 30, gateway: str = "g") -> AsyncIterator[SqliteLedger]:
    loop = asyncio.get_running_loop()
    ledger = SqliteLedger(path, gateway=gateway, max_bytes=max_bytes, loop=loop)
    try:
        yield ledger
    finally:
        await ledger.close()


async def _until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110  # a file does not tell when it grows
            await asyncio.sleep(0.005)


def _make(path: Path, numbers: range) -> None:
    """A file with these records, written without our writer: the independent half of the tests."""
    connection = apsw.Connection(str(path))
    connection.pragma("journal_mode", "wal")
    for step in MIGRATIONS:
        connection.execute(step)
    connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
    previous = GENESIS
    with connection:
        for seq in numbers:
            payload = encode_record(_record(seq))
            previous = link(previous, seq, payload)
            row = (seq, f"r{seq}", seq, payload, previous)
            connection.execute("INSERT INTO usage VALUES(?,?,?,?,?)", row)
    connection.close()


async def test_numbers_run_from_one_without_holes_over_restarts(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    async with _open(path) as ledger:
        assert await ledger.append(_record(1)) == 1
        together = await asyncio.gather(*(ledger.append(_record(n)) for n in range(2, BATCH_ROWS + 90)))
        assert together == list(range(2, BATCH_ROWS + 90))
    async with _open(path) as ledger:
        assert await ledger.append(_record(0)) == BATCH_ROWS + 90

    found = verify(path)
    assert (found.ok, found.rows, found.start_seq) == (True, BATCH_ROWS + 90, 0)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 31, 32, 33, BATCH_ROWS - 1, BATCH_ROWS, BATCH_ROWS + 1])
async def test_a_batch_of_any_size_is_kept_whole(tmp_path: Path, count: int) -> None:
    async with _open(tmp_path / "ledger.db") as ledger:
        await asyncio.gather(*(ledger.append(_record(n)) for n in range(count)))

    assert [each.request_id for each in records(tmp_path / "ledger.db")] == [f"r{n}" for n in range(count)]
    assert verify(tmp_path / "ledger.db").rows == count


async def test_cancelling_the_waiter_keeps_the_record(tmp_path: Path) -> None:
    async with _open(tmp_path / "ledger.db") as ledger:
        waiter = asyncio.create_task(ledger.append(_record(1)))
        await asyncio.sleep(0)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        assert await ledger.append(_record(2)) == 2

    assert [each.request_id for each in records(tmp_path / "ledger.db")] == ["r1", "r2"]


async def test_closing_keeps_what_is_queued_and_refuses_what_comes_after(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    ledger = SqliteLedger(tmp_path / "ledger.db", gateway="g", max_bytes=1 << 30, loop=loop)
    waiters = [ledger.submit(_record(n)) for n in range(700)]

    await asyncio.gather(ledger.close(), ledger.close())
    await ledger.close()

    assert [each.result() for each in waiters] == list(range(1, 701))
    assert _names(tmp_path) == {"ledger.db"}  # the WAL was copied and is gone
    with pytest.raises(LedgerUnavailable, match="closed"):
        await ledger.append(_record(1))


async def test_find_gives_the_newest_record_of_a_request(tmp_path: Path) -> None:
    async with _open(tmp_path / "ledger.db") as ledger:
        assert await ledger.find("r1") is None
        await ledger.append(_record(1))
        await ledger.append(_record(1, time_ns=99))
        assert await ledger.find("r1") == _record(1, time_ns=99)
        assert await ledger.find("r2") is None


async def test_leases_are_kept_exactly_also_past_64_bits(tmp_path: Path) -> None:
    async with _open(tmp_path / "ledger.db") as ledger:
        await asyncio.gather(
            ledger.lease("team", "2026-01", 5),
            ledger.append(_record(1)),
            ledger.lease("all", "2026-W01", 2**80),
        )
        await ledger.lease("team", "2026-01", 9)
    async with _open(tmp_path / "ledger.db") as ledger:
        assert ledger.leases() == {("team", "2026-01"): 9, ("all", "2026-W01"): 2**80}
        assert await ledger.append(_record(2)) == 2


async def test_spent_is_exact_where_the_clock_jumped(tmp_path: Path) -> None:
    day = 86_400 * 10**9
    times = [3 * day] * 50 + [day] * (3 * SPAN_ROWS) + [4 * day] * 60 + [day] * 10
    async with _open(tmp_path / "ledger.db") as ledger:
        await asyncio.gather(*(ledger.append(_record(n, time)) for n, time in enumerate(times)))
        found = [int(each.request_id[1:]) for each in ledger.spent(3 * day)]

    assert found == [n for n, time in enumerate(times) if time >= 3 * day]
    between = records(tmp_path / "ledger.db", 2 * day, 4 * day)
    assert sum(1 for _ in between) == 50


async def test_complete_blocks_are_summed_up(tmp_path: Path) -> None:
    async with _open(tmp_path / "ledger.db") as ledger:
        await asyncio.gather(*(ledger.append(_record(n)) for n in range(1, 2 * SPAN_ROWS + 10)))

    connection = apsw.Connection(str(tmp_path / "ledger.db"))
    found = spans(connection)
    connection.close()
    assert found == {0: (1, SPAN_ROWS), 1: (SPAN_ROWS + 1, 2 * SPAN_ROWS)}


async def test_at_its_bound_it_says_so_and_still_keeps_what_is_in_flight(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    async with _open(path, max_bytes=256 * 1024) as ledger:
        assert ledger.problem() is None
        for n in range(1, 20):
            await asyncio.gather(*(ledger.append(_record(n * 1_000 + k)) for k in range(100)))
            if ledger.full:
                break
        assert "its bound is 262144" in (ledger.problem() or "")
        assert await ledger.append(_record(0)) == n * 100 + 1
    async with _open(path, max_bytes=256 * 1024) as ledger:
        assert ledger.full
    async with _open(path, max_bytes=1 << 30) as ledger:
        assert (ledger.full, ledger.problem()) == (False, None)


async def test_a_file_of_the_first_schema_is_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    connection = apsw.Connection(str(path))
    connection.execute(MIGRATIONS[0])
    connection.execute("PRAGMA user_version = 1")
    previous = GENESIS
    with connection:
        for seq in range(1, SPAN_ROWS + 3):
            payload = encode_record(_record(seq))
            previous = link(previous, seq, payload)
            connection.execute(
                "INSERT INTO usage VALUES(?,?,?,?,?)", (seq, f"r{seq}", seq, payload, previous)
            )
    connection.close()
    assert verify(path).rows == SPAN_ROWS + 2  # readers take the old schema as it is

    async with _open(path) as ledger:
        assert await ledger.append(_record(1)) == SPAN_ROWS + 3

    connection = apsw.Connection(str(path))
    assert connection.pragma("user_version") == len(MIGRATIONS)
    assert spans(connection) == {0: (1, SPAN_ROWS)}
    connection.close()
    assert verify(path).ok


async def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    _make(path, range(1, 3))
    connection = apsw.Connection(str(path))
    connection.execute("PRAGMA user_version = 99")
    connection.close()

    with pytest.raises(SchemaTooNew, match=f"found schema version 99.*up to {len(MIGRATIONS)}.*newer Ondol"):
        async with _open(path):
            pass
    with pytest.raises(SchemaTooNew):
        verify(path)


async def test_a_ledger_belongs_to_one_gateway(tmp_path: Path) -> None:
    async with _open(tmp_path / "ledger.db"):
        pass

    with pytest.raises(LedgerBroken, match="gateway 'g', and this is 'other'"):
        async with _open(tmp_path / "ledger.db", gateway="other"):
            pass


async def test_a_file_that_is_no_database_is_broken(tmp_path: Path) -> None:
    (tmp_path / "ledger.db").write_bytes(b"not a database at all" * 100)

    with pytest.raises(LedgerBroken, match="damaged, or not a ledger"):
        async with _open(tmp_path / "ledger.db"):
            pass
    with pytest.raises(LedgerBroken):
        verify(tmp_path / "ledger.db")


async def test_a_directory_that_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(LedgerUnavailable, match="Check that the disk"):
        async with _open(tmp_path / "missing" / "ledger.db"):
            pass
    with pytest.raises(LedgerUnavailable, match="no such ledger"):
        verify(tmp_path / "ledger.db")


async def test_a_broken_tail_stops_the_start(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    _make(path, range(1, 2_000))
    _tamper(path, "UPDATE usage SET payload = CAST('x' AS BLOB) WHERE seq = 1500")

    with pytest.raises(LedgerBroken, match="record 1500.*ledger verify"):
        async with _open(path):
            pass


async def test_rows_cannot_be_changed_or_taken_out(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    _make(path, range(1, 5))
    connection = apsw.Connection(str(path))

    with pytest.raises(apsw.ConstraintError, match="append-only"):
        connection.execute("UPDATE usage SET time_ns = 0")
    with pytest.raises(apsw.ConstraintError, match="append-only"):
        connection.execute("DELETE FROM usage WHERE seq = 4")
    connection.close()


async def test_after_a_checkpoint_pruned_rows_are_not_missed(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    _make(path, range(1, 21))
    connection = apsw.Connection(str(path))
    connection.execute("INSERT INTO checkpoint SELECT seq, hash, 0, NULL FROM usage WHERE seq = 8")
    connection.execute("DELETE FROM usage WHERE seq <= 8")
    with pytest.raises(apsw.ConstraintError, match="no checkpoint covers"):
        connection.execute("DELETE FROM usage WHERE seq = 9")
    connection.close()

    found = verify(path)
    assert (found.ok, found.rows, found.start_seq, found.last_seq) == (True, 12, 8, 20)
    async with _open(path) as ledger:
        assert await ledger.append(_record(1)) == 21


async def test_reading_beside_a_writer_never_stops_it(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    async with _open(path) as ledger:
        await ledger.append(_record(0))
        done = asyncio.Event()

        async def read() -> int:
            looks = 0
            while not done.is_set():
                found = await asyncio.to_thread(verify, path)
                assert found.ok
                assert found.rows >= 1
                looks += 1
            return looks

        async def write(first: int) -> None:
            for n in range(first, first + 150):
                await ledger.append(_record(n))

        readers = [asyncio.create_task(read()) for _ in range(2)]
        await asyncio.gather(*(write(n * 1_000) for n in range(1, 9)))
        done.set()
        assert min(await asyncio.gather(*readers)) >= 1
        assert ledger.problem() is None

    assert verify(path).rows == 1_201


async def test_the_wal_is_copied_when_nobody_waits(tmp_path: Path) -> None:
    async with _open(tmp_path / "ledger.db") as ledger:
        before = (tmp_path / "ledger.db").stat().st_size
        await asyncio.gather(*(ledger.append(_record(n)) for n in range(400)))
        await _until(lambda: (tmp_path / "ledger.db").stat().st_size > before)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give up the right to write")
def test_a_copy_on_a_read_only_disk_can_be_verified() -> None:
    program = (
        "import os, sys; from pathlib import Path\n"
        "from ondol.adapters.ledger_reader import verify\n"
        "os.setuid(65534); print(verify(Path(sys.argv[1])).rows)"
    )
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders can be entered by us alone
        path = Path(folder) / "ledger.db"
        _make(path, range(1, 5))
        path.chmod(0o444)
        Path(folder).chmod(0o555)

        command = [sys.executable, "-c", program, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.stdout == "4\n", done.stderr


def test_verify_tells_how_far_it_is(tmp_path: Path) -> None:
    _make(tmp_path / "ledger.db", range(1, 1_101))
    seen: list[tuple[int, int]] = []

    verify(tmp_path / "ledger.db", lambda done, total: seen.append((done, total)))

    assert seen == [(512, 1_100), (1_024, 1_100), (1_100, 1_100)]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_byte_or_a_missing_row_is_found_where_it_is(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "chain.db"
    path.unlink(missing_ok=True)
    count = data.draw(st.integers(2, 30))
    _make(path, range(1, count + 1))
    seq = data.draw(st.integers(1, count))
    kind = data.draw(st.sampled_from(["payload", "hash", "request_id", "time_ns", "row"]))

    if kind == "row":
        seq = min(seq, count - 1)  # the chain cannot show that its end was cut off
        _tamper(path, "DELETE FROM usage WHERE seq = ?", seq)
    elif kind in {"payload", "hash"}:
        connection = apsw.Connection(str(path))
        found = connection.execute(f"SELECT {kind} FROM usage WHERE seq = ?", (seq,)).get
        connection.close()
        flipped = bytearray(found)
        flipped[data.draw(st.integers(0, len(flipped) - 1))] ^= data.draw(st.integers(1, 255))
        _tamper(path, f"UPDATE usage SET {kind} = ? WHERE seq = ?", bytes(flipped), seq)
    else:
        value = "x" if kind == "request_id" else 10**18
        _tamper(path, f"UPDATE usage SET {kind} = ? WHERE seq = ?", value, seq)

    result = verify(path)
    assert not result.ok
    assert (result.broken_seq, result.last_seq, result.rows) == (seq, seq - 1, seq - 1)
    assert result.why


def test_a_payload_that_is_chained_but_no_record_is_found(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    _make(path, range(1, 3))
    connection = apsw.Connection(str(path))
    previous = connection.execute("SELECT hash FROM usage WHERE seq = 2").get
    row = (3, "r3", 3, b"{}", link(previous, 3, b"{}"))
    connection.execute("INSERT INTO usage VALUES(?,?,?,?,?)", row)
    connection.close()

    result = verify(path)

    assert result.broken_seq == 3
    assert "cannot be decoded" in (result.why or "")


def test_a_directory_has_one_owner_at_a_time(tmp_path: Path) -> None:
    with (
        lock_directory(tmp_path / "data"),
        pytest.raises(DirectoryLocked, match=f"pid {os.getpid()}.*Stop that process"),
        lock_directory(tmp_path / "data"),
    ):
        pass
    with lock_directory(tmp_path / "data"):
        assert (tmp_path / "data" / "lock").read_text() == f"{os.getpid()}\n"


def test_a_result_can_be_shown_as_json(tmp_path: Path) -> None:
    _make(tmp_path / "ledger.db", range(1, 2))

    shown = msgspec.json.decode(msgspec.json.encode(verify(tmp_path / "ledger.db")))

    assert shown["rows"] == 1
    assert len(shown["last_hash"]) == 64


def _names(folder: Path) -> set[str]:
    return {each.name for each in folder.iterdir()}


def _tamper(path: Path, sql: str, *values: object) -> None:
    """Change a file as somebody would who knows SQLite: the triggers go first."""
    connection = apsw.Connection(str(path))
    connection.execute("DROP TRIGGER usage_no_update; DROP TRIGGER usage_no_delete")
    connection.execute(sql, values)
    connection.close()
