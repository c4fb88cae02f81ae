"""What `budget` keeps of each budget, and the answers it gives.  Only `budget.Budgets` changes any of it."""

from __future__ import annotations

from datetime import tzinfo
from typing import Final

import msgspec

from ondol.core.catalog import BudgetDoc
from ondol.core.exchange import Rates
from ondol.core.money import Money, money
from ondol.core.periods import Period, period

_BLOCKS: Final = 50
"""A lease grows by a fiftieth of the amount: a crash costs at most about 2 % of a budget, and a period
takes about fifty durable writes."""
_PERIODS_KEPT: Final = 64
"""Past periods are kept for reservations that settle late and for a wall clock that is set back."""


class Exhausted(msgspec.Struct, frozen=True):
    """A hard budget cannot pay.

    `why` is `spent`, `unpriced` (the price is unknown) or `no_rate` (no exchange rate to its currency).
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


class Reservation:
    """Money set aside in each covering budget.  Opaque; only `Budgets` changes it."""

    __slots__ = ("holds", "open")

    def __init__(self, holds: tuple[Hold, ...]) -> None:
        """Begin open."""
        self.holds = holds
        self.open = True


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
    """One budget in its present period; amounts are decimal text in `currency`."""

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
        "hard",
        "leases",
        "name",
        "now",
        "periods",
        "rates",
        "recorded",
        "tz",
    )

    def __init__(self, name: str, doc: BudgetDoc, tz: tzinfo, rates: Rates) -> None:
        self.name = name
        self.doc = doc
        self.tz = tz
        self.hard = doc.hard
        self.currency = doc.currency
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

    def needs_lease(self, state: PeriodState, amount: int) -> NeedsLease:
        """The next block: a fiftieth of the amount, or what `amount` needs if that is more.

        Never less than was asked for before: else a small lease that is written after a large one would
        hide on the disk what the large one lets us spend.
        """
        missing = state.used + amount - state.leased
        total = state.leased + max(self.amount // _BLOCKS, missing)
        state.asked = max(state.asked, min(total, self.amount))
        return NeedsLease(self.name, state.period.key, state.asked)

    def status(self, state: PeriodState) -> BudgetStatus:
        """The row for a person."""

        def text(amount: int) -> str:
            return str(Money(amount, self.currency)).partition(" ")[0]

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
        )


class Hold(msgspec.Struct, frozen=True):
    """What one reservation holds in one budget, with the rates it was computed at."""

    budget: str
    currency: str
    hard: bool
    state: PeriodState
    amount: int
    rates: Rates
