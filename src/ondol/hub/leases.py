"""Budgets as leases, at the hub: what each site holds of each budget in each period.

A row says what a site may spend in total, and is durable before the site hears of it.  The hub counts all of it as
spent until the site itself says less: a hub cannot know what a silent site has spent, and no clock tells it
(docs/adr/0015-fleet-leases.md).  A call carries the site's totals and a number that only rises, so the row is
simply replaced by what the newest call says, plus what is granted with it:

    held by the site  <=  granted here;      sum of granted  <=  amount

A hub that was restored from an older backup has forgotten grants: hub/freeze.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

import msgspec

from ondol.core.catalog import BudgetDoc
from ondol.core.money import Money, money
from ondol.core.ports import Tx
from ondol.errors import InvalidRequest
from ondol.hub import freeze
from ondol.hub.decide.leases import TERM_S, Holder, grant, left_of, plausible
from ondol.units import NS_PER_S
from ondol.wire.sync import Lease, LeaseReply

SCHEMA: Final[tuple[str, ...]] = (
    """CREATE TABLE lease_grants(
        budget TEXT NOT NULL, currency TEXT NOT NULL, period TEXT NOT NULL, site TEXT NOT NULL,
        number BIGINT NOT NULL, granted TEXT NOT NULL, spent TEXT NOT NULL,
        term_ends_ns BIGINT NOT NULL, heard_ns BIGINT NOT NULL, era BIGINT NOT NULL, declared TEXT NOT NULL,
        PRIMARY KEY(budget, currency, period, site))""",
    "CREATE INDEX lease_grants_site ON lease_grants(site)",
    *freeze.SCHEMA,
)
"""Amounts are decimal text in scaled units.  The currency is in the key: a budget that changes it begins anew.

`declared` is what the site held when it first spoke in the era `era` (0: never since a freeze); `heard_ns` only rises.
"""

_DIGITS_MAX: Final = 30
_PUT: Final = (
    "INSERT INTO lease_grants(budget, currency, period, site, number, granted, spent, term_ends_ns, heard_ns, era,"
    " declared) VALUES(?,?,?,?,?,?,?,?,?,?,?) ON CONFLICT (budget, currency, period, site) DO UPDATE SET"
    " number = excluded.number, granted = excluded.granted, spent = excluded.spent,"
    " term_ends_ns = excluded.term_ends_ns, heard_ns = excluded.heard_ns, era = excluded.era,"
    " declared = excluded.declared"
)
_SETTLING: Final = "the hub has just started, and hears its sites before it grants anything new; ask again"


class _Row(NamedTuple):
    """What one site holds, as it is written."""

    holder: Holder
    number: int = 0
    heard_ns: int = 0
    era: int = 0
    declared: int = 0


class SiteShare(msgspec.Struct, frozen=True, kw_only=True):
    """What one site holds; amounts are decimal text in the budget's currency.  `heard_ns`: when it last said so."""

    site: str
    granted: str
    spent: str
    heard_ns: int


class FleetBudget(msgspec.Struct, frozen=True, kw_only=True):
    """One budget in one period over all sites; amounts are decimal text in `currency`.

    `frozen` says why no more than `left` is granted, though less is held than the amount.
    """

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
    frozen: str = ""


def take_lease(
    tx: Tx, site: str, message: Lease, *, budget: BudgetDoc, now_ns: int, term_s: float = TERM_S,
    settling: bool = False,
) -> LeaseReply:  # fmt: skip
    """Take what a site says of a budget, grant what it may have, and answer with the whole.  O(sites).

    A call whose number is not above the last one changes nothing and is answered with the present state.  A soft
    budget refuses nothing: its rows only say who spent how much.  `settling`: the hub has just started, and grants
    nothing yet.

    Raises:
        InvalidRequest: the message is about another budget or currency, about a period that is not now, or an
            amount in it is no number.
    """
    want, least = _units(message.want, "want"), _units(message.least, "least")
    spent = _units(message.spent, "spent")
    _check(message, budget, want, now_ns)
    known = _rows(tx, budget, message.period)
    row = known.get(site, _Row(Holder(site, 0, 0)))
    amount = money(budget.amount, budget.currency).amount
    withheld, why = 0, ""
    if message.number > row.number:
        row = known[site] = _said(tx, site, message, row, spent=spent, budget=budget, now_ns=now_ns)
        holders = tuple([one.holder for one in known.values()])
        if budget.hard and want > 0:
            withheld, why = _withheld(tx, amount, known, budget, message.period)
            if settling or (why and row.era != freeze.era(tx)):
                more, why = 0, why or _SETTLING
            else:
                others = (*holders, Holder("", withheld, 0)) if withheld else holders
                more = grant(amount, others, site, want=want, least=least)
                why = "" if more else why
            row = known[site] = row._replace(holder=Holder(site, row.holder.granted + more, spent))
        ends_ns = now_ns + int(term_s * NS_PER_S)
        values = (str(row.holder.granted), str(spent), ends_ns, row.heard_ns, row.era, str(row.declared))
        tx.run(_PUT, (budget.name, budget.currency, message.period, site, row.number, *values))
    left = left_of(amount, tuple([one.holder for one in known.values()]))
    return LeaseReply(
        budget=budget.name, period=message.period, number=row.number, granted=str(row.holder.granted), term_s=term_s,
        left=str(max(left - withheld, 0)), frozen=why, hub_ns=row.heard_ns,
    )  # fmt: skip


def _said(
    tx: Tx, site: str, message: Lease, row: _Row, *, spent: int, budget: BudgetDoc, now_ns: int
) -> _Row:
    """The row as the site says it; a freeze begins where it holds more than this hub has granted to it."""
    if message.granted:
        held = _units(message.granted, "granted")
    else:
        held = row.holder.granted - _units(message.give_back, "give_back")
    number, fresh = freeze.era(tx), False
    explained = row.era != number and freeze.covers(number, budget, message.period)
    if held > row.holder.granted and not (explained and freeze.is_awaited(tx, site)):
        why = f"{site} holds more of budget {budget.name} in {message.period} than this hub has granted to it"
        number, fresh = freeze.begin(tx, why, now_ns=now_ns), True
    # A site that was charged more than it held tells the truth, and the truth counts.
    held = max(held, spent)
    row = row._replace(
        holder=Holder(site, held, spent), number=message.number, heard_ns=max(now_ns, row.heard_ns)
    )
    # An older release does not say the era; what it says after the freeze began is taken as said since.
    since = not fresh if message.era is None else message.era == number
    return row._replace(era=number, declared=held) if since and row.era != number else row


def _withheld(
    tx: Tx, amount: int, known: Mapping[str, _Row], budget: BudgetDoc, period: str
) -> tuple[int, str]:
    """How much of what nobody is known to hold silent sites may hold after all, and the sentence on it.

    All sites together held no more than the amount when the freeze began, whoever held how much.  So nothing new
    may be granted but what came back since from sites that had said what they hold.
    """
    number = freeze.era(tx)
    waiting = freeze.silent(tx, number, budget, period) if freeze.covers(number, budget, period) else []
    # But for the one who says it with the very call that is being answered.
    waiting = [site for site in waiting if site not in known or known[site].era != number]
    if not waiting:
        return 0, ""
    back = sum(one.declared - one.holder.granted for one in known.values() if one.era == number)
    left = left_of(amount, tuple([one.holder for one in known.values()]))
    return left - min(max(back, 0), left), freeze.sentence(number, waiting)


def reclaim(tx: Tx, site: str, spent: Mapping[tuple[str, str, str], int], *, now_ns: int) -> tuple[str, ...]:
    """Take back what a revoked site did not spend; the names of the budgets that got something.

    Call it only when the site's whole ledger up to its revocation has arrived: `spent` is what that says, in scaled
    units by (budget, currency, period).  A grant whose term goes on is left alone, since the site may use it yet.
    """
    rows = tx.run(
        "SELECT budget, currency, period, number, granted, term_ends_ns, heard_ns, era, declared FROM lease_grants"
        " WHERE site = ? AND term_ends_ns < ?",
        (site, now_ns),
    )
    freed = []
    for name, currency, period, number, granted, *rest in rows:
        used = spent.get((name, currency, period), 0)
        if used < int(granted):
            tx.run(_PUT, (name, currency, period, site, number, str(used), str(used), *rest))
            freed.append(name)
    return tuple(dict.fromkeys(freed))


def forget(tx: Tx, *, heard_before_ns: int) -> None:
    """Delete what no site has spoken of since then: long past periods."""
    tx.run("DELETE FROM lease_grants WHERE heard_ns < ?", (heard_before_ns,))


def status(tx: Tx, budgets: Iterable[BudgetDoc]) -> list[FleetBudget]:
    """Every budget in every period of which some site holds a part: by name, the newest period first."""
    found = []
    for budget in sorted(budgets, key=lambda one: one.name):
        periods = tx.run(
            "SELECT DISTINCT period FROM lease_grants WHERE budget = ? AND currency = ? ORDER BY period DESC",
            (budget.name, budget.currency),
        )
        found += [_fleet_budget(tx, budget, period) for (period,) in periods]
    return found


def _fleet_budget(tx: Tx, budget: BudgetDoc, period: str) -> FleetBudget:
    def text(units: int) -> str:
        return str(Money(units, budget.currency)).partition(" ")[0]

    amount = money(budget.amount, budget.currency).amount
    rows = _rows(tx, budget, period)
    holders = tuple([rows[site].holder for site in sorted(rows)])
    withheld, frozen = _withheld(tx, amount, rows, budget, period) if budget.hard else (0, "")
    spent = sum(one.spent for one in holders)
    return FleetBudget(
        name=budget.name, period=period, currency=budget.currency, hard=budget.hard, amount=text(amount),
        granted=text(sum(one.granted for one in holders)), spent=text(spent),
        left=text(left_of(amount, holders) - withheld), over=spent > amount, frozen=frozen,
        sites=tuple(
            [
                SiteShare(
                    site=one.site, granted=text(one.granted), spent=text(one.spent), heard_ns=rows[one.site].heard_ns
                )
                for one in holders
            ]
        ),
    )  # fmt: skip


def _rows(tx: Tx, budget: BudgetDoc, period: str) -> dict[str, _Row]:
    rows = tx.run(
        "SELECT site, granted, spent, number, heard_ns, era, declared FROM lease_grants"
        " WHERE budget = ? AND currency = ? AND period = ?",
        (budget.name, budget.currency, period),
    )
    return {
        site: _Row(Holder(site, int(granted), int(spent)), number, heard_ns, era, int(declared))
        for site, granted, spent, number, heard_ns, era, declared in rows
    }


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
