"""Questions about usage: who used and paid what, from all sites, counted once.

What a question about whole UTC days needs stands in the cells, which are as exact as the rows.  Questions by tag,
or about another zone's days, read the rows.  The rules of counting are those of `core.costs`: a request that
a peer answered is a request of the site that was asked and a cost of the site that paid.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime, timedelta, tzinfo
from typing import Final
from zoneinfo import ZoneInfo

import msgspec

from ondol.core.costs import GROUPINGS, CostRow, Sums, fold
from ondol.core.ports import Tx
from ondol.core.usage import UsageRecord, decode_record
from ondol.errors import InvalidRequest
from ondol.hub import cells
from ondol.units import NS_PER_S

PAGE_ROWS: Final = 1024
_EPOCH: Final = date(1970, 1, 1)
_LAST: Final = (1 << 63) - 1
_LAST_DAY: Final = date.max.toordinal()
_FIELDS: Final = {"team": "team", "route": "route", "model": "model", "key": "key_id"}
_QUERY: Final = ("by", "since", "until", "zone")


class Received(msgspec.Struct, frozen=True, kw_only=True):
    """How far the hub has a gateway's ledger: it has all records 1 … `records`, and has them durably."""

    gateway: str
    site: str
    records: int
    taken_ns: int


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """Rows by a grouping, the total of each currency, and what they were made from."""

    by: str
    since: str | None
    until: str | None
    zone: str
    rows: list[CostRow]
    total: list[CostRow]
    received: list[Received]


def answer(tx: Tx, query: Mapping[str, str]) -> Answer:
    """What `GET usage` says.

    `by`: a grouping of `core.costs` (default site); `since`, `until`: days, the second one excluded; `zone`:
    whose days (default UTC).

    Raises:
        InvalidRequest: a parameter is unknown or not one of its values.
    """
    for name in query:
        if name not in _QUERY:
            raise InvalidRequest(
                f"usage: found parameter {name[:40]!r}; expected {', '.join(_QUERY)}", param=name[:40]
            )
    by, zone_name = query.get("by", "site"), query.get("zone", "UTC")
    since, until, zone = _day(query, "since"), _day(query, "until"), _zone(zone_name)
    rows = totals(tx, by=by, since=since, until=until, zone=zone)
    return Answer(
        by=by,
        since=None if since is None else since.isoformat(),
        until=None if until is None else until.isoformat(),
        zone=zone_name,
        rows=rows,
        total=totals(tx, by="", since=since, until=until, zone=zone),
        received=received(tx),
    )


def totals(
    tx: Tx, *, by: str, since: date | None = None, until: date | None = None, zone: tzinfo = UTC
) -> list[CostRow]:
    """The rows that `core.costs.fold` makes of all records of the days since <= day < until.

    `by` empty makes one row for each currency.  From the cells about 3 µs a cell; by tag, or for the days of
    another zone, about 15 µs a record.

    Raises:
        InvalidRequest: no such grouping.
    """
    if by and by not in GROUPINGS and not (by.startswith("tag:") and len(by) > len("tag:")):
        raise InvalidRequest(
            f"usage: found by={by[:40]!r}; expected {', '.join(GROUPINGS)} or tag:NAME", param="by"
        )
    reads_days = by == "day" or since is not None or until is not None
    if by.startswith("tag") or (zone is not UTC and reads_days):
        found = records(tx, since_ns=_start_ns(since, zone), until_ns=_start_ns(until, zone))
        return fold(found, by=by, zone=zone) if by else _one_row(found)
    since_day = 0 if since is None else (since - _EPOCH).days
    until_day = _LAST if until is None else (until - _EPOCH).days
    sums: dict[tuple[str, str], Sums] = {}
    for place, of_cell in cells.scan(tx, since_day=since_day, until_day=until_day):
        answered, booked = _keys(place, by)
        sums.setdefault((answered, place.currency), Sums()).merge_requests(of_cell)
        sums.setdefault((booked, place.currency), Sums()).merge_booked(of_cell)
    return [sums[key].row(*key) for key in sorted(sums)]


def received(tx: Tx) -> list[Received]:
    """Every gateway whose ledger is here, by site."""
    rows = tx.run("SELECT gateway, site, seq, taken_ns FROM marks ORDER BY site, gateway")
    return [
        Received(gateway=gateway, site=site, records=int(seq), taken_ns=int(taken_ns))
        for gateway, site, seq, taken_ns in rows
    ]


def rows_after(tx: Tx, gateway: str, seq: int, limit: int) -> list[tuple[int, bytes]]:
    """At most `limit` rows of a gateway after number `seq`, as the site wrote them, in order."""
    rows = tx.run(
        "SELECT seq, payload FROM usage WHERE gateway = ? AND seq > ? ORDER BY seq LIMIT ?",
        (gateway, seq, limit),
    )
    return [(int(number), bytes(payload)) for number, payload in rows]


def records(tx: Tx, *, since_ns: int | None = None, until_ns: int | None = None) -> Iterator[UsageRecord]:
    """All records of since <= arrival < until, by gateway and number; some thousand of them in memory."""
    for gateway, in tx.run("SELECT gateway FROM marks ORDER BY gateway"):  # fmt: skip
        seq = 0
        while rows := tx.run(
            "SELECT seq, time_ns, payload FROM usage WHERE gateway = ? AND seq > ? ORDER BY seq LIMIT ?",
            (gateway, seq, PAGE_ROWS),
        ):
            for number, time_ns, payload in rows:
                seq = int(number)
                if (since_ns is None or time_ns >= since_ns) and (until_ns is None or time_ns < until_ns):
                    yield decode_record(bytes(payload))


def _one_row(found: Iterator[UsageRecord]) -> list[CostRow]:
    sums: dict[str, Sums] = {}
    for record in found:
        of_currency = sums.setdefault(record.currency, Sums())
        of_currency.add_request(record)
        of_currency.add_booked(record)
    return [sums[currency].row("", currency) for currency in sorted(sums)]


def _keys(place: cells.Place, by: str) -> tuple[str, str]:
    """Under what the requests of a cell are counted, and under what its money."""
    if by == "site":
        return place.answered_by, place.site
    if by == "day":
        ordinal = min(_EPOCH.toordinal() + place.day, _LAST_DAY)
        key = date.fromordinal(ordinal).isoformat()
    else:
        key = getattr(place, _FIELDS[by]) if by else ""
    return key, key


def _day(query: Mapping[str, str], name: str) -> date | None:
    text = query.get(name)
    if text is None:
        return None
    try:
        day = date.fromisoformat(text)
    except ValueError:
        day = date.min
    if day < _EPOCH:
        raise InvalidRequest(
            f"usage: found {name}={text[:40]!r}; expected a day from 1970 on, such as 2026-11-24", param=name
        )
    return day


def _zone(name: str) -> tzinfo:
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name[:64])
    except (ValueError, OSError, KeyError):  # a path, a folder, an unknown name
        raise InvalidRequest(
            f"usage: found zone={name[:64]!r}; expected a time zone such as Asia/Seoul", param="zone"
        ) from None


def _start_ns(day: date | None, zone: tzinfo) -> int | None:
    if day is None:
        return None
    start = datetime(day.year, day.month, day.day, tzinfo=zone)
    return (start - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(seconds=1) * NS_PER_S
