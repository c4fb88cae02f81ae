"""The ledger as an outbox: which rows the hub has, and since when; and rows read out in one piece.

A **mark** says that the hub had every row up to a number, durably, at some time of its own clock.  A few are kept
over the time, so that it is known which rows have been at the hub long enough to be pruned; the newest is what
was acknowledged.  Invariant: marks rise in their number; a hub that went back takes the later ones away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import apsw
import msgspec

from ondol.core.ports import LedgerRange
from ondol.core.usage import GENESIS
from ondol.errors import LedgerUnavailable
from ondol.units import NS_PER_S

MARK_EVERY_NS: Final = 3600 * NS_PER_S
"""Marks are an hour apart, save the newest: 336 of them in two weeks."""

_RANGE: Final = """
SELECT count(*), max(seq), CAST(group_concat(text, char(10)) AS BLOB) FROM (
  SELECT seq, CAST(payload AS TEXT) AS text FROM (
    SELECT seq, payload, sum(length(payload)) OVER (ORDER BY seq) AS total
    FROM (SELECT seq, payload FROM usage WHERE seq > :after ORDER BY seq LIMIT :rows))
  WHERE total <= :size OR seq = :after + 1 ORDER BY seq)
"""
"""One row for a whole range: each row that SQLite hands over gives up the interpreter's lock and has to win it
back from a busy event loop.  Records are JSON on one line, so a line break can only stand between two of them."""


class Mark(msgspec.Struct, frozen=True, array_like=True):
    """The hub had all rows up to `seq`, whose hash is that, at its time `hub_ns`."""

    seq: int
    hash: bytes
    hub_ns: int


def load_marks(connection: apsw.Connection) -> tuple[Mark, ...]:
    """The marks of a file, by number."""
    return tuple(Mark(*row) for row in connection.execute("SELECT seq, hash, hub_ns FROM mark ORDER BY seq"))


def marked(marks: tuple[Mark, ...], new: Mark) -> tuple[Mark, ...]:
    """The marks after another acknowledgement.  A lower number than before takes back what was above it."""
    same = [one for one in marks if one.seq <= new.seq]
    if same and same[-1].seq == new.seq:
        return tuple(same)  # it was there as early as that says
    if len(same) > 1 and new.hub_ns - same[-2].hub_ns < MARK_EVERY_NS:
        same.pop()
    return (*same, new)


def write_marks(cursor: apsw.Cursor, old: tuple[Mark, ...], new: tuple[Mark, ...]) -> None:
    """Make the file's marks `new`, within the caller's transaction."""
    cursor.executemany("DELETE FROM mark WHERE seq = ?", [(one.seq,) for one in old if one not in new])
    cursor.executemany(
        "INSERT INTO mark(seq, hash, hub_ns) VALUES(?,?,?)",
        [(one.seq, one.hash, one.hub_ns) for one in new if one not in old],
    )


def prunable(marks: Sequence[Mark], keep_ns: int, hub_ns: int) -> int:
    """The last row that the hub has had for `keep_ns` at its time `hub_ns`; 0 for none."""
    return max((one.seq for one in marks if hub_ns - one.hub_ns >= keep_ns), default=0)


def hash_at(connection: apsw.Connection, seq: int) -> bytes | None:
    """The hash of a row, or of the checkpoint that stands for it; None where neither is here."""
    if seq == 0:
        return GENESIS
    found: bytes | None = connection.execute(
        "SELECT hash FROM usage WHERE seq = ?1 UNION ALL SELECT hash FROM checkpoint WHERE seq = ?1 LIMIT 1",
        (seq,),
    ).get
    return found


def read_range(connection: apsw.Connection, seq: int, *, rows: int, size: int) -> LedgerRange | None:
    """At most `rows` rows after `seq` of `size` bytes together, and always one where there is one.

    Raises:
        LedgerUnavailable: rows after `seq` were pruned, or a row is damaged.
    """
    with connection:  # one read transaction: rows, and the hashes that go with them
        previous = hash_at(connection, seq)
        if previous is None:
            oldest = connection.execute("SELECT min(seq) FROM usage").get
            raise LedgerUnavailable(
                f"rows after {seq} were asked for, and this ledger begins at {oldest or 'none'}: what was before has "
                "been at the hub for `ledger_keep_days` and was pruned. Restore a newer backup of the hub."
            )
        found: tuple[Any, ...] = connection.execute(
            _RANGE, {"after": seq, "rows": rows, "size": size}
        ).fetchall()[0]
        count, last, joined = found
        if not count:
            return None
        last_hash = hash_at(connection, last)
    payloads = tuple(joined.split(b"\n"))
    if last - seq != count or len(payloads) != count or last_hash is None or previous is None:
        raise LedgerUnavailable(
            f"rows {seq + 1} to {last}: found {len(payloads)} of {last - seq}. Run `ondol ledger verify`."
        )
    return LedgerRange(first=seq + 1, previous=previous, rows=payloads, last_hash=last_hash)
