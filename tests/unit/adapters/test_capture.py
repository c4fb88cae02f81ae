"""Captured prompts: kept, bounded, and really gone when their time is over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import apsw
import pytest

from ondol.adapters.capture import Captured, SqliteCapture
from ondol.errors import SchemaTooNew


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "capture.db"


@pytest.fixture
def capture(path: Path) -> Iterator[SqliteCapture]:
    with closing(SqliteCapture(path, max_bytes=20_000)) as opened:
        yield opened


def on_disk(path: Path) -> bytes:
    return b"".join(file.read_bytes() for file in path.parent.iterdir())


def test_what_was_captured_is_shown_until_its_time(capture: SqliteCapture) -> None:
    assert capture.put("r1", b"why?", b"because", 100)
    assert capture.get("r1", 99) == Captured(b"why?", b"because", 100)
    assert capture.get("r1", 100) is None
    assert capture.get("r2", 0) is None


def test_a_second_capture_takes_the_place_of_the_first(capture: SqliteCapture) -> None:
    capture.put("r1", b"why?", b"", 100)
    capture.put("r1", b"why?", b"because", 200)
    assert capture.get("r1", 150) == Captured(b"why?", b"because", 200)


def test_expired_content_is_gone_from_the_disk(capture: SqliteCapture, path: Path) -> None:
    for number in range(20):
        capture.put(f"old{number}", b"my-secret-prompt" * 20, b"my-secret-answer" * 20, 100)
    capture.put("new", b"fresh-prompt", b"", 200)
    assert b"my-secret" in on_disk(path)
    assert capture.expire(100) == 20
    assert b"my-secret" not in on_disk(path)
    assert b"fresh-prompt" in on_disk(path)
    assert capture.expire(100) == 0


def test_the_room_is_given_back(path: Path) -> None:
    with closing(SqliteCapture(path)) as capture:
        capture.put("r1", b"x" * 1_000_000, b"", 100)
        full = path.stat().st_size
        capture.expire(100)
        assert path.stat().st_size < full / 10


def test_the_oldest_make_room(capture: SqliteCapture) -> None:
    for number in range(30):
        assert capture.put(f"r{number}", b"x" * 900, b"y" * 900, 100)
    kept = [number for number in range(30) if capture.get(f"r{number}", 0) is not None]
    assert kept == list(range(20, 30))
    assert not capture.put("huge", b"x" * 20_000, b"", 100)
    assert capture.get("r29", 0) is not None


def test_only_the_owner_may_read(capture: SqliteCapture, path: Path) -> None:
    capture.put("r1", b"why?", b"because", 100)
    assert {file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {0o600}


def test_it_survives_a_restart_and_refuses_a_newer_schema(path: Path) -> None:
    with closing(SqliteCapture(path)) as capture:
        capture.put("r1", b"why?", b"because", 100)
    with closing(SqliteCapture(path)) as capture:
        assert capture.get("r1", 0) is not None
    with closing(apsw.Connection(str(path))) as db:
        db.execute("PRAGMA user_version = 2").fetchall()
    with pytest.raises(SchemaTooNew):
        SqliteCapture(path)
