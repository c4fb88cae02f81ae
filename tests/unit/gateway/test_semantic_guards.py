"""The guards: what must never be served, however similar."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol.gateway.semantic_guards import contradiction, marks
from ondol.gateway.semantic_numbers import numbers
from ondol.gateway.semantic_text import language, normal


def _generator() -> Any:
    spec = importlib.util.spec_from_file_location(
        "contradictions", Path(__file__).parent / "contradictions.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code(one: str, other: str) -> str | None:
    found = contradiction(marks(one), marks(other))
    return None if found is None else found.code


@pytest.mark.parametrize("seed", range(4))
def test_no_generated_contradiction_passes(seed: int) -> None:
    pairs = list(_generator().contradictions(seed, 1600))
    assert len({kind for kind, _, _ in pairs}) == 10
    passed = [(kind, one, other) for kind, one, other in pairs if code(one, other) is None]
    assert passed == []


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("Cancel my order", "Do not cancel my order", "negation"),
        ("계좌를 해지해 주세요", "계좌를 해지하지 마세요", "negation"),
        ("How do I activate my card?", "How do I deactivate my card?", "opposite"),
        ("에어컨 켜 줘", "에어컨 꺼 줘", "opposite"),
        ("Is the fee $5?", "Is the fee $7?", "number"),
        ("세 명 예약해 줘", "네 명 예약해 줘", "number"),
        ("30분 뒤에 깨워 줘", "30시간 뒤에 깨워 줘", "unit"),
        ("Are you open on Monday?", "Are you open on Sunday?", "date"),
        ("서울까지 얼마나 걸려?", "부산까지 얼마나 걸려?", "place"),
        ("Where did you send it?", "When did you send it?", "question"),
        ("Can I pay in dollars here?", "Can I pay in euros here?", "currency"),
        ("What does Alice pay?", "What does Bob pay?", "name"),
        ("Is Python faster than Java?", "Is Java faster than Python?", "direction"),
        ("철수가 영희를 좋아해?", "영희가 철수를 좋아해?", "direction"),
        ("삼성전자 전화번호 알려줘", "현대자동차 전화번호 알려줘", "word"),
        ("How do I pay?", "어떻게 결제하나요?", "language"),
        ("¿Cómo pago la factura hoy?", "¿Cómo cancelo la factura hoy?", "unknown_language"),
    ],
)  # fmt: skip
def test_each_guard_refuses_with_its_code_both_ways(one: str, other: str, expected: str) -> None:
    assert code(one, other) == expected
    assert code(other, one) == expected
    found = contradiction(marks(one), marks(other))
    assert found is not None and found.en.startswith("the similar question") and found.ko.endswith("다릅니다")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("How do I reset my password?", "How can I reset my password please"),
        ("비밀번호를 어떻게 바꾸나요?", "비밀번호 바꾸는 방법 알려줘"),
        ("I have two cards", "I have 2 cards"),
        ("thirty-five days of leave in my plan", "35 days of leave in my plan"),
        ("세 시에 만나자", "3시에 만나자"),
        ("온도를 삼십오도로 설정해", "온도를 35도로 설정해"),
        ("I don't know how to link my new card", "Which steps link the new one that arrived?"),
        ("¿Cómo pago la factura?", "¿cómo pago la factura"),
    ],
)
def test_plain_paraphrases_pass(one: str, other: str) -> None:
    assert code(one, other) is None


@given(st.text(max_size=80))
def test_a_question_never_contradicts_itself(text: str) -> None:
    assert code(text, text) is None


@given(st.text(max_size=60), st.text(max_size=60))
def test_guards_do_not_depend_on_who_asked_first(one: str, other: str) -> None:
    assert (code(one, other) is None) == (code(other, one) is None)


@given(st.integers(2, 99_999), st.integers(2, 99_999))
def test_two_numbers_are_never_the_same_question(one: int, other: int) -> None:
    if one != other:
        assert code(f"How do I order {one} boxes?", f"How do I order {other} boxes?") == "number"
        assert code(f"상자 {one}개 주문해 줘", f"상자 {other}개 주문해 줘") == "number"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,000원", {("1000", "krw")}),
        ("3만 5천원", {("30000", ""), ("5000", "krw")}),
        ("twenty five minutes", {("25", "minute")}),
        ("two hundred dollars", {("200", "usd")}),
        ("서른두 살", {("32", "age")}),
        ("이번 주에 뭐 해", set()),
        ("내 편이 하나도 없어", set()),
    ],
)
def test_numbers_are_read_as_figures_and_words(text: str, expected: set[tuple[str, str]]) -> None:
    assert numbers(normal(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("KBS 뉴스 보여줘", "ko"), ("what is it", "en"), ("Guten Morgen", "la"), ("今日は", "ja"), ("123", "")],
)
def test_languages_are_told_by_script_and_small_words(text: str, expected: str) -> None:
    assert language(text) == expected
