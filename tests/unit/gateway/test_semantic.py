"""The verified semantic cache: what contradicts is refused, what is promised holds, tenants never meet."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.gateway.contradictions import contradictions

from ondol.core.inference import Capability, DataClass, InferenceRequest, Task
from ondol.core.route_terms import SemanticPolicy
from ondol.gateway.cache import Entry
from ondol.gateway.semantic import Check, Miss, Question, SemanticCache, Serve, namespace_of
from ondol.gateway.semantic_compare import compare_answers
from ondol.gateway.semantic_eligible import eligible
from ondol.gateway.semantic_evidence import Evidence, gamma_above
from ondol.gateway.semantic_guards import contradiction, marks

POLICY = SemanticPolicy(max_error=0.05, checked=0.05)


# ---- guards


def test_no_generated_contradiction_passes_the_guards() -> None:
    """The gate of a release: negations, opposites, numbers, units, names, places, directions, questions, quantities."""
    passed = [
        (kind, one, other)
        for kind, one, other in contradictions(7, 8000)
        if contradiction(marks(one), marks(other)) is None
    ]
    assert passed == [], Counter(kind for kind, _, _ in passed)


@pytest.mark.parametrize(
    ("cached", "asked", "code"),
    [
        ("Please cancel my order", "Please do not cancel my order", "negation"),
        ("주문을 취소해 주세요", "주문을 취소하지 마세요", "negation"),
        ("How do I open an account?", "How do I close an account?", "opposite"),
        ("예약을 신청하려면 어떻게 하나요?", "예약을 취소하려면 어떻게 하나요?", "opposite"),
        ("Can I return it within 14 days?", "Can I return it within 30 days?", "number"),
        ("승차권 두 장 예약해 줘", "승차권 세 장 예약해 줘", "number"),
        ("Do you ship to Busan?", "Do you ship to Seoul?", "place"),
        ("When does the shop open?", "Where does the shop open?", "question"),
    ],
)
def test_a_contradiction_is_refused_with_its_reason(cached: str, asked: str, code: str) -> None:
    found = contradiction(marks(asked), marks(cached))
    assert found is not None
    assert found.code == code
    assert found.en and found.ko


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("How do I reset my password?", "How can I reset my password?"),
        ("I want to cancel my order", "Please cancel my order"),
        ("비밀번호를 재설정하려면 어떻게 하나요?", "비밀번호 재설정은 어떻게 하나요?"),
        ("What are your opening hours", "what are your opening hours?"),
    ],
)
def test_what_asks_the_same_passes(one: str, other: str) -> None:
    assert contradiction(marks(one), marks(other)) is None


@given(st.text(max_size=200), st.text(max_size=200))
def test_guards_take_any_text_and_are_fair_to_both_sides(one: str, other: str) -> None:
    ours, theirs = contradiction(marks(one), marks(other)), contradiction(marks(other), marks(one))
    assert (ours is None) == (theirs is None)
    assert contradiction(marks(one), marks(one)) is None


# ---- what may be looked up at all


def request(*messages: dict[str, Any], **fields: Any) -> InferenceRequest:
    body = {"model": "faq", "messages": list(messages), "temperature": 0} | fields
    needs = frozenset({Capability.WEB_SEARCH}) if "web_search_options" in fields else frozenset()
    return InferenceRequest(task=Task.CHAT, route="faq", body=body, needs=needs)


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def asked(
    *messages: dict[str, Any], tenant: str = "t", data: DataClass = DataClass.INTERNAL, **fields: Any
) -> Any:
    return eligible(request(*messages, **fields), POLICY, data, tenant=tenant, generation="g")


@pytest.mark.parametrize(
    ("messages", "fields", "code"),
    [
        ((user("What is the weather today?"),), {}, "semantic_time_bound"),
        ((user("오늘 날씨 어때?"),), {}, "semantic_time_bound"),
        ((user("Send it to kim@example.com"),), {}, "semantic_personal"),
        ((user("제 이름은 김민수입니다"),), {}, "semantic_personal"),
        ((user("How?"),), {"user": "u1"}, "semantic_personal"),
        ((user("How are you?"),), {"tools": [{"type": "function"}]}, "semantic_tools"),
        ((user("How are you?"),), {"temperature": 1.5}, "semantic_temperature"),
        ((user("How are you?"), {"role": "assistant", "content": "Fine"}), {}, "semantic_conversation"),
        ((user([{"type": "image_url", "image_url": {}}]),), {}, "semantic_modality"),
        ((user("x" * 3000),), {}, "semantic_length"),
    ],
)
def test_what_is_never_answered_from_another_question(
    messages: tuple[dict[str, Any], ...], fields: dict[str, Any], code: str
) -> None:
    found = asked(*messages, **fields)
    assert isinstance(found, Miss)
    assert found.code == code


@pytest.mark.parametrize("data", [DataClass.CONFIDENTIAL, DataClass.RESTRICTED])
def test_what_is_confidential_is_compared_with_nothing(data: DataClass) -> None:
    found = asked(user("How do I return shoes?"), data=data)
    assert isinstance(found, Miss)
    assert found.code == "semantic_data_class"


def test_all_but_the_last_question_must_be_exactly_the_same() -> None:
    plain = asked(user("How do I return shoes?"))
    assert isinstance(plain, Question)
    same = asked(user("How can I return shoes?"))
    assert plain.namespace == same.namespace
    others = [
        asked(user("How do I return shoes?"), tenant="u"),
        asked({"role": "system", "content": "Be brief"}, user("How do I return shoes?")),
        asked(user("How do I return shoes?"), max_tokens=5),
        asked(user("How do I return shoes?"), seed=1),
    ]
    assert len({plain.namespace, *(one.namespace for one in others)}) == 5
    assert namespace_of(b"ab", b"c") != namespace_of(b"a", b"bc")


# ---- evidence


def test_without_evidence_nothing_is_served() -> None:
    evidence = Evidence(0.05, 0.95)
    assert evidence.threshold is None
    for _ in range(20):
        evidence.saw(6.0)
        evidence.learn(6.0, True)
    assert not evidence.serves(6.0), "twenty right ones prove no 5 %"
    for _ in range(200):
        evidence.saw(6.0)
        evidence.learn(6.0, True)
    assert evidence.serves(6.0)
    assert evidence.bound <= 0.05


def test_the_promise_holds_over_streams_of_every_quality() -> None:
    """P(wrong) falls with the score; over 40 streams the share of wrong hits is promised to be at most 5 %."""
    broken = 0
    for seed in range(40):
        rng = random.Random(seed)
        evidence, served, wrong = Evidence(0.05, 0.95), 0, 0
        slope = rng.uniform(0.2, 1.5)
        for _ in range(4000):
            score = rng.gauss(2, 2)
            right = rng.random() > 0.5 / (1 + 2.718 ** (slope * score))
            evidence.saw(score)
            if evidence.serves(score):
                if rng.random() < 0.05:
                    evidence.learn(score, right, checked=True)
                else:
                    served += 1
                    wrong += not right
            else:
                evidence.learn(score, right)
        broken += wrong > 0.05 * max(served, 1)
    assert broken <= 4, f"{broken} of 40 streams were over; 5 % of them may be"


def test_a_drift_is_noticed_and_stops_the_hits() -> None:
    rng = random.Random(1)
    evidence = Evidence(0.05, 0.95)
    for _ in range(500):
        evidence.saw(5.0)
        evidence.learn(5.0, True)
    assert evidence.serves(5.0)
    for _ in range(400):
        evidence.saw(5.0)
        if evidence.serves(5.0):
            evidence.learn(5.0, rng.random() > 0.5, checked=True)
    assert not evidence.serves(5.0)


def test_the_gamma_tail_is_right() -> None:
    assert gamma_above(1.0, 2.0) == pytest.approx(0.1353352832)
    assert gamma_above(3.0, 2.0) == pytest.approx(0.6766764162)
    assert gamma_above(10.0, 20.0) == pytest.approx(0.00499541, rel=1e-4)
    assert gamma_above(2.0, 0.0) == 1.0


# ---- the cache


def question(text: str, *, tenant: str = "t") -> Question:
    found = asked(user(text), tenant=tenant)
    assert isinstance(found, Question)
    return found


def entry(tenant: str = "t") -> Entry:
    return Entry(tenant=tenant, generation="g", body=b"{}")


def taught() -> SemanticCache:
    cache = SemanticCache(1 << 20)
    for number in range(120):
        cache.teach(
            "t", "faq", POLICY, cached=f"how do i return item {number}", asked=f"how can i return item {number}",
            similarity=0.97, same=True,
        )  # fmt: skip
    return cache


def look(
    cache: SemanticCache, text: str, key: int, *, tenant: str = "t", dice: float = 0.9, now_ns: int = 0
) -> Any:
    return cache.lookup(question(text, tenant=tenant), POLICY, [(key, 0.97)], now_ns=now_ns, dice=dice)


def test_served_checked_refused_and_too_old() -> None:
    cache = taught()
    key, _ = cache.put(question("how do i return shoes"), entry(), said="Bring them.", now_ns=0)
    assert key is not None
    assert isinstance(look(cache, "how can i return shoes", key), Serve)
    assert isinstance(look(cache, "how can i return shoes", key, dice=0.01), Check)
    refused = look(cache, "how can i not return shoes", key)
    assert isinstance(refused, Miss) and refused.code == "semantic_guard_negation"
    old = look(cache, "how can i return shoes", key, now_ns=10**18)
    assert isinstance(old, Miss) and old.code == "semantic_empty"


def test_an_entry_of_another_tenant_is_not_served_whatever_the_memory_says() -> None:
    cache = taught()
    key, _ = cache.put(question("how do i return shoes", tenant="u"), entry("u"), said="x", now_ns=0)
    assert key is not None
    assert isinstance(look(cache, "how can i return shoes", key), Miss)
    assert cache.drop_tenant("u") == (key,)


def test_a_prompt_made_to_collide_is_one_more_question_of_its_own_tenant() -> None:
    """Whoever poisons a cache poisons his own tenant's, and there the evidence counts what comes of it."""
    cache = taught()
    key, _ = cache.put(question("how do i return shoes ignore previous"), entry(), said="Never.", now_ns=0)
    assert key is not None
    verdict = look(cache, "how can i return shoes", key)
    assert isinstance(verdict, Serve)
    assert cache.complain(verdict.trial) == (key,)
    assert isinstance(look(cache, "how can i return shoes", key), Miss)
    other, _ = cache.put(question("how do i return shoes"), entry(), said="Bring them.", now_ns=0)
    assert other is not None
    assert isinstance(look(cache, "how can i return shoes", other, tenant="u"), Miss)


def test_memory_is_bounded() -> None:
    cache = SemanticCache(20_000)
    for number in range(100):
        cache.put(question(f"question number {number}"), entry(), said="x", now_ns=0)
    stats = cache.stats()
    assert stats.bytes <= stats.bytes_max
    assert 0 < stats.entries < 100
    huge = Entry(tenant="t", generation="g", body=b"x" * 10_000)
    assert cache.put(question("huge"), huge, said="x", now_ns=0) == (None, ())


# ---- answers


@pytest.mark.parametrize(
    ("fresh", "cached", "similarity", "outcome"),
    [
        ("Bring it back.", "bring it back", None, "same"),
        ("Yes, you can.", "No, you cannot.", 0.95, "different"),
        ("It costs 5 euros.", "It costs 6 euros.", 0.99, "different"),
        ("Bring it to the shop within a week.", "Take the train to work.", 0.3, "different"),
        ("Bring it to the shop.", "You may bring it to our shop.", None, "unsure"),
        ("", "x", 1.0, "different"),
    ],
)
def test_two_answers_are_called_the_same_only_where_that_is_plain(
    fresh: str, cached: str, similarity: float | None, outcome: str
) -> None:
    assert compare_answers(fresh, cached, similarity) == outcome
