"""Budgets as leases, at the hub: what each site holds of each budget in each period.

A row says what a site may spend in total, and is durable before the site hears of it.  The hub counts all of it as
spent until the site itself says less: a hub cannot know what a silent site has spent, and no clock tells it
(docs/adr/0015-fleet-leases.md).  A call carries the site's totals and a number that only rises, so the row is
simply replaced by what the newest call says, plus what is granted with it:

    held by the site  <=  granted here;      sum of granted  <=  amount
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from ondol.core.catalog import BudgetDoc
from ondol.core.money import Money, money
from ondol.core.ports import Tx
from ondol.errors import InvalidRequest
from ondol.hub.decide.leases import TERM_S, Holder, grant, left_of, plausible
from ondol.units import NS_PER_S
from ondol.wire.sync import Lease, LeaseReply

SCHEMA: Final[tuple[str, ...]] = (
    """CREATE TABLE lease_grants(
        budget TEXT NOT NULL, currency TEXT NOT NULL, period TEXT NOT NULL, site TEXT NOT NULL,
        number BIGINT NOT NULL, granted TEXT NOT NULL, spent TEXT NOT NULL,
        term_ends_ns BIGINT NOT NULL, heard_ns BIGINT NOT NULL,
        PRIMARY KEY(budget, currency, period, site))""",
    "CREATE INDEX lease_grants_site ON lease_grants(site)",
)
"""Amounts are decimal text in scaled units.  The currency is in the key: a budget that changes it begins anew."""

_DIGITS_MAX: Final = 30
_PUT: Final = (
    "INSERT INTO lease_grants(budget, currency, period, site, number, granted, spent, term_ends_ns, heard_ns)"
    " VALUES(?,?,?,?,?,?,?,?,?) ON CONFLICT (budget, currency, period, site) DO UPDATE SET"
    " number = excluded.number, granted = excluded.granted, spent = excluded.spent,"
    " term_ends_ns = excluded.term_ends_ns, heard_ns = excluded.heard_ns"
)


class SiteShare(msgspec.Struct, frozen=True, kw_only=True):
    """What one site holds; amounts are decimal text in the budget's currency.  `heard_ns`: when it last said so."""

    site: str
    granted: str
    spent: str
    heard_ns: int


class FleetBudget(msgspec.Struct, frozen=True, kw_only=True):
    """One budget in one period over all sites; amounts are decimal text in `currency`."""

    name: str
    period: str
    currency: str
    hard: bool
    amount: str
    granted: str
    spent: str
    left: str
    over: bool
    sites: tuple[SiteShare, ...]


def take_lease(
    tx: Tx, site: str, message: Lease, *, budget: BudgetDoc, now_ns: int, term_s: float = TERM_S
) -> LeaseReply:
    """Take what a site says of a budget, grant what it may have, and answer with the whole.  O(sites).

    A call whose number is not above the last one changes nothing and is answered with the present state.  A soft
    budget refuses nothing: its rows only say who spent how much.

    Raises:
        InvalidRequest: the message is about another budget or currency, about a period that is not now, or an
            amount in it is no number.
    """
    spent, want = _units(message.spent, "spent"), _units(message.want, "want")
    least = _units(message.least, "least")
    _check(message, budget, want, now_ns)
    known = {one.site: (one, number) for one, number in _rows(tx, budget, message.period)}
    mine, number = known.get(site, (Holder(site, 0, 0), 0))
    others = tuple([one for one, _ in known.values() if one.site != site])
    amount = money(budget.amount, budget.currency).amount
    if message.number > number:
        if message.granted:
            held = _units(message.granted, "granted")
        else:
            held = mine.granted - _units(message.give_back, "give_back")
        # A site that was charged more than it held tells the truth, and the truth counts.
        mine, number = Holder(site, max(held, spent), spent), message.number
        if budget.hard:
            more = grant(amount, (*others, mine), site, want=want, least=least)
            mine = Holder(site, mine.granted + more, spent)
        ends_ns = now_ns + int(term_s * NS_PER_S)
        row = (budget.name, budget.currency, message.period, site, number)
        tx.run(_PUT, (*row, str(mine.granted), str(mine.spent), ends_ns, now_ns))
    return LeaseReply(
        budget=budget.name,
        period=message.period,
        number=number,
        granted=str(mine.granted),
        term_s=term_s,
        left=str(left_of(amount, (*others, mine))),
    )


def reclaim(tx: Tx, site: str, spent: Mapping[tuple[str, str, str], int], *, now_ns: int) -> tuple[str, ...]:
    """Take back what a revoked site did not spend; the names of the budgets that got something.

    Call it only when the site's whole ledger up to its revocation has arrived: `spent` is what that says, in scaled
    units by (budget, currency, period).  A grant whose term goes on is left alone, since the site may use it yet.
    """
    rows = tx.run(
        "SELECT budget, currency, period, number, granted, term_ends_ns, heard_ns FROM lease_grants"
        " WHERE site = ? AND term_ends_ns < ?",
        (site, now_ns),
    )
    freed = []
    for name, currency, period, number, granted, ends_ns, heard_ns in rows:
        used = spent.get((name, currency, period), 0)
        if used < int(granted):
            tx.run(_PUT, (name, currency, period, site, number, str(used), str(used), ends_ns, heard_ns))
            freed.append(name)
    return tuple(dict.fromkeys(freed))


def forget(tx: Tx, *, heard_before_ns: int) -> None:
    """Delete what no site has spoken of since then: long past periods."""
    tx.run("DELETE FROM lease_grants WHERE heard_ns < ?", (heard_before_ns,))


def status(tx: Tx, budgets: Iterable[BudgetDoc]) -> list[FleetBudget]:
    """Every budget in every period of which some site holds a part: by name, the newest period first."""
    found = []
    for budget in sorted(budgets, key=lambda one: one.name):
        rows = tx.run(
            "SELECT period, site, granted, spent, heard_ns FROM lease_grants"
            " WHERE budget = ? AND currency = ? ORDER BY period DESC, site",
            (budget.name, budget.currency),
        )
        for period in dict.fromkeys([row[0] for row in rows]):
            found.append(_fleet_budget(budget, period, [row for row in rows if row[0] == period]))
    return found


def _fleet_budget(budget: BudgetDoc, period: str, rows: list[tuple[str, str, str, str, int]]) -> FleetBudget:
    def text(units: int) -> str:
        return str(Money(units, budget.currency)).partition(" ")[0]

    amount = money(budget.amount, budget.currency).amount
    holders = tuple([Holder(site, int(granted), int(spent)) for _, site, granted, spent, _ in rows])
    spent_in_all = sum(one.spent for one in holders)
    return FleetBudget(
        name=budget.name,
        period=period,
        currency=budget.currency,
        hard=budget.hard,
        amount=text(amount),
        granted=text(sum(one.granted for one in holders)),
        spent=text(spent_in_all),
        left=text(left_of(amount, holders)),
        over=spent_in_all > amount,
        sites=tuple(
            [
                SiteShare(site=site, granted=text(int(granted)), spent=text(int(spent)), heard_ns=heard_ns)
                for _, site, granted, spent, heard_ns in rows
            ]
        ),
    )


def _rows(tx: Tx, budget: BudgetDoc, period: str) -> list[tuple[Holder, int]]:
    rows = tx.run(
        "SELECT site, granted, spent, number FROM lease_grants WHERE budget = ? AND currency = ? AND period = ?",
        (budget.name, budget.currency, period),
    )
    return [(Holder(site, int(granted), int(spent)), number) for site, granted, spent, number in rows]


def _check(message: Lease, budget: BudgetDoc, want: int, now_ns: int) -> None:
    if message.budget != budget.name:
        raise InvalidRequest(f"lease: found budget {message.budget[:64]!r}, expected {budget.name!r}")
    if message.currency and message.currency != budget.currency:
        raise InvalidRequest(
            f"lease: the site counts budget {budget.name} in {message.currency[:8]}, and it is in "
            f"{budget.currency} now; fetch the desired state first"
        )
    if not 0 < message.number < 2**62:
        raise InvalidRequest(f"lease: found number {message.number}, expected one from 1 on")
    if want > 0 and not plausible(message.period, budget.period, now_ns):
        raise InvalidRequest(
            f"lease: {message.period[:32]!r} is no {budget.period} that goes on now, so nothing is granted for it; "
            "check the site's clock and its desired state"
        )


def _units(text: str, field: str) -> int:
    if not (0 < len(text) <= _DIGITS_MAX and text.isascii() and text.isdigit()):
        raise InvalidRequest(f"lease: {field} is {text[:40]!r}; expected scaled units as decimal digits")
    return int(text)
