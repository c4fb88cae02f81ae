"""What was done to the fleet, by whom and when: the hub's own audit.  Pure over a transaction.

Lines are numbered without holes.  (What sites did comes from them: `hub/ingest.py`.)
"""

from __future__ import annotations

from typing import Final

from ondol.core.ports import Tx

SCHEMA: Final[tuple[str, ...]] = (
    "CREATE TABLE audit(id BIGINT NOT NULL PRIMARY KEY, time_ns BIGINT NOT NULL, kind TEXT NOT NULL,"
    " subject TEXT NOT NULL, detail TEXT NOT NULL)",
)


def note(tx: Tx, now_ns: int, kind: str, subject: str, detail: str) -> None:
    """One more line."""
    number = int(tx.run("SELECT COALESCE(MAX(id), 0) + 1 FROM audit")[0][0])
    tx.run(
        "INSERT INTO audit(id, time_ns, kind, subject, detail) VALUES(?,?,?,?,?)",
        (number, now_ns, kind, subject[:200], detail[:500]),
    )


def newest(tx: Tx, limit: int) -> list[dict[str, object]]:
    """The newest lines, newest first."""
    rows = tx.run("SELECT id, time_ns, kind, subject, detail FROM audit ORDER BY id DESC LIMIT ?", (limit,))
    names = ("id", "time_ns", "kind", "subject", "detail")
    return [dict(zip(names, row, strict=True)) for row in rows]


def prune(tx: Tx, *, before_ns: int) -> None:
    """Forget lines from before a time of the hub's clock.  The newest stays: the next number is above it."""
    tx.run("DELETE FROM audit WHERE time_ns < ? AND id < (SELECT MAX(id) FROM audit)", (before_ns,))
