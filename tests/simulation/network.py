"""The network between sites and hub: it delays, loses, repeats, reorders, cuts one way or both, and breaks off.

`SimLink` implements `core.ports.HubLink` over a hub in the same process.  What a fault does to a call is what it
does on a real line: a lost question is never heard, a lost answer was acted upon, and a repeated question is
heard twice, the second time when nobody waits for the answer any more.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, Protocol

from ondol.errors import HubRefused, LinkDown, OndolError


class HubFace(Protocol):
    """What a site reaches of a hub: `hub.service.Hub` has it."""

    async def handle(self, name: str, authorization: str | None, body: bytes) -> bytes: ...

    def watch(self, authorization: str | None, body: bytes) -> AsyncIterator[bytes]: ...


class Weather:
    """How the network is now; the world's chaos changes it.  Rates are probabilities a message."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.loss = 0.0
        self.repeat = 0.0
        self.delay_s = (0.001, 0.02)
        self.up_cut: set[str] = set()
        self.down_cut: set[str] = set()

    def calm(self) -> None:
        """Everything heals."""
        self.loss = self.repeat = 0.0
        self.delay_s = (0.001, 0.02)
        self.up_cut.clear()
        self.down_cut.clear()

    def delay(self) -> float:
        """Of one message; two that follow each other may overtake."""
        return self.rng.uniform(*self.delay_s)

    def loses(self) -> bool:
        return self.rng.random() < self.loss

    def repeats(self) -> bool:
        return self.rng.random() < self.repeat


class SimLink:
    """One site's way to the hub.  `hub` gives None while the hub is down, which refuses connections."""

    def __init__(
        self, site: str, weather: Weather, hub: Callable[[], HubFace | None], authorization: Callable[[], str]
    ) -> None:
        self._site = site
        self._weather = weather
        self._hub = hub
        self._authorization = authorization
        self._late: set[asyncio.Task[None]] = set()

    async def call(self, name: str, body: bytes, *, timeout_s: float) -> bytes:
        try:
            async with asyncio.timeout(timeout_s):
                return await self._call(name, body)
        except TimeoutError:
            raise LinkDown(f"{name}: the hub did not answer within {timeout_s:g} s") from None

    async def _call(self, name: str, body: bytes) -> bytes:
        weather, authorization = self._weather, self._authorization()
        await asyncio.sleep(weather.delay())
        if self._site in weather.up_cut or weather.loses():
            await _never()
        if weather.repeats():
            self._spawn(self._again(name, authorization, body))
        answer = await self._ask(name, authorization, body)
        await asyncio.sleep(weather.delay())
        if self._site in weather.down_cut or weather.loses():
            await _never()
        if isinstance(answer, OndolError):
            raise HubRefused(answer.message, why=answer.code, retry_after_s=answer.retry_after_s)
        return answer

    async def _ask(self, name: str, authorization: str, body: bytes) -> bytes | OndolError:
        hub = self._hub()
        if hub is None:
            raise LinkDown("connection refused")
        try:
            answer = await hub.handle(name, authorization, body)
        except OndolError as error:
            return error
        if self._hub() is not hub:
            raise LinkDown("the connection was reset")
        return answer

    async def _again(self, name: str, authorization: str, body: bytes) -> None:
        """The same message, later."""
        await asyncio.sleep(self._weather.rng.uniform(0, 5))
        try:
            await self._ask(name, authorization, body)
        except LinkDown:
            return

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._late.add(task)
        task.add_done_callback(self._late.discard)

    async def watch(self, body: bytes, *, silence_s: float) -> AsyncIterator[bytes]:
        weather = self._weather
        await asyncio.sleep(weather.delay())
        hub = self._hub()
        if hub is None:
            raise LinkDown("connection refused")
        if self._site in weather.up_cut or self._site in weather.down_cut:
            await asyncio.sleep(silence_s)
            raise LinkDown(f"nothing was heard for {silence_s:g} s")
        try:
            async with aclosing(hub.watch(self._authorization(), body)) as lines:  # type: ignore[type-var]
                while True:
                    line = await self._line(lines, silence_s)
                    if self._hub() is not hub:
                        raise LinkDown("the connection was reset")
                    if line is None:
                        return
                    yield line
        except HubRefused:
            raise
        except LinkDown:
            raise
        except OndolError as error:
            raise HubRefused(error.message, why=error.code, retry_after_s=error.retry_after_s) from error

    async def _line(self, lines: AsyncIterator[bytes], silence_s: float) -> bytes | None:
        """The next line that comes through; TCP loses none, it only stands still while it is cut."""
        weather = self._weather
        try:
            async with asyncio.timeout(silence_s):
                line = await anext(lines, None)
                await asyncio.sleep(weather.delay())
                if self._site in weather.down_cut:
                    await _never()
                if weather.loses() and weather.rng.random() < 0.2:
                    raise LinkDown("the stream broke off")
                return line
        except TimeoutError:
            raise LinkDown(f"nothing was heard for {silence_s:g} s") from None

    async def close(self) -> None:
        for task in list(self._late):
            task.cancel()


async def _never() -> None:
    """Wait until whoever waits for us gives up."""
    await asyncio.sleep(1e6)
