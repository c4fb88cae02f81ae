"""Setting money aside before an endpoint is asked: the worst case there, in every budget that covers the request."""

from __future__ import annotations

from ondol.core.money import Money, money
from ondol.core.ports import Clock
from ondol.core.usage import Attempt
from ondol.errors import BudgetExhausted
from ondol.gateway.books import Books, View
from ondol.gateway.budget import Exhausted, NeedsGrant, NeedsLease, Reservation
from ondol.gateway.call import Call
from ondol.gateway.endpoints import Endpoint
from ondol.gateway.explain import exhausted_sentence
from ondol.gateway.meter import totals


class Purse:
    """The stage `reserve`; owned by the pipeline."""

    def __init__(self, books: Books, clock: Clock) -> None:
        """Take the parts."""
        self._books = books
        self._clock = clock

    def affords(self, call: Call, endpoint: Endpoint, now_ns: int) -> bool:
        """Whether budgets and the caller's ceiling allow the worst case there.  Changes nothing."""
        worst = self.worst(call, endpoint)
        affordable = self._books.budgets.can_afford(
            call.budgets, worst, call.wall_ns, now_ns=now_ns, local=endpoint.local
        )
        return affordable and _within(call.hints.max_cost, worst)

    def worst(self, call: Call, endpoint: Endpoint) -> Money | None:
        """The most that the request can cost there; asked for by `schedule`, then by `reserve`."""
        if endpoint.name not in call.worst:
            call.worst[endpoint.name] = endpoint.worst(call.request, call.max_output_tokens)
        return call.worst[endpoint.name]

    def what_is_left(self, view: View, call: Call) -> BudgetExhausted | None:
        """The refusal of a budget, with what it has left; None where the caller's own ceiling refused."""
        now_ns = self._clock.now_ns()
        for endpoint in view.routes[call.route.name]:
            worst = self.worst(call, endpoint)
            refusal = self._books.budgets.refusal(
                call.budgets, worst, call.wall_ns, now_ns=now_ns, local=endpoint.local
            )
            if refusal is not None:
                return BudgetExhausted(exhausted_sentence(refusal))
        return None

    async def reserve(self, call: Call, endpoint: Endpoint) -> Reservation | None:
        """Set the worst case at this endpoint aside in every budget that covers the request; None without any.

        Raises:
            BudgetExhausted: one cannot pay it.
        """
        if not call.budgets:
            return None
        worst, budgets = self.worst(call, endpoint), self._books.budgets
        since_ns, alone = self._clock.now_ns(), False
        while True:
            answer = budgets.reserve(
                call.budgets,
                worst,
                call.wall_ns,
                now_ns=self._clock.now_ns(),
                local=endpoint.local,
                alone=alone,
            )
            if isinstance(answer, NeedsLease):
                await self._books.ledger.lease(answer.budget, answer.period, answer.total)
                budgets.leased(answer.budget, answer.period, answer.total)
                continue
            if isinstance(answer, NeedsGrant):
                alone = budgets.fleet is None or not await budgets.fleet.ask(answer, since_ns)
                continue
            if isinstance(answer, Exhausted):
                raise BudgetExhausted(exhausted_sentence(answer))
            return answer

    def release(self, reservation: Reservation | None) -> None:
        """Give back what was set aside."""
        if reservation is not None:
            self._books.budgets.release(reservation)

    def pay(self, call: Call, reservation: Reservation | None, attempt: Attempt) -> None:
        """Settle an attempt that lost a race, apart from the one that won."""
        if reservation is None:
            return
        cost = totals((attempt,), attempt.currency or attempt.peer_currency or "USD").shown_cost
        self._books.budgets.settle(reservation, cost)
        call.paid += 0 if cost is None else cost.amount


def _within(max_cost: str | None, worst: Money | None) -> bool:
    """Whether the worst case fits the caller's ceiling; unpriced or in another currency never fits."""
    if max_cost is None:
        return True
    amount, currency = max_cost.split()
    return worst is not None and worst.currency == currency and worst <= money(amount, currency)
