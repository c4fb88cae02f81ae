"""Everything counts once, also over the ledgers of several sites."""

from __future__ import annotations

from datetime import timedelta, timezone
from decimal import Decimal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol.core.costs import GROUPINGS, CostRow, fold
from ondol.core.identity import Origin
from ondol.core.inference import Usage
from ondol.core.usage import Attempt, UsageRecord

OWN = Attempt(
    deployment="d", engine="llamacpp", site="edge", outcome="ok", usage=Usage(10, 20),
    energy_uj=2_000_000, carbon_ng=5_000_000,
)  # fmt: skip
BASE = UsageRecord(
    request_id="r1", time_ns=1_767_193_200_000_000_000, site="edge", gateway="edge", tenant="default",
    team="a", key_id="k1", route="assistant", task="chat", outcome="completed", status=200, model="helper",
    answered_by="edge", usage=Usage(10, 20), cost=1_500, attempts=(OWN,), energy_uj=2_000_000,
    carbon_ng=5_000_000,
)  # fmt: skip
CALLER = msgspec.structs.replace(
    BASE, request_id="r2", answered_by="cloud", cost=0, energy_uj=9_000_000,
    attempts=(
        msgspec.structs.replace(OWN, engine="peer", energy_uj=9_000_000, peer_request="c1", peer_cost=9),
    ),
)  # fmt: skip
CALLEE = msgspec.structs.replace(
    BASE, request_id="c1", site="cloud", gateway="cloud", answered_by="cloud", cost=9_000,
    origin=Origin(site="edge", request_id="r2", attempt=1),
)  # fmt: skip


def _one(rows: list[CostRow], key: str) -> CostRow:
    (row,) = [row for row in rows if row.key == key]
    return row


def test_the_union_of_two_sites_counts_a_peer_request_once() -> None:
    (row,) = fold([BASE, CALLER, CALLEE], by="team")

    assert (row.requests, row.for_peers) == (2, 1)
    assert (row.input_tokens, row.output_tokens) == (20, 40)
    assert row.cost == "0.0000105"
    assert row.energy_j == 4.0
    assert row.carbon_g == 0.01


def test_by_site_money_is_where_it_was_booked_and_requests_where_they_were_answered() -> None:
    rows = fold([BASE, CALLER, CALLEE], by="site")

    edge, cloud = _one(rows, "edge"), _one(rows, "cloud")
    assert (edge.requests, edge.cost, edge.energy_j) == (1, "0.0000015", 2.0)
    assert (cloud.requests, cloud.cost, cloud.for_peers, cloud.energy_j) == (1, "0.000009", 1, 2.0)


def test_currencies_are_never_added() -> None:
    won = msgspec.structs.replace(BASE, currency="KRW", cost=1_000_000)

    rows = fold([BASE, won, won], by="team")

    assert [(row.currency, row.cost, row.requests) for row in rows] == [
        ("KRW", "2", 2),
        ("USD", "0.0000015", 1),
    ]


def test_a_day_is_that_of_the_zone() -> None:
    record = msgspec.structs.replace(BASE, time_ns=1_767_193_200_000_000_000)  # 2025-12-31 15:00 UTC

    assert fold([record], by="day")[0].key == "2025-12-31"
    assert fold([record], by="day", zone=timezone(timedelta(hours=9)))[0].key == "2026-01-01"


def test_a_record_counts_under_each_of_its_tags() -> None:
    record = msgspec.structs.replace(BASE, tags=(("lesson", "7"), ("unit", "math")))

    assert [row.key for row in fold([record, BASE], by="tag")] == ["", "lesson=7", "unit=math"]
    assert [row.key for row in fold([record, BASE], by="tag:unit")] == ["", "math"]


def test_what_is_unknown_is_counted_and_not_taken_for_zero() -> None:
    attempt = msgspec.structs.replace(OWN, energy_uj=None, carbon_ng=None)
    unknown = msgspec.structs.replace(BASE, cost=0, unpriced=True, energy_uj=None, attempts=(attempt,))
    hit = msgspec.structs.replace(BASE, cache="exact", attempts=(), cost=0, energy_uj=None, carbon_ng=None)

    (row,) = fold([unknown, hit], by="team")

    assert (row.energy_j, row.carbon_g) == (None, None)
    assert (row.unpriced, row.unmeasured, row.cache_hits) == (1, 1, 1)


def test_an_unknown_grouping_says_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"found 'colour'.*team, route"):
        fold([], by="colour")


@given(
    costs=st.lists(
        st.tuples(st.integers(0, 2**70), st.sampled_from(["a", "b"]), st.sampled_from(["USD", "KRW"])),
        max_size=30,
    ),
    by=st.sampled_from([each for each in GROUPINGS if each != "tag"]),
)
def test_rows_add_up_to_the_records(costs: list[tuple[int, str, str]], by: str) -> None:
    records = [
        msgspec.structs.replace(BASE, cost=cost, team=team, key_id=team, currency=currency)
        for cost, team, currency in costs
    ]

    rows = fold(records, by=by)

    assert sum(row.requests for row in rows) == len(records)
    for currency, scale in (("USD", 9), ("KRW", 6)):
        booked = Decimal(sum(cost for cost, _, each in costs if each == currency)).scaleb(-scale)
        assert sum(Decimal(row.cost) for row in rows if row.currency == currency) == booked
