"""How far the site's clock is from the hub's: bounded by what was measured, whatever is done to the clocks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ondol.gateway.clocks import DRIFT_PPM, OFF_NS, ClockOffset
from ondol.units import NS_PER_S


class HandClock:
    """A clock that a test sets."""

    def __init__(self, *, wall_ns: int = 10**18) -> None:
        self.mono = 10**12
        self.wall = wall_ns

    def now_ns(self) -> int:
        return self.mono

    def wall_ns(self) -> int:
        return self.wall

    def pass_(self, ns: int) -> None:
        self.mono += ns
        self.wall += ns


def _exchange(clock: HandClock, offset: ClockOffset, *, ahead_ns: int, there_ns: int, back_ns: int) -> None:
    """One call, while our wall clock is `ahead_ns` of the hub's."""
    sent = clock.mono
    clock.pass_(there_ns)
    hub_ns = clock.wall - ahead_ns
    clock.pass_(back_ns)
    offset.seen(sent_ns=sent, received_ns=clock.mono, hub_ns=hub_ns)


def test_nothing_is_known_before_the_first_exchange() -> None:
    offset = ClockOffset(HandClock())
    assert (offset.ns, offset.error_ns, offset.hub_ns(), offset.sentence()) == (None, None, None, None)


_MS = st.integers(0, 3000)
_STEPS = st.lists(st.tuples(_MS, _MS, st.integers(0, 3600), st.integers(-50, 50)), min_size=1, max_size=40)


@given(_STEPS, st.integers(-(10**15), 10**15))
def test_the_true_offset_is_within_the_bound_however_slow_either_way_is(
    steps: list[tuple[int, int, int, int]], ahead_ns: int
) -> None:
    clock = HandClock()
    offset = ClockOffset(clock)
    for there_ms, back_ms, wait_s, set_by_s in steps:
        clock.pass_(wait_s * NS_PER_S)
        clock.wall += set_by_s * NS_PER_S  # somebody sets the wall clock; the hub's goes on
        ahead_ns += set_by_s * NS_PER_S
        _exchange(clock, offset, ahead_ns=ahead_ns, there_ns=there_ms * 10**6, back_ns=back_ms * 10**6)
        assert offset.ns is not None and offset.error_ns is not None
        assert abs(offset.ns - ahead_ns) <= offset.error_ns
        # Never worse than what the last exchange alone would say.
        trip_ns = (there_ms + back_ms) * 10**6
        assert offset.error_ns <= trip_ns // 2 + trip_ns * DRIFT_PPM // 10**6 + 2


def test_the_shortest_round_trip_counts_until_it_is_too_old() -> None:
    clock = HandClock()
    offset = ClockOffset(clock)
    _exchange(clock, offset, ahead_ns=7 * NS_PER_S, there_ns=10**6, back_ns=10**6)
    _exchange(clock, offset, ahead_ns=7 * NS_PER_S, there_ns=0, back_ns=2 * 10**9)
    assert offset.ns is not None and abs(offset.ns - 7 * NS_PER_S) < 3 * 10**6
    clock.pass_(NS_PER_S * 1_000_000 // DRIFT_PPM * 2)  # it may have drifted by two seconds since
    _exchange(clock, offset, ahead_ns=7 * NS_PER_S, there_ns=10**8, back_ns=0)
    assert offset.error_ns is not None and offset.error_ns < 10**8


def test_a_clock_that_somebody_sets_is_seen_at_once() -> None:
    clock = HandClock()
    offset = ClockOffset(clock)
    _exchange(clock, offset, ahead_ns=0, there_ns=10**6, back_ns=10**6)
    clock.wall += 3600 * NS_PER_S
    assert offset.ns is not None and abs(offset.ns - 3600 * NS_PER_S) < 2 * 10**6
    hub_ns = offset.hub_ns()
    assert hub_ns is not None and abs(hub_ns - (clock.wall - 3600 * NS_PER_S)) < 2 * 10**6


def test_a_machine_that_slept_believes_the_newest_exchange() -> None:
    clock = HandClock()
    offset = ClockOffset(clock)
    _exchange(clock, offset, ahead_ns=0, there_ns=1000, back_ns=1000)
    clock.wall += 8 * 3600 * NS_PER_S  # eight hours passed, and the monotonic clock stood still
    _exchange(clock, offset, ahead_ns=0, there_ns=10**8, back_ns=10**8)
    assert offset.ns is not None and abs(offset.ns) <= 10**8 + 2


def test_a_clock_that_is_off_is_said_with_its_direction_and_a_good_one_is_not() -> None:
    for ahead_ns, word in ((OFF_NS * 2, "10 s ahead of"), (-OFF_NS * 2, "10 s behind"), (OFF_NS, None)):
        clock = HandClock()
        offset = ClockOffset(clock)
        _exchange(clock, offset, ahead_ns=ahead_ns, there_ns=10**6, back_ns=10**6)
        sentence = offset.sentence()
        assert (sentence is None) if word is None else (sentence is not None and word in sentence)
