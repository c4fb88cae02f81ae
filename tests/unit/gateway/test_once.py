"""`Idempotency-Key`: done once, answered as often as asked, and free again after a failure."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from ondol.core.identity import Principal
from ondol.core.inference import Task
from ondol.errors import Conflict, EngineUnavailable, InvalidRequest
from ondol.gateway.call import Ask, Chunks, Whole
from ondol.gateway.idempotency import IdempotencyStore
from ondol.gateway.once import REPLAYED, Waiter, once
from ondol.wire.sse import DONE, encode

pytestmark = pytest.mark.anyio

CALLER = Principal(key_id="k", tenant="default", team="shop")
OTHER = Principal(key_id="k2", tenant="default", team="shop")
HEADERS = [("x-ondol-request-id", "req-1")]


def ask(raw: bytes = b"{}", task: Task = Task.CHAT, now_ns: int = 0) -> Ask:
    return Ask(task=task, raw=raw, header=lambda _: None, received_ns=now_ns, wall_ns=now_ns)


class Work:
    """What is done at most once: it counts, may wait, and may fail."""

    def __init__(self, *pieces: bytes, fails: int = 0) -> None:
        self.pieces = pieces
        self.fails = fails
        self.done = 0
        self.closed = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.store: IdempotencyStore[Waiter] = IdempotencyStore(1_000_000)

    async def handle(self, ask: Ask, principal: Principal) -> Whole | Chunks:
        self.done += 1
        number = self.done
        await self.gate.wait()
        if number <= self.fails:
            raise EngineUnavailable("it rests")
        if self.pieces:
            return Chunks(headers=HEADERS, pieces=self._stream(), close=self._close)
        return Whole(headers=HEADERS, body=b"answer %d" % number)

    async def _stream(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            yield piece

    def _close(self) -> None:
        self.closed += 1

    async def ask(self, key: str = "a", of: Ask | None = None, who: Principal = CALLER) -> Whole | Chunks:
        return await once(self.store, key, of or ask(), who, self.handle)

    async def whole(self, key: str = "a", of: Ask | None = None, who: Principal = CALLER) -> Whole:
        reply = await self.ask(key, of, who)
        assert isinstance(reply, Whole)
        return reply

    async def chunks(self) -> Chunks:
        reply = await self.ask()
        assert isinstance(reply, Chunks)
        return reply


async def read(reply: Chunks) -> list[bytes]:
    return [piece async for piece in reply.pieces]


async def test_the_same_request_is_answered_again_and_done_once() -> None:
    work = Work()
    assert await work.whole() == Whole(headers=HEADERS, body=b"answer 1")
    assert await work.whole() == Whole(headers=[*HEADERS, REPLAYED], body=b"answer 1")
    assert work.done == 1


async def test_other_keys_and_other_callers_are_other_requests() -> None:
    work = Work()
    bodies = [
        (await work.whole(key, who=who)).body for key, who in (("a", CALLER), ("b", CALLER), ("a", OTHER))
    ]
    assert bodies == [b"answer 1", b"answer 2", b"answer 3"]


@pytest.mark.parametrize("other", [ask(b"{ }"), ask(task=Task.COMPLETION)])
async def test_another_request_under_the_same_key_is_a_conflict(other: Ask) -> None:
    work = Work()
    await work.whole()
    with pytest.raises(Conflict):
        await work.ask(of=other)
    assert work.done == 1


async def test_a_bad_key_is_refused_before_any_work() -> None:
    work = Work()
    with pytest.raises(InvalidRequest):
        await work.ask(key="")
    assert work.done == 0


async def test_those_who_come_meanwhile_wait_for_the_first() -> None:
    work = Work()
    work.gate.clear()
    asked = [asyncio.ensure_future(work.whole()) for _ in range(4)]
    await asyncio.sleep(0)
    assert not any(one.done() for one in asked)
    work.gate.set()
    assert {reply.body for reply in await asyncio.gather(*asked)} == {b"answer 1"}
    assert work.done == 1


async def test_after_a_failure_the_key_is_free_and_one_who_waited_does_it() -> None:
    work = Work(fails=1)
    work.gate.clear()
    first, second, third = [asyncio.ensure_future(work.whole()) for _ in range(3)]
    await asyncio.sleep(0)
    work.gate.set()
    with pytest.raises(EngineUnavailable):
        await first
    assert (await second).body == (await third).body == b"answer 2"
    assert work.done == 2


async def test_a_first_that_is_cancelled_gives_the_key_back() -> None:
    work = Work()
    work.gate.clear()
    first, second = asyncio.ensure_future(work.whole()), asyncio.ensure_future(work.whole())
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    work.gate.set()
    assert (await second).body == b"answer 2"


async def test_one_who_waits_and_goes_away_disturbs_nobody() -> None:
    work = Work()
    work.gate.clear()
    first, second, third = [asyncio.ensure_future(work.whole()) for _ in range(3)]
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    work.gate.set()
    assert (await first).body == (await third).body == b"answer 1"


async def test_a_stream_that_ended_well_is_given_again_piece_by_piece() -> None:
    work = Work(encode(b"1"), encode(b"2") + DONE)
    first = await work.chunks()
    assert await read(first) == list(work.pieces)
    first.close()
    again = await work.chunks()
    assert again.headers == [*HEADERS, REPLAYED]
    assert await read(again) == list(work.pieces)
    again.close()
    assert (work.done, work.closed) == (1, 1)


@pytest.mark.parametrize("take", [0, 1, 2])
async def test_a_stream_that_did_not_end_well_is_forgotten(take: int) -> None:
    work = Work(encode(b"1"), encode(b'{"error":{}}'))
    first = await work.chunks()
    for _ in range(take):
        await anext(first.pieces)
    waiting = asyncio.ensure_future(work.chunks())
    await asyncio.sleep(0)
    assert not waiting.done()
    first.close()
    first.close()
    second = await waiting
    second.close()
    assert work.done == 2
    assert len(work.store) == 0
