"""A disk that fails: waiters are told, nothing of the batch is kept, and work goes on when it can."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import apsw
import pytest

from ondol.adapters.ledger import SqliteLedger
from ondol.adapters.ledger_reader import records, verify
from ondol.core.usage import UsageRecord
from ondol.errors import LedgerUnavailable

pytestmark = pytest.mark.anyio


class FailingDisk(apsw.VFS):
    """The real disk until `after` more writes (or syncs) were done; then it fails until told otherwise."""

    def __init__(self, name: str) -> None:
        self.after: int | None = None
        self.fail_sync = False
        self.name = name
        super().__init__(name, "")

    def xOpen(self, name: apsw.URIFilename | str | None, flags: list[int]) -> apsw.VFSFile:  # noqa: N802
        return _File(self, name, flags)


class _File(apsw.VFSFile):
    def __init__(self, disk: FailingDisk, name: apsw.URIFilename | str | None, flags: list[int]) -> None:
        super().__init__("", name, flags)
        self.disk = disk

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        if self.disk.after is not None:
            if self.disk.after <= 0:
                raise apsw.FullError("no space left on the test's disk")
            self.disk.after -= 1
        super().xWrite(data, offset)

    def xSync(self, flags: int) -> None:  # noqa: N802
        if self.disk.fail_sync:
            raise apsw.IOError("the test's disk does not sync")
        super().xSync(flags)


@pytest.fixture
def disk(request: pytest.FixtureRequest) -> Iterator[FailingDisk]:
    disk = FailingDisk(f"failing-{request.node.name}")
    yield disk
    disk.unregister()


@pytest.fixture
async def ledger(tmp_path: Path, disk: FailingDisk) -> AsyncIterator[SqliteLedger]:
    loop = asyncio.get_running_loop()
    ledger = SqliteLedger(tmp_path / "ledger.db", gateway="g", max_bytes=1 << 30, loop=loop, vfs=disk.name)
    yield ledger
    await ledger.close()


def _record(name: str) -> UsageRecord:
    return UsageRecord(
        request_id=name, time_ns=1, site="s", gateway="g", tenant="default", team="a", key_id="k",
        route="r", task="chat", outcome="completed", status=200, error="x" * 500,
    )  # fmt: skip


async def _until_well(ledger: SqliteLedger) -> None:
    async with asyncio.timeout(20):
        while ledger.problem() is not None:  # noqa: ASYNC110  # the ledger tells by an attribute
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("after", [0, 1, 5])
async def test_a_full_disk_is_said_and_nothing_of_the_batch_is_kept(
    tmp_path: Path, ledger: SqliteLedger, disk: FailingDisk, after: int
) -> None:
    await asyncio.gather(*(ledger.append(_record(f"before{n}")) for n in range(10)))

    disk.after = after
    told = await asyncio.gather(
        *(ledger.append(_record(f"lost{n}")) for n in range(40)), return_exceptions=True
    )
    assert {type(each) for each in told} == {LedgerUnavailable}
    assert "cannot be written" in (ledger.problem() or "")
    assert not ledger.full
    assert await ledger.find("before3") == _record("before3")
    with pytest.raises(LedgerUnavailable, match="has room"):
        await ledger.lease("team", "2026-01", 5)

    disk.after = None
    await _until_well(ledger)
    assert await ledger.append(_record("after")) == 11

    kept = [each.request_id for each in records(tmp_path / "ledger.db")]
    assert kept == [*(f"before{n}" for n in range(10)), "after"]
    assert verify(tmp_path / "ledger.db").ok


async def test_a_disk_that_does_not_sync_acknowledges_nothing(
    tmp_path: Path, ledger: SqliteLedger, disk: FailingDisk
) -> None:
    await ledger.append(_record("before"))

    disk.fail_sync = True
    with pytest.raises(LedgerUnavailable):
        await ledger.append(_record("lost"))
    assert ledger.problem() is not None

    disk.fail_sync = False
    await _until_well(ledger)
    assert await ledger.append(_record("after")) == 2
    assert [each.request_id for each in records(tmp_path / "ledger.db")] == ["before", "after"]


async def test_a_request_that_is_in_flight_finds_the_disk_well_again_by_itself(
    ledger: SqliteLedger, disk: FailingDisk
) -> None:
    disk.after = 0
    with pytest.raises(LedgerUnavailable):
        await ledger.append(_record("lost"))
    disk.after = None

    assert await ledger.append(_record("kept")) == 1
    await _until_well(ledger)


async def test_closing_while_the_disk_is_full_answers_everybody(
    tmp_path: Path, ledger: SqliteLedger, disk: FailingDisk
) -> None:
    await ledger.append(_record("before"))
    disk.after = 0
    waiters = [ledger.submit(_record(f"lost{n}")) for n in range(3)]

    await ledger.close()

    assert [type(each.exception()) for each in waiters] == [LedgerUnavailable] * 3
    disk.after = None
    assert verify(tmp_path / "ledger.db").rows == 1


async def test_a_lock_that_another_program_holds_is_waited_out(tmp_path: Path, ledger: SqliteLedger) -> None:
    other = apsw.Connection(str(tmp_path / "ledger.db"))
    other.execute("BEGIN IMMEDIATE")
    waiter = asyncio.create_task(ledger.append(_record("patient")))
    await asyncio.sleep(0.05)
    assert not waiter.done()
    other.execute("COMMIT")
    other.close()

    assert await waiter == 1
