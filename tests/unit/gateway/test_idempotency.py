"""Requests by Idempotency-Key: nothing is done twice, nothing grows without bound."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol.errors import Conflict, InvalidRequest, Overloaded
from ondol.gateway.idempotency import (
    DEFAULT_TTL_NS,
    Done,
    IdempotencyStore,
    KeptAnswer,
    Running,
    Slot,
    Started,
)

ANSWER = KeptAnswer(status=200, headers=(("content-type", "application/json"),), body=b"{}")


def store(max_bytes: int = 1_000_000) -> IdempotencyStore[str]:
    return IdempotencyStore(max_bytes)


def started(of: IdempotencyStore[str], key: str = "a", *, now_ns: int = 0, waiter: str = "w") -> Slot[str]:
    answer = of.begin("k1", key, b"hash", now_ns, waiter)
    assert isinstance(answer, Started)
    return answer.slot


def test_the_first_runs_the_second_waits_the_third_gets_the_answer() -> None:
    some = store()
    slot = started(some, waiter="first")
    assert some.begin("k1", "a", b"hash", 0, "second") == Running("first")
    assert some.finish(slot, ANSWER) == "first"
    assert some.begin("k1", "a", b"hash", 0, "third") == Done(ANSWER)


def test_another_request_under_the_same_key_is_a_conflict_running_or_done() -> None:
    some = store()
    slot = started(some)
    with pytest.raises(Conflict, match="different request"):
        some.begin("k1", "a", b"other", 0, "w")
    some.finish(slot, ANSWER)
    with pytest.raises(Conflict, match="different request"):
        some.begin("k1", "a", b"other", 0, "w")


def test_callers_do_not_share_keys() -> None:
    some = store()
    started(some)
    assert isinstance(some.begin("k2", "a", b"other", 0, "w"), Started)


def test_what_failed_may_be_tried_again_also_differently() -> None:
    some = store()
    assert some.abandon(started(some, waiter="first")) == "first"
    assert isinstance(some.begin("k1", "a", b"other", 0, "w"), Started)


def test_after_a_day_it_is_forgotten_but_never_while_it_runs() -> None:
    some = store()
    slot = started(some)
    assert isinstance(some.begin("k1", "a", b"hash", DEFAULT_TTL_NS, "w"), Running)
    some.finish(slot, ANSWER)
    assert isinstance(some.begin("k1", "a", b"hash", DEFAULT_TTL_NS - 1, "w"), Done)
    assert isinstance(some.begin("k1", "a", b"hash", DEFAULT_TTL_NS, "w"), Started)


def test_expiry_frees_what_nobody_asks_for_again() -> None:
    some = store()
    some.finish(started(some, "a"), ANSWER)
    running = started(some, "b", now_ns=0)
    assert some.expire(DEFAULT_TTL_NS) == 1
    assert len(some) == 1
    some.abandon(running)
    assert some.bytes_held == 0


def test_an_answer_too_large_to_keep_is_still_not_done_twice() -> None:
    some = store(80_000)
    some.finish(started(some), KeptAnswer(status=200, chunks=(b"x" * 5000, b"y" * 5000)))
    with pytest.raises(Conflict, match="too large to keep"):
        some.begin("k1", "a", b"hash", 0, "w")
    assert some.bytes_held < 2000


def test_the_oldest_finished_give_way_and_the_running_do_not() -> None:
    some = store(10_000)
    running = started(some, "running")
    for number in range(20):
        some.finish(started(some, f"k{number}"), ANSWER)
        assert some.bytes_held <= 10_000
    assert isinstance(some.begin("k1", "running", b"hash", 0, "w"), Running)
    assert isinstance(some.begin("k1", "k19", b"hash", 0, "w"), Done)
    assert isinstance(some.begin("k1", "k0", b"hash", 0, "w"), Started)
    some.finish(running, ANSWER)


def test_more_running_than_can_be_remembered_are_refused() -> None:
    some = store(10_000)
    for number in range(9):
        started(some, f"k{number}")
    with pytest.raises(Overloaded, match="9 requests"):
        started(some, "one more")


@pytest.mark.parametrize("key", ["", "x" * 256, "naïve", "a\nb"])
def test_a_bad_key_is_refused(key: str) -> None:
    with pytest.raises(InvalidRequest, match="1 to 255 printable ASCII") as caught:
        store().begin("k1", key, b"hash", 0, "w")
    assert caught.value.param == "Idempotency-Key"


def test_a_slot_is_closed_once() -> None:
    some = store()
    slot = started(some)
    some.finish(slot, ANSWER)
    with pytest.raises(AssertionError):
        some.abandon(slot)


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from(["begin", "finish", "abandon"]), st.integers(0, 3000)),
        max_size=80,
    )
)
def test_one_runs_at_a_time_and_the_count_of_bytes_never_drifts(steps: list[tuple[int, str, int]]) -> None:
    some = store(20_000)
    running: dict[str, Slot[str]] = {}
    for number, what, size in steps:
        key = f"k{number}"
        if what == "begin":
            try:
                answer = some.begin("k1", key, b"hash", 0, key)
            except Conflict:
                continue
            assert isinstance(answer, Running) == (key in running)
            if isinstance(answer, Started):
                running[key] = answer.slot
        elif key in running and what == "finish":
            some.finish(running.pop(key), KeptAnswer(status=200, body=b"x" * size))
        elif key in running:
            some.abandon(running.pop(key))
        assert 0 <= some.bytes_held <= 20_000
    for slot in running.values():
        some.abandon(slot)
    some.expire(DEFAULT_TTL_NS)
    assert (len(some), some.bytes_held) == (0, 0)
