"""Caps and hours, without a clock of our own."""

from __future__ import annotations

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol.core.pace import Bucket, opens_in_s, parse_hours
from ondol.errors import InvalidRequest
from ondol.units import NS_PER_S


@given(st.lists(st.integers(1, 300_000), min_size=5, max_size=60), st.integers(1000, 10_000_000))
def test_over_time_a_cap_holds_whatever_the_pieces(pieces: list[int], rate: int) -> None:
    bucket, now = Bucket(rate), 10**15
    begun = now
    for size in pieces:
        now += bucket.take(size, now)
    least = sum(pieces) * NS_PER_S // rate - NS_PER_S // 4
    assert now - begun >= least - len(pieces)
    assert now - begun <= least + NS_PER_S // 4 + len(pieces)


def test_idle_time_is_not_saved_up() -> None:
    bucket = Bucket(1000)
    bucket.take(1000, 0)
    hours = 3600 * NS_PER_S
    assert bucket.take(1000, hours) == 3 * NS_PER_S // 4


def test_without_a_cap_nothing_waits() -> None:
    assert Bucket(None).take(10**12, 0) == 0


def wall(hour: int, minute: int = 0) -> int:
    return int(datetime(2026, 11, 24, hour, minute, tzinfo=UTC).timestamp()) * NS_PER_S


@pytest.mark.parametrize(
    ("hours", "hour", "wait"),
    [
        ("22:00-06:00", 23, 0), ("22:00-06:00", 5, 0), ("22:00-06:00", 6, 16), ("22:00-06:00", 12, 10),
        ("01:00-05:00", 0, 1), ("01:00-05:00", 1, 0), ("01:00-05:00", 5, 20), ("09:00-09:00", 3, 0), (None, 3, 0),
    ],
)  # fmt: skip
def test_the_hours_of_a_day(hours: str | None, hour: int, wait: int) -> None:
    assert opens_in_s(hours, wall(hour), UTC) == wait * 3600


def test_the_hours_are_those_of_the_place() -> None:
    assert opens_in_s("22:00-06:00", wall(14), ZoneInfo("Asia/Seoul")) == 0
    assert opens_in_s("22:00-06:00", wall(12, 30), ZoneInfo("Asia/Seoul")) == 1800


@pytest.mark.parametrize(
    "text", ["", "22-06", "22:00", "24:00-06:00", "22:60-06:00", "aa:bb-cc:dd", "٢٢:00-06:00"]
)
def test_what_is_no_hours_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="hours"):
        parse_hours(text)
