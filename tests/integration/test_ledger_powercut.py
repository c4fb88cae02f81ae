"""A power cut at any moment: what was acknowledged is there, whatever the disk had not synced yet.

`tests/powercut.py` rebuilds the files as a cut at any point would leave them: unsynced changes are gone, or a
random part of them is there in spite of it (disks reorder).  The same test with `synchronous=NORMAL` must lose
rows, else it would prove nothing.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.powercut import Change, Disk, after_cut

from ondol.adapters.ledger import SqliteLedger
from ondol.adapters.ledger_reader import records, verify
from ondol.core.usage import UsageRecord
from ondol.errors import LedgerBroken, LedgerUnavailable

pytestmark = pytest.mark.anyio

ROWS = 180
CUTS = 40


class NormalLedger(SqliteLedger):
    """The ledger with the setting that most programs use, which is not enough."""

    _synchronous = "NORMAL"


@pytest.fixture
def disk(request: pytest.FixtureRequest) -> Iterator[Disk]:
    disk = Disk(f"powercut-{request.node.name}")
    yield disk
    disk.unregister()


async def _fill(kind: type[SqliteLedger], path: Path, disk: Disk) -> list[int]:
    """Append ROWS records; the length of the disk's list at each acknowledgement, by number."""
    loop = asyncio.get_running_loop()
    acknowledged = [0] * ROWS
    ledger = kind(path, gateway="g", max_bytes=1 << 30, loop=loop, vfs=disk.name)

    async def work(number: int) -> None:
        seq = await ledger.append(
            UsageRecord(
                request_id=f"r{number}", time_ns=number, site="s", gateway="g", tenant="default",
                team="a", key_id="k", route="r", task="chat", outcome="completed", status=200,
            )
        )  # fmt: skip
        acknowledged[seq - 1] = len(disk.changes)

    for first in range(0, ROWS, 60):
        for number in range(first, first + 60, 2):
            await asyncio.gather(work(number), work(number + 1))
        await _until_copied(path, disk, since=len(disk.changes))  # so that the WAL restarts
    await ledger.close()
    return acknowledged


async def _until_copied(path: Path, disk: Disk, *, since: int) -> None:
    copied = Change(str(path), "sync")
    async with asyncio.timeout(20):
        while copied not in disk.changes[since:]:  # noqa: ASYNC110  # a file does not tell when it is synced
            await asyncio.sleep(0.01)


def _lost(disk: Disk, acknowledged: list[int], folder: Path, *, lucky: bool) -> int:
    """In how many cuts an acknowledged record is gone, or the file cannot be read."""
    moments = random.Random(7)  # moments, not secrets
    lost = 0
    for cut in range(CUTS):
        moment = moments.randrange(acknowledged[0], len(disk.changes) + 1)
        target = folder / f"cut-{cut}-{lucky}"
        target.mkdir()
        after_cut(disk.changes[:moment], target, moments if lucky else None)
        expected = sum(1 for each in acknowledged if each <= moment)
        try:
            result = verify(target / "ledger.db")
            found = len({each.request_id for each in records(target / "ledger.db")})
            lost += not result.ok or found != result.rows or found < expected
        except (LedgerBroken, LedgerUnavailable):
            lost += 1
    return lost


async def test_a_power_cut_loses_nothing_that_was_acknowledged(tmp_path: Path, disk: Disk) -> None:
    acknowledged = await _fill(SqliteLedger, tmp_path / "ledger.db", disk)

    assert _lost(disk, acknowledged, tmp_path, lucky=False) == 0
    assert _lost(disk, acknowledged, tmp_path, lucky=True) == 0


async def test_the_same_cuts_lose_rows_where_commits_are_not_synced(tmp_path: Path, disk: Disk) -> None:
    acknowledged = await _fill(NormalLedger, tmp_path / "ledger.db", disk)

    assert _lost(disk, acknowledged, tmp_path, lucky=False) > 0


async def test_a_ledger_goes_on_after_a_power_cut(tmp_path: Path, disk: Disk) -> None:
    acknowledged = await _fill(SqliteLedger, tmp_path / "ledger.db", disk)
    target = tmp_path / "cut"
    target.mkdir()
    after_cut(disk.changes[: acknowledged[99]], target, None)

    loop = asyncio.get_running_loop()
    ledger = SqliteLedger(target / "ledger.db", gateway="g", max_bytes=1 << 30, loop=loop)
    kept = verify(target / "ledger.db").rows
    record = next(iter(records(target / "ledger.db")))
    seq = await ledger.append(record)
    await ledger.close()

    assert kept >= 100
    assert seq == kept + 1
    assert verify(target / "ledger.db").ok
