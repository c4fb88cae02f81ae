"""A request that takes a while: its body must keep coming, and its client must still be there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, Final

from ondol.core.catalog import Limits
from ondol.core.ports import Clock
from ondol.units import NS_PER_S
from ondol.wire.guard import BodyMeter, Refusal

WATCH_AFTER_S: Final = 0.02
"""Most answers are there sooner, and then a watch for a hang-up would only cost."""


class Stopped(Exception):
    """A body was refused while it was read."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


class Watch:
    """Cancels the present task when its body comes too slowly, or when its client goes away.

    One timer for both: most requests have their body at once and their answer soon, and then nothing
    more is started.  `asyncio.timeout` alone costs five times as much.
    """

    __slots__ = (
        "_clock",
        "_loop",
        "_patience",
        "_proto",
        "_reading",
        "_task",
        "_timer",
        "_watch",
        "gone",
        "patience_ns",
    )

    def __init__(self, proto: Any, clock: Clock) -> None:
        self.gone = False
        self._clock = clock
        self.patience_ns = 0
        self._proto = proto
        self._reading = False
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task(self._loop)
        self._patience: asyncio.TimerHandle | None = None
        self._watch: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = self._loop.call_later(WATCH_AFTER_S, self._look)

    async def body(self, length: str | None, limits: Limits, received_ns: int) -> bytes:
        """The whole body, in time and within its bounds; `length` is the header's.

        Raises:
            Stopped: it is too large, too slow or broken.
        """
        meter = BodyMeter(limits, received_ns, length)
        refusal = meter.begin()
        if refusal is not None:
            raise Stopped(refusal)
        if length is not None:
            # One wait for all of it: it may take as long as the slowest allowed body of that size.
            self.patience_ns = meter.patience_ns(received_ns, int(length))
            raw: bytes = await self.reading(self._proto(), meter)
            refusal = meter.feed(raw) or meter.finish()
            if refusal is not None:
                raise Stopped(refusal)
            return raw
        parts: list[bytes] = []
        chunks = aiter(self._proto)
        while True:
            self.patience_ns = meter.patience_ns(self._clock.now_ns())
            try:
                # Not `anext(chunks, default)`: on granian's iterator that ends the process (CPython 3.11).
                part = await self.reading(chunks.__anext__(), meter)
            except StopAsyncIteration:
                break
            refusal = meter.feed(part)
            if refusal is not None:
                raise Stopped(refusal)
            parts.append(part)
        refusal = meter.finish()
        if refusal is not None:
            raise Stopped(refusal)
        return b"".join(parts)

    async def reading(self, what: Awaitable[bytes], meter: BodyMeter) -> bytes:
        """The awaited part of a body; `Stopped` when `patience_ns` is over first."""
        self._reading = True
        if self._timer is None:
            self._look()
        try:
            return await what
        except asyncio.CancelledError:
            if self._patience is not None and self._loop.time() >= self._patience.when():
                raise Stopped(meter.too_slow()) from None
            raise
        finally:
            self._reading = False
            if self._patience is not None:
                self._patience.cancel()
                self._patience = None
            if self._timer is None and self._watch is None:
                self._timer = self._loop.call_later(WATCH_AFTER_S, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._reading:
            self._patience = self._loop.call_later(max(self.patience_ns, 0) / NS_PER_S, self._cancel)
        elif self._watch is None:
            self._watch = self._loop.create_task(self._wait())

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _wait(self) -> None:
        await self._proto.client_disconnect()
        self.gone = True
        self._cancel()

    def stop(self) -> None:
        """End all looking; the request is over."""
        if self._timer is not None:
            self._timer.cancel()
        if self._watch is not None:
            self._watch.cancel()
