"""What `budget` keeps of each budget, and the answers it gives.  Only `budget.Budgets` changes any of it."""

from __future__ import annotations

from datetime import tzinfo
from typing import Final, Protocol

import msgspec

from ondol.core.catalog import BudgetDoc
from ondol.core.exchange import Rates
from ondol.core.money import Money, money
from ondol.core.periods import Period, period
from ondol.units import NS_PER_S

_BLOCKS: Final = 50
"""A lease grows by a fiftieth of the amount: a crash costs at most about 2 % of a budget, and a period
takes about fifty durable writes."""
_LEAST_BLOCKS: Final = 1000
"""In a fleet a block is at most half of what is open of the site's grant, but no less than a thousandth of the
amount: what a crash writes off is small also where the grant is."""
_FRESH_NS: Final = 10 * NS_PER_S
"""For so long the site believes what the hub said is left, and refuses without asking again."""
_PERIODS_KEPT: Final = 64
"""Past periods are kept for reservations that settle late and for a wall clock that is set back."""


class Exhausted(msgspec.Struct, frozen=True):
    """A hard budget cannot pay.

    `why` is `spent`, `unpriced` (the price is unknown), `no_rate` (no exchange rate to its currency) or `lease`
    (this site's part of the fleet's budget is used up, and the hub is away).
    """

    budget: str
    left: Money
    renews_ns: int
    why: str = "spent"


class NeedsLease(msgspec.Struct, frozen=True):
    """`total` (scaled units, for the whole period, not an addition) must be written durably first."""

    budget: str
    period: str
    total: int


class NeedsGrant(msgspec.Struct, frozen=True):
    """The site's part of a fleet's budget lacks `least` (scaled units); the hub is asked for it first."""

    budget: str
    period: str
    least: int


class Grant(msgspec.Struct, frozen=True):
    """What this site may spend of a fleet's budget in one period, in total, until a monotonic time.

    Past `low` it is time to ask for more.  `left` is what the fleet had not granted to anybody at `told_ns`; None
    before the hub has said so.
    """

    total: int
    low: int
    until_ns: int
    left: int | None
    told_ns: int


class FleetGrants(Protocol):
    """The site's parts of the fleet's budgets: durable here before `grant` shows them.

    A budget is named with its currency, `shop USD`: one that changes its currency begins anew.
    """

    def grant(self, budget: str, period: str) -> Grant | None:
        """What the site holds; None before the hub has given any."""
        ...

    def away(self, budget: str) -> bool:
        """Whether the hub cannot be asked for this budget now."""
        ...

    def wish(self, budget: str, period: str) -> None:
        """Ask for more in the background.  Costs nothing when it is under way."""
        ...

    async def ask(self, need: NeedsGrant, since_ns: int) -> bool:
        """Ask now, and wait until the hub has answered.

        False when it has not within 2 s of `since_ns`, the monotonic time at which the request began to wait.
        """
        ...


class Reservation:
    """Money set aside in each covering budget.  Opaque; only `Budgets` changes it."""

    __slots__ = ("holds", "open")

    def __init__(self, holds: tuple[Hold, ...]) -> None:
        """Begin open."""
        self.holds = holds
        self.open = True

    @property
    def unleased(self) -> tuple[str, ...]:
        """The fleet's budgets that do not count this request: answered here, without a lease, with the hub away."""
        return tuple([hold.budget for hold in self.holds if not hold.counted])


NOTHING_RESERVED: Final = Reservation(())
"""What a request without a budget gets."""


class Settled(msgspec.Struct, frozen=True):
    """What came of settling.  All three are names of budgets.

    `overruns`: the answer cost more than was reserved.  `over`: a soft budget that has just passed its
    amount, said once.  `uncounted`: soft budgets that could not count it, for want of a price or a rate.
    """

    overruns: tuple[str, ...] = ()
    over: tuple[str, ...] = ()
    uncounted: tuple[str, ...] = ()


class BudgetStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One budget in its present period; amounts are decimal text in `currency`.

    In a fleet `granted` is what this site may spend of it, and `fleet_left` what no site holds, as last heard.
    """

    name: str
    period: str
    currency: str
    hard: bool
    amount: str
    spent: str
    written_off: str
    reserved: str
    leased: str
    left: str
    renews_ns: int
    granted: str | None = None
    fleet_left: str | None = None


class Position(msgspec.Struct, frozen=True, kw_only=True):
    """What this site has used and leased of one budget in one period, in scaled units.

    `share` is what `FleetGrants` calls it; `now` says that the period goes on.
    """

    share: str
    budget: str
    period: str
    currency: str
    hard: bool
    amount: int
    used: int
    reserved: int
    leased: int
    now: bool


class PeriodState:
    """One budget in one period, in scaled units of the budget's currency."""

    __slots__ = ("asked", "leased", "period", "rates", "reserved", "said_over", "spent", "written_off")

    def __init__(self, span: Period, spent: int, leased: int, rates: Rates) -> None:
        self.period = span
        self.spent = spent
        self.reserved = 0
        self.leased = leased
        self.asked = leased
        self.written_off = max(leased - spent, 0)
        self.said_over = -1
        self.rates = rates

    @property
    def used(self) -> int:
        """What may not be reserved again: spent, written off or set aside."""
        return self.spent + self.written_off + self.reserved


class OneBudget:
    """One budget as configured, with its periods."""

    __slots__ = (
        "amount",
        "currency",
        "doc",
        "fleet",
        "hard",
        "leases",
        "name",
        "now",
        "periods",
        "rates",
        "recorded",
        "share",
        "tz",
    )

    def __init__(
        self, name: str, doc: BudgetDoc, tz: tzinfo, rates: Rates, fleet: FleetGrants | None
    ) -> None:
        self.name = name
        self.fleet = fleet if doc.hard else None
        self.doc = doc
        self.tz = tz
        self.hard = doc.hard
        self.currency = doc.currency
        self.share = f"{name} {doc.currency}"
        self.amount = money(doc.amount, doc.currency).amount
        self.rates = rates
        self.periods: dict[str, PeriodState] = {}
        self.now: PeriodState | None = None
        self.recorded: dict[str, int] = {}
        self.leases: dict[str, int] = {}

    def continues_as(self, doc: BudgetDoc) -> bool:
        """Whether what was counted under this document still counts under that one."""
        mine = self.doc
        return (mine.currency, mine.period, mine.timezone) == (doc.currency, doc.period, doc.timezone)

    def at(self, wall_ns: int) -> PeriodState:
        """The state of the period that holds `wall_ns`."""
        now = self.now
        if now is not None and now.period.start_ns <= wall_ns < now.period.end_ns:
            return now
        span = period(wall_ns, self.doc.period, self.tz)
        state = self.periods.get(span.key)
        if state is None:
            leased = self.leases.get(span.key, 0) if self.hard else 0
            state = PeriodState(span, self.recorded.get(span.key, 0), leased, self.rates)
            if not self.hard and state.spent > self.amount:
                state.said_over = self.amount
            while len(self.periods) >= _PERIODS_KEPT:
                del self.periods[min(self.periods, key=lambda key: self.periods[key].period.start_ns)]
            self.periods[span.key] = state
        self.now = state
        return state

    def left(self, state: PeriodState) -> Money:
        """What can still be reserved, never below zero."""
        return Money(max(self.amount - state.used, 0), self.currency)

    def exhausted(self, state: PeriodState, why: str) -> Exhausted:
        """The refusal."""
        return Exhausted(self.name, self.left(state), state.period.end_ns, why)

    def ceiling(self, state: PeriodState, now_ns: int) -> int:
        """What may be spent in this period in all: the amount, or the site's part of it while its term lasts."""
        if self.fleet is None:
            return self.amount
        held = self.fleet.grant(self.share, state.period.key)
        if held is None or now_ns >= held.until_ns:
            return min(state.used, self.amount)
        return min(held.total, self.amount)

    def lacks(self, state: PeriodState, amount: int, now_ns: int, *, alone: bool) -> Exhausted | None:
        """The refusal of `amount` (not zero); None where it can be paid, or where the hub is to be asked."""
        if state.used + amount > self.amount:
            return self.exhausted(state, "spent")
        if self.fleet is None:
            return None
        ceiling = self.ceiling(state, now_ns)
        if state.used + amount <= ceiling:
            return None
        held = self.fleet.grant(self.share, state.period.key)
        if held is not None and held.left is not None and now_ns - held.told_ns < _FRESH_NS:
            everywhere = max(ceiling - state.used, 0) + held.left
            if now_ns < held.until_ns and amount > everywhere:
                left = Money(everywhere, self.currency)
                return Exhausted(self.name, left, state.period.end_ns, "spent")
        if alone or self.fleet.away(self.share):
            self.fleet.wish(self.share, state.period.key)
            left = Money(max(ceiling - state.used, 0), self.currency)
            return Exhausted(self.name, left, state.period.end_ns, "lease")
        return None

    def needs_lease(self, state: PeriodState, amount: int, ceiling: int) -> NeedsLease:
        """The next block: a fiftieth of the amount, or what `amount` needs if that is more.

        Never less than was asked for before: else a small lease that is written after a large one would
        hide on the disk what the large one lets us spend.
        """
        missing = state.used + amount - state.leased
        block = self.amount // _BLOCKS
        if self.fleet is not None:
            block = min(block, max((ceiling - state.leased) // 2, self.amount // _LEAST_BLOCKS))
        total = state.leased + max(block, missing)
        state.asked = max(state.asked, min(total, ceiling))
        return NeedsLease(self.name, state.period.key, state.asked)

    def status(self, state: PeriodState) -> BudgetStatus:
        """The row for a person."""

        def text(amount: int) -> str:
            return str(Money(amount, self.currency)).partition(" ")[0]

        held = None if self.fleet is None else self.fleet.grant(self.share, state.period.key)
        return BudgetStatus(
            name=self.name,
            period=state.period.key,
            currency=self.currency,
            hard=self.hard,
            amount=text(self.amount),
            spent=text(state.spent),
            written_off=text(state.written_off),
            reserved=text(state.reserved),
            leased=text(state.leased),
            left=text(self.left(state).amount),
            renews_ns=state.period.end_ns,
            granted=None if self.fleet is None else text(0 if held is None else held.total),
            fleet_left=None if held is None or held.left is None else text(held.left),
        )

    def position(self, state: PeriodState) -> Position:
        """What the hub is told of it."""
        return Position(
            share=self.share,
            budget=self.name,
            period=state.period.key,
            currency=self.currency,
            hard=self.hard,
            amount=self.amount,
            used=state.used,
            reserved=state.reserved,
            leased=max(state.leased, state.asked) if self.hard else 0,
            now=state is self.now,
        )


class Hold(msgspec.Struct, frozen=True):
    """What one reservation holds in one budget, with the rates it was computed at.

    One that is not `counted` holds nothing, and what it costs is not charged.
    """

    budget: str
    currency: str
    hard: bool
    state: PeriodState
    amount: int
    rates: Rates
    counted: bool = True
