"""A power cut while a ledger prunes, or copies its WAL: the chain holds, and nothing is gone that was not signed off."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest
from tests.powercut import Disk, after_cut

from ondol.adapters.ledger import SqliteLedger
from ondol.adapters.ledger_pruning import Pruning
from ondol.adapters.ledger_reader import records, verify
from ondol.core import dsse
from ondol.core.usage import UsageRecord
from ondol.units import NS_PER_S

pytestmark = pytest.mark.anyio

DAY = 86_400 * NS_PER_S
NOW = 1_800_000_000 * NS_PER_S
ROUNDS = 4
ROWS = 150
CUTS = 60
PRIVATE = dsse.new_private_key()
KEYS = {dsse.key_id(dsse.public_key(PRIVATE)): dsse.public_key(PRIVATE)}


@pytest.fixture
def disk(request: pytest.FixtureRequest) -> Iterator[Disk]:
    disk = Disk(f"prunecut-{request.node.name}")
    yield disk
    disk.unregister()


def _pruning() -> Pruning:
    return Pruning(
        site="s", gateway="g", keep_ns=DAY, sign=lambda kind, body: dsse.sign(PRIVATE, kind, body)
    )  # fmt: skip


def _record(number: int) -> UsageRecord:
    return UsageRecord(
        request_id=f"r{number}", time_ns=number, site="s", gateway="g", tenant="default", team="a", key_id="k",
        route="r", task="chat", outcome="completed", status=200,
    )  # fmt: skip


async def _live(path: Path, disk: Disk) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Rounds of work, acknowledgement and pruning: when (in the disk's list) which row and which mark was durable."""
    kept: list[tuple[int, int]] = []
    marks: list[tuple[int, int]] = []
    ledger = SqliteLedger(
        path,
        gateway="g",
        max_bytes=1 << 30,
        loop=asyncio.get_running_loop(),
        vfs=disk.name,
        pruning=_pruning(),
    )
    for turn in range(ROUNDS):
        async with asyncio.TaskGroup() as group:  # pruning of the round before goes on beside it

            async def work(number: int) -> None:
                seq = await ledger.append(_record(number))
                kept.append((len(disk.changes), seq))

            for number in range(ROWS):
                group.create_task(work(number))
                if number % 10 == 0:
                    await asyncio.sleep(0.004)
        found = await ledger.range_after(ledger.acknowledged_seq, rows=ROWS - 10, size=1 << 30)
        assert found is not None
        mark = found.first + len(found.rows) - 1
        await ledger.acknowledged(mark, found.last_hash, hub_ns=NOW + turn * DAY)
        marks.append((len(disk.changes), mark))
    await asyncio.sleep(0.2)
    await ledger.close()
    return kept, marks


def _moments(disk: Disk, path: Path, luck: random.Random, first: int) -> list[int]:
    """Moments anywhere, and as many within the copying of the WAL into the database."""
    copying = [
        at for at, change in enumerate(disk.changes)
        if change.file == str(path) and change.what == "write" and at > first
    ]  # fmt: skip
    anywhere = [luck.randrange(first, len(disk.changes) + 1) for _ in range(CUTS)]
    return anywhere + [luck.choice(copying) + luck.randrange(2) for _ in range(CUTS)]


@pytest.mark.parametrize("lucky", [False, True])
async def test_a_cut_while_pruning_or_copying_loses_nothing(tmp_path: Path, disk: Disk, lucky: bool) -> None:
    path = tmp_path / "ledger.db"
    kept, marks = await _live(path, disk)
    luck = random.Random(11)
    started_in: set[int] = set()
    for cut, moment in enumerate(_moments(disk, path, luck, kept[0][0])):
        target = tmp_path / f"cut-{cut}"
        target.mkdir()
        after_cut(disk.changes[:moment], target, luck if lucky else None)
        found = verify(target / "ledger.db", keys=KEYS)
        assert found.ok, found.why
        assert found.last_seq >= max(seq for at, seq in kept if at <= moment)
        assert found.rows == sum(1 for _ in records(target / "ledger.db"))
        started_in.add(found.start_seq)
        connection = apsw.Connection(str(target / "ledger.db"))
        mark = connection.execute("SELECT coalesce(max(seq), 0) FROM mark").get
        connection.close()
        assert mark >= max((seq for at, seq in marks if at <= moment), default=0)
        assert found.start_seq <= mark  # only what the hub has is gone
        ledger = SqliteLedger(
            target / "ledger.db",
            gateway="g",
            max_bytes=1 << 30,
            loop=asyncio.get_running_loop(),
            pruning=_pruning(),
        )
        assert await ledger.append(_record(0)) == found.last_seq + 1
        await ledger.close()
    assert len(started_in) > 2  # the cuts did fall between the steps
