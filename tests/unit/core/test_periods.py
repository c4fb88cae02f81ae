"""Periods partition time, in every zone and across every clock change."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone, tzinfo
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol.core.periods import PeriodKind, period

KINDS: tuple[PeriodKind, ...] = ("day", "week", "month")
ZONES = (
    "UTC",
    "Asia/Seoul",
    "Europe/Berlin",
    "America/New_York",
    "America/Sao_Paulo",  # changed its clocks at midnight
    "Africa/Cairo",  # changes at midnight
    "America/St_Johns",  # changed at 00:01, so that some dates began twice
    "Pacific/Apia",  # skipped 2011-12-30
    "Australia/Lord_Howe",  # half an hour of summer time
    "Asia/Kathmandu",
)
SECOND = 1_000_000_000


def ns(*parts: int, tz: tzinfo = UTC) -> int:
    year, month, day, *clock = parts
    hour, minute, second = (*clock, 0, 0, 0)[:3]
    at = datetime(year, month, day, hour, minute, second, tzinfo=tz)
    return int(at.timestamp()) * SECOND


@given(
    wall_ns=st.integers(0, ns(2200, 1, 1)),
    kind=st.sampled_from(KINDS),
    zone=st.sampled_from(ZONES),
)
def test_periods_partition_time(wall_ns: int, kind: PeriodKind, zone: str) -> None:
    tz = ZoneInfo(zone)
    here = period(wall_ns, kind, tz)
    assert here.start_ns <= wall_ns < here.end_ns
    assert period(here.start_ns, kind, tz) == here
    assert period(here.end_ns - 1, kind, tz) == here
    following = period(here.end_ns, kind, tz)
    assert following.start_ns == here.end_ns
    assert following.key > here.key


@given(
    hours=st.integers(0, 24 * 3),
    kind=st.sampled_from(KINDS),
    zone=st.sampled_from(ZONES),
    around=st.sampled_from(
        [
            (2010, 11, 7),
            (2011, 12, 29),
            (2018, 11, 3),
            (2018, 2, 16),
            (2024, 4, 25),
            (2024, 10, 30),
            (2026, 3, 28),
            (2026, 10, 24),
            (2026, 10, 31),
            (1999, 10, 30),
        ]
    ),
)
def test_periods_partition_time_around_clock_changes(
    hours: int, kind: PeriodKind, zone: str, around: tuple[int, int, int]
) -> None:
    tz = ZoneInfo(zone)
    here = period(ns(*around) + hours * 3600 * SECOND, kind, tz)
    assert period(here.end_ns, kind, tz).start_ns == here.end_ns
    assert period(here.start_ns - 1, kind, tz).end_ns == here.start_ns


def test_month_of_a_zone_begins_at_its_own_midnight() -> None:
    seoul = ZoneInfo("Asia/Seoul")
    here = period(ns(2026, 10, 31, 15), "month", seoul)
    assert here.key == "2026-11"
    assert here.start_ns == ns(2026, 10, 31, 15)
    assert here.end_ns == ns(2026, 11, 30, 15)
    assert period(here.start_ns - 1, "month", seoul).key == "2026-10"


def test_day_of_a_clock_change_is_23_or_25_hours_long() -> None:
    berlin = ZoneInfo("Europe/Berlin")
    spring = period(ns(2026, 3, 29, 12), "day", berlin)
    autumn = period(ns(2026, 10, 25, 12), "day", berlin)
    assert spring.end_ns - spring.start_ns == 23 * 3600 * SECOND
    assert autumn.end_ns - autumn.start_ns == 25 * 3600 * SECOND


def test_day_whose_midnight_is_skipped_begins_at_the_skip() -> None:
    sao_paulo = ZoneInfo("America/Sao_Paulo")
    here = period(ns(2018, 11, 4, 12), "day", sao_paulo)
    assert here.key == "2018-11-04"
    assert here.start_ns == ns(2018, 11, 4, 3)


def test_day_that_begins_twice_begins_the_first_time() -> None:
    st_johns = ZoneInfo("America/St_Johns")  # 2010-11-07 00:01 became 2010-11-06 23:01
    here = period(ns(2010, 11, 7, 2, 45), "day", st_johns)
    assert here.key == "2010-11-07"
    assert here.start_ns == ns(2010, 11, 7, 2, 30)
    assert period(here.start_ns - 1, "day", st_johns).key == "2010-11-06"


class SkipsFromHalfPastEleven(tzinfo):
    """A zone that goes from 2026-03-28 23:30 UTC to 00:30 of the next day, ahead of UTC from then on."""

    change = datetime(2026, 3, 28, 23, 30)
    hour = timedelta(hours=1)

    def utcoffset(self, dt: datetime | None) -> timedelta:
        assert dt is not None
        skipped_until = self.change + self.hour
        ahead = dt.replace(tzinfo=None, fold=0) >= (self.change if dt.fold else skipped_until)
        return self.hour if ahead else timedelta(0)

    def dst(self, dt: datetime | None) -> timedelta:
        return self.utcoffset(dt)

    def tzname(self, dt: datetime | None) -> str:
        return f"UTC+{self.utcoffset(dt)}"

    def fromutc(self, dt: datetime) -> datetime:
        return dt + self.hour if dt.replace(tzinfo=None) >= self.change else dt


@pytest.mark.parametrize("minute", range(0, 120, 5))
def test_a_skip_across_midnight_leaves_neither_gap_nor_overlap(minute: int) -> None:
    tz = SkipsFromHalfPastEleven()
    wall_ns = ns(2026, 3, 28, 23) + minute * 60 * SECOND
    here = period(wall_ns, "day", tz)
    assert here.start_ns <= wall_ns < here.end_ns
    assert period(here.end_ns, "day", tz).start_ns == here.end_ns


def test_skipped_day_has_no_period() -> None:
    apia = ZoneInfo("Pacific/Apia")
    before = period(ns(2011, 12, 30, 9, 59, 59), "day", apia)
    after = period(ns(2011, 12, 30, 10), "day", apia)
    assert (before.key, after.key) == ("2011-12-29", "2011-12-31")
    assert before.end_ns == after.start_ns


@pytest.mark.parametrize(
    ("day", "key"),
    [
        ((2026, 11, 24), "2026-W48"),
        ((2027, 1, 3), "2026-W53"),
        ((2027, 1, 4), "2027-W01"),
        ((2024, 12, 30), "2025-W01"),
    ],
)
def test_weeks_begin_on_monday_and_are_numbered_as_iso_does(day: tuple[int, int, int], key: str) -> None:
    here = period(ns(*day), "week", UTC)
    assert here.key == key
    assert datetime.fromtimestamp(here.start_ns / SECOND, UTC).weekday() == 0


def test_fixed_offsets_work_without_a_zone_database() -> None:
    tz = timezone(timedelta(hours=9))
    assert period(ns(2026, 12, 31, 15), "day", tz).key == "2027-01-01"
