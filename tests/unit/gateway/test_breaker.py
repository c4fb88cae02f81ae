"""Circuit breakers and the retry budget."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol.gateway.breaker import Breaker, BreakerSettings, RetryBudget

SECOND = 1_000_000_000


def middle() -> float:
    return 0.5  # no jitter


def breaker() -> Breaker:
    return Breaker(middle, BreakerSettings())


def attempt(one: Breaker, outcome: str, now_ns: int, *, began: bool = False) -> None:
    ticket = one.begin(now_ns)
    assert ticket is not None
    one.record(ticket, outcome, now_ns, began=began)


def opened(now_ns: int = 0) -> Breaker:
    one = breaker()
    for _ in range(5):
        attempt(one, "unavailable", now_ns)
    return one


@pytest.mark.parametrize("outcome", ["unavailable", "failed", "deadline"])
def test_five_failures_in_a_row_open_it(outcome: str) -> None:
    one = breaker()
    for _ in range(4):
        attempt(one, outcome, 0)
    assert one.state(0) == "closed"
    attempt(one, outcome, 0)
    assert one.state(0) == "open"
    assert one.begin(0) is None
    assert "5 failures in a row" in one.state_sentence(0)


@pytest.mark.parametrize("outcome", ["rejected", "cancelled", "deadline"])
def test_what_says_nothing_about_health_does_not_count(outcome: str) -> None:
    one = breaker()
    for _ in range(50):
        attempt(one, outcome, 0, began=True)
    assert one.state(0) == "closed"


def test_a_success_breaks_the_row() -> None:
    one = breaker()
    for _ in range(4):
        attempt(one, "unavailable", 0)
    attempt(one, "ok", 0)
    for _ in range(4):
        attempt(one, "unavailable", 0)
    assert one.state(0) == "closed"


def test_half_of_twenty_failing_opens_it() -> None:
    one = breaker()
    for number in range(20):
        assert one.state(0) == "closed"
        attempt(one, "failed" if number % 2 else "ok", 0)
    assert one.state(0) == "open"
    assert "10 of the last 20" in one.state_sentence(0)


def test_failures_of_long_ago_are_forgotten() -> None:
    one = breaker()
    for number in range(30):
        for outcome in ("ok", "failed"):
            attempt(one, outcome, number * 4 * SECOND)
    assert one.state(120 * SECOND) == "closed"


def test_one_probe_at_a_time_and_its_success_closes() -> None:
    one = opened()
    assert not one.allows(SECOND - 1)
    assert one.allows(SECOND)
    assert one.state(SECOND) == "half-open"
    probe = one.begin(SECOND)
    assert probe is not None
    assert one.begin(SECOND) is None
    assert "one probe is under way" in one.state_sentence(SECOND)
    one.record(probe, "ok", SECOND)
    assert one.state(SECOND) == "closed"
    assert one.state_sentence(SECOND) == "takes requests"
    for _ in range(4):
        attempt(one, "failed", SECOND)
    assert one.state(SECOND) == "closed"


def test_failed_probes_double_the_rest_up_to_a_minute() -> None:
    one, now_ns, rests = opened(), 0, []
    for _ in range(8):
        began_ns = now_ns
        while not one.allows(now_ns):
            now_ns += SECOND // 2
        rests.append((now_ns - began_ns) // SECOND)
        attempt(one, "unavailable", now_ns)
    assert rests == [1, 2, 4, 8, 16, 32, 60, 60]


@pytest.mark.parametrize("outcome", ["cancelled", "rejected"])
def test_a_probe_that_says_nothing_makes_room_for_the_next(outcome: str) -> None:
    one = opened()
    attempt(one, outcome, SECOND)
    assert one.state(SECOND) == "half-open"
    assert one.allows(SECOND)


def test_a_lost_probe_does_not_block_forever_and_its_late_answer_is_ignored() -> None:
    one = opened()
    lost = one.begin(SECOND)
    later_ns = 121 * SECOND
    assert lost is not None
    assert not one.allows(later_ns - 1)
    second = one.begin(later_ns)
    assert second is not None
    one.record(lost, "ok", later_ns)
    assert one.state(later_ns) == "half-open"
    one.record(second, "ok", later_ns)
    assert one.state(later_ns) == "closed"


def test_answers_from_before_it_opened_change_nothing() -> None:
    one = breaker()
    early = one.begin(0)
    assert early is not None
    for _ in range(5):
        attempt(one, "failed", 0)
    one.record(early, "ok", 0)
    assert one.state(0) == "open"
    one.record(early, "failed", 2 * SECOND)
    assert one.allows(2 * SECOND)


def test_it_rests_as_long_as_the_endpoint_asks() -> None:
    one = breaker()
    ticket = one.begin(0)
    assert ticket is not None
    one.record(ticket, "unavailable", 0, retry_after_s=30)
    assert not one.allows(30 * SECOND - 1)
    assert one.allows(30 * SECOND)
    assert "asked for 30 s" in one.state_sentence(0)


def test_a_rest_asked_for_by_a_probe_outlasts_the_usual_one() -> None:
    one = opened()
    probe = one.begin(SECOND)
    assert probe is not None
    one.record(probe, "unavailable", SECOND, retry_after_s=100)
    assert not one.allows(101 * SECOND - 1)
    assert one.allows(101 * SECOND)


def test_an_absurd_rest_is_cut_to_an_hour() -> None:
    one = breaker()
    ticket = one.begin(0)
    assert ticket is not None
    one.record(ticket, "unavailable", 0, retry_after_s=1e9)
    assert one.allows(3600 * SECOND)


def test_jitter_spreads_by_a_fifth_and_comes_from_the_generator_given() -> None:
    def rest(seed: int) -> int:
        one = Breaker(Random(seed).random)
        for _ in range(5):
            attempt(one, "failed", 0)
        return next(ms for ms in range(2000) if one.allows(ms * 1_000_000))

    rests = [rest(seed) for seed in range(50)]
    assert rests == [rest(seed) for seed in range(50)]
    assert 800 <= min(rests) < 900 < 1100 < max(rests) <= 1201


@given(
    st.lists(
        st.tuples(
            st.integers(0, 5 * SECOND),
            st.sampled_from(["ok", "failed", "unavailable", "cancelled", "rejected", "deadline"]),
            st.integers(0, 3),
        ),
        max_size=200,
    )
)
def test_at_most_one_probe_runs_and_it_always_recovers(steps: list[tuple[int, str, int]]) -> None:
    one, now_ns = breaker(), 0
    running: list[int] = []
    for wait_ns, outcome, finish in steps:
        now_ns += wait_ns
        half_open = one.state(now_ns) == "half-open"
        ticket = one.begin(now_ns)
        if ticket is not None:
            running.append(ticket)
            assert not half_open or one.begin(now_ns) is None
        for _ in range(min(finish, len(running))):
            one.record(running.pop(0), outcome, now_ns)
    now_ns += 200 * SECOND
    attempt(one, "ok", now_ns)
    assert one.state(now_ns) == "closed"


def test_retries_are_the_floor_plus_a_fifth_of_requests() -> None:
    budget = RetryBudget()
    assert sum(budget.take(0) for _ in range(100)) == 10
    for _ in range(100):
        budget.request(0)
    assert sum(budget.take(0) for _ in range(100)) == 20
    assert sum(budget.take(11 * SECOND) for _ in range(100)) == 10
