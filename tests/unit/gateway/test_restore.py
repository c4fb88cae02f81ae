"""What budgets have spent, read back from records: the same sums as the budgets themselves had."""

from __future__ import annotations

from datetime import UTC, tzinfo
from typing import Any
from zoneinfo import ZoneInfo

from hypothesis import given
from hypothesis import strategies as st

from ondol.core.catalog import BudgetDoc, BudgetScope
from ondol.core.identity import Principal
from ondol.core.money import Money
from ondol.core.usage import Attempt, UsageRecord
from ondol.gateway.budget import Budgets, NeedsLease, Reservation
from ondol.gateway.restore import earliest_ns, spent

DAY = 86_400_000_000_000
NOW = 20_000 * DAY  # 2024-10-04, a Friday


def zone(name: str) -> tzinfo:
    return UTC if name == "UTC" else ZoneInfo(name)


def doc(name: str, scope: BudgetScope, **changes: Any) -> BudgetDoc:
    given: dict[str, Any] = {"amount": "1000", "period": "day", **changes}
    return BudgetDoc(name=name, scope=scope, **given)


def record(**changes: Any) -> UsageRecord:
    given: dict[str, Any] = {
        "request_id": "r", "time_ns": NOW, "site": "here", "gateway": "g", "tenant": "default",
        "team": "shop", "key_id": "k1", "route": "r", "task": "chat", "outcome": "completed", "status": 200,
    }  # fmt: skip
    return UsageRecord(**(given | changes))


def peer(cost: int | None, currency: str | None = "USD") -> Attempt:
    return Attempt(
        deployment="d", engine="peer", site="hub", outcome="ok", peer_cost=cost, peer_currency=currency
    )


DOCS = {
    one.name: one
    for one in [
        doc("tenant-day", BudgetScope(tenant="default")),
        doc("team-week", BudgetScope(team="shop"), period="week", timezone="Asia/Seoul"),
        doc("team-month", BudgetScope(team="lab"), period="month", hard=False),
        doc("key-day", BudgetScope(key="k1"), timezone="America/New_York"),
        doc("tag-any", BudgetScope(tag="project")),
        doc("tag-one", BudgetScope(tag="project=apollo"), period="month"),
    ]
}


def test_the_oldest_period_that_counts() -> None:
    assert earliest_ns({}, zone, NOW) == NOW
    assert earliest_ns({"a": DOCS["tenant-day"]}, zone, NOW + 5) == NOW
    assert earliest_ns(DOCS, zone, NOW + 5) == NOW - 4 * DAY - 9 * 3600 * 10**9  # Monday in Seoul


def test_own_costs_and_those_of_peers_count() -> None:
    docs = {"t": doc("t", BudgetScope(team="shop"))}
    records = [
        record(cost=5), record(cost=7, attempts=(peer(100), peer(None, None))), record(cost=9, team="lab"),
        record(cost=11, time_ns=NOW + DAY),
    ]  # fmt: skip
    assert spent(records, docs, {}, zone) == {("t", "2024-10-04"): 112, ("t", "2024-10-05"): 11}


def test_other_currencies_are_exchanged_and_rounded_up() -> None:
    docs = {"t": doc("t", BudgetScope(team="shop"), currency="KRW")}
    records = [record(cost=1), record(cost=1000, attempts=(peer(1_000_000, "KRW"),))]
    # One unit is 10^-9 USD = 1.4 * 10^-6 KRW: 1.4 units of KRW, rounded up.
    assert spent(records, docs, {("USD", "KRW"): "1400"}, zone) == {("t", "2024-10-04"): 2 + 1400 + 1_000_000}
    assert spent(records, docs, {}, zone) == {("t", "2024-10-04"): 1_000_000}


TAGS = st.dictionaries(
    st.sampled_from(["project", "project=apollo", "x"]),
    st.sampled_from(["apollo", "gemini", "a=b", ""]),
    max_size=2,
).map(lambda tags: tuple(tags.items()))
RECORDS = st.lists(
    st.builds(
        record, time_ns=st.integers(NOW, NOW + 20 * DAY), team=st.sampled_from(["shop", "lab"]),
        key_id=st.sampled_from(["k1", "k2"]), tenant=st.sampled_from(["default", "acme"]), tags=TAGS,
        cost=st.integers(0, 10**9), attempts=st.just(()) | st.builds(peer, st.integers(0, 10**9)).map(lambda a: (a,)),
    ),
    max_size=12,
)  # fmt: skip


@given(RECORDS)
def test_the_sums_are_those_that_the_budgets_had(records: list[UsageRecord]) -> None:
    records.sort(key=lambda one: one.time_ns)
    live = Budgets(DOCS, {}, zone=zone, spent={}, leases={})
    for one in records:
        caller = Principal(key_id=one.key_id, tenant=one.tenant, team=one.team)
        actual = Money(one.cost + sum(a.peer_cost or 0 for a in one.attempts), "USD")
        names = live.covering(caller, one.tags)
        while isinstance(answer := live.reserve(names, actual, one.time_ns), NeedsLease):
            live.leased(answer.budget, answer.period, answer.total)
        assert isinstance(answer, Reservation)
        live.settle(answer, actual)
    last = records[-1].time_ns if records else NOW
    sums = spent(records, DOCS, {}, zone)
    again = Budgets(DOCS, {}, zone=zone, spent=sums, leases={})
    for before, after in zip(live.status(last), again.status(last), strict=True):
        assert (before.name, before.spent) == (after.name, after.spent)


@given(RECORDS)
def test_the_order_of_records_means_nothing(records: list[UsageRecord]) -> None:
    assert spent(records, DOCS, {}, zone) == spent(records[::-1], DOCS, {}, zone)
