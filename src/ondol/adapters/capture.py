"""Prompts and answers kept for debugging, where a route asks for it, until their time is over.

Owns `capture.db`, readable by its owner only.  What is deleted is overwritten with zeros in the file
(`secure_delete`), and there is no log of old pages: the rollback journal is cut to nothing after each
transaction.  Freed blocks of the disk itself are out of its reach.
"""

from __future__ import annotations

from pathlib import Path
from threading import Lock

import msgspec

from ondol.adapters.privatedb import open_private

_MIGRATIONS = (
    """
    CREATE TABLE captures (
        seq INTEGER PRIMARY KEY,
        request_id TEXT NOT NULL UNIQUE,
        prompt BLOB NOT NULL,
        answer BLOB NOT NULL,
        expires_ns INTEGER NOT NULL,
        size INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX captures_by_expiry ON captures (expires_ns);
    """,
)
_ROW_OVERHEAD = 128


class Captured(msgspec.Struct, frozen=True):
    """One request as it came and one answer as it went."""

    prompt: bytes
    answer: bytes
    expires_ns: int


class SqliteCapture:
    """The captures of one site.  Every call blocks on the disk: call it in a thread."""

    def __init__(self, path: Path, *, max_bytes: int = 256 * 1024 * 1024) -> None:
        """Hold at most `max_bytes` of content; the oldest are given up first.

        Raises:
            SchemaTooNew: a newer Ondol wrote the file.
        """
        # auto_vacuum gives the room back to the disk; it must come before the first table.
        self._db = open_private(
            path,
            pragmas=(
                "auto_vacuum=FULL",
                "journal_mode=TRUNCATE",
                "synchronous=FULL",
                "secure_delete=ON",
                "temp_store=MEMORY",
            ),
            migrations=_MIGRATIONS,
        )
        self._max_bytes = max_bytes
        self._lock = Lock()

    def put(self, request_id: str, prompt: bytes, answer: bytes, expires_ns: int) -> bool:
        """Keep both until `expires_ns` (wall clock); False when they alone pass the bound.

        A second capture of the same request takes the place of the first.
        """
        size = len(prompt) + len(answer) + _ROW_OVERHEAD
        if size > self._max_bytes:
            return False
        with self._lock, self._db:
            self._db.execute("DELETE FROM captures WHERE request_id = ?", (request_id,))
            self._make_room(size)
            self._db.execute(
                "INSERT INTO captures (request_id, prompt, answer, expires_ns, size) VALUES (?, ?, ?, ?, ?)",
                (request_id, prompt, answer, expires_ns, size),
            )
        return True

    def get(self, request_id: str, wall_ns: int) -> Captured | None:
        """What was captured of a request, or None; nothing is shown past its time."""
        with self._lock:
            row = self._db.execute(
                "SELECT prompt, answer, expires_ns FROM captures WHERE request_id = ? AND expires_ns > ?",
                (request_id, wall_ns),
            ).fetchone()
        return None if row is None else Captured(*row)

    def expire(self, wall_ns: int) -> int:
        """Delete for good what is past its time; how many."""
        with self._lock:
            self._db.execute("DELETE FROM captures WHERE expires_ns <= ?", (wall_ns,))
            return self._db.changes()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def _make_room(self, size: int) -> None:
        held: int = self._db.execute("SELECT coalesce(sum(size), 0) FROM captures").get
        while held + size > self._max_bytes:
            freed: int = self._db.execute(
                "DELETE FROM captures WHERE seq = (SELECT min(seq) FROM captures) RETURNING size"
            ).get
            held -= freed
