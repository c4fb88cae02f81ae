"""When a second endpoint is asked as well."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol.gateway.hedge import hedge_after

MS = st.floats(0, 1e6)


@pytest.mark.parametrize(
    ("first", "second", "remaining", "after"),
    [
        (100, 50, 200, None),  # the first makes it
        (300, 50, 200, 100),  # as late as the second can be, less a margin
        (300, 180, 200, 0),
        (300, 200, 200, 0),
        (300, 250, 200, 0),  # both late, the second less so
        (300, 400, 200, None),  # both late, and the second more so
    ],
)
def test_as_late_as_possible_and_only_where_it_helps(
    first: float, second: float, remaining: float, after: float | None
) -> None:
    assert hedge_after(first, second, remaining) == after


@given(MS, MS, MS)
def test_the_second_can_make_it_where_it_could_from_the_start(
    first: float, second: float, remaining: float
) -> None:
    after = hedge_after(first, second, remaining)
    if after is not None:
        assert after >= 0
        assert after + second <= max(remaining, second) + 1e-6
