"""When a site was heard, by the clock of this replica and by what others wrote."""

from __future__ import annotations

from ondol.hub.liveness import NEVER_NS, Liveness
from ondol.units import NS_PER_S

HOUR = 3600 * NS_PER_S


def test_the_newer_of_here_and_elsewhere_counts() -> None:
    known = Liveness()
    assert known.ago_ns("a", 100 * NS_PER_S, 40 * NS_PER_S) == 40 * NS_PER_S
    known.heard("a", 90 * NS_PER_S)
    assert known.ago_ns("a", 100 * NS_PER_S, 40 * NS_PER_S) == 10 * NS_PER_S
    assert known.ago_ns("a", 100 * NS_PER_S, 4 * NS_PER_S) == 4 * NS_PER_S


def test_a_time_in_the_future_says_nothing_unless_two_clocks_differ_by_a_little() -> None:
    known = Liveness()
    assert known.ago_ns("a", 0, -HOUR) == NEVER_NS
    assert known.ago_ns("a", 0, -NS_PER_S) == 0
    known.heard("a", 0)
    assert known.ago_ns("a", 50 * NS_PER_S, -HOUR) == 50 * NS_PER_S
    assert not known.live("a", "i", 50 * NS_PER_S, -HOUR)


def test_that_a_site_is_heard_is_written_now_and_then() -> None:
    known = Liveness()
    assert known.due("a", 0)
    known.heard("a", 0)
    assert known.due("a", 0)
    known.heard("a", 0, written=True)
    assert not known.due("a", 4 * NS_PER_S)
    assert known.due("a", 5 * NS_PER_S)


def test_who_hung_up_is_gone_until_it_watches_again() -> None:
    known = Liveness()
    known.heard("a", 0)
    known.watching("a", "one")
    assert known.live("a", "one", NS_PER_S, HOUR)
    known.hung_up("a", "one")
    assert not known.live("a", "one", NS_PER_S, HOUR)
    assert known.live("a", "two", NS_PER_S, HOUR)
    known.watching("a", "one")
    assert known.live("a", "one", NS_PER_S, HOUR)
