"""Engines in virtual time, against times worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ondol.simulate.prefixes import BlockCache
from ondol.simulate.service import Service, engine_of
from ondol.simulate.trace import Trace


def served(service: Service, requests: Sequence[tuple[float, int, int]], *, prefixes: list[tuple[int, ...] | None] | None = None, slots: int = 4) -> tuple[list[float], list[float], list[int]]:  # fmt: skip
    """First tokens, ends, and cached tokens of (time in ms, prompt, output)."""
    trace = Trace(
        name="t", times=[0.0] * len(requests), prompts=[one[1] for one in requests],
        outputs=[one[2] for one in requests], prefixes=prefixes,
    )  # fmt: skip
    first, cached, end = [inf] * len(requests), [0] * len(requests), [inf] * len(requests)
    engine = engine_of(service, slots, trace, first, cached)
    waiting = list(enumerate(requests))
    while waiting or engine.next_event() < inf:
        if waiting and waiting[0][1][0] <= engine.next_event():
            number, one = waiting.pop(0)
            engine.arrive(number, one[0])
        else:
            now = engine.next_event()
            for done in engine.step_to(now):
                end[done] = now
    return first, end, cached


PLAIN = Service(prefill_tokens_per_s=1000, step_ms=10, step_ms_per_sequence=5, overhead_ms=20, source="test")


def test_one_request_alone() -> None:
    first, end, _ = served(PLAIN, [(0, 100, 11)])
    assert first == [120]
    assert end == [220]  # ten more tokens, 10 ms each


def test_two_write_together_and_slow_each_other() -> None:
    # b is read from 120 to 240, while a stands still; then both write at 15 ms a token.
    first, end, _ = served(PLAIN, [(0, 100, 11), (0, 100, 6)])
    assert first == [120, 240]
    assert end[1] == pytest.approx(240 + 5 * 15)
    assert end[0] == pytest.approx(240 + 5 * 15 + 5 * 10)


def test_writing_goes_on_while_a_prompt_is_read_where_it_may() -> None:
    half = Service(prefill_tokens_per_s=1000, step_ms=10, decode_while_prefill=0.5, source="test")
    first, end, _ = served(half, [(0, 100, 21), (100, 100, 1)])
    assert first == [100, 200]
    assert end[1] == 200
    assert end[0] == pytest.approx(200 + (20 - 5) * 10)  # five tokens in 100 ms at half of the pace


def test_a_full_engine_lets_the_next_one_wait() -> None:
    first, end, _ = served(PLAIN, [(0, 100, 11), (0, 100, 2)], slots=1)
    assert end[0] == 220
    assert first[1] == 220 + 120


def test_an_elastic_service_lets_nobody_wait() -> None:
    service = Service(prefill_tokens_per_s=1000, step_ms=10, overhead_ms=20, elastic=True, source="test")
    first, end, _ = served(service, [(0, 100, 11)] * 3 + [(5, 10, 1)])
    assert first == [120, 120, 120, 35]
    assert end == [220, 220, 220, 35]


def test_a_held_prefix_is_not_read_again() -> None:
    service = Service(prefill_tokens_per_s=1000, step_ms=10, kv_blocks=10, source="test")
    first, _, cached = served(
        service, [(0, 1030, 1), (5000, 1030, 1), (9000, 512, 1)], prefixes=[(1, 2), (1, 2), (1,)]
    )
    assert cached == [0, 1024, 511]
    assert first == [1030, 5006, 9001]


def test_the_least_recently_touched_block_leaves_first() -> None:
    cache = BlockCache(2)
    assert cache.touch([1, 2]) == 0
    assert cache.touch([1]) == 1
    assert cache.touch([3]) == 0  # 2 leaves
    assert cache.touch([1, 2]) == 1
    assert (cache.hits, cache.looked, len(cache)) == (2, 6, 2)
    nothing = BlockCache(0)
    assert nothing.touch([1]) == nothing.touch([1]) == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 2000), st.integers(1, 3000), st.integers(0, 200)), min_size=1, max_size=25),
    st.integers(1, 5), st.sampled_from([0.0, 0.5, 1.0]), st.booleans(),
)  # fmt: skip
def test_every_request_ends_and_none_sooner_than_alone(requests: list[tuple[float, int, int]], slots: int, share: float, elastic: bool) -> None:  # fmt: skip
    service = Service(
        prefill_tokens_per_s=1000, step_ms=10, step_ms_per_sequence=1, decode_while_prefill=share, overhead_ms=3,
        elastic=elastic, source="test",
    )  # fmt: skip
    requests = sorted(requests)
    first, end, _ = served(service, requests, slots=slots)
    for (start, prompt, output), begun, done in zip(requests, first, end, strict=True):
        assert begun >= start + 3 + prompt - 1e-6
        assert done < inf
        assert done >= begun + max(output - 1, 0) * 10 - 1e-6
