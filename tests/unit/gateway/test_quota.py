"""Token buckets: all or nothing, exact, bounded."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ondol.core.catalog import TeamDoc
from ondol.core.identity import Principal
from ondol.gateway.quota import UNLIMITED, Granted, Limited, Quotas, rate_headers

MINUTE = 60_000_000_000
SECOND = 1_000_000_000


def who(*, key: str = "k1", requests: int | None = None, tokens: int | None = None) -> Principal:
    return Principal(
        key_id=key, tenant="default", team="shop", requests_per_min=requests, tokens_per_min=tokens
    )


def team(*, requests: int | None = None, tokens: int | None = None) -> TeamDoc:
    return TeamDoc(name="shop", requests_per_min=requests, tokens_per_min=tokens)


def granted(answer: Granted | Limited) -> Granted:
    assert isinstance(answer, Granted)
    return answer


def limited(answer: Granted | Limited) -> Limited:
    assert isinstance(answer, Limited)
    return answer


def test_without_limits_all_share_one_answer_and_nothing_is_kept() -> None:
    quotas = Quotas()
    for team_doc in (None, team()):
        assert quotas.admit(principal=who(), team=team_doc, tokens=10**9, now_ns=0) is UNLIMITED
    assert len(quotas) == 0
    assert rate_headers(UNLIMITED) == ()


def test_a_minutes_worth_passes_at_once_and_then_one_at_a_time() -> None:
    quotas, caller = Quotas(), who(requests=6)
    for _ in range(6):
        granted(quotas.admit(principal=caller, team=None, tokens=0, now_ns=0))
    refused = limited(quotas.admit(principal=caller, team=None, tokens=0, now_ns=0))
    assert (refused.owner, refused.kind, refused.limit) == ("key", "requests", 6)
    assert refused.retry_after_s == 10.0
    assert "6 requests a minute" in refused.message
    limited(quotas.admit(principal=caller, team=None, tokens=0, now_ns=10 * SECOND - 1))
    granted(quotas.admit(principal=caller, team=None, tokens=0, now_ns=10 * SECOND))
    limited(quotas.admit(principal=caller, team=None, tokens=0, now_ns=10 * SECOND))


def test_a_refusal_by_the_team_takes_nothing_from_the_key() -> None:
    quotas, caller = Quotas(), who(requests=2)
    granted(quotas.admit(principal=caller, team=team(tokens=100), tokens=90, now_ns=0))
    refused = limited(quotas.admit(principal=caller, team=team(tokens=100), tokens=90, now_ns=0))
    assert (refused.owner, refused.kind) == ("team", "tokens")
    granted(quotas.admit(principal=caller, team=team(tokens=100), tokens=10, now_ns=0))


def test_a_team_is_shared_by_its_keys_but_not_with_the_same_name_elsewhere() -> None:
    quotas = Quotas()
    granted(quotas.admit(principal=who(key="a"), team=team(requests=1), tokens=0, now_ns=0))
    limited(quotas.admit(principal=who(key="b"), team=team(requests=1), tokens=0, now_ns=0))
    elsewhere = TeamDoc(name="shop", tenant="other", requests_per_min=1)
    granted(quotas.admit(principal=who(key="b"), team=elsewhere, tokens=0, now_ns=0))


def test_a_request_larger_than_the_whole_bucket_can_never_pass() -> None:
    quotas = Quotas()
    refused = limited(quotas.admit(principal=who(tokens=100), team=None, tokens=101, now_ns=0))
    assert refused.retry_after_s is None
    assert "never pass" in refused.message
    assert "101" in refused.message
    granted(quotas.admit(principal=who(tokens=100), team=None, tokens=100, now_ns=0))


def test_what_was_not_used_comes_back_and_what_was_used_more_is_owed() -> None:
    quotas, caller = Quotas(), who(tokens=60)
    first = granted(quotas.admit(principal=caller, team=None, tokens=60, now_ns=0))
    quotas.correct(first, 20, 0)
    second = granted(quotas.admit(principal=caller, team=None, tokens=40, now_ns=0))
    quotas.correct(second, 100, 0)
    refused = limited(quotas.admit(principal=caller, team=None, tokens=1, now_ns=0))
    assert refused.retry_after_s == 61.0


def test_giving_back_never_fills_above_a_minute() -> None:
    quotas, caller = Quotas(), who(tokens=60)
    first = granted(quotas.admit(principal=caller, team=None, tokens=60, now_ns=0))
    quotas.correct(first, 0, MINUTE)
    granted(quotas.admit(principal=caller, team=None, tokens=60, now_ns=MINUTE))
    limited(quotas.admit(principal=caller, team=None, tokens=1, now_ns=MINUTE))


def test_a_changed_limit_keeps_what_was_used() -> None:
    quotas = Quotas()
    granted(quotas.admit(principal=who(tokens=100), team=None, tokens=80, now_ns=0))
    limited(quotas.admit(principal=who(tokens=120), team=None, tokens=41, now_ns=0))
    granted(quotas.admit(principal=who(tokens=120), team=None, tokens=40, now_ns=0))


def test_headers_show_the_tightest_bucket_of_each_kind() -> None:
    quotas = Quotas()
    answer = quotas.admit(
        principal=who(requests=60, tokens=1000), team=team(requests=10, tokens=5000), tokens=100, now_ns=0
    )
    assert dict(rate_headers(answer)) == {
        "x-ratelimit-limit-requests": "10",
        "x-ratelimit-remaining-requests": "9",
        "x-ratelimit-reset-requests": "6s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "900",
        "x-ratelimit-reset-tokens": "6s",
    }


def test_headers_write_durations_as_openai_does() -> None:
    quotas, caller = Quotas(), who(requests=600, tokens=600)
    first = granted(quotas.admit(principal=caller, team=None, tokens=600, now_ns=0))
    assert dict(rate_headers(first))["x-ratelimit-reset-requests"] == "100ms"
    assert dict(rate_headers(first))["x-ratelimit-reset-tokens"] == "1m0s"
    quotas.correct(first, 625, 0)
    refused = limited(quotas.admit(principal=caller, team=None, tokens=1, now_ns=0))
    assert dict(rate_headers(refused))["x-ratelimit-reset-tokens"] == "1m2.5s"
    assert dict(rate_headers(refused))["x-ratelimit-remaining-tokens"] == "0"


def test_idle_owners_are_forgotten_and_busy_ones_are_not() -> None:
    quotas = Quotas()
    granted(quotas.admit(principal=who(key="busy", tokens=10), team=None, tokens=10, now_ns=9 * MINUTE))
    for number in range(5000):
        now_ns = 0 if number < 4000 else 9 * MINUTE
        quotas.admit(principal=who(key=f"k{number}", requests=5), team=None, tokens=0, now_ns=now_ns)
    assert len(quotas) < 2500
    limited(quotas.admit(principal=who(key="busy", tokens=10), team=None, tokens=10, now_ns=9 * MINUTE))


@given(
    limit=st.integers(1, 10_000_000),
    asks=st.lists(st.tuples(st.integers(0, 2 * MINUTE), st.integers(0, 3000)), max_size=60),
)
def test_never_more_than_a_bucket_and_the_refill_passes(limit: int, asks: list[tuple[int, int]]) -> None:
    quotas, caller = Quotas(), who(tokens=limit)
    now_ns = passed = 0
    for wait_ns, tokens in asks:
        now_ns += wait_ns
        if isinstance(quotas.admit(principal=caller, team=None, tokens=tokens, now_ns=now_ns), Granted):
            passed += tokens
        assert passed * MINUTE <= limit * MINUTE + limit * now_ns


@given(
    limit=st.integers(1, 1_000_000),
    used=st.floats(0, 1),
    wanted=st.floats(0, 1),
    start_ns=st.integers(0, 10**18),
)
def test_who_waits_as_told_passes_and_not_a_nanosecond_before(
    limit: int, used: float, wanted: float, start_ns: int
) -> None:
    quotas, caller = Quotas(), who(tokens=limit)
    granted(quotas.admit(principal=caller, team=None, tokens=int(limit * used), now_ns=start_ns))
    tokens = int(limit * wanted)
    answer = quotas.admit(principal=caller, team=None, tokens=tokens, now_ns=start_ns)
    if isinstance(answer, Limited):
        assert answer.retry_after_ns is not None
        soon_ns = start_ns + answer.retry_after_ns
        limited(quotas.admit(principal=caller, team=None, tokens=tokens, now_ns=soon_ns - 1))
        granted(quotas.admit(principal=caller, team=None, tokens=tokens, now_ns=soon_ns))
