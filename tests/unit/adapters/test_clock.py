"""The clocks of this machine."""

from __future__ import annotations

import time

from ondol.adapters.clock import SystemClock


def test_the_monotonic_clock_never_goes_back_and_the_wall_clock_counts_from_1970() -> None:
    clock = SystemClock()

    first, second = clock.now_ns(), clock.now_ns()
    before, wall, after = time.time_ns(), clock.wall_ns(), time.time_ns()

    assert first <= second
    assert before <= wall <= after
