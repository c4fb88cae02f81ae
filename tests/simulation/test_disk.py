"""The faulty disk: it keeps what was synced, loses what was not, fills up, and dies."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest
from tests.faults.disk import FaultyDisk


@pytest.fixture
def disk(request: pytest.FixtureRequest) -> Iterator[FaultyDisk]:
    made = FaultyDisk(f"faulty-{request.node.name}")
    yield made
    made.unregister()


def _open(path: Path, disk: FaultyDisk, synchronous: str = "FULL") -> apsw.Connection:
    connection = apsw.Connection(str(path), vfs=disk.name)
    connection.execute(f"PRAGMA journal_mode=WAL; PRAGMA synchronous={synchronous}").fetchall()
    return connection


def _rows(path: Path) -> int:
    found: int = apsw.Connection(str(path)).execute("SELECT count(*) FROM t").get
    return found


@pytest.mark.parametrize("seed", range(5))
def test_a_cut_keeps_what_was_committed(tmp_path: Path, disk: FaultyDisk, seed: int) -> None:
    connection = _open(tmp_path / "a.db", disk)
    connection.execute("CREATE TABLE t(x)")
    for number in range(20):
        connection.execute("INSERT INTO t VALUES(?)", (number,))
    disk.cut(tmp_path / "after", random.Random(seed))
    assert _rows(tmp_path / "after" / "a.db") == 20
    disk.bury()
    connection.close()


def test_a_cut_loses_what_was_not_synced(tmp_path: Path, disk: FaultyDisk) -> None:
    connection = _open(tmp_path / "a.db", disk, "NORMAL")
    connection.execute("CREATE TABLE t(x)")
    connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    for number in range(20):
        connection.execute("INSERT INTO t VALUES(?)", (number,))
    disk.cut(tmp_path / "after", None)
    assert _rows(tmp_path / "after" / "a.db") < 20
    disk.bury()
    connection.close()


def test_a_full_disk_refuses_and_recovers(tmp_path: Path, disk: FaultyDisk) -> None:
    connection = _open(tmp_path / "a.db", disk)
    connection.execute("CREATE TABLE t(x)")
    disk.room = 0
    with pytest.raises(apsw.FullError):
        connection.execute("INSERT INTO t VALUES(zeroblob(9000))")
    disk.room = None
    connection.execute("INSERT INTO t VALUES(1)")
    assert connection.execute("SELECT count(*) FROM t").get == 1
    connection.close()


def test_a_dead_disk_does_nothing(tmp_path: Path, disk: FaultyDisk) -> None:
    connection = _open(tmp_path / "a.db", disk)
    connection.execute("CREATE TABLE t(x)")
    disk.dead = True
    with pytest.raises(apsw.Error):
        connection.execute("INSERT INTO t VALUES(1)")
    disk.bury()
    connection.close()
