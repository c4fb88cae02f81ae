"""The exact cache: what makes a key, what may be kept, and bounds in bytes."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol.core.inference import Capability, DataClass, InferenceRequest, Task, Usage
from ondol.core.route_terms import CachePolicy
from ondol.gateway.cache import BODY_BYTES_MAX, IGNORED_FIELDS, Entry, ExactCache, cache_key, cacheable

SECOND = 1_000_000_000
BODY: dict[str, Any] = {
    "model": "assistant",
    "messages": [{"role": "user", "content": "why is the sky blue?"}],
    "temperature": 0.2,
}


def key(body: dict[str, Any] | None = None, **changes: Any) -> bytes:
    given = {
        "tenant": "default",
        "route": "assistant",
        "task": "chat",
        "body": BODY if body is None else body,
        "stream": False,
        "include_usage": False,
        "generation": "g1",
        "objective": "fast",
    }
    return cache_key(**{**given, **changes})


def request(body: dict[str, Any], *needs: Capability) -> InferenceRequest:
    return InferenceRequest(task=Task.CHAT, route="assistant", body=body, needs=frozenset(needs), n=2)


def entry(text: bytes, *, tenant: str = "default", generation: str = "g1") -> Entry:
    return Entry(tenant=tenant, generation=generation, body=text, usage=Usage(3, 4))


def test_the_order_of_fields_does_not_matter() -> None:
    turned = {name: BODY[name] for name in reversed(BODY)}
    turned["messages"] = [{"content": "why is the sky blue?", "role": "user"}]
    assert key(turned) == key()


@pytest.mark.parametrize("field", sorted(IGNORED_FIELDS))
def test_fields_that_do_not_change_the_answer_do_not_matter(field: str) -> None:
    assert key({**BODY, field: "x"}) == key()


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.3},
        {"seed": 7},
        {"n": 2},
        {"max_tokens": 9},
        {"tools": []},
        {"unknown_field": 1},
        {"messages": [{"role": "system", "content": "why is the sky blue?"}]},
    ],
)
def test_fields_that_may_change_the_answer_matter(change: dict[str, Any]) -> None:
    assert key({**BODY, **change}) != key()


@pytest.mark.parametrize(
    "change",
    [
        {"tenant": "other"},
        {"route": "r2"},
        {"task": "completion"},
        {"stream": True},
        {"include_usage": True},
        {"generation": "g2"},
        {"objective": "best"},
    ],
)
def test_what_stands_around_the_body_matters(change: dict[str, Any]) -> None:
    assert key(**change) != key()


texts = st.text(max_size=5)


@given(st.tuples(texts, texts, texts), st.tuples(texts, texts, texts))
def test_names_cannot_be_shifted_from_one_part_to_the_next(
    one: tuple[str, str, str], two: tuple[str, str, str]
) -> None:
    first = key(tenant=one[0], route=one[1], generation=one[2])
    second = key(tenant=two[0], route=two[1], generation=two[2])
    assert (first == second) == (one == two)


@pytest.mark.parametrize(
    ("body", "needs", "policy", "data_class", "reason"),
    [
        (BODY, (), CachePolicy(), DataClass.CONFIDENTIAL, None),
        (BODY, (), None, DataClass.PUBLIC, "off"),
        (BODY, (), CachePolicy(), DataClass.RESTRICTED, "restricted"),
        (BODY, (), CachePolicy(max_temperature=0.2), DataClass.PUBLIC, None),
        (BODY, (), CachePolicy(max_temperature=0.1), DataClass.PUBLIC, "temperature"),
        ({"messages": []}, (), CachePolicy(max_temperature=0.9), DataClass.PUBLIC, "temperature"),
        ({"input": "text"}, (), CachePolicy(max_temperature=0.0), DataClass.PUBLIC, None),
        (BODY, (Capability.AUDIO_OUT,), CachePolicy(), DataClass.PUBLIC, "audio_out"),
        (BODY, (Capability.WEB_SEARCH,), CachePolicy(), DataClass.PUBLIC, "web_search"),
        (BODY, (Capability.TOOLS, Capability.CHOICES), CachePolicy(), DataClass.PUBLIC, None),
        (
            {"messages": [{"role": "user"}, {"role": "tool"}]},
            (),
            CachePolicy(),
            DataClass.PUBLIC,
            "tool_results",
        ),
    ],
)
def test_what_may_be_kept(
    body: dict[str, Any],
    needs: tuple[Capability, ...],
    policy: CachePolicy | None,
    data_class: DataClass,
    reason: str | None,
) -> None:
    assert cacheable(request(body, *needs), policy, data_class) == reason


def test_a_huge_request_is_not_looked_up() -> None:
    assert (
        cacheable(request(BODY), CachePolicy(), DataClass.PUBLIC, body_bytes=BODY_BYTES_MAX + 1)
        == "too_large"
    )


def test_an_answer_is_found_until_its_time_is_over() -> None:
    cache = ExactCache(1_000_000)
    kept = entry(b"blue")
    assert cache.put(b"k", kept, 10 * SECOND, 0)
    assert cache.get(b"k", 10 * SECOND - 1) is kept
    assert cache.get(b"k", 10 * SECOND) is None
    assert cache.get(b"other", 0) is None
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.expired, stats.entries, stats.bytes) == (1, 2, 1, 0, 0)


def test_the_least_recently_used_goes_first() -> None:
    one = entry(b"x" * 1000)
    cache = ExactCache(one.size() * 8)
    for name in b"abcdefgh":
        cache.put(bytes([name]), one, SECOND, 0)
    assert cache.get(b"a", 0) is one
    cache.put(b"i", one, SECOND, 0)
    assert cache.get(b"b", 0) is None
    assert cache.get(b"a", 0) is one
    assert cache.stats().evictions == 1


def test_one_answer_may_not_take_more_than_an_eighth() -> None:
    fits = entry(b"x" * 5000)
    cache = ExactCache(fits.size() * 8)
    assert cache.put(b"a", fits, SECOND, 0)
    assert not cache.put(b"b", entry(b"x" * 5001), SECOND, 0)
    assert not ExactCache(0).put(b"a", fits, SECOND, 0)


def test_putting_again_replaces_and_does_not_count_twice() -> None:
    cache = ExactCache(100_000)
    cache.put(b"a", entry(b"old"), SECOND, 0)
    new = entry(b"newer")
    cache.put(b"a", new, SECOND, 0)
    assert cache.get(b"a", 0) is new
    assert cache.stats().bytes == new.size()


def test_tenants_generations_and_the_old_are_dropped_apart() -> None:
    cache = ExactCache(1_000_000)
    cache.put(b"a", entry(b"1", tenant="acme"), SECOND, 0)
    cache.put(b"b", entry(b"2", generation="g2"), SECOND, 0)
    cache.put(b"c", entry(b"3", generation="g2"), 9 * SECOND, 0)
    assert cache.drop_tenant("acme") == 1
    assert cache.purge("g2") == 0
    assert cache.expire(SECOND) == 1
    assert cache.get(b"c", SECOND) is not None
    assert cache.purge("g3") == 1
    assert cache.stats().bytes == 0


def test_the_bound_is_in_true_bytes() -> None:
    bound = 2_000_000
    cache = ExactCache(bound)
    tracemalloc.start()
    try:
        for number in range(2000):
            chunks = tuple([b"%d %d " % (number, piece) * 5 for piece in range(20)])
            kept = Entry(tenant="default", generation="g1", chunks=chunks, usage=Usage(number, 20))
            cache.put(number.to_bytes(32, "big"), kept, SECOND, 0)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert cache.stats().bytes <= bound
    assert cache.stats().bytes > bound * 0.9
    assert held < bound * 1.1


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 3000), st.integers(0, 5)), max_size=100))
def test_the_count_of_bytes_never_drifts(steps: list[tuple[int, int, int]]) -> None:
    cache = ExactCache(20_000)
    for now_ns, (name, size, ttl_ns) in enumerate(steps):
        cache.put(bytes([name]), entry(b"x" * size), ttl_ns, now_ns)
        cache.get(bytes([name ^ 1]), now_ns)
        assert 0 <= cache.stats().bytes <= 20_000
    cache.purge("none")
    assert cache.stats().bytes == 0
