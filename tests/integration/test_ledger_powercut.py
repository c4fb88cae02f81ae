"""A power cut at any moment: what was acknowledged is there, whatever the disk had not synced yet.

A VFS of ours writes down every write, truncate and sync of the real ledger.  From that list the files are
rebuilt as a cut at any point would leave them: unsynced changes are gone, or a random part of them is
there in spite of it (disks reorder).  The same test with `synchronous=NORMAL` must lose rows, else it
would prove nothing.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import apsw
import pytest

from ondol.adapters.ledger import SqliteLedger
from ondol.adapters.ledger_reader import records, verify
from ondol.core.usage import UsageRecord
from ondol.errors import LedgerBroken, LedgerUnavailable

pytestmark = pytest.mark.anyio

ROWS = 180
CUTS = 40


class Change(NamedTuple):
    """One thing that was asked of the disk."""

    file: str
    what: Literal["write", "truncate", "sync"]
    at: int = 0
    data: bytes = b""


class Disk(apsw.VFS):
    """The real disk, with a list of what it was asked."""

    def __init__(self, name: str) -> None:
        self.changes: list[Change] = []
        self.lock = threading.Lock()
        self.name = name
        super().__init__(name, "")

    def note(self, change: Change) -> None:
        with self.lock:
            self.changes.append(change)

    def xOpen(self, name: apsw.URIFilename | str | None, flags: list[int]) -> apsw.VFSFile:  # noqa: N802
        return _File(self, name, flags)


class _File(apsw.VFSFile):
    def __init__(self, disk: Disk, name: apsw.URIFilename | str | None, flags: list[int]) -> None:
        super().__init__("", name, flags)
        self.disk = disk
        self.file = name.filename() if isinstance(name, apsw.URIFilename) else str(name)

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        self.disk.note(Change(self.file, "write", offset, bytes(data)))
        super().xWrite(data, offset)

    def xTruncate(self, newsize: int) -> None:  # noqa: N802
        self.disk.note(Change(self.file, "truncate", newsize))
        super().xTruncate(newsize)

    def xSync(self, flags: int) -> None:  # noqa: N802
        super().xSync(flags)
        self.disk.note(Change(self.file, "sync"))


class NormalLedger(SqliteLedger):
    """The ledger with the setting that most programs use, which is not enough."""

    _synchronous = "NORMAL"


@pytest.fixture
def disk(request: pytest.FixtureRequest) -> Iterator[Disk]:
    disk = Disk(f"powercut-{request.node.name}")
    yield disk
    disk.unregister()


def _after_cut(changes: list[Change], target: Path, luck: random.Random | None) -> None:
    """Write to the folder what a cut after these changes leaves; `luck` keeps some unsynced ones."""
    synced = {change.file: index for index, change in enumerate(changes) if change.what == "sync"}
    files: dict[str, bytearray] = {}
    for index, change in enumerate(changes):
        if index > synced.get(change.file, -1) and (luck is None or luck.random() < 0.5):
            continue
        content = files.setdefault(change.file, bytearray())
        if change.what == "write":
            content.extend(bytes(max(0, change.at + len(change.data) - len(content))))
            content[change.at : change.at + len(change.data)] = change.data
        elif change.what == "truncate":
            del content[change.at :]
    for file, content in files.items():
        if not file.endswith("-journal"):
            (target / Path(file).name).write_bytes(content)


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
        _after_cut(disk.changes[:moment], target, moments if lucky else None)
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
    _after_cut(disk.changes[: acknowledged[99]], target, None)

    loop = asyncio.get_running_loop()
    ledger = SqliteLedger(target / "ledger.db", gateway="g", max_bytes=1 << 30, loop=loop)
    kept = verify(target / "ledger.db").rows
    record = next(iter(records(target / "ledger.db")))
    seq = await ledger.append(record)
    await ledger.close()

    assert kept >= 100
    assert seq == kept + 1
    assert verify(target / "ledger.db").ok
