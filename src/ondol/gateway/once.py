"""`Idempotency-Key`: a request that is sent again is answered again, and done once.

The store holds the state; this module waits for a request that is still running, and records a reply
on its way out.  Answers are kept in memory, so a restart forgets them.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable

from ondol.core.identity import Principal
from ondol.gateway.call import Ask, Chunks, Whole
from ondol.gateway.idempotency import Done, IdempotencyStore, KeptAnswer, Running, Slot
from ondol.wire.sse import DONE

Waiter = asyncio.Future[None]
Handle = Callable[[Ask, Principal], Awaitable[Whole | Chunks]]
REPLAYED = ("x-ondol-idempotent", "replayed")


async def once(
    store: IdempotencyStore[Waiter], key: str, ask: Ask, principal: Principal, handle: Handle
) -> Whole | Chunks:
    """The reply to a request with an idempotency key: made now, waited for, or made before.

    Raises:
        Conflict: the key was used for another request.
        OndolError: as `handle` does; then the key is free again.
    """
    digest = hashlib.sha256(ask.task.value.encode() + b"\n" + ask.raw).digest()
    while True:
        waiter: Waiter = asyncio.get_running_loop().create_future()
        state = store.begin(principal.key_id, key, digest, ask.received_ns, waiter)
        if isinstance(state, Running):
            await asyncio.shield(state.waiter)
            continue
        if isinstance(state, Done):
            return _again(state.answer)
        return await _first(store, state.slot, await_reply=handle(ask, principal))


async def _first(
    store: IdempotencyStore[Waiter], slot: Slot[Waiter], *, await_reply: Awaitable[Whole | Chunks]
) -> Whole | Chunks:
    try:
        reply = await await_reply
    except BaseException:
        _wake(store.abandon(slot))
        raise
    if isinstance(reply, Whole):
        kept = KeptAnswer(status=reply.status, headers=tuple(reply.headers), body=reply.body)
        _wake(store.finish(slot, kept))
        return reply
    recorded = _Recorded(store, slot, reply)
    return Chunks(headers=reply.headers, pieces=recorded, close=recorded.close)


def _wake(waiter: Waiter) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _again(answer: KeptAnswer) -> Whole | Chunks:
    headers = [*answer.headers, REPLAYED]
    if not answer.chunks:
        return Whole(status=answer.status, headers=headers, body=answer.body)

    async def pieces() -> AsyncIterator[bytes]:
        for chunk in answer.chunks:
            yield chunk

    return Chunks(headers=headers, pieces=pieces(), close=lambda: None)


class _Recorded:
    """A stream that is written down while it goes out; only one that ended well is kept."""

    def __init__(self, store: IdempotencyStore[Waiter], slot: Slot[Waiter], reply: Chunks) -> None:
        self._store = store
        self._slot = slot
        self._reply = reply
        self._seen: list[bytes] = []
        self._open = True

    def __aiter__(self) -> _Recorded:
        return self

    async def __anext__(self) -> bytes:
        piece = await anext(self._reply.pieces)
        self._seen.append(piece)
        if piece.endswith(DONE):
            self._open = False
            kept = KeptAnswer(status=200, headers=tuple(self._reply.headers), chunks=tuple(self._seen))
            _wake(self._store.finish(self._slot, kept))
        return piece

    def close(self) -> None:
        self._reply.close()
        if self._open:
            self._open = False
            _wake(self._store.abandon(self._slot))
