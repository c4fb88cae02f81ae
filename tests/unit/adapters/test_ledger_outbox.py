"""The ledger as an outbox: ranges out, acknowledgements in, and rows that go when the hub has had them for long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import apsw
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol.adapters.ledger import SqliteLedger
from ondol.adapters.ledger_outbox import MARK_EVERY_NS, Mark, marked, prunable
from ondol.adapters.ledger_pruning import Pruning
from ondol.adapters.ledger_reader import records, verify
from ondol.core import dsse
from ondol.core.usage import GENESIS, UsageRecord, decode_record, link
from ondol.errors import LedgerUnavailable, RangeRefused
from ondol.units import NS_PER_S

pytestmark = pytest.mark.anyio

DAY = 86_400 * NS_PER_S
NOW = 1_800_000_000 * NS_PER_S
PRIVATE = dsse.new_private_key()
KEYS = {dsse.key_id(dsse.public_key(PRIVATE)): dsse.public_key(PRIVATE)}


def _record(number: int, **fields: str) -> UsageRecord:
    return UsageRecord(
        request_id=f"r{number}", time_ns=number, site="s", gateway="g", tenant="default", team="a", key_id="k",
        route="assistant", task="chat", outcome="completed", status=200, **fields,  # type: ignore[arg-type]
    )  # fmt: skip


def _pruning(needed_ns: Callable[[], int] = lambda: 1 << 62) -> Pruning:
    return Pruning(
        site="s", gateway="g", keep_ns=14 * DAY, sign=lambda kind, body: dsse.sign(PRIVATE, kind, body),
        needed_ns=needed_ns,
    )  # fmt: skip


@asynccontextmanager
async def _open(
    path: Path, *, max_bytes: int = 1 << 30, pruning: Pruning | None = None
) -> AsyncIterator[SqliteLedger]:
    loop = asyncio.get_running_loop()
    ledger = SqliteLedger(path, gateway="g", max_bytes=max_bytes, loop=loop, pruning=pruning)
    try:
        yield ledger
    finally:
        await ledger.close()


async def _until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not holds():  # noqa: ASYNC110  # a file does not tell when it changes
            await asyncio.sleep(0.005)


async def _fill(ledger: SqliteLedger, count: int, **fields: str) -> None:
    first = ledger.last_seq + 1
    await asyncio.gather(*(ledger.append(_record(n, **fields)) for n in range(first, first + count)))


async def _hash(ledger: SqliteLedger, seq: int) -> bytes:
    found = await ledger.range_after(seq - 1, rows=1, size=1)
    assert found is not None
    return found.last_hash


def _rows(path: Path) -> list[int]:
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        return [seq for (seq,) in connection.execute("SELECT seq FROM usage ORDER BY seq")]
    finally:
        connection.close()


# ---- ranges


async def test_ranges_cover_the_ledger_without_a_gap_and_prove_their_chain(tmp_path: Path) -> None:
    async with _open(tmp_path / "ledger.db") as ledger:
        assert await ledger.range_after(0, rows=10, size=1 << 20) is None
        await _fill(ledger, 1000, user="홍길동\nand a line", error='"quoted"')
        seq, previous, seen = 0, GENESIS, []
        while (found := await ledger.range_after(seq, rows=300, size=1 << 30)) is not None:
            assert (found.first, found.previous) == (seq + 1, previous)
            for payload in found.rows:
                seq += 1
                previous = link(previous, seq, payload)
                seen.append(decode_record(payload))
            assert found.last_hash == previous

    assert seen == list(records(tmp_path / "ledger.db"))


async def test_a_range_is_bounded_in_rows_and_bytes_and_has_at_least_one_row(tmp_path: Path) -> None:
    async with _open(tmp_path / "ledger.db") as ledger:
        await _fill(ledger, 50, error="x" * 1000)
        rows = [
            await ledger.range_after(3, rows=rows, size=size)
            for rows, size in ((7, 1 << 20), (50, 5000), (50, 1))
        ]

    assert [len(found.rows) for found in rows if found is not None] == [7, 4, 1]
    assert all(found is not None and found.first == 4 for found in rows)


async def test_who_waits_for_rows_is_woken_by_the_next_commit_and_no_sooner(tmp_path: Path) -> None:
    async with _open(tmp_path / "ledger.db") as ledger:
        await _fill(ledger, 3)
        await ledger.grown(2)
        waiter = asyncio.create_task(ledger.grown(3))
        await ledger.lease("b", "p", 1)
        await asyncio.sleep(0.02)
        assert not waiter.done()
        await _fill(ledger, 1)
        await waiter


# ---- acknowledgements


async def test_an_acknowledgement_survives_a_restart_and_may_go_back(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    async with _open(path) as ledger:
        assert (ledger.acknowledged_seq, ledger.last_seq) == (0, 0)
        await _fill(ledger, 20)
        await ledger.acknowledged(15, await _hash(ledger, 15), hub_ns=NOW)
        assert ledger.acknowledged_seq == 15
    async with _open(path) as ledger:
        assert ledger.acknowledged_seq == 15
        await ledger.acknowledged(4, await _hash(ledger, 4), hub_ns=NOW + 1)
        assert ledger.acknowledged_seq == 4
        await ledger.acknowledged(0, b"", hub_ns=NOW + 2)
        assert ledger.acknowledged_seq == 0
    async with _open(path) as ledger:
        assert (ledger.acknowledged_seq, ledger.last_seq) == (0, 20)


async def test_a_hub_that_has_other_rows_or_more_of_them_is_a_fork(tmp_path: Path) -> None:
    async with _open(tmp_path / "ledger.db") as ledger:
        await _fill(ledger, 5)
        with pytest.raises(RangeRefused, match="another one here"):
            await ledger.acknowledged(5, bytes(32), hub_ns=NOW)
        with pytest.raises(RangeRefused, match="does not exist here yet"):
            await ledger.acknowledged(6, bytes(32), hub_ns=NOW)
        assert ledger.acknowledged_seq == 0


_MARKS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20 * MARK_EVERY_NS)), max_size=60)


@given(_MARKS)
def test_marks_rise_are_few_and_never_say_that_the_hub_has_had_a_row_for_longer(
    said: list[tuple[int, int]],
) -> None:
    marks: tuple[Mark, ...] = ()
    told: list[tuple[int, int]] = []
    hub_ns = 0
    for seq, later in said:
        hub_ns += later
        marks = marked(marks, Mark(seq, b"", hub_ns))
        told = [one for one in told if one[0] <= seq] + [(seq, hub_ns)]
        assert marks[-1].seq == seq
        assert [one.seq for one in marks] == sorted({one.seq for one in marks})
        for keep_ns in (1, MARK_EVERY_NS, 5 * MARK_EVERY_NS):
            upto = prunable(marks, keep_ns, hub_ns)
            # What may go was said to be at the hub, by a mark old enough that was never taken back.
            assert upto == 0 or any(at >= upto and hub_ns - when >= keep_ns for at, when in told)
    assert len(marks) <= 2 + hub_ns // MARK_EVERY_NS * 2


# ---- pruning


async def _acknowledge_all(ledger: SqliteLedger, hub_ns: int) -> None:
    await ledger.acknowledged(ledger.last_seq, await _hash(ledger, ledger.last_seq), hub_ns=hub_ns)


async def test_rows_go_when_the_hub_has_had_them_for_long_enough_and_the_chain_still_holds(
    tmp_path: Path,
) -> None:
    path = tmp_path / "ledger.db"
    async with _open(path, pruning=_pruning()) as ledger:
        await _fill(ledger, 700)
        await _acknowledge_all(ledger, NOW)
        await _fill(ledger, 300)
        await ledger.acknowledged(700, await _hash(ledger, 700), hub_ns=NOW + 13 * DAY)
        await _fill(ledger, 1)
        assert len(_rows(path)) == 1001
        await ledger.acknowledged(700, await _hash(ledger, 700), hub_ns=NOW + 14 * DAY)
        await _until(lambda: _rows(path)[:1] == [701])
        assert await ledger.find("r700") is None
        assert await ledger.find("r701") == _record(701)
        with pytest.raises(LedgerUnavailable, match="begins at 701"):
            await ledger.range_after(699, rows=1, size=1)
        found = await ledger.range_after(700, rows=1000, size=1 << 30)
        assert found is not None and len(found.rows) == 301
    found_again = verify(path, keys=KEYS)
    assert (found_again.ok, found_again.start_seq, found_again.rows) == (True, 700, 301)
    async with _open(path, pruning=_pruning()) as ledger:
        assert (ledger.acknowledged_seq, ledger.last_seq) == (700, 1001)
        assert await ledger.append(_record(1002)) == 1002


async def test_everything_may_be_pruned_and_the_numbers_go_on(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    async with _open(path, pruning=_pruning()) as ledger:
        await _fill(ledger, 130)
        await _acknowledge_all(ledger, NOW)
        await ledger.acknowledged(130, await _hash(ledger, 130), hub_ns=NOW + 20 * DAY)
        await _until(lambda: _rows(path) == [])
    async with _open(path, pruning=_pruning()) as ledger:
        assert await ledger.append(_record(131)) == 131
    assert verify(path, keys=KEYS).ok


async def test_a_hub_that_went_back_keeps_rows_from_being_pruned(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    async with _open(path, pruning=_pruning()) as ledger:
        await _fill(ledger, 300)
        await _acknowledge_all(ledger, NOW)
        await ledger.acknowledged(100, await _hash(ledger, 100), hub_ns=NOW + 13 * DAY)
        await ledger.acknowledged(100, await _hash(ledger, 100), hub_ns=NOW + 40 * DAY)
        await _until(lambda: _rows(path)[0] == 101)
        await _acknowledge_all(ledger, NOW + 41 * DAY)
        await ledger.lease("b", "p", 1)  # the writer has been round
        await asyncio.sleep(0.1)
    assert _rows(path) == list(range(101, 301))


async def test_records_that_a_budget_is_restored_from_stay(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    async with _open(path, pruning=_pruning(lambda: 42)) as ledger:
        await _fill(ledger, 300)  # record n arrived at n
        await _acknowledge_all(ledger, NOW)
        await ledger.acknowledged(300, await _hash(ledger, 300), hub_ns=NOW + 15 * DAY)
        await _until(lambda: _rows(path)[0] == 42)
        await asyncio.sleep(0.1)
    assert _rows(path) == list(range(42, 301))
    assert verify(path, keys=KEYS).ok


async def test_a_checkpoint_that_others_signed_or_nobody_is_found(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    async with _open(path, pruning=_pruning()) as ledger:
        await _fill(ledger, 200)
        await _acknowledge_all(ledger, NOW)
        await ledger.acknowledged(200, await _hash(ledger, 200), hub_ns=NOW + 15 * DAY)
        await _until(lambda: _rows(path) == [])
        await _fill(ledger, 2)
    other = dsse.public_key(dsse.new_private_key())
    assert "no good signature" in (verify(path, keys={dsse.key_id(other): other}).why or "")

    tampered = apsw.Connection(str(path))
    tampered.execute("UPDATE checkpoint SET signature = NULL")
    tampered.close()
    assert "is not signed" in (verify(path, keys=KEYS).why or "")
    assert verify(path).ok


async def test_at_its_bound_the_ledger_takes_work_again_once_old_rows_are_gone(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    async with _open(path, max_bytes=1_000_000, pruning=_pruning()) as ledger:
        await _fill(ledger, 1500, error="x" * 1000)
        await _until(lambda: ledger.full)
        assert "the hub has those up to 0" in (ledger.problem() or "")
        await _acknowledge_all(ledger, NOW)
        await _fill(ledger, 1)
        await _until(lambda: "the hub has those up to 1500" in (ledger.problem() or ""))
        await ledger.acknowledged(1500, await _hash(ledger, 1500), hub_ns=NOW + 15 * DAY)
        await _until(lambda: not ledger.full)
        assert ledger.problem() is None
        size = path.stat().st_size
        await _fill(ledger, 100, error="x" * 1000)
    assert path.stat().st_size <= size + 200_000  # what was freed is used again
    assert verify(path, keys=KEYS).ok


async def test_a_signer_that_fails_stops_pruning_and_nothing_else(tmp_path: Path) -> None:
    def refuse(kind: str, body: bytes) -> dsse.Envelope:
        raise ValueError("no key")

    pruning = Pruning(site="s", gateway="g", keep_ns=1, sign=refuse)
    async with _open(tmp_path / "ledger.db", pruning=pruning) as ledger:
        await _fill(ledger, 10)
        await _acknowledge_all(ledger, NOW)
        await ledger.acknowledged(10, await _hash(ledger, 10), hub_ns=NOW + DAY)
        await asyncio.sleep(0.1)
        assert await ledger.append(_record(11)) == 11
        assert ledger.problem() is None
    assert len(_rows(tmp_path / "ledger.db")) == 11
