"""The `x-ondol-*` request headers: every form that is allowed, and every other one refused by name."""

from __future__ import annotations

from decimal import Decimal
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol.core.identity import Hints
from ondol.core.inference import DataClass, Objective
from ondol.core.money import money
from ondol.errors import InvalidRequest
from ondol.gateway.hints import LATENCY_MS_MAX, NO_HINTS, TAGS_MAX, parse_hints

NAMES = (
    "x-ondol-data-class", "x-ondol-objective", "x-ondol-max-latency-ms", "x-ondol-remaining-ms",
    "x-ondol-max-cost", "x-ondol-tags", "cache-control",
)  # fmt: skip


def hints(**headers: str) -> Hints:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return parse_hints({f"x-ondol-{n}" if n != "cache-control" else n: v for n, v in named.items()}.get)


def test_without_headers_nothing_is_made() -> None:
    assert parse_hints({"accept": "*/*", "cache-control": "max-age=0"}.get) is NO_HINTS == Hints()


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"data_class": " Restricted "}, {"data_class": DataClass.RESTRICTED}),
        ({"objective": "GREEN"}, {"objective": Objective.GREEN}),
        ({"max_latency_ms": "1"}, {"max_latency_ms": 1}),
        ({"max_latency_ms": str(LATENCY_MS_MAX)}, {"max_latency_ms": LATENCY_MS_MAX}),
        ({"remaining_ms": "250"}, {"max_latency_ms": 250}),
        ({"max_latency_ms": "5", "remaining_ms": "250"}, {"max_latency_ms": 5}),
        ({"max_cost": "0.002 usd"}, {"max_cost": "0.002 USD"}),
        ({"max_cost": "  0   KRW "}, {"max_cost": "0 KRW"}),
        ({"max_cost": "1e-9 USD"}, {"max_cost": "1e-9 USD"}),
        ({"tags": "a=1, b=x%2Cy%3D%ED%95%9C,"}, {"tags": (("a", "1"), ("b", "x,y=한"))}),
        ({"tags": "a="}, {"tags": (("a", ""),)}),
        ({"tags": ""}, {"tags": ()}),
        ({"cache_control": "no-cache"}, {"no_cache": True}),
        ({"cache_control": "max-age=0, no-store"}, {"no_cache": True}),
    ],
)
def test_what_is_allowed(headers: dict[str, str], expected: dict[str, Any]) -> None:
    assert hints(**headers) == Hints(**expected)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("data-class", "secret", "public, internal, confidential, restricted"),
        ("data-class", "", "one of"),
        ("objective", "fastest", "fast, cheap, green, best, private"),
        ("max-latency-ms", "0", "from 1 to a day"),
        ("max-latency-ms", "-5", "from 1 to a day"),
        ("max-latency-ms", "1.5", "from 1 to a day"),
        ("max-latency-ms", "²", "from 1 to a day"),
        ("max-latency-ms", str(LATENCY_MS_MAX + 1), "from 1 to a day"),
        ("max-latency-ms", "000000000001" + "9" * 12, "from 1 to a day"),
        ("max-latency-ms", "000000000001" + "9" * 6000, "from 1 to a day"),
        ("max-cost", "", "0.002 USD"),
        ("max-cost", "0.002", "0.002 USD"),
        ("max-cost", "USD 1", "0.002 USD"),
        ("max-cost", "-1 USD", "0.002 USD"),
        ("max-cost", "nan USD", "0.002 USD"),
        ("max-cost", "inf USD", "0.002 USD"),
        ("max-cost", "1e999999 USD", "0.002 USD"),
        ("max-cost", "1e-999999 USD", "0.002 USD"),
        ("max-cost", "1 dollars", "0.002 USD"),
        ("max-cost", "1 USD extra", "0.002 USD"),
        ("tags", "a", "k=v"),
        ("tags", "=1", "k=v"),
        ("tags", "a=" + "x" * 600, "k=v"),
        ("tags", ",".join(f"t{i}=1" for i in range(TAGS_MAX + 1)), "at most 16"),
    ],
)
def test_what_is_not_allowed_is_refused_by_name(name: str, value: str, expected: str) -> None:
    with pytest.raises(InvalidRequest, match=f"x-ondol-{name}.*{expected}") as caught:
        parse_hints({f"x-ondol-{name}": value}.get)
    assert caught.value.param == f"x-ondol-{name}"
    assert len(caught.value.message) < 200


@given(st.dictionaries(st.sampled_from(NAMES), st.text(max_size=60), max_size=7))
def test_any_headers_give_hints_or_a_named_refusal(headers: dict[str, str]) -> None:
    try:
        found = parse_hints(headers.get)
    except InvalidRequest as error:
        assert error.param in headers
    else:
        assert found.max_latency_ms is None or 1 <= found.max_latency_ms <= LATENCY_MS_MAX


@given(
    st.decimals(0, 10**12, allow_nan=False, allow_infinity=False, places=9) | st.floats(0, 1e12).map(Decimal)
)
def test_an_accepted_ceiling_can_be_computed_with(amount: Decimal) -> None:
    try:
        said = hints(max_cost=f"{amount} USD").max_cost
    except InvalidRequest:
        assert 0 < amount < Decimal("1e-29")
    else:
        assert said is not None
        assert money(said.split()[0], "USD").amount >= 0


TAGS = st.dictionaries(st.text(min_size=1, max_size=8), st.text(max_size=8), max_size=TAGS_MAX)


@given(TAGS)
def test_percent_encoded_tags_come_through(tags: dict[str, str]) -> None:
    text = ",".join(f"{quote(k, safe='')}={quote(v, safe='')}" for k, v in tags.items())
    assert hints(tags=text).tags == tuple(tags.items())


TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize(
    ("found", "kept"),
    [
        (TRACE, TRACE),
        (TRACE.upper(), ""),
        ("ff" + TRACE[2:], ""),
        (TRACE.replace("0af7651916cd43dd8448eb211c80319c", "0" * 32), ""),
        (TRACE.replace("b7ad6b7169203331", "0" * 16), ""),
        (TRACE + "\r\nx-ondol-origin: a;b;1", ""),
        (TRACE + "-more", ""),
        ("", ""),
    ],
)
def test_a_trace_is_passed_on_whole_or_not_at_all(found: str, kept: str) -> None:
    assert parse_hints({"traceparent": found}.get).trace == kept
