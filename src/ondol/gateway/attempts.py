"""One attempt at one endpoint, or two against each other: until there is a whole answer, or the first chunk of one.

Whatever happens, every attempt that began is ended here, or by whoever got it opened.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final, NamedTuple, TypeVar

from ondol.core.inference import Chunk, Completion
from ondol.core.ports import Clock, EngineCall
from ondol.errors import (
    BudgetExhausted,
    DeadlineExceeded,
    EngineRejected,
    EngineUnavailable,
    OndolError,
)
from ondol.gateway.budget import Reservation
from ondol.gateway.call import Call
from ondol.gateway.endpoints import Endpoint, Running
from ondol.gateway.meter import Spent
from ondol.gateway.relay import Heard
from ondol.gateway.reserve import Purse

T = TypeVar("T")
MS_PER_S: Final = 1000.0


class Opened(NamedTuple):
    """An attempt that has something: a `completion`, or the `first` chunk and those after it."""

    running: Running
    completion: Completion | None = None
    first: Chunk | None = None
    chunks: AsyncIterator[Chunk] | None = None


class Attempts:
    """Begins, races and ends attempts; owned by the pipeline."""

    def __init__(self, purse: Purse, clock: Clock) -> None:
        """Take the parts."""
        self._purse = purse
        self._clock = clock

    async def begin(
        self,
        call: Call,
        endpoint: Endpoint,
        patience_ms: Callable[[], float | None] = lambda: None,
        *,
        spared: int = 0,
    ) -> tuple[Running, Reservation | None]:
        """Set its money aside and count it in; `spared` is what of the prompt was read there before.

        Raises:
            BudgetExhausted: a budget cannot pay its worst case.
            EngineUnavailable: its breaker lets nothing through.
        """
        reservation = await self._purse.reserve(call, endpoint)
        ticket = endpoint.breaker.begin(self._clock.now_ns())
        if ticket is None:
            self._purse.release(reservation)
            raise EngineUnavailable(endpoint.breaker.state_sentence(self._clock.now_ns()))
        return endpoint.begin(ticket, self._clock.now_ns(), patience_ms(), spared=spared), reservation

    async def ask(self, call: Call, running: Running) -> Opened:
        """Ask one endpoint, for as long as its patience allows.

        Raises:
            OndolError: there is no answer; the attempt has ended.
        """
        try:
            return await _within(running, self._open(call, running, len(call.attempts) + 1))
        except BaseException as error:
            self.end(call, running, spent_of(error))
            raise

    async def race(self, call: Call, running: Running, rival: Endpoint, after_ms: float) -> Opened:
        """Ask one endpoint, and after a while a second as well: the first that has something wins.

        The other is cancelled, ended and paid for.  Where the second cannot be asked, the first is waited for.

        Raises:
            OndolError: neither has answered; both have ended.
        """
        number = len(call.attempts) + 1
        tasks = {asyncio.create_task(self._open(call, running, number)): running}
        held: dict[Running, Reservation | None] = {running: call.reservation}
        try:
            done, _ = await asyncio.wait(tasks, timeout=after_ms / MS_PER_S)
            if not done:
                second = await self._second(call, rival)
                if second is not None:
                    held[second[0]] = second[1]
                    tasks[asyncio.create_task(self._open(call, second[0], number + 1))] = second[0]
            return await self._first(call, tasks, held)
        finally:
            await self._drop(call, tasks, held)

    async def _second(self, call: Call, rival: Endpoint) -> tuple[Running, Reservation | None] | None:
        try:
            return await self.begin(call, rival)
        except (EngineUnavailable, BudgetExhausted):
            return None

    async def _first(
        self, call: Call, tasks: dict[asyncio.Task[Opened], Running], held: dict[Running, Reservation | None]
    ) -> Opened:
        """The first that succeeds; it is taken out of `tasks`, and so is whatever has failed."""
        while True:
            done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            task = next((one for one in tasks if one in done and one.exception() is None), None)
            if task is not None:
                running = tasks.pop(task)
                call.reservation = held[running]
                return task.result()
            for task in done:
                running, error = tasks.pop(task), task.exception()
                assert error is not None
                self.end(call, running, spent_of(error), aside=bool(waiting))
                if not waiting:
                    call.reservation = held[running]
                    raise error
                self._purse.release(held[running])

    async def _drop(
        self, call: Call, tasks: dict[asyncio.Task[Opened], Running], held: dict[Running, Reservation | None]
    ) -> None:
        """Cancel whatever is left, and pay for it: it worked, and nobody heard it."""
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.gather(*tasks, return_exceptions=True)
        for task, running in tasks.items():
            if not task.cancelled() and task.exception() is None:
                await _close(task.result().chunks)
            self.end(call, running, Spent(outcome="cancelled"), aside=True)
            if held[running] is not call.reservation:
                self._purse.pay(call, held[running], call.attempts[-1])

    async def _open(self, call: Call, running: Running, number: int) -> Opened:
        engine, asked = running.endpoint.engine, _engine_call(call, number)
        if not call.request.stream:
            return Opened(running, completion=await engine.complete(asked))
        chunks = engine.stream(asked)
        try:
            first = await anext(chunks, None)
        except BaseException:
            await _close(chunks)
            raise
        if first is None:
            raise EngineUnavailable("the engine's stream ended before its first chunk")
        return Opened(running, first=first, chunks=chunks)

    def end(self, call: Call, running: Running, spent: Spent, *, aside: bool = False) -> None:
        """Count an attempt out, and note it; `aside` where it ran beside the one whose time counts."""
        now_ns = self._clock.now_ns()
        if running.first_ns is None and not aside:
            call.engine_ns += now_ns - running.started_ns
        call.attempts.append(running.end(call.request, call.max_output_tokens, spent, now_ns))


def _engine_call(call: Call, number: int) -> EngineCall:
    return EngineCall(
        request=call.request,
        request_id=call.request_id,
        attempt=number,
        deadline_ns=call.deadline_ns,
        max_output_tokens=call.max_output_tokens,
        principal=call.principal,
        data_class=call.data_class,
        objective=call.objective.value,
        origin=call.principal.origin,
        trace=call.hints.trace,
    )


async def _within(running: Running, answer: Awaitable[T]) -> T:
    """The answer, or its first part, unless the patience with its endpoint ends before.

    Raises:
        EngineUnavailable: nothing came in time; what was under way is cancelled.
    """
    if running.patience_ms is None:
        return await answer
    try:
        async with asyncio.timeout(running.patience_ms / MS_PER_S):
            return await answer
    except TimeoutError as error:
        running.endpoint.left(running.started_ns)
        raise EngineUnavailable(
            f"nothing came from it within {running.patience_ms:.0f} ms, which is longer than 99 of 100 answers take"
        ) from error


async def _close(chunks: AsyncIterator[Chunk] | None) -> None:
    if chunks is not None and hasattr(chunks, "aclose"):
        await chunks.aclose()


_OUTCOMES = (
    (EngineUnavailable, "unavailable"), (EngineRejected, "rejected"), (DeadlineExceeded, "deadline"),
    (asyncio.CancelledError, "cancelled"),
)  # fmt: skip


def outcome_of(error: BaseException) -> str:
    """The word for it in a record's attempts."""
    return next((word for kind, word in _OUTCOMES if isinstance(error, kind)), "failed")


def spent_of(error: BaseException) -> Spent:
    """What an attempt took that gave nothing."""
    message = error.message if isinstance(error, OndolError) else None
    wait = error.retry_after_s if isinstance(error, OndolError) else None
    return Spent(outcome=outcome_of(error), error=message, retry_after_s=wait)


def heard_of(heard: Heard, outcome: str, error: OndolError | None) -> Spent:
    """What an attempt took of which something was heard."""
    return Spent(
        outcome=outcome, usage=heard.usage, model=heard.model, receipt=heard.receipt, pieces=heard.pieces,
        error=None if error is None else error.message,
    )  # fmt: skip
