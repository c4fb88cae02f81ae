"""THE request path.  This file states the order, and nothing else does.

    authenticate → classify → admit → lookup → schedule → reserve → infer → meter → reply

One record a request is written, whatever its outcome, from the moment it is admitted.  The end of an
answer is released only when its record is durable.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Final

import msgspec

from ondol.core.identity import Principal
from ondol.core.inference import Chunk, Completion
from ondol.core.ports import Clock, KeyStore
from ondol.core.usage import Decision
from ondol.errors import (
    BudgetExhausted,
    EngineError,
    EngineFailed,
    EngineUnavailable,
    LedgerFull,
    LedgerUnavailable,
    NoEndpoint,
    OndolError,
)  # fmt: skip
from ondol.gateway.attempts import Attempts, Opened, heard_of, outcome_of
from ondol.gateway.books import Books, View
from ondol.gateway.breaker import RetryBudget
from ondol.gateway.cache import Entry, cache_key, cacheable
from ondol.gateway.call import Ask, Call, Chunks, Whole
from ondol.gateway.choose import Chooser
from ondol.gateway.classify import classify
from ondol.gateway.endpoints import Endpoint, Running, deadline
from ondol.gateway.hedge import hedge_after
from ondol.gateway.hints import parse_hints
from ondol.gateway.identity import Authenticator, FleetTrust, on_behalf
from ondol.gateway.meter import Spent
from ondol.gateway.policy import admit, find_route
from ondol.gateway.quota import rate_headers
from ondol.gateway.recall import Recall
from ondol.gateway.relay import Ending, Heard, Relay
from ondol.gateway.reply import JSON_HEADERS, SSE_HEADERS, closing, place_headers, took_headers, with_closing
from ondol.gateway.reserve import Purse
from ondol.gateway.schedule import fell_back, hedged
from ondol.gateway.semantic import Serve
from ondol.wire.openai import parse_request
from ondol.wire.sse import DONE, encode

HEDGES_PERCENT: Final = 5
HEDGES_FLOOR: Final = 2
"""Of the requests of the last ten seconds so many may be asked twice: a place that is slow for all is not doubled."""


class Pipeline:
    """Composes the stages.  `view` is replaced by a reload."""

    def __init__(
        self,
        *,
        view: View,
        books: Books,
        keys: KeyStore,
        pepper: bytes,
        clock: Clock,
        new_id: Callable[[], str],
        recall: Recall,
        fleet: Callable[[], FleetTrust | None] = lambda: None,
    ) -> None:
        """Take the parts; the composition root made them.  `fleet` gives what a joined site lets others in by."""
        self._recall = recall
        self.view = view
        self._books = books
        self._keys = keys
        self._authenticator = Authenticator(pepper)
        self._clock = clock
        self._purse = Purse(books, clock)
        self._new_id = new_id
        self._fleet = fleet
        self._attempts = Attempts(self._purse, clock)
        self._chooser = Chooser(self._purse, clock)
        self._retries = RetryBudget()
        self._hedges = RetryBudget(percent=HEDGES_PERCENT, floor=HEDGES_FLOOR)

    def principal(self, header: Callable[[str], str | None], wall_ns: int) -> Principal:
        """Authenticate a request by its headers (the first stage, also for administration)."""
        principal = self._authenticator.principal(
            header("authorization"), self._keys.snapshot(), wall_ns, self._fleet()
        )
        self._keys.touch(principal.key_id, wall_ns)
        if principal.kind != "peer":
            return principal
        return on_behalf(
            principal, origin=header("x-ondol-origin"), hops=header("x-ondol-hops"),
            behalf=header("x-ondol-on-behalf"),
        )  # fmt: skip

    async def handle(self, ask: Ask, principal: Principal) -> Whole | Chunks:
        """Answer one request of an authenticated caller.

        Raises:
            OndolError: the reason why there is no answer; what was admitted is metered by then.
        """
        view = self.view
        call = self._classified(view, ask, principal)
        self._admit(view, call)
        try:
            entry = self._lookup(view, call)
            if entry is not None:
                return await self._serve(view, call, entry, "exact")
            similar = await self._recalled(view, call)
            if similar is not None:
                return await self._serve(view, call, similar, "semantic")
            return await self._infer(view, call)
        except OndolError as error:
            error.request_id = call.request_id
            await self._books.close(view, call, error)
            raise
        except asyncio.CancelledError:
            self._books.spawn(self._books.close(view, call, None))
            raise
        except Exception:  # a bug: whatever it is, the reservation is settled and the request is recorded
            await self._books.close(view, call, EngineFailed("something went wrong in the gateway"))
            raise

    # ---- classify, admit, lookup

    def _classified(self, view: View, ask: Ask, principal: Principal) -> Call:
        request = parse_request(ask.task, ask.raw, view.catalog.gateway.limits)
        hints = parse_hints(ask.header)
        route = find_route(view.catalog, request.route, principal)
        return Call(
            ask=ask,
            request_id=self._new_id(),
            principal=principal,
            request=request,
            route=route,
            hints=hints,
            data_class=classify(hints, route),
            deadline_ns=deadline(ask.received_ns, route.timeout_s, hints.max_latency_ms),
        )

    def _admit(self, view: View, call: Call) -> None:
        problem = self._books.ledger.problem()
        if problem is not None:
            raise (
                LedgerFull(problem)
                if self._books.ledger.full
                else LedgerUnavailable(problem, retry_after_s=5.0)
            )
        request = call.request
        call.budgets = self._books.budgets.covering(call.principal, call.tags)
        call.granted = admit(
            self._books.quotas,
            view.catalog,
            call.principal,
            tokens=request.prompt_tokens + call.max_output_tokens * request.answers,
            now_ns=call.received_ns,
        )

    def _lookup(self, view: View, call: Call) -> Entry | None:
        policy, request = call.route.cache, call.request
        if policy is None or call.hints.no_cache:
            return None
        if cacheable(request, policy, call.data_class, body_bytes=len(call.raw)) is not None:
            return None
        call.cache = "miss"
        call.cache_key = cache_key(
            tenant=call.principal.tenant,
            route=call.route.name,
            task=request.task.value,
            body=request.body,
            stream=request.stream,
            include_usage=request.include_usage,
            generation=view.catalog.digest,
            objective=call.objective.value,
        )
        return self._books.cache.get(call.cache_key, call.received_ns)

    async def _recalled(self, view: View, call: Call) -> Entry | None:
        """The answer to a similar question, where the route wants such and the evidence allows it."""
        policy = call.route.cache.semantic if call.route.cache is not None else None
        if policy is None or call.cache_key is None:
            return None
        call.recall, call.recalled = await self._recall.lookup(call, policy, view.catalog.digest)
        verdict = None if call.recalled is None else call.recalled.verdict
        return verdict.entry if isinstance(verdict, Serve) else None

    async def _serve(self, view: View, call: Call, entry: Entry, how: str) -> Whole | Chunks:
        """An answer of the cache (`exact` or `semantic`), metered at no cost."""
        call.cache = how
        call.decision = recalled(
            call, Decision(code=f"cache_{how}", objective=call.objective.value, chosen=entry.deployment)
        )
        record, sums = self._books.record(view, call, "completed", 200, entry=entry)
        await self._books.ledger.submit(record)
        overhead = self._clock.now_ns() - call.received_ns
        headers = [*place_headers(record), *took_headers(sums, overhead), *self._rates(call)]
        if not call.request.stream:
            return Whole(headers=headers + JSON_HEADERS, body=entry.body)
        last = with_closing(entry.chunks[-1], closing(record, sums, overhead))
        pieces = [encode(chunk) for chunk in entry.chunks[:-1]] + [encode(last) + DONE]
        return Chunks(headers=headers + SSE_HEADERS, pieces=_each(pieces), close=_nothing)

    # ---- schedule, reserve

    async def _infer(self, view: View, call: Call) -> Whole | Chunks:
        """Try endpoints, best first; another takes over only before the first byte."""
        choice = await self._chooser.choose(view, call)
        now_ns = self._clock.now_ns()
        call.decision = recalled(call, choice.decision)
        failed: EngineError | BudgetExhausted | None = None
        self._retries.request(now_ns)
        self._hedges.request(now_ns)
        for rank, name in enumerate(choice.order):
            endpoint = view.endpoints[name]
            # What runs here cannot be stormed from here: its own bounds hold, and nobody else pays.
            if call.attempts and not endpoint.local and not self._retries.take(self._clock.now_ns()):
                continue
            if failed is not None:
                call.decision = fell_back(call.decision, name, failed)
            try:
                opened = await self._ask(view, call, endpoint, choice.order[rank + 1 :])
            except (EngineUnavailable, BudgetExhausted) as error:
                failed = error
                self._purse.release(call.reservation)
                call.reservation = None
                continue
            self._chooser.remember(call, opened.running.endpoint)
            if opened.completion is not None:
                return await self._whole(view, call, opened.running, opened.completion)
            return self._streamed(view, call, opened)
        if isinstance(failed, BudgetExhausted) and not call.attempts:
            raise failed
        tried = "; ".join(f"{a.deployment}: {a.error}" for a in call.attempts)
        wait = failed.retry_after_s if failed is not None else None
        raise NoEndpoint(
            f"every endpoint failed before its first byte: {tried or failed}", retry_after_s=wait or 1.0
        ) from failed

    async def _ask(self, view: View, call: Call, endpoint: Endpoint, others: tuple[str, ...]) -> Opened:
        """Ask an endpoint: alone, with patience where another could answer, or in a race where the deadline is near."""
        other = self._other(view, others)
        after_ms = None if other is None else self._hedge_ms(call, endpoint, other)

        def patience_ms() -> float | None:
            if other is None or after_ms is not None:
                return None
            return endpoint.patience_ms(call.request, call.max_output_tokens, self._clock.now_ns())

        running, call.reservation = await self._attempts.begin(
            call, endpoint, patience_ms, spared=self._chooser.spared(call, endpoint)
        )
        if other is None or after_ms is None:
            return await self._attempts.ask(call, running)
        call.decision = hedged(call.decision, other.name)
        return await self._attempts.race(call, running, other, after_ms)

    def _other(self, view: View, others: tuple[str, ...]) -> Endpoint | None:
        """The next best that would take the request now, if there is one."""
        now_ns = self._clock.now_ns()
        for name in others:
            one = view.endpoints[name]
            if one.takes(now_ns) and (one.local or self._retries.has(now_ns)):
                return one
        return None

    def _hedge_ms(self, call: Call, first: Endpoint, second: Endpoint) -> float | None:
        """When to ask the second as well: where the caller's own deadline is at risk, and not too often."""
        if call.hints.max_latency_ms is None:
            return None
        now_ns = self._clock.now_ns()
        first_ms = first.time_bound_ms(call.request, call.max_output_tokens, now_ns)
        second_ms = second.time_bound_ms(call.request, call.max_output_tokens, now_ns)
        after_ms = hedge_after(first_ms, second_ms, (call.deadline_ns - now_ns) / 1e6)
        return after_ms if after_ms is not None and self._hedges.take(now_ns) else None

    # ---- infer

    async def _whole(self, view: View, call: Call, running: Running, completion: Completion) -> Whole:
        spent = Spent(
            outcome="ok", usage=completion.usage, model=completion.model, receipt=completion.receipt
        )
        self._attempts.end(call, running, spent)
        record, sums = self._books.record(view, call, "completed", 200)
        await self._books.ledger.submit(record)
        self._keep(call, self._books.keep(view, call, record, sums, body=completion.body))
        overhead = self._clock.now_ns() - call.received_ns - call.engine_ns
        headers = [*place_headers(record), *took_headers(sums, overhead), *self._rates(call), *JSON_HEADERS]
        return Whole(headers=headers, body=completion.body)

    def _streamed(self, view: View, call: Call, opened: Opened) -> Chunks:
        running, first, chunks = opened.running, opened.first, opened.chunks
        assert first is not None and chunks is not None
        now_ns = self._clock.now_ns()
        call.ttft_ns = now_ns - call.received_ns
        running.first_ns = now_ns
        call.engine_ns += now_ns - running.started_ns
        place = self._books.preview(view, call, running, first)

        async def finish(ending: Ending) -> bytes:
            return await self._stream_ended(view, call, running, ending)

        def abandon(heard: Heard, rest: AsyncIterator[Chunk]) -> None:
            self._books.spawn(self._stream_left(view, call, running, heard, rest))

        relay = Relay(
            first=first, chunks=chunks, include_usage=call.request.include_usage,
            collect=call.cache_key is not None or call.route.capture is not None, finish=finish, abandon=abandon,
        )  # fmt: skip
        headers = [*place_headers(place), *self._rates(call), *SSE_HEADERS]
        return Chunks(headers=headers, pieces=relay, close=relay.close)

    def _keep(self, call: Call, entry: Entry | None) -> None:
        """A model answered what was looked up by its meaning: that is learnt from."""
        if entry is not None and call.recalled is not None:
            self._recall.answered(call.recalled, entry)

    async def _stream_ended(self, view: View, call: Call, running: Running, ending: Ending) -> bytes:
        error = ending.error
        outcome = "ok" if error is None else outcome_of(error)
        self._attempts.end(call, running, heard_of(ending.heard, outcome, error))
        if error is not None:
            await self._books.close(view, call, error)
            return b""
        record, sums = self._books.record(view, call, "completed", 200)
        overhead = call.ttft_ns - call.engine_ns if call.ttft_ns is not None else 0
        call.closed = True
        await self._books.ledger.submit(record)
        if ending.collected:
            self._keep(call, self._books.keep(view, call, record, sums, chunks=ending.collected))
        return closing(record, sums, overhead)

    async def _stream_left(
        self, view: View, call: Call, running: Running, heard: Heard, rest: AsyncIterator[Chunk]
    ) -> None:
        """The client has gone: stop the engine, then meter what it got."""
        if hasattr(rest, "aclose"):
            await rest.aclose()
        self._attempts.end(call, running, heard_of(heard, "cancelled", None))
        await self._books.close(view, call, None)

    # ---- meter

    def _rates(self, call: Call) -> tuple[tuple[str, str], ...]:
        return rate_headers(call.granted) if call.granted is not None else ()


def recalled(call: Call, decision: Decision) -> Decision:
    """The decision with what the semantic cache said before it."""
    if not call.recall:
        return decision
    asked = call.recalled
    similarity = None if asked is None or not asked.verdict.similarity else round(asked.verdict.similarity, 3)
    return msgspec.structs.replace(decision, recall=call.recall, similarity=similarity)


async def _each(pieces: list[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def _nothing() -> None:
    """Closing a reply that holds nothing open."""
