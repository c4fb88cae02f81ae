"""The books: what follows an answer.  Settle budgets and limits, write the record, remember the answer.

Work that must outlive its request (a client that hung up is metered too) is owned here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final, Protocol

import msgspec

from ondol.core.catalog import Catalog
from ondol.core.inference import Chunk, Usage
from ondol.core.money import Money
from ondol.core.ports import Clock, Ledger
from ondol.core.usage import UsageRecord
from ondol.errors import LedgerUnavailable, OndolError
from ondol.gateway.budget import Budgets
from ondol.gateway.cache import Entry, ExactCache
from ondol.gateway.call import Call
from ondol.gateway.endpoints import Endpoint, Running
from ondol.gateway.meter import Spent, Totals, attempt, nothing, record_of, totals
from ondol.gateway.quota import Quotas
from ondol.units import NS_PER_S
from ondol.wire.statuses import status_of

CLIENT_GONE: Final = 499
"""nginx's status for a request whose client hung up; nobody is sent it."""


class Observer(Protocol):
    """Who is told what happened: metrics and logs."""

    def finished(self, record: UsageRecord, shown: Totals) -> None:
        """A request ended and is metered."""
        ...

    def noted(self, event: str, **fields: str) -> None:
        """Something that an operator should see, without content."""
        ...


class View(msgspec.Struct, frozen=True, kw_only=True):
    """One consistent state of the site: a reload makes a new one, requests under way keep theirs."""

    catalog: Catalog
    endpoints: Mapping[str, Endpoint]
    routes: Mapping[str, tuple[Endpoint, ...]]


class Books:
    """Owns the settling of requests, and the tasks that outlive them."""

    def __init__(
        self, *, gateway: str, quotas: Quotas, budgets: Budgets, cache: ExactCache, ledger: Ledger, clock: Clock,
        observer: Observer, pseudonym: Callable[[str, str], str],
        capture: Callable[[str, bytes, bytes, int], None], clock_offset: Callable[[], int | None] = lambda: None,
    ) -> None:  # fmt: skip
        """Take the parts.

        `pseudonym` maps tenant and user, `capture` keeps a prompt and its answer, `clock_offset` is how many
        nanoseconds the wall clock is ahead of the hub's.
        """
        self._gateway = gateway
        self.quotas = quotas
        self.budgets = budgets
        self.cache = cache
        self.ledger = ledger
        self._clock = clock
        self._observer = observer
        self._pseudonym = pseudonym
        self._capture = capture
        self._clock_offset = clock_offset
        self._tasks: set[asyncio.Task[None]] = set()

    def record(
        self, view: View, call: Call, outcome: str, status: int, *, entry: Entry | None = None,
        error: OndolError | None = None,
    ) -> tuple[UsageRecord, Totals]:  # fmt: skip
        """Settle budgets and limits, tell the observer, and make the record; not yet durable."""
        currency = view.catalog.gateway.currency
        if entry is None:
            sums = totals(call.attempts, currency)
        else:
            sums = nothing(entry.usage or Usage(), currency)
        call.closed = True
        record = record_of(
            call, sums, outcome=outcome, status=status, site=view.catalog.site.name, gateway=self._gateway,
            now_ns=self._clock.now_ns(), entry=entry, error=error,
            user=None if call.request.user is None else self._pseudonym(call.principal.tenant, call.request.user),
            clock_offset_ns=self._clock_offset(),
        )  # fmt: skip
        if call.reservation is not None:
            cost = sums.shown_cost
            if cost is not None and call.paid:
                cost = Money(cost.amount - call.paid, cost.currency)
            settled = self.budgets.settle(call.reservation, cost)
            call.reservation = None
            for name in settled.over:
                self._observer.noted("budget_over", budget=name)
            for name in settled.overruns:
                self._observer.noted("budget_overrun", budget=name, request_id=call.request_id)
        if call.granted is not None and call.granted.owners:
            used = sums.usage.input_tokens + sums.usage.output_tokens
            self.quotas.correct(call.granted, used, self._clock.now_ns())
        self._observer.finished(record, sums)
        return record, sums

    async def close(self, view: View, call: Call, error: OndolError | None) -> None:
        """Meter a request that gave no whole answer; `error` None means that the client hung up."""
        if call.closed:
            return
        outcome = "cancelled" if error is None else "refused" if not call.attempts else "failed"
        record, _ = self.record(
            view, call, outcome, CLIENT_GONE if error is None else status_of(error), error=error
        )
        try:
            await self.ledger.submit(record)
        except LedgerUnavailable:
            self._observer.noted("record_lost_with_failed_request", request_id=call.request_id)

    def preview(self, view: View, call: Call, running: Running, first: Chunk) -> UsageRecord:
        """The record as far as it is known at the first byte, for the headers."""
        terms = running.endpoint.terms
        seen = attempt(terms, call.request, Spent(outcome="ok", model=first.model, receipt=first.receipt))
        sums = totals((seen,), view.catalog.gateway.currency)
        return record_of(
            call, sums, outcome="running", status=200, site=view.catalog.site.name, gateway=self._gateway,
            now_ns=self._clock.now_ns(), last=seen,
        )  # fmt: skip

    def keep(
        self, view: View, call: Call, record: UsageRecord, sums: Totals, *, body: bytes = b"",
        chunks: tuple[bytes, ...] = (),
    ) -> Entry | None:  # fmt: skip
        """Remember a whole answer where the route says so: in the cache, and for debugging; what the cache keeps."""
        capture, policy, key = call.route.capture, call.route.cache, call.cache_key
        if capture is not None:
            expires_ns = call.wall_ns + int(capture.retention_s * NS_PER_S)
            self._capture(call.request_id, call.raw, body or b"\n".join(chunks), expires_ns)
        if policy is None or key is None:
            return None
        entry = Entry(
            tenant=call.principal.tenant, generation=view.catalog.digest, body=body, chunks=chunks,
            usage=sums.usage, model=record.model, deployment=record.deployment, cost=sums.shown_cost,
            energy_uj=sums.shown_energy_uj, carbon_ng=sums.shown_carbon_ng,
        )  # fmt: skip
        self.cache.put(key, entry, int(policy.ttl_s * NS_PER_S), self._clock.now_ns())
        return entry

    # ---- tasks that outlive their request

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run what must outlive its request."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def drain(self) -> None:
        """Wait until every task that meters a finished request is done."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
