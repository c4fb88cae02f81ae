"""What the hub grants: never more than there is, less towards the end, and nothing twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol.adapters.database_sqlite import InlineDatabase
from ondol.core.catalog import BudgetDoc, BudgetScope
from ondol.core.ports import Tx
from ondol.errors import InvalidRequest
from ondol.hub.decide.leases import Holder, grant, left_of, plausible
from ondol.hub.leases import forget, reclaim, status, take_lease
from ondol.hub.schema import MIGRATIONS
from ondol.units import NS_PER_S
from ondol.wire.sync import Lease, LeaseReply

T = TypeVar("T")
DAY_NS = 86_400 * NS_PER_S
NOW = 20_000 * DAY_NS  # 2024-10-04
PERIOD = "2024-10-04"

amounts = st.integers(min_value=0, max_value=10**12)
holders = st.lists(
    st.tuples(st.sampled_from("abcdef"), amounts, amounts), max_size=6, unique_by=lambda one: one[0]
).map(lambda rows: tuple([Holder(site, max(granted, spent), spent) for site, granted, spent in rows]))


@given(amount=amounts, held=holders, want=amounts, least=amounts)
def test_a_grant_never_passes_what_is_left_and_helps_or_is_nothing(
    amount: int, held: tuple[Holder, ...], want: int, least: int
) -> None:
    left = left_of(amount, held)
    got = grant(amount, held, "a", want=want, least=least)
    assert 0 <= got <= left
    assert got == 0 or got >= least
    if want > 0 and left > 0 and least <= left:
        assert got > 0


@given(amount=st.integers(1, 10**6), wants=st.lists(st.integers(1, 2000), min_size=1, max_size=50))
def test_whoever_asks_long_enough_gets_the_last_unit(amount: int, wants: list[int]) -> None:
    held: tuple[Holder, ...] = ()
    for turn in range(5000):
        want = wants[turn % len(wants)]
        granted = sum(one.granted for one in held)
        more = grant(amount, held, "a", want=want, least=0)
        if not more:
            break
        held = (Holder("a", granted + more, granted + more),)
    assert left_of(amount, held) == 0 or turn == 4999


def test_the_first_to_ask_gets_a_part_and_the_busy_one_more_than_the_quiet() -> None:
    assert grant(1000, (), "a", want=1000, least=0) == 100
    held = (Holder("busy", 300, 300), Holder("quiet", 100, 10))
    assert grant(1000, held, "busy", want=1000, least=0) == 100
    assert grant(1000, held, "quiet", want=1000, least=0) == 75
    assert grant(1000, held, "quiet", want=1000, least=200) == 300
    assert grant(1000, held, "new", want=1000, least=601) == 0


@pytest.mark.parametrize(
    ("key", "kind", "good"),
    [
        (PERIOD, "day", True), ("2024-10-05", "day", True), ("2024-10-07", "day", False),
        ("2024-W40", "week", True), ("2024-W42", "week", False), ("2024-10", "month", True),
        ("9999-12", "month", False), ("", "day", False), (PERIOD, "month", False),
    ],
)  # fmt: skip
def test_a_site_cannot_invent_a_period(key: str, kind: Any, good: bool) -> None:
    assert plausible(key, kind, NOW) is good


class Desk:
    """The hub's table, and messages to it."""

    def __init__(self, folder: Path) -> None:
        self.database = InlineDatabase(folder / "hub.db", migrations=MIGRATIONS)
        self.numbers: dict[str, int] = {}
        self.budget = BudgetDoc(
            name="b", scope=BudgetScope(team="t"), amount="1", currency="USD", period="day"
        )

    def run(self, work: Callable[[Tx], T]) -> T:
        return self.database.write_now(work)

    def say(self, site: str, now_ns: int = NOW, **fields: Any) -> LeaseReply:
        number = fields.pop("number", None) or self.numbers.get(site, 0) + 1
        self.numbers[site] = max(number, self.numbers.get(site, 0))
        known = {"instance": "i", "budget": "b", "period": PERIOD, "spent": "0", "want": "0", "granted": "0"}
        message = Lease(number=number, **(known | fields))
        return self.run(lambda tx: take_lease(tx, site, message, budget=self.budget, now_ns=now_ns))


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.database.close_now()


def test_a_call_that_comes_twice_or_late_changes_nothing(desk: Desk) -> None:
    first = desk.say("s", want="1000", number=3)
    assert (first.number, first.granted, first.left, first.term_s) == (3, "1000", "999999000", 3600.0)
    assert desk.say("s", want="1000", number=3) == first
    late = desk.say("s", want="5", granted="7", number=2)
    assert (late.number, late.granted) == (3, "1000")


def test_an_answer_that_was_lost_comes_back_with_the_next_call(desk: Desk) -> None:
    desk.say("s", want="1000")
    again = desk.say("s", granted="0", spent="0", want="500")
    assert (again.granted, again.left) == ("500", "999999500")


def test_what_is_given_back_goes_to_others_and_what_is_spent_never_does(desk: Desk) -> None:
    desk.budget = BudgetDoc(name="b", scope=BudgetScope(team="t"), amount="0.000001", period="day")
    assert desk.say("s", want="1000", least="900").granted == "900"
    assert desk.say("other", want="1000", least="101").granted == "0"
    assert desk.say("s", spent="300", granted="250", give_back="650").granted == "300"
    assert desk.say("other", want="1000", least="700").granted == "700"
    assert desk.say("third", want="1").granted == "0"


def test_a_site_of_an_older_format_gives_back_by_difference(desk: Desk) -> None:
    desk.say("s", want="1000")
    assert desk.say("s", granted="", give_back="400").granted == "600"


def test_a_lowered_amount_grants_nothing_until_less_is_held(desk: Desk) -> None:
    desk.say("s", want="90000000")
    desk.budget = BudgetDoc(name="b", scope=BudgetScope(team="t"), amount="0.05", period="day")
    answer = desk.say("s", granted="90000000", want="10")
    assert (answer.granted, answer.left) == ("90000000", "0")
    assert desk.say("s", granted="40000000", want="10").granted == "40000010"


def test_a_restored_hub_learns_from_the_sites_what_they_hold(desk: Desk) -> None:
    answer = desk.say("s", number=17, granted="999999999", spent="5", want="0")
    assert (answer.number, answer.granted, answer.left) == (17, "999999999", "1")


def test_a_new_currency_begins_anew_and_an_old_one_is_refused(desk: Desk) -> None:
    desk.say("s", want="1000", currency="USD")
    desk.budget = BudgetDoc(name="b", scope=BudgetScope(team="t"), amount="1", currency="KRW", period="day")
    with pytest.raises(InvalidRequest, match="counts budget b in USD, and it is in KRW now; fetch"):
        desk.say("s", want="1", currency="USD")
    assert desk.say("s", want="10", currency="KRW").granted == "10"


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"want": "-1"}, "want is '-1'; expected scaled units"),
        ({"spent": "1e9"}, "spent is '1e9'"),
        ({"granted": "9" * 31}, "granted is"),
        ({"budget": "other"}, "found budget 'other', expected 'b'"),
        ({"number": -1}, "found number -1"),
        ({"want": "1", "period": "2031-01-01"}, "'2031-01-01' is no day that goes on now"),
    ],
)
def test_a_bad_call_is_refused_and_changes_nothing(desk: Desk, fields: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidRequest, match=match):
        desk.say("s", **fields)
    assert desk.run(lambda tx: status(tx, [desk.budget])) == []


def test_a_soft_budget_only_listens(desk: Desk) -> None:
    desk.budget = BudgetDoc(name="b", scope=BudgetScope(team="t"), amount="1", period="day", hard=False)
    desk.say("s", spent="700000000", want="0")
    desk.say("other", spent="600000000", want="0")
    [row] = desk.run(lambda tx: status(tx, [desk.budget]))
    assert (row.spent, row.left, row.over) == ("1.3", "0", True)


def test_status_lists_every_period_and_site(desk: Desk) -> None:
    desk.say("s", want="250000000", spent="0")
    desk.say("s", granted="100000000", spent="40000000")
    desk.say("z", want="10", period="2024-10-05")
    newest, older = desk.run(lambda tx: status(tx, [desk.budget]))
    assert (newest.period, [one.site for one in newest.sites]) == ("2024-10-05", ["z"])
    assert (older.granted, older.spent, older.left, older.over) == ("0.1", "0.04", "0.9", False)


def test_a_revoked_sites_rest_comes_back_only_after_its_term(desk: Desk) -> None:
    desk.say("gone", want="50000000")
    spent = {("b", "USD", PERIOD): 3}
    early, late = NOW + 3599 * NS_PER_S, NOW + 3601 * NS_PER_S
    assert desk.run(lambda tx: reclaim(tx, "gone", spent, now_ns=early)) == ()
    assert desk.run(lambda tx: reclaim(tx, "gone", spent, now_ns=late)) == ("b",)
    [row] = desk.run(lambda tx: status(tx, [desk.budget]))
    assert (row.granted, row.spent) == ("0.000000003", "0.000000003")
    assert desk.run(lambda tx: reclaim(tx, "gone", spent, now_ns=late)) == ()


def test_long_past_periods_are_forgotten(desk: Desk) -> None:
    desk.say("s", want="5")
    desk.run(lambda tx: forget(tx, heard_before_ns=NOW))
    assert desk.run(lambda tx: status(tx, [desk.budget]))
    desk.run(lambda tx: forget(tx, heard_before_ns=NOW + 1))
    assert desk.run(lambda tx: status(tx, [desk.budget])) == []
