"""Budgets that hold: money is reserved before it is spent, within blocks that are written durably first.

`Budgets` owns the state.  Between check and take nothing is awaited, so that requests cannot slip past
each other.  The one invariant of a hard budget, in each period:

    spent + written off + reserved <= leased <= amount

It breaks only where an engine charges more than the worst case that was reserved (the truth is recorded,
and `Settled.overruns` names the budget) or where a lower amount is configured (then nothing passes).

How the caller reserves (leases of one budget must reach the disk in the order in which they were asked
for; their totals only grow, so several callers may ask at once):

    while isinstance(answer := budgets.reserve(names, worst, wall_ns), NeedsLease):
        await ledger.lease(answer.budget, answer.period, answer.total)
        budgets.leased(answer.budget, answer.period, answer.total)

In a fleet the amount is for all sites together, and this one spends within its part of it (`FleetGrants`): then
`leased <= granted` too, and `reserve` may say `NeedsGrant`, which `fleet.ask` answers.  A request that a local
endpoint answers while the hub is away, as `offline: local` allows, is not counted.

`wall_ns` is the request's arrival, as its record says it, so that the ledger and the budgets count it in the
same period.

After a crash the open part of a lease (leased, but in no record) counts as spent for the rest of the period
(`written_off`), since a request may have been paid for whose record was lost.  On a clean stop, when no
reservation is open, the caller writes `closing_leases()`, and nothing is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import tzinfo
from typing import Final

from ondol.core.catalog import BudgetDoc
from ondol.core.exchange import Exchange, converted, rates
from ondol.core.identity import Principal
from ondol.core.money import Money
from ondol.errors import ConfigError
from ondol.gateway.budget_state import (
    NOTHING_RESERVED,
    BudgetStatus,
    Exhausted,
    FleetGrants,
    Hold,
    NeedsGrant,
    NeedsLease,
    OneBudget,
    PeriodState,
    Position,
    Reservation,
    Settled,
)
from ondol.units import CURRENCY_SCALE

__all__ = [
    "NOTHING_RESERVED",
    "BudgetStatus",
    "Budgets",
    "Exhausted",
    "FleetGrants",
    "NeedsGrant",
    "NeedsLease",
    "Position",
    "Reservation",
    "Settled",
]


_SETTLED: Final = Settled()


class Budgets:
    """All budgets of a site.  Bounded by the budgets configured and the reservations open."""

    def __init__(
        self,
        budgets: Mapping[str, BudgetDoc],
        exchange: Exchange,
        *,
        zone: Callable[[str], tzinfo],
        spent: Mapping[tuple[str, str], int],
        leases: Mapping[tuple[str, str], int],
        fleet: FleetGrants | None = None,
    ) -> None:
        """Start from what the ledger knows: spent and leased by (budget, period), in scaled units.

        `fleet` is given where the budgets are those of a fleet; it may also come with `join`, before requests do.

        Raises:
            ConfigError: a budget's currency has no scale.
        """
        self._zone = zone
        self.fleet = fleet
        self._budgets: dict[str, OneBudget] = {}
        self._by_scope: dict[tuple[str, str], list[str]] = {}
        self.reload(budgets, exchange, spent=spent, leases=leases)

    def reload(
        self,
        budgets: Mapping[str, BudgetDoc],
        exchange: Exchange,
        *,
        spent: Mapping[tuple[str, str], int],
        leases: Mapping[tuple[str, str], int],
    ) -> None:
        """Take a new catalogue.  What is spent and reserved stays.

        Those that are `brought` start from `spent` and `leases`, which are unused for the others.  New
        exchange rates act from the next lease on.

        Raises:
            ConfigError: a budget's currency has no scale; nothing is changed.
        """
        fresh: dict[str, OneBudget] = {}
        ratios = rates(exchange)
        scopes: dict[tuple[str, str], list[str]] = {}
        for name, doc in budgets.items():
            if doc.currency not in CURRENCY_SCALE:
                allowed = ", ".join(sorted(CURRENCY_SCALE))
                raise ConfigError(f"Budget {name}: currency {doc.currency} is unknown; allowed: {allowed}.")
            scopes.setdefault(_scope(doc), []).append(name)
            one = OneBudget(name, doc, self._zone(doc.timezone), ratios, self.fleet)
            known = self._budgets.get(name)
            if known is not None and known.continues_as(doc):
                one.periods, one.now = known.periods, known.now
            else:
                one.recorded = {key: amount for (owner, key), amount in spent.items() if owner == name}
                one.leases = {key: amount for (owner, key), amount in leases.items() if owner == name}
            fresh[name] = one
        self._budgets, self._by_scope = fresh, scopes

    def brought(self, budgets: Mapping[str, BudgetDoc]) -> tuple[str, ...]:
        """The budgets that a `reload` would begin anew: for these alone the ledger must be read.

        A budget whose currency, period or time zone changed is a new one under its old name.
        """
        known = self._budgets
        return tuple([n for n, doc in budgets.items() if n not in known or not known[n].continues_as(doc)])

    def covering(self, principal: Principal, tags: Iterable[tuple[str, str]]) -> tuple[str, ...]:
        """The budgets that pay for a request: of its tenant, team, key and tags.

        A tag scope reads `name=value`, or `name` for any value of it.  A request that another site of the fleet
        sends is paid there: nobody pays twice.
        """
        if not self._by_scope or (self.fleet is not None and principal.origin is not None):
            return ()
        by_scope = self._by_scope
        names = (
            by_scope.get(("tenant", principal.tenant), [])
            + by_scope.get(("team", principal.team), [])
            + by_scope.get(("key", principal.key_id), [])
        )
        for name, value in tags:
            names = names + by_scope.get(("tag", name), []) + by_scope.get(("tag", f"{name}={value}"), [])
        return tuple(dict.fromkeys(names))

    def can_afford(
        self,
        names: tuple[str, ...],
        worst: Money | None,
        wall_ns: int,
        *,
        now_ns: int = 0,
        local: bool = False,
    ) -> bool:
        """Whether `reserve` would not say `Exhausted` now, but for what the hub may answer.  Changes nothing."""
        return not names or self.refusal(names, worst, wall_ns, now_ns=now_ns, local=local) is None

    def refusal(
        self,
        names: tuple[str, ...],
        worst: Money | None,
        wall_ns: int,
        *,
        now_ns: int = 0,
        local: bool = False,
    ) -> Exhausted | None:
        """What `reserve` would refuse with now, else None.  Changes nothing."""
        known = [(one, one.at(wall_ns)) for one in self._known(names)]
        return _refusal(known, worst, now_ns, local=local, alone=False)

    def remaining(self, names: tuple[str, ...], wall_ns: int) -> tuple[tuple[str, Money], ...]:
        """What each hard budget among `names` has left, never below zero."""
        return tuple([(one.name, one.left(one.at(wall_ns))) for one in self._known(names) if one.hard])

    def reserve(
        self, names: tuple[str, ...], worst: Money | None, wall_ns: int, *, now_ns: int = 0, local: bool = False,
        alone: bool = False,
    ) -> Reservation | Exhausted | NeedsLease | NeedsGrant:  # fmt: skip
        """Set `worst` aside in all of `names`, or in none.  None is an unknown price.

        A lease is asked for only when every budget can pay.  What is free (a worst case of zero) passes
        also where nothing is left.  `now_ns` is monotonic, `local` says that the endpoint is on this site, and
        `alone` that the hub was asked already and has not answered.
        """
        if not names:
            return NOTHING_RESERVED
        known = [(one, one.at(wall_ns)) for one in self._known(names)]
        refusal = _refusal(known, worst, now_ns, local=local, alone=alone)
        if refusal is not None:
            return refusal
        holds = []
        for one, state in known:
            hold = _hold(one, state, worst, now_ns, alone=alone)
            if not isinstance(hold, Hold):
                return hold
            holds.append(hold)
        for hold in holds:
            hold.state.reserved += hold.amount
        return Reservation(tuple(holds))

    def leased(self, budget: str, period_key: str, total: int) -> None:
        """A lease is durable now: it may be used.  Pins the exchange rates of today for what follows.

        A smaller total than one before, and a budget that was removed meanwhile, change nothing.
        """
        one = self._budgets.get(budget)
        state = None if one is None else one.periods.get(period_key)
        if one is not None and state is not None and total > state.leased:
            state.leased = total
            state.rates = one.rates

    def settle(self, reservation: Reservation, actual: Money | None) -> Settled:
        """Turn a reservation into what it really cost, in the period in which it was reserved.

        An unknown `actual` counts as all that was reserved.

        Raises:
            ValueError: it was settled or released before.
        """
        if not reservation.holds:
            return _SETTLED
        if not reservation.open:
            raise ValueError("a reservation is settled once")
        reservation.open = False
        overruns, over, uncounted = [], [], []
        for hold in reservation.holds:
            state = hold.state
            if not hold.counted:
                continue
            cost = converted(actual, hold.currency, hold.rates)
            if cost is None:
                cost = hold.amount
                if not hold.hard:
                    uncounted.append(hold.budget)
            state.reserved -= hold.amount
            state.spent += cost
            if cost > hold.amount:
                overruns.append(hold.budget)
            if self._passes_now(hold):
                over.append(hold.budget)
        return Settled(tuple(overruns), tuple(over), tuple(uncounted))

    def release(self, reservation: Reservation) -> None:
        """Give a reservation back unused.  One that is closed already stays so: fit for a `finally`."""
        if reservation.holds and reservation.open:
            reservation.open = False
            for hold in reservation.holds:
                hold.state.reserved -= hold.amount

    def closing_leases(self) -> list[NeedsLease]:
        """What to write as leases on a clean stop, after the last settlement: only what is used."""
        return [
            NeedsLease(one.name, key, state.used)
            for one in self._budgets.values()
            if one.hard
            for key, state in one.periods.items()
            if state.leased != state.used
        ]

    def status(self, wall_ns: int) -> list[BudgetStatus]:
        """Every budget in its present period, by name."""
        return [one.status(one.at(wall_ns)) for _, one in sorted(self._budgets.items())]

    # ---- in a fleet

    def join(self, fleet: FleetGrants) -> None:
        """From now on the budgets are those of a fleet."""
        self.fleet = fleet
        for one in self._budgets.values():
            one.fleet = fleet if one.hard else None

    def positions(self, wall_ns: int) -> list[Position]:
        """Every budget in the period that holds `wall_ns`, and in each one before of which something is known."""
        for one in self._budgets.values():
            one.at(wall_ns)
        return [one.position(state) for one in self._budgets.values() for state in one.periods.values()]

    def shrink(self, budget: str, period_key: str, keep: int) -> tuple[int, NeedsLease | None]:
        """Keep no more than `keep` (scaled units) beyond what is used.

        Gives the total that is kept, and the lease that must be durable before anybody is told.  Requests that
        wait for a lease keep what they asked for.
        """
        one = self._budgets.get(budget)
        state = None if one is None else one.periods.get(period_key)
        if state is None:
            return 0, None
        total = state.used + keep
        if state.leased <= total and state.asked <= total:
            return total, None
        if state.asked > state.leased:
            return max(total, state.asked), None
        state.leased = state.asked = total
        return total, NeedsLease(budget, period_key, total)

    def write_off(self, budget: str, period_key: str, total: int) -> NeedsLease | None:
        """Count all of `total` as spent, since this site may have spent it and forgotten; the lease to write."""
        one = self._budgets.get(budget)
        state = None if one is None else one.periods.get(period_key)
        if state is None or total <= state.used:
            return None
        state.written_off += total - state.used
        state.leased = state.asked = max(total, state.leased, state.asked)
        return NeedsLease(budget, period_key, state.leased)

    def _known(self, names: tuple[str, ...]) -> list[OneBudget]:
        # A budget that a reload removed between two stages of a request no longer counts.
        return [self._budgets[name] for name in names if name in self._budgets]

    def _passes_now(self, hold: Hold) -> bool:
        """Whether a soft budget is over its amount, and nobody has said so yet."""
        one, state = self._budgets.get(hold.budget), hold.state
        if one is None or one.hard or one.periods.get(state.period.key) is not state:
            return False
        if not state.spent > one.amount > state.said_over:
            return False
        state.said_over = one.amount
        return True


def _refusal(
    known: list[tuple[OneBudget, PeriodState]], worst: Money | None, now_ns: int, *, local: bool, alone: bool
) -> Exhausted | None:
    for one, state in known:
        if not one.hard:
            continue
        amount = converted(worst, one.currency, state.rates)
        if amount is None:
            return one.exhausted(state, "unpriced" if worst is None else "no_rate")
        lacks = one.lacks(state, amount, now_ns, alone=alone) if amount > 0 else None
        if lacks is not None and not (lacks.why == "lease" and local and one.doc.offline == "local"):
            return lacks
    return None


def _hold(
    one: OneBudget, state: PeriodState, worst: Money | None, now_ns: int, *, alone: bool
) -> Hold | NeedsLease | NeedsGrant:
    """What a budget that does not refuse holds, or what it needs first."""
    amount = converted(worst, one.currency, state.rates) or 0
    if one.hard and amount > 0:
        ceiling = one.ceiling(state, now_ns)
        if state.used + amount > ceiling:
            if one.lacks(state, amount, now_ns, alone=alone) is not None:
                return Hold(one.name, one.currency, one.hard, state, 0, state.rates, counted=False)
            return NeedsGrant(one.share, state.period.key, state.used + amount - ceiling)
        if state.used + amount > state.leased:
            return one.needs_lease(state, amount, ceiling)
        if one.fleet is not None:
            held = one.fleet.grant(one.share, state.period.key)
            if held is not None and state.used + amount > held.low:
                one.fleet.wish(one.share, state.period.key)
    return Hold(one.name, one.currency, one.hard, state, amount, state.rates)


def _scope(doc: BudgetDoc) -> tuple[str, str]:
    for kind in ("tenant", "team", "key", "tag"):
        value = getattr(doc.scope, kind)
        if value is not None:
            return kind, value
    raise ConfigError(f"Budget {doc.name}: its scope names nothing; give one of tenant, team, key or tag.")
