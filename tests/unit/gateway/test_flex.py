"""Work that can wait: for a slot, for its hours, and never past its deadline."""

from __future__ import annotations

from datetime import UTC

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol.core.route_terms import Flex
from ondol.gateway.flex import hold_s, is_flex
from ondol.units import NS_PER_S

NOON = 20_000 * 86_400 * NS_PER_S + 12 * 3600 * NS_PER_S
NIGHT = Flex(hours="22:00-06:00")
HOUR_MS = 3_600_000.0


def hold(
    flex: Flex | None = None, *, remaining_ms: float = HOUR_MS, needs_ms: float = 1000.0, slot: bool = True
) -> float:
    return hold_s(flex, wall_ns=NOON, zone=UTC, remaining_ms=remaining_ms, needs_ms=needs_ms, slot=slot)


def test_what_says_that_a_request_can_wait() -> None:
    assert is_flex({"service_tier": "flex"}, ())
    assert is_flex({}, (("service_tier", "flex"),))
    assert not is_flex({"service_tier": "auto"}, (("team", "flex"),))


def test_a_free_slot_begins_it_at_once_and_none_is_waited_for() -> None:
    assert hold() == 0
    assert hold(slot=False) == 0.5
    assert hold(slot=False, remaining_ms=1200) == pytest.approx(0.2)
    assert hold(slot=False, remaining_ms=900) == 0


def test_its_hours_are_waited_for_where_they_begin_in_time() -> None:
    assert hold(NIGHT, remaining_ms=11 * HOUR_MS) == 60
    assert hold(NIGHT, remaining_ms=9 * HOUR_MS) == 0, "they begin in ten hours, past its deadline"
    assert hold(Flex(hours="11:00-13:00")) == 0


@given(st.floats(0, 1e9), st.floats(0, 1e9), st.booleans(), st.booleans())
def test_it_is_never_held_past_the_time_that_its_answer_needs(
    remaining: float, needs: float, slot: bool, night: bool
) -> None:
    held = hold(NIGHT if night else None, remaining_ms=remaining, needs_ms=needs, slot=slot)
    assert held == 0 or held * 1000 <= remaining - needs + 1e-6
