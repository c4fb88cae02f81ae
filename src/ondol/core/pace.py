"""How fast, and when: a bandwidth cap as a token bucket, and the hours in which something may run.  Pure."""

from __future__ import annotations

from datetime import datetime, tzinfo
from typing import Final

from ondol.errors import InvalidRequest
from ondol.units import NS_PER_S

_DAY_S: Final = 86_400


class Bucket:
    """A cap in bytes a second; mutable, owned by one transfer.  A quarter of a second may come at once."""

    def __init__(self, bytes_per_s: int | None) -> None:
        self._rate = bytes_per_s
        self._free_ns = 0

    def take(self, size: int, now_ns: int) -> int:
        """Nanoseconds to wait after `size` bytes came, so that the cap holds over time; 0 without a cap."""
        if self._rate is None:
            return 0
        burst_ns = NS_PER_S // 4
        start = max(self._free_ns, now_ns - burst_ns)
        self._free_ns = start + size * NS_PER_S // self._rate
        return max(0, self._free_ns - now_ns)


def parse_hours(hours: str) -> tuple[int, int]:
    """`22:00-06:00` as seconds of the day; the second may be lower (past midnight), and equal means all day.

    Raises:
        InvalidRequest: it names no two times of a day.
    """
    begin, _, end = hours.partition("-")
    return _seconds(begin, hours), _seconds(end, hours)


def _seconds(text: str, whole: str) -> int:
    hour, _, minute = text.partition(":")
    if len(text) != 5 or not (hour.isdigit() and minute.isdigit() and text.isascii()):
        raise InvalidRequest(f"hours: found {whole[:40]!r}, expected the form 22:00-06:00")
    if int(hour) > 23 or int(minute) > 59:
        raise InvalidRequest(f"hours: found {whole[:40]!r}, expected times from 00:00 to 23:59")
    return int(hour) * 3600 + int(minute) * 60


def opens_in_s(hours: str | None, wall_ns: int, zone: tzinfo) -> int:
    """Seconds until the hours begin by the wall clock of `zone`; 0 while they last, or without any.

    Across a clock change it may be off by that hour, once: ask again when it has passed.

    Raises:
        InvalidRequest: as `parse_hours`.
    """
    if hours is None:
        return 0
    begin, end = parse_hours(hours)
    local = datetime.fromtimestamp(wall_ns // NS_PER_S, zone)
    now = local.hour * 3600 + local.minute * 60 + local.second
    inside = begin == end or (begin <= now < end if begin < end else now >= begin or now < end)
    return 0 if inside else (begin - now) % _DAY_S
