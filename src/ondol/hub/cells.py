"""Sums of usage by day and place, kept in the same transaction as the rows: what a question reads.

A cell is one UTC day of one site, team, key, route, model and currency.  Amounts are decimal text, because
they pass 63 bits; they are added in Python, exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from ondol.core.costs import Sums
from ondol.core.ports import Tx
from ondol.core.usage import UsageRecord
from ondol.errors import RangeRefused
from ondol.units import NS_PER_S

DAY_NS: Final = 86_400 * NS_PER_S
_INT_MAX: Final = (1 << 63) - 1

SCHEMA: Final[tuple[str, ...]] = (
    "CREATE TABLE cells(day BIGINT NOT NULL, site TEXT NOT NULL, answered_by TEXT NOT NULL, team TEXT NOT NULL,"
    " key_id TEXT NOT NULL, route TEXT NOT NULL, model TEXT NOT NULL, currency TEXT NOT NULL,"
    " requests BIGINT NOT NULL, for_peers BIGINT NOT NULL, cache_hits BIGINT NOT NULL,"
    " input_tokens BIGINT NOT NULL, output_tokens BIGINT NOT NULL, unpriced BIGINT NOT NULL,"
    " unmeasured BIGINT NOT NULL, cost TEXT NOT NULL, energy_uj TEXT, carbon_ng TEXT,"
    " PRIMARY KEY(day, site, answered_by, team, key_id, route, model, currency))",
)


class Place(NamedTuple):
    """What a cell sums: `day` counts UTC days since 1970; `answered_by` is the site that made the answer."""

    day: int
    site: str
    answered_by: str
    team: str
    key_id: str
    route: str
    model: str
    currency: str


_PLACE: Final = ", ".join(Place._fields)
_COUNTS: Final = (
    "requests", "for_peers", "cache_hits", "input_tokens", "output_tokens", "unpriced", "unmeasured",
)  # fmt: skip
_AMOUNTS: Final = ("cost", "energy_uj", "carbon_ng")
_SUMS: Final = ", ".join(_COUNTS + _AMOUNTS)
_IS_PLACE: Final = " AND ".join(f"{name} = ?" for name in Place._fields)
_FIND: Final = f"SELECT {_SUMS} FROM cells WHERE {_IS_PLACE}"  # noqa: S608  # names of ours only
_SCAN: Final = f"SELECT {_PLACE}, {_SUMS} FROM cells WHERE day >= ? AND day < ?"  # noqa: S608  # names of ours only
_PUT: Final = (
    f"INSERT INTO cells({_PLACE}, {_SUMS}) VALUES({','.join('?' * 18)}) ON CONFLICT({_PLACE}) DO UPDATE SET "
    + ", ".join(f"{name} = excluded.{name}" for name in _COUNTS + _AMOUNTS)
)


def place_of(record: UsageRecord) -> Place:
    """The cell of a record.  A peer's request is counted where it was booked, as `core.costs` has it."""
    site = record.site
    return Place(
        record.time_ns // DAY_NS,
        site,
        site if record.origin is not None else record.answered_by or site,
        record.team,
        record.key_id,
        record.route,
        record.model,
        record.currency,
    )


def add(tx: Tx, fresh: Mapping[Place, Sums]) -> None:
    """Add sums to their cells; in a fixed order, so that two replicas do not wait for each other.

    Raises:
        RangeRefused: a count would pass 63 bits.
    """
    rows = []
    # PostgreSQL's text holds no NUL; two names that differ only there share a cell.
    by_place: dict[Place, Sums] = {}
    for place, sums in fresh.items():
        clean = Place(place.day, *(name.replace("\0", "\ufffd") for name in place[1:]))
        by_place.setdefault(clean, Sums()).merge(sums)
    for place in sorted(by_place):
        sums = by_place[place]
        for found in tx.run(_FIND, place):
            sums.merge(_sums(found))
        counts = [getattr(sums, name) for name in _COUNTS]
        if not all(0 <= count <= _INT_MAX for count in counts):
            raise RangeRefused(
                f"usage of {place.site}: its tokens on one day add up to {max(counts)}: no such count"
            )
        rows.append((*place, *counts, *(_text(getattr(sums, name)) for name in _AMOUNTS)))
    tx.many(_PUT, rows)


def scan(tx: Tx, *, since_day: int, until_day: int) -> Iterator[tuple[Place, Sums]]:
    """The cells of the days since <= day < until."""
    for row in tx.run(_SCAN, (since_day, until_day)):
        yield Place(*row[:8]), _sums(row[8:])


def _sums(row: tuple[Any, ...]) -> Sums:
    sums = Sums()
    for name, count in zip(_COUNTS, row, strict=False):
        setattr(sums, name, int(count))
    sums.cost = int(row[7])
    sums.energy_uj = None if row[8] is None else int(row[8])
    sums.carbon_ng = None if row[9] is None else int(row[9])
    return sums


def _text(amount: int | None) -> str | None:
    return None if amount is None else str(amount)
