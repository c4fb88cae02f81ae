"""Where conversations were: by tenant, the longest part first, and forgotten in time."""

from __future__ import annotations

from ondol.gateway import affinity
from ondol.gateway.affinity import HALF_LIFE_NS, Affinity, prefixes

FIRST = [{"role": "user", "content": "hello"}]
SECOND = [*FIRST, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "and now?"}]


def test_the_next_turn_finds_where_the_last_one_was() -> None:
    seen = Affinity()
    seen.put(prefixes("t", FIRST)[-1], "edge", 100, 0)
    assert seen.find(prefixes("t", SECOND), 0) == ("edge", 100)
    seen.put(prefixes("t", SECOND)[-1], "cloud", 150, 0)
    third = [*SECOND, {"role": "assistant", "content": "so"}, {"role": "user", "content": "?"}]
    assert seen.find(prefixes("t", third), 0) == ("cloud", 150)
    assert seen.find(prefixes("t", FIRST), 0) == ("edge", 100)


def test_another_tenant_and_other_words_find_nothing() -> None:
    seen = Affinity()
    seen.put(prefixes("t", FIRST)[-1], "edge", 100, 0)
    assert seen.find(prefixes("u", SECOND), 0) is None
    assert seen.find(prefixes("t", [{"role": "user", "content": "hello!"}]), 0) is None
    assert seen.find((), 0) is None


def test_what_is_spared_fades_by_half_in_five_minutes() -> None:
    seen = Affinity()
    seen.put(prefixes("t", FIRST)[-1], "edge", 100, 0)
    assert seen.find(prefixes("t", SECOND), HALF_LIFE_NS) == ("edge", 50)


def test_the_least_recently_used_is_forgotten() -> None:
    seen = Affinity()
    for number in range(affinity.KEPT + 1):
        seen.put(number.to_bytes(4, "big"), "edge", 1, 0)
    assert seen.find((b"\0\0\0\0",), 0) is None
    assert seen.find((b"\0\0\0\1",), 0) is not None
