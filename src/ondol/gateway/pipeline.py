"""THE request path.  This file states the order, and nothing else does.

    authenticate → classify → admit → lookup → schedule → reserve → infer → meter → reply

One record a request is written, whatever its outcome, from the moment it is admitted.  The end of an
answer is released only when its record is durable.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from ondol.core.identity import Principal
from ondol.core.inference import Chunk
from ondol.core.ports import Clock, EngineCall, KeyStore
from ondol.core.usage import Decision
from ondol.errors import (
    BudgetExhausted,
    DeadlineExceeded,
    EngineError,
    EngineFailed,
    EngineRejected,
    EngineUnavailable,
    LedgerFull,
    LedgerUnavailable,
    NoEndpoint,
    OndolError,
)  # fmt: skip
from ondol.gateway.books import Books, View
from ondol.gateway.breaker import RetryBudget
from ondol.gateway.cache import Entry, cache_key, cacheable
from ondol.gateway.call import Ask, Call, Chunks, Whole
from ondol.gateway.classify import classify
from ondol.gateway.endpoints import Endpoint, Running, deadline
from ondol.gateway.hints import parse_hints
from ondol.gateway.identity import Authenticator, FleetTrust, on_behalf
from ondol.gateway.meter import Spent
from ondol.gateway.policy import admit, find_route
from ondol.gateway.quota import rate_headers
from ondol.gateway.relay import Ending, Heard, Relay
from ondol.gateway.reply import JSON_HEADERS, SSE_HEADERS, closing, place_headers, took_headers, with_closing
from ondol.gateway.reserve import Purse
from ondol.gateway.schedule import Candidate, Wish, fell_back, schedule
from ondol.wire.openai import parse_request
from ondol.wire.sse import DONE, encode


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
        fleet: Callable[[], FleetTrust | None] = lambda: None,
    ) -> None:
        """Take the parts; the composition root made them.  `fleet` gives what a joined site lets others in by."""
        self.view = view
        self._books = books
        self._keys = keys
        self._authenticator = Authenticator(pepper)
        self._clock = clock
        self._purse = Purse(books, clock)
        self._new_id = new_id
        self._fleet = fleet
        self._retries = RetryBudget()

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
                return await self._serve(view, call, entry)
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

    async def _serve(self, view: View, call: Call, entry: Entry) -> Whole | Chunks:
        """The answer of the exact cache, metered at no cost."""
        call.cache = "exact"
        call.decision = Decision(code="cache_exact", objective=call.objective.value, chosen=entry.deployment)
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
        now_ns = self._clock.now_ns()
        candidates = [self._candidate(one, call, now_ns) for one in view.routes[call.route.name]]
        wish = Wish(
            task=call.request.task,
            needs=call.request.needs,
            tokens_max=call.request.prompt_tokens_max,
            prompt_tokens=call.request.prompt_tokens,
            objective=call.objective,
            data_class=call.data_class,
            remaining_ms=(call.deadline_ns - now_ns) / 1e6,
        )
        try:
            choice = schedule(wish, candidates)
        except BudgetExhausted as error:
            raise self._purse.what_is_left(view, call) or error from error
        call.decision = choice.decision
        failed: EngineError | BudgetExhausted | None = None
        self._retries.request(now_ns)
        for name in choice.order:
            if call.attempts and not self._retries.take(self._clock.now_ns()):
                break
            endpoint = view.endpoints[name]
            if failed is not None:
                call.decision = fell_back(call.decision, name, failed)
            try:
                await self._purse.reserve(call, endpoint)
                ticket = endpoint.breaker.begin(self._clock.now_ns())
                if ticket is None:
                    raise EngineUnavailable(endpoint.breaker.state_sentence(self._clock.now_ns()))
                running = endpoint.begin(ticket, self._clock.now_ns())
                return await (self._streamed if call.request.stream else self._whole)(view, call, running)
            except (EngineUnavailable, BudgetExhausted) as error:
                failed = error
                self._purse.release(call)
        if isinstance(failed, BudgetExhausted) and not call.attempts:
            raise failed
        tried = "; ".join(f"{a.deployment}: {a.error}" for a in call.attempts)
        wait = failed.retry_after_s if failed is not None else None
        raise NoEndpoint(
            f"every endpoint failed before its first byte: {tried or failed}", retry_after_s=wait or 1.0
        ) from failed

    def _candidate(self, endpoint: Endpoint, call: Call, now_ns: int) -> Candidate:
        affordable = True
        if call.budgets or call.hints.max_cost is not None:
            affordable = self._purse.affords(call, endpoint, now_ns)
        return endpoint.candidate(call.request, call.max_output_tokens, now_ns, affordable=affordable)

    # ---- infer

    def _engine_call(self, call: Call) -> EngineCall:
        return EngineCall(
            request=call.request,
            request_id=call.request_id,
            attempt=len(call.attempts) + 1,
            deadline_ns=call.deadline_ns,
            max_output_tokens=call.max_output_tokens,
            principal=call.principal,
            data_class=call.data_class,
            objective=call.objective.value,
            origin=call.principal.origin,
            trace=call.hints.trace,
        )

    async def _whole(self, view: View, call: Call, running: Running) -> Whole:
        try:
            completion = await running.endpoint.engine.complete(self._engine_call(call))
        except BaseException as error:
            self._end_attempt(call, running, _spent(error))
            raise
        spent = Spent(
            outcome="ok", usage=completion.usage, model=completion.model, receipt=completion.receipt
        )
        self._end_attempt(call, running, spent)
        record, sums = self._books.record(view, call, "completed", 200)
        await self._books.ledger.submit(record)
        self._books.keep(view, call, record, sums, body=completion.body)
        overhead = self._clock.now_ns() - call.received_ns - call.engine_ns
        headers = [*place_headers(record), *took_headers(sums, overhead), *self._rates(call), *JSON_HEADERS]
        return Whole(headers=headers, body=completion.body)

    async def _streamed(self, view: View, call: Call, running: Running) -> Chunks:
        chunks = running.endpoint.engine.stream(self._engine_call(call))
        try:
            first = await anext(chunks, None)
            if first is None:
                raise EngineUnavailable("the engine's stream ended before its first chunk")
        except BaseException as error:
            self._end_attempt(call, running, _spent(error))
            raise
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

    async def _stream_ended(self, view: View, call: Call, running: Running, ending: Ending) -> bytes:
        error = ending.error
        outcome = "ok" if error is None else _outcome(error)
        self._end_attempt(call, running, _heard(ending.heard, outcome, error))
        if error is not None:
            await self._books.close(view, call, error)
            return b""
        record, sums = self._books.record(view, call, "completed", 200)
        overhead = call.ttft_ns - call.engine_ns if call.ttft_ns is not None else 0
        call.closed = True
        await self._books.ledger.submit(record)
        if ending.collected:
            self._books.keep(view, call, record, sums, chunks=ending.collected)
        return closing(record, sums, overhead)

    async def _stream_left(
        self, view: View, call: Call, running: Running, heard: Heard, rest: AsyncIterator[Chunk]
    ) -> None:
        """The client has gone: stop the engine, then meter what it got."""
        if hasattr(rest, "aclose"):
            await rest.aclose()
        self._end_attempt(call, running, _heard(heard, "cancelled", None))
        await self._books.close(view, call, None)

    # ---- meter

    def _end_attempt(self, call: Call, running: Running, spent: Spent) -> None:
        now_ns = self._clock.now_ns()
        if running.first_ns is None:
            call.engine_ns += now_ns - running.started_ns
        call.attempts.append(running.end(call.request, call.max_output_tokens, spent, now_ns))

    def _rates(self, call: Call) -> tuple[tuple[str, str], ...]:
        return rate_headers(call.granted) if call.granted is not None else ()


_OUTCOMES = (
    (EngineUnavailable, "unavailable"), (EngineRejected, "rejected"), (DeadlineExceeded, "deadline"),
    (asyncio.CancelledError, "cancelled"),
)  # fmt: skip


def _outcome(error: BaseException) -> str:
    return next((word for kind, word in _OUTCOMES if isinstance(error, kind)), "failed")


def _spent(error: BaseException) -> Spent:
    message = error.message if isinstance(error, OndolError) else None
    wait = error.retry_after_s if isinstance(error, OndolError) else None
    return Spent(outcome=_outcome(error), error=message, retry_after_s=wait)


def _heard(heard: Heard, outcome: str, error: OndolError | None) -> Spent:
    return Spent(
        outcome=outcome, usage=heard.usage, model=heard.model, receipt=heard.receipt, pieces=heard.pieces,
        error=None if error is None else error.message,
    )  # fmt: skip


async def _each(pieces: list[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def _nothing() -> None:
    """Closing a reply that holds nothing open."""
