"""Days, weeks and months in a time zone, as half-open intervals of wall-clock nanoseconds.

The one invariant: the periods of a kind and a zone follow each other without gap or overlap, also where a
clock change makes a midnight happen twice or not at all.
"""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, tzinfo
from typing import Final, Literal, assert_never

import msgspec

from ondol.units import NS_PER_S

PeriodKind = Literal["day", "week", "month"]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_DAY: Final = timedelta(days=1)


class Period(msgspec.Struct, frozen=True):
    """`start_ns` belongs to the period, `end_ns` to the next.

    `key` reads `2026-11-24` (day), `2026-W48` (week, numbered as ISO 8601 does) or `2026-11` (month).
    """

    key: str
    start_ns: int
    end_ns: int


def period(wall_ns: int, kind: PeriodKind, tz: tzinfo) -> Period:
    """The period that holds `wall_ns` (nanoseconds since 1970 UTC, from 1970 to the year 9998).

    A period begins at the first local midnight of its first day.  Where the clock skips that midnight it
    begins at the skip; a day that the clock skips altogether (Apia, 2011-12-30) has no period.  About 10 us:
    callers keep the result until `end_ns`.
    """
    local = datetime.fromtimestamp(wall_ns // NS_PER_S, tz).date()
    first = _first_day(local, kind)
    # The local date alone is not enough: around a clock change at midnight it can go back by one.
    while _midnight_ns(first, tz) > wall_ns:
        first = _first_day(first - _DAY, kind)
    after = _first_day_after(first, kind)
    while _midnight_ns(after, tz) <= wall_ns:
        first, after = after, _first_day_after(after, kind)
    return Period(_key(first, kind), _midnight_ns(first, tz), _midnight_ns(after, tz))


def _first_day(day: date, kind: PeriodKind) -> date:
    match kind:
        case "day":
            return day
        case "week":
            return day - timedelta(days=day.weekday())
        case "month":
            return day.replace(day=1)
        case _:
            assert_never(kind)


def _first_day_after(first: date, kind: PeriodKind) -> date:
    match kind:
        case "day":
            return first + _DAY
        case "week":
            return first + timedelta(days=7)
        case "month":
            return (first + timedelta(days=31)).replace(day=1)
        case _:
            assert_never(kind)


def _midnight_ns(day: date, tz: tzinfo) -> int:
    # fold=0 means the first of two midnights.  In a gap it means the offset before the change (PEP 495),
    # which for a gap that begins at midnight is the moment of the change.
    since = datetime(day.year, day.month, day.day, tzinfo=tz) - _EPOCH
    return (since.days * 86_400 + since.seconds) * NS_PER_S


def _key(first: date, kind: PeriodKind) -> str:
    match kind:
        case "day":
            return first.isoformat()
        case "week":
            year, week, _ = first.isocalendar()
            return f"{year:04d}-W{week:02d}"
        case "month":
            return f"{first.year:04d}-{first.month:02d}"
        case _:
            assert_never(kind)
