"""Budgets hold: under any interleaving, across crashes, periods, reloads and exchange rates."""

from __future__ import annotations

import asyncio
from datetime import UTC, tzinfo
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ondol.core.catalog import BudgetDoc, BudgetScope
from ondol.core.identity import Principal
from ondol.core.money import Money, money
from ondol.errors import ConfigError
from ondol.gateway.budget import (
    NOTHING_RESERVED,
    Budgets,
    Exhausted,
    NeedsGrant,
    NeedsLease,
    Reservation,
    Settled,
)

DAY = 86_400_000_000_000
NOW = 20_000 * DAY  # 2024-10-04, a Friday
CALLER = Principal(key_id="k1", tenant="default", team="shop")


def zone(name: str) -> tzinfo:
    return UTC if name == "UTC" else ZoneInfo(name)


def doc(name: str = "b", amount: str = "1", **changes: Any) -> BudgetDoc:
    given = {"scope": BudgetScope(team="shop"), "period": "day", **changes}
    return BudgetDoc(name=name, amount=amount, **given)


def budgets(
    *docs: BudgetDoc,
    exchange: dict[tuple[str, str], str] | None = None,
    spent: dict[tuple[str, str], int] | None = None,
    leases: dict[tuple[str, str], int] | None = None,
) -> Budgets:
    named = {one.name: one for one in docs}
    return Budgets(named, exchange or {}, zone=zone, spent=spent or {}, leases=leases or {})


def usd(text: str) -> Money:
    return money(text, "USD")


def take(
    of: Budgets, names: tuple[str, ...], worst: Money | None, wall_ns: int = NOW
) -> Reservation | Exhausted:
    """Reserve, granting every lease at once."""
    while isinstance(answer := of.reserve(names, worst, wall_ns), NeedsLease):
        of.leased(answer.budget, answer.period, answer.total)
    assert not isinstance(answer, NeedsGrant), "a site that is in no fleet needs no grant"
    return answer


def taken(of: Budgets, names: tuple[str, ...], worst: Money | None, wall_ns: int = NOW) -> Reservation:
    answer = take(of, names, worst, wall_ns)
    assert isinstance(answer, Reservation)
    return answer


def refused(of: Budgets, names: tuple[str, ...], worst: Money | None, wall_ns: int = NOW) -> Exhausted:
    answer = take(of, names, worst, wall_ns)
    assert isinstance(answer, Exhausted)
    return answer


def test_a_request_without_a_budget_costs_nothing_to_reserve() -> None:
    none = budgets()
    assert none.covering(CALLER, [("a", "b")]) == ()
    assert none.reserve((), None, NOW) is NOTHING_RESERVED
    assert none.can_afford((), None, NOW)
    assert none.settle(NOTHING_RESERVED, usd("1")) == none.settle(NOTHING_RESERVED, None) == Settled()
    none.release(NOTHING_RESERVED)


def test_tenant_team_key_and_tags_cover() -> None:
    some = budgets(
        doc("tenant", scope=BudgetScope(tenant="default")),
        doc("team", scope=BudgetScope(team="shop")),
        doc("key", scope=BudgetScope(key="k1")),
        doc("lesson", scope=BudgetScope(tag="lesson")),
        doc("lesson-7", scope=BudgetScope(tag="lesson=7")),
        doc("other", scope=BudgetScope(team="other")),
    )
    assert some.covering(CALLER, [("lesson", "7")]) == ("tenant", "team", "key", "lesson", "lesson-7")
    assert some.covering(CALLER, [("lesson", "8"), ("lesson", "9")]) == ("tenant", "team", "key", "lesson")


def test_an_exhausted_budget_says_what_is_left_and_when_it_renews() -> None:
    some = budgets(doc(amount="0.01"))
    some.settle(taken(some, ("b",), usd("0.004")), usd("0.004"))
    answer = refused(some, ("b",), usd("0.007"), NOW + 5)
    assert answer == Exhausted("b", usd("0.006"), NOW + DAY, "spent")
    assert not some.can_afford(("b",), usd("0.007"), NOW)
    assert some.can_afford(("b",), usd("0.006"), NOW)
    assert some.remaining(("b",), NOW) == (("b", usd("0.006")),)
    taken(some, ("b",), usd("0.006"))
    assert some.refusal(("b",), usd("0.001"), NOW) == Exhausted("b", usd("0"), NOW + DAY, "spent")


def test_what_is_free_passes_where_nothing_is_left() -> None:
    some = budgets(doc(amount="0.01"))
    some.settle(taken(some, ("b",), usd("0.01")), usd("0.02"))
    assert some.can_afford(("b",), usd("0"), NOW)
    taken(some, ("b",), usd("0"))


def test_an_unknown_price_is_refused_by_a_hard_budget_and_not_counted_by_a_soft_one() -> None:
    some = budgets(doc("hard"), doc("soft", hard=False))
    assert refused(some, ("hard",), None).why == "unpriced"
    assert not some.can_afford(("hard",), None, NOW)
    assert some.settle(taken(some, ("soft",), None), None).uncounted == ("soft",)


def test_a_soft_budget_says_once_that_it_is_over() -> None:
    soft = doc(hard=False, amount="0.01")
    some = budgets(soft)
    assert some.settle(taken(some, ("b",), usd("0.01")), usd("0.01")).over == ()
    assert some.settle(taken(some, ("b",), usd("5")), usd("0.001")).over == ("b",)
    assert some.settle(taken(some, ("b",), usd("5")), usd("0.001")).over == ()
    some.reload({"b": doc(hard=False, amount="0.02")}, {}, spent={}, leases={})
    assert some.settle(taken(some, ("b",), usd("5")), usd("0.1")).over == ("b",)


def test_all_budgets_pay_or_none() -> None:
    some = budgets(doc("wide", amount="10"), doc("narrow", amount="0.01"))
    assert refused(some, ("wide", "narrow"), usd("1")).budget == "narrow"
    assert some.remaining(("wide", "narrow"), NOW) == (("wide", usd("10")), ("narrow", usd("0.01")))


def test_no_lease_is_asked_for_a_request_that_another_budget_refuses() -> None:
    some = budgets(doc("wide", amount="10"), doc("narrow", amount="0.01"))
    assert isinstance(some.reserve(("wide", "narrow"), usd("1"), NOW), Exhausted)


def test_leases_grow_by_a_fiftieth_or_by_what_is_needed_and_end_at_the_amount() -> None:
    some = budgets(doc(amount="100"))
    first = some.reserve(("b",), usd("0.5"), NOW)
    assert first == NeedsLease("b", "2024-10-04", usd("2").amount)
    some.leased("b", "2024-10-04", first.total)
    for _ in range(4):
        assert isinstance(some.reserve(("b",), usd("0.5"), NOW), Reservation)
    assert some.reserve(("b",), usd("7"), NOW) == NeedsLease("b", "2024-10-04", usd("9").amount)
    assert some.reserve(("b",), usd("97.5"), NOW) == NeedsLease("b", "2024-10-04", usd("99.5").amount)
    some.leased("b", "2024-10-04", usd("99").amount)
    assert some.reserve(("b",), usd("97.5"), NOW) == NeedsLease("b", "2024-10-04", usd("100").amount)


def test_a_lease_never_shrinks_by_a_late_smaller_answer() -> None:
    some = budgets(doc(amount="100"))
    some.reserve(("b",), usd("0.5"), NOW)
    some.leased("b", "2024-10-04", usd("4").amount)
    some.leased("b", "2024-10-04", usd("2").amount)
    some.leased("gone", "2024-10-04", usd("2").amount)
    assert isinstance(some.reserve(("b",), usd("4"), NOW), Reservation)


def test_totals_asked_for_only_grow_so_that_the_last_write_covers_all() -> None:
    some = budgets(doc(amount="100"))
    large = some.reserve(("b",), usd("10"), NOW)
    small = some.reserve(("b",), usd("1"), NOW)
    assert small == large == NeedsLease("b", "2024-10-04", usd("10").amount)
    assert isinstance(small, NeedsLease)
    some.leased("b", "2024-10-04", small.total)
    assert isinstance(some.reserve(("b",), usd("10"), NOW), Reservation)


def test_after_a_crash_the_open_part_of_the_lease_counts_as_spent() -> None:
    day = ("b", "2024-10-04")
    some = budgets(doc(amount="10"), spent={day: usd("3").amount}, leases={day: usd("4").amount})
    assert some.remaining(("b",), NOW) == (("b", usd("6")),)
    [row] = some.status(NOW)
    assert (row.spent, row.written_off, row.leased, row.left) == ("3", "1", "4", "6")
    assert some.remaining(("b",), NOW + DAY) == (("b", usd("10")),)


def test_after_a_clean_stop_nothing_is_lost() -> None:
    before = budgets(doc(amount="10"))
    before.settle(taken(before, ("b",), usd("3")), usd("1"))
    [closing] = before.closing_leases()
    assert closing == NeedsLease("b", "2024-10-04", usd("1").amount)
    day = (closing.budget, closing.period)
    after = budgets(doc(amount="10"), spent={day: usd("1").amount}, leases={day: closing.total})
    assert after.remaining(("b",), NOW) == (("b", usd("9")),)


def test_an_overrun_is_recorded_as_it_was_and_reported() -> None:
    some = budgets(doc(amount="1"))
    settled = some.settle(taken(some, ("b",), usd("0.5")), usd("1.5"))
    assert settled.overruns == ("b",)
    assert some.status(NOW)[0].spent == "1.5"
    assert refused(some, ("b",), usd("0.000000001")).left == usd("0")


def test_an_unknown_cost_counts_as_all_that_was_reserved() -> None:
    some = budgets(doc(amount="1"))
    some.settle(taken(some, ("b",), usd("0.5")), None)
    assert some.status(NOW)[0].spent == "0.5"


def test_a_reservation_is_settled_once_and_released_for_certain() -> None:
    some = budgets(doc(amount="1"))
    first, second = taken(some, ("b",), usd("0.5")), taken(some, ("b",), usd("0.5"))
    some.settle(first, usd("0.1"))
    some.release(first)
    with pytest.raises(ValueError, match="once"):
        some.settle(first, usd("0.1"))
    some.release(second)
    some.release(second)
    assert some.remaining(("b",), NOW) == (("b", usd("0.9")),)


def test_a_late_settlement_belongs_to_the_period_of_its_reservation() -> None:
    some = budgets(doc(amount="1"))
    late = taken(some, ("b",), usd("0.5"), NOW + DAY - 1)
    assert some.remaining(("b",), NOW + DAY) == (("b", usd("1")),)
    some.settle(late, usd("0.4"))
    assert some.remaining(("b",), NOW + DAY) == (("b", usd("1")),)
    assert some.remaining(("b",), NOW) == (("b", usd("0.6")),)


def test_setting_the_clock_back_and_forth_renews_nothing() -> None:
    some = budgets(doc(amount="1"))
    some.settle(taken(some, ("b",), usd("1")), usd("1"))
    taken(some, ("b",), usd("0.25"), NOW - DAY)
    taken(some, ("b",), usd("0.25"), NOW + DAY)
    assert isinstance(take(some, ("b",), usd("0.1")), Exhausted)


def test_a_budget_in_won_pays_prices_in_dollars_rounded_up() -> None:
    won = doc(amount="1000", currency="KRW")
    some = budgets(won, exchange={("USD", "KRW"): "1391.237"})
    some.settle(taken(some, ("b",), usd("0.5")), Money(1, "USD"))
    assert some.status(NOW)[0].spent == "0.000002"  # 1.391237 of 10^-6 won, rounded up
    turned = budgets(doc(amount="1"), exchange={("USD", "KRW"): "1400"})
    turned.settle(taken(turned, ("b",), money("700", "KRW")), money("700", "KRW"))
    assert turned.status(NOW)[0].spent == "0.5"


def test_without_a_rate_a_hard_budget_cannot_pay() -> None:
    assert refused(budgets(doc(currency="KRW")), ("b",), usd("0.1")).why == "no_rate"


def test_a_new_rate_acts_from_the_next_lease_on() -> None:
    won = doc(amount="1000000", currency="KRW")
    some = budgets(won, exchange={("USD", "KRW"): "1000"})
    early = taken(some, ("b",), usd("1"))
    some.reload({"b": won}, {("USD", "KRW"): "2000"}, spent={}, leases={})
    some.settle(taken(some, ("b",), usd("1")), usd("1"))
    assert some.status(NOW)[0].spent == "1000"
    needs = some.reserve(("b",), usd("19"), NOW)
    assert isinstance(needs, NeedsLease)
    some.leased(needs.budget, needs.period, needs.total)
    some.settle(taken(some, ("b",), usd("1")), usd("1"))
    assert some.status(NOW)[0].spent == "3000"
    some.settle(early, usd("1"))
    assert some.status(NOW)[0].spent == "4000"


def test_a_reload_keeps_what_is_spent_and_reserved() -> None:
    some = budgets(doc(amount="1"))
    held = taken(some, ("b",), usd("0.5"))
    changed = {"b": doc(amount="2"), "c": doc("c")}
    assert some.brought(changed) == ("c",)
    some.reload(changed, {}, spent={}, leases={})
    assert some.remaining(("b",), NOW) == (("b", usd("1.5")),)
    some.settle(held, usd("0.25"))
    assert some.remaining(("b",), NOW) == (("b", usd("1.75")),)
    some.reload({"b": doc(amount="0.1")}, {}, spent={}, leases={})
    assert refused(some, ("b",), usd("0.01")).left == usd("0")


def test_a_budget_with_a_new_period_starts_from_what_it_is_given() -> None:
    some = budgets(doc(amount="1"))
    held = taken(some, ("b",), usd("0.5"))
    weekly = {"b": doc(amount="1", period="week")}
    assert some.brought(weekly) == ("b",)
    some.reload(weekly, {}, spent={("b", "2024-W40"): usd("0.25").amount}, leases={})
    assert some.remaining(("b",), NOW) == (("b", usd("0.75")),)
    some.settle(held, usd("0.5"))
    assert some.remaining(("b",), NOW) == (("b", usd("0.75")),)


def test_a_budget_that_was_removed_no_longer_counts() -> None:
    some = budgets(doc(amount="1"))
    held = taken(some, ("b",), usd("0.5"))
    some.reload({}, {}, spent={}, leases={})
    some.settle(held, usd("0.5"))
    assert isinstance(some.reserve(("b",), usd("9"), NOW), Reservation)
    assert some.status(NOW) == []


def test_unknown_currencies_and_empty_scopes_are_refused() -> None:
    with pytest.raises(ConfigError, match="GBP is unknown; allowed: EUR, JPY, KRW, USD"):
        budgets(doc(currency="GBP"))
    with pytest.raises(ConfigError, match="scope names nothing"):
        budgets(doc(scope=BudgetScope()))


def test_periods_follow_the_budgets_time_zone() -> None:
    some = budgets(doc(amount="1", timezone="Asia/Seoul"))
    [row] = some.status(NOW)
    assert (row.period, row.renews_ns) == ("2024-10-04", NOW + 15 * DAY // 24)


def test_a_thousand_at_once_never_pass_the_amount() -> None:
    some = budgets(doc(amount="1"))
    durable = {"b": 0}
    writing = asyncio.Lock()  # the ledger's writer: first come, first written

    async def ask(number: int) -> int:
        names, worst = ("b",), Money(usd("0.01").amount * (number % 7 + 1) // 7, "USD")
        while isinstance(answer := some.reserve(names, worst, NOW), NeedsLease):
            async with writing:
                await asyncio.sleep(0)
                durable["b"] = answer.total
            some.leased(answer.budget, answer.period, answer.total)
        if not isinstance(answer, Reservation):
            assert isinstance(answer, Exhausted)
            return 0
        await asyncio.sleep(0)
        cost = Money(worst.amount * (number % 3 + 1) // 3, "USD")
        some.settle(answer, cost)
        return cost.amount

    async def storm() -> list[int]:
        return await asyncio.gather(*[ask(number) for number in range(1000)])

    costs = asyncio.run(storm())
    assert 100 <= sum(cost > 0 for cost in costs) < 1000
    assert sum(costs) <= durable["b"] <= usd("1").amount
    assert some.status(NOW)[0].reserved == "0"


class BudgetMachine(RuleBasedStateMachine):
    """Reserve, lease, settle, release, crash and stop in any order, against a ledger kept beside."""

    amounts = {"hard": 1000, "narrow": 300}

    def __init__(self) -> None:
        super().__init__()
        self.recorded = dict.fromkeys(self.amounts, 0)
        self.leases = dict.fromkeys(self.amounts, 0)
        self.lost = dict.fromkeys(self.amounts, 0)
        self.open: list[tuple[Reservation, tuple[str, ...], int]] = []
        self.pending: list[NeedsLease] = []
        self.start()

    def start(self) -> None:
        docs = [doc(name, amount=f"0.{amount:09d}") for name, amount in self.amounts.items()]
        self.budgets = budgets(
            *docs,
            spent={(name, "2024-10-04"): amount for name, amount in self.recorded.items()},
            leases={(name, "2024-10-04"): amount for name, amount in self.leases.items()},
        )
        self.open, self.pending = [], []

    @rule(worst=st.integers(0, 200), names=st.sampled_from([("hard",), ("narrow",), ("hard", "narrow")]))
    def reserve(self, worst: int, names: tuple[str, ...]) -> None:
        affordable = self.budgets.can_afford(names, Money(worst, "USD"), NOW)
        answer = self.budgets.reserve(names, Money(worst, "USD"), NOW)
        assert affordable != isinstance(answer, Exhausted)
        if isinstance(answer, NeedsLease):
            assert self.leases[answer.budget] < answer.total <= self.amounts[answer.budget]
            self.pending.append(answer)
        elif isinstance(answer, Reservation):
            self.open.append((answer, names, worst))

    @precondition(lambda self: self.pending)
    @rule()
    def lease_is_durable(self) -> None:
        # In the order of asking, the last write wins: as the ledger does it.
        one = self.pending.pop(0)
        self.leases[one.budget] = one.total
        self.budgets.leased(one.budget, one.period, one.total)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), share=st.floats(0, 1))
    def settle(self, data: st.DataObject, share: float) -> None:
        held, names, worst = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        for name in names:
            self.recorded[name] += int(worst * share)
        assert self.budgets.settle(held, Money(int(worst * share), "USD")) == Settled()

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.budgets.release(self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))[0])

    @rule(share=st.floats(0, 1))
    def crash(self, share: float) -> None:
        # The engines were paid for what was reserved; no record tells.
        for _, names, worst in self.open:
            for name in names:
                self.lost[name] += int(worst * share)
        self.start()

    @precondition(lambda self: not self.open and not self.pending)
    @rule()
    def stop_cleanly(self) -> None:
        for one in self.budgets.closing_leases():
            self.leases[one.budget] = one.total
        before = self.budgets.remaining(tuple(self.amounts), NOW)
        self.start()
        assert self.budgets.remaining(tuple(self.amounts), NOW) == before

    @invariant()
    def what_engines_were_paid_never_passes_the_amount(self) -> None:
        for name, amount in self.amounts.items():
            open_now = sum(worst for _, names, worst in self.open if name in names)
            paid = self.recorded[name] + self.lost[name] + open_now
            assert paid <= self.leases[name] <= amount


TestBudgetMachine = BudgetMachine.TestCase
TestBudgetMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
