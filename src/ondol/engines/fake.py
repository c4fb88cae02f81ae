"""An engine without a model, for tests, load and rehearsals: the same request gives the same answer.

Owns pacing and chosen failures; the answers themselves are made by `fake_answers`.  It answers in full
form (tools, schemas, log-probs, several choices), so that what is built on it is built on the protocol.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Final

from ondol.core.catalog import FakeAnswers
from ondol.core.inference import Capability, Chunk, Completion, Task, Usage
from ondol.core.ports import Clock, EngineCall
from ondol.engines.fake_answers import Answer, chunks_of, compose, embed, whole_of
from ondol.engines.fake_schema import SchemaTooLarge
from ondol.errors import DeadlineExceeded, EngineFailed, EngineRejected, EngineUnavailable
from ondol.units import NS_PER_S

CAPABILITIES: Final = frozenset(
    {
        Capability.TOOLS,
        Capability.TOOL_CHOICE,
        Capability.JSON_OBJECT,
        Capability.JSON_SCHEMA,
        Capability.LOGPROBS,
        Capability.CHOICES,
        Capability.SEED,
        Capability.IMAGE,
        Capability.ECHO,
        Capability.DIMENSIONS,
    }
)


class FakeEngine:
    """Implements `core.ports.Engine` on nothing but the request and the loop's clock."""

    def __init__(
        self,
        *,
        model: str,
        clock: Clock,
        answers: FakeAnswers | None = None,
        capabilities: frozenset[Capability] | None = None,
    ) -> None:
        """Take the model's name as it stands in answers, and how to behave."""
        self._model = model
        self._clock = clock
        self._answers = answers or FakeAnswers()
        self._capabilities = CAPABILITIES if capabilities is None else capabilities
        self._calls = 0
        self._closed = False
        self._pauses: set[asyncio.Future[None]] = set()

    @property
    def capabilities(self) -> frozenset[Capability]:
        """As declared, else all that it gives a true form of."""
        return self._capabilities

    async def start(self) -> None:
        """Nothing is to be made ready."""

    def problem(self) -> str | None:
        """None until it is closed."""
        return "this engine is closed" if self._closed else None

    async def complete(self, call: EngineCall) -> Completion:
        """The whole answer, after the time that its tokens take."""
        failing = self._enter(call)
        if failing == "after":
            # Nothing of a whole answer has gone out, so to the caller this is a failure before.
            raise EngineUnavailable("fake: fails after the first token, as its deployment says")
        if call.request.task is Task.EMBEDDING:
            body, input_tokens = embed(call.request.body, self._model)
            await self._pause(call, 0)
            return Completion(body=body, usage=Usage(input_tokens=input_tokens), model=self._model)
        answer = self._compose(call)
        longest = max(len(choice.pieces) for choice in answer.choices)
        await self._pause(call, longest)
        return Completion(body=whole_of(answer), usage=_usage(answer), model=self._model)

    async def stream(self, call: EngineCall) -> AsyncGenerator[Chunk, None]:
        """The same answer, a chunk a token, each at its time."""
        failing = self._enter(call)
        answer = self._compose(call)
        begun_s = asyncio.get_running_loop().time()
        for position, (data, pieces, finish) in enumerate(chunks_of(answer)):
            try:
                await self._pause(call, position, begun_s)
            except EngineUnavailable as error:
                if position:
                    raise EngineFailed(error.message) from error
                raise
            yield Chunk(data=data, pieces=pieces, finish=finish, model=self._model)
            if failing == "after":
                raise EngineFailed("fake: fails after the first token, as its deployment says")
        yield Chunk(data=answer.usage_chunk(), has_choices=False, usage=_usage(answer), model=self._model)

    async def close(self) -> None:
        """End what waits, with an error; later calls are unavailable.  Idempotent."""
        self._closed = True
        for pause in self._pauses:
            if not pause.done():
                pause.set_exception(EngineUnavailable("this engine is closed"))

    def _enter(self, call: EngineCall) -> str | None:
        """Count the call; return `after` when it has to fail later, and fail at once where it says so."""
        if self._closed:
            raise EngineUnavailable("this engine is closed")
        if call.deadline_ns <= self._clock.now_ns():
            raise DeadlineExceeded("the time of this request was used up before the engine was asked")
        self._calls += 1
        fail = self._answers.fail
        if fail is None or self._calls % (self._answers.fail_every or 1):
            return None
        if fail == "before":
            raise EngineUnavailable("fake: fails before the first token, as its deployment says")
        if fail == "reject":
            raise EngineRejected("fake: rejects the request, as its deployment says", status=400)
        return fail

    def _compose(self, call: EngineCall) -> Answer:
        try:
            return compose(
                call.request,
                self._model,
                max_output_tokens=call.max_output_tokens,
                text=self._answers.text,
                output_tokens=self._answers.output_tokens,
            )
        except SchemaTooLarge as error:
            raise EngineRejected(str(error), status=400, param="response_format") from error

    async def _pause(self, call: EngineCall, tokens: int, begun_s: float | None = None) -> None:
        """Wait until the token of this number is due; 0 is the first."""
        if self._closed:
            raise EngineUnavailable("this engine is closed")
        wait_ms = self._answers.first_token_ms + tokens * self._answers.token_ms
        if wait_ms == 0:
            if call.deadline_ns <= self._clock.now_ns():
                raise DeadlineExceeded("the time of this request is used up")
            return
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        due_s = (now_s if begun_s is None else begun_s) + wait_ms / 1000
        deadline_s = now_s + (call.deadline_ns - self._clock.now_ns()) / NS_PER_S
        late = deadline_s < due_s
        await self._sleep_until(loop, min(due_s, deadline_s))
        if late:
            raise DeadlineExceeded("the time of this request was used up before the answer was whole")

    async def _sleep_until(self, loop: asyncio.AbstractEventLoop, when_s: float) -> None:
        if when_s <= loop.time():
            return
        pause: asyncio.Future[None] = loop.create_future()
        timer = loop.call_at(when_s, _wake, pause)
        self._pauses.add(pause)
        try:
            await pause
        finally:
            timer.cancel()
            self._pauses.discard(pause)


def _wake(pause: asyncio.Future[None]) -> None:
    if not pause.done():
        pause.set_result(None)


def _usage(answer: Answer) -> Usage:
    return Usage(input_tokens=answer.input_tokens, output_tokens=answer.output_tokens)
