"""Reasons as sentences, in English and in Korean: every code has one, with its figures."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ondol.core.inference import Objective
from ondol.core.money import Money
from ondol.core.usage import Decision, Dropped, UsageRecord
from ondol.errors import EngineUnavailable
from ondol.gateway.budget import Exhausted
from ondol.gateway.explain import exhausted_sentence, sentence
from ondol.gateway.schedule import REASONS, fell_back
from ondol.gateway.scorers import FACTORS

KOREAN = re.compile("[가-힣]")


def told(decision: Decision | None, **changes: Any) -> tuple[str, str]:
    given: dict[str, Any] = {
        "request_id": "req-1", "time_ns": 0, "site": "here", "gateway": "g", "tenant": "default",
        "team": "shop", "key_id": "k", "route": "r", "task": "chat", "outcome": "completed", "status": 200,
        "deployment": "d", "answered_by": "hub", "data_class": "restricted", "decision": decision,
    }  # fmt: skip
    return sentence(UsageRecord(**(given | changes)))


CODES = [
    *REASONS.values(),
    "private_stays",
    "class_stays",
    "only_choice",
    "balance",
    "fallback",
    "cache_exact",
]


@pytest.mark.parametrize("code", CODES)
def test_every_reason_is_a_sentence_in_both_languages(code: str) -> None:
    english, korean = told(Decision(code=code, objective="green", chosen="d"))
    assert f": {code}" not in english + korean  # the bare code would be no sentence
    assert "{" not in english + korean
    assert english.endswith(".")
    assert korean.endswith(".")
    assert english.isascii()
    assert KOREAN.search(korean)
    if code != "cache_exact":
        assert english.startswith("d on hub answered: ")
        assert korean.startswith("hub의 d 응답: ")
    assert ("restricted" in english) == ("restricted" in korean) == (code == "class_stays")
    assert ("green" in english.replace("greenest", "")) == (code == "balance")


def test_no_objective_lacks_its_reason() -> None:
    assert set(REASONS) == set(Objective)


DROPS = [
    ("task", "embedding"), ("capability", "tools"), ("context", "5 > 4"), ("class_stays", "restricted"),
    ("private_stays", ""), ("unhealthy", "it rests"), ("full", "8 at once"), ("budget", "unpriced"),
    ("too_slow", "9 ms > 5 ms"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "detail"), DROPS)
def test_every_drop_is_told_with_its_figure(code: str, detail: str) -> None:
    english, korean = told(
        Decision(code="only_choice", chosen="d", dropped=(Dropped("other", code, detail),))
    )
    english_part, korean_part = english.split("; ")[1], korean.split("; ")[1]
    assert english_part.startswith("other was dropped (")
    assert korean_part.startswith("other 제외(")
    assert KOREAN.search(korean_part.removeprefix("other 제외"))
    assert detail in english_part
    assert detail in korean_part
    assert code not in english + korean or code in ("task", "full", "budget")


@pytest.mark.parametrize("factor", FACTORS)
def test_the_runner_up_is_told_with_both_figures(factor: str) -> None:
    english, korean = told(
        Decision(
            code="fastest", chosen="d", runner_up="r", lost_on=factor, chosen_value=1.0, runner_up_value=2.0
        )
    )
    figures = re.search(r"runner-up r lost on .+ \(2\S*( \S+)? against 1\S*( \S+)?\)", english)
    assert figures is not None
    assert re.search(r"차점 r: .*[가-힣].*\(2.*1.*\)", korean)


def test_an_unknown_figure_is_a_question_mark() -> None:
    english, korean = told(
        Decision(code="cheapest", chosen="d", runner_up="r", lost_on="price", chosen_value=1.0)
    )
    assert "(? against 1.00000000)" in english
    assert "(?, 선택된 쪽 1.00000000)" in korean


def test_without_a_decision_the_error_is_told() -> None:
    assert told(None, error="budget_exhausted") == ("budget_exhausted", "budget_exhausted")
    english, korean = told(None)
    assert english.isascii()
    assert KOREAN.search(korean)


def test_a_fall_back_says_what_failed_first_and_then_what_was_dropped() -> None:
    before = Decision(code="fastest", chosen="near", dropped=(Dropped("small", "capability", "tools"),))
    english, korean = told(fell_back(before, "d", EngineUnavailable("refused {the} connection")))
    assert english == (
        "d on hub answered: the first choice failed before its first byte (near: refused {the} connection); "
        "small was dropped (cannot do tools)."
    )
    assert "(near: refused {the} connection); small 제외(" in korean
    assert korean.count("near") == english.count("near") == 1


def test_codes_of_a_newer_version_do_not_break_it() -> None:
    english, korean = told(
        Decision(
            code="new_code", dropped=(Dropped("a", "newer", "figure {x}"), Dropped("b", "unhealthy", "{odd}"))
        )
    )
    assert english == "d on hub answered: new_code; a was dropped (figure {x}); b was dropped ({odd})."
    assert "{odd}" in korean


def spent(why: str) -> Exhausted:
    left = Money(500_000_000, "USD")
    return Exhausted(budget="shop-month", left=left, renews_ns=1_767_225_600_000_000_000, why=why)


@pytest.mark.parametrize(
    ("why", "part"),
    [("unpriced", "no endpoint has a known price"), ("no_rate", "no exchange rate"), ("spent", "cannot pay")],
)
def test_an_exhausted_budget_is_named_with_the_way_out(why: str, part: str) -> None:
    text = exhausted_sentence(spent(why))
    assert text.startswith("budget 'shop-month'")
    assert part in text
    if why == "spent":
        assert "0.5 USD left" in text
        assert "renews 2026-01-01T00:00Z" in text
