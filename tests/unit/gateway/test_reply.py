"""What a reply says about itself: headers, and the field that ends a stream."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol.core.inference import Usage
from ondol.core.money import Money
from ondol.core.usage import Decision, UsageRecord
from ondol.gateway.meter import Totals, nothing
from ondol.gateway.reply import closing, cost_text, place_headers, took_headers, with_closing

RECORD = UsageRecord(
    request_id="req-1", time_ns=0, site="here", gateway="g", tenant="default", team="shop", key_id="k",
    route="r", task="chat", outcome="completed", status=200, cache="miss", model="m", deployment="d",
    answered_by="hub", decision=Decision(code="cheapest"),
)  # fmt: skip
KNOWN = Totals(
    usage=Usage(1, 2), cost=Money(0, "USD"), unpriced=False, energy_uj=None, carbon_ng=None,
    shown_cost=Money(12_400, "USD"), shown_energy_uj=1_234_567, shown_carbon_ng=2_000_000_000,
)  # fmt: skip
UNKNOWN = msgspec.structs.replace(KNOWN, shown_cost=None, shown_energy_uj=None, shown_carbon_ng=None)


def test_where_and_why() -> None:
    assert place_headers(RECORD) == [
        ("x-ondol-request-id", "req-1"), ("x-ondol-site", "hub"), ("x-ondol-model", "m"),
        ("x-ondol-deployment", "d"), ("x-ondol-cache", "miss"), ("x-ondol-reason", "cheapest"),
    ]  # fmt: skip
    bare = dict(place_headers(msgspec.structs.replace(RECORD, answered_by="", decision=None)))
    assert (bare["x-ondol-site"], bare["x-ondol-reason"]) == ("here", "none")


def test_what_it_took() -> None:
    assert dict(took_headers(KNOWN, 123_999)) == {
        "x-ondol-cost": "0.0000124 USD", "x-ondol-overhead-us": "123", "x-ondol-energy-j": "1.234567",
        "x-ondol-carbon-g": "2.000000000",
    }  # fmt: skip


def test_what_nobody_knows_is_left_out_and_never_zero() -> None:
    assert dict(took_headers(UNKNOWN, 0)) == {"x-ondol-cost": "unpriced", "x-ondol-overhead-us": "0"}
    said = json.loads(closing(RECORD, UNKNOWN, 0))
    assert said["cost"] == "unpriced"
    assert not {"energy_j", "carbon_g"} & said.keys()


def test_what_is_known_to_be_nothing_is_zero() -> None:
    free = nothing(Usage(1, 2), "KRW")
    assert dict(took_headers(free, 0))["x-ondol-energy-j"] == "0.000000"
    assert json.loads(closing(RECORD, free, 0)) | {} == {
        "request_id": "req-1", "site": "hub", "model": "m", "deployment": "d", "cache": "miss",
        "reason": "cheapest", "cost": "0 KRW", "energy_j": 0.0, "carbon_g": 0.0,
    }  # fmt: skip


@given(st.integers(0, 10**15), st.integers(0, 10**12), st.integers(0, 10**12), st.integers(0, 10**9))
def test_headers_and_the_closing_field_say_the_same(
    cost: int, energy: int, carbon: int, overhead: int
) -> None:
    totals = msgspec.structs.replace(
        KNOWN, shown_cost=Money(cost, "USD"), shown_energy_uj=energy, shown_carbon_ng=carbon
    )
    headers = dict(took_headers(totals, overhead))
    field = json.loads(closing(RECORD, totals, overhead))
    assert field["cost"] == headers["x-ondol-cost"] == cost_text(Money(cost, "USD"))
    assert field["energy_j"] == float(headers["x-ondol-energy-j"])
    assert field["carbon_g"] == float(headers["x-ondol-carbon-g"])
    assert field.get("overhead_us", 0) == int(headers["x-ondol-overhead-us"])


@pytest.mark.parametrize(
    "chunk", [b"{}", b"{ }\n", b'{"a":1}', b' {"a": {"b": []}} \r\n', b'{"ondol":{"site":"hub"},"a":1}', b'{"a":1,"ondol":null}'],
)  # fmt: skip
def test_the_field_is_set_once(chunk: bytes) -> None:
    found = with_closing(chunk, b'{"site":"here"}')
    assert found.count(b'"ondol"') == 1
    assert json.loads(found) == json.loads(chunk) | {"ondol": {"site": "here"}}


JSON: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=10) | st.just('"ondol"'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.just("ondol"), inner, max_size=3),
)  # fmt: skip


@given(st.dictionaries(st.text(max_size=5) | st.just("ondol"), JSON, max_size=4), st.booleans())
def test_any_chunk_keeps_its_other_fields(fields: dict[str, Any], escaped: bool) -> None:
    chunk = json.dumps(fields, ensure_ascii=escaped).encode()
    assert json.loads(with_closing(chunk, b"{}")) == fields | {"ondol": {}}
