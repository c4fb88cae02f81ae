"""One session with the hub: hello, then a watch until the line breaks, then hello again.

    away ──hello──► joined ──the watch breaks, or any call does──► away
      ▲               the hub knows us no more ──────────────────► hello
      └── waiting (another process of this site lives), fenced (it was there first), refused: asked again, slowly

Nobody waits for it but what runs in it.  Pauses are short and drawn by chance: a SYN is cheap, a fleet must not
knock in step, and records shall flow within a second of a line coming back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any, Final, Literal, Protocol, TypeVar

import msgspec

from ondol.core.ports import Clock, HubLink, SiteMemory
from ondol.errors import HubRefused, LinkDown
from ondol.gateway.clocks import ClockOffset
from ondol.units import NS_PER_S
from ondol.wire import sync

R = TypeVar("R", bound=sync.Message)
State = Literal["away", "joined", "waiting", "fenced", "refused"]
CALL_S: Final = 10.0
HELLO_S: Final = 5.0
PAUSE_S: Final = (0.1, 0.8)
PAUSE_AFTER_SLOW_S: Final = (0.0, 0.2)
"""After a try that took a second itself: packets vanish, and whoever waits for them has waited already."""
SLOW_TRY_S: Final = 1.0
SLOW_PAUSE_S: Final = 15.0
"""After a refusal that another try will not change."""
_TRANSIENT: Final = frozenset({"draining", "state_unavailable", "overloaded", "internal_error"})
_ENDS: Final = frozenset({"hello_again", "fenced", "invalid_api_key"})
"""Refusals of any call after which a session is over."""


def is_lasting(error: HubRefused) -> bool:
    """Whether the refusal is about what was asked, so that asking again soon gives the same."""
    return error.why not in _TRANSIENT | _ENDS


class Dice(Protocol):
    """Chance; `random.Random` has it."""

    def uniform(self, a: float, b: float, /) -> float:
        """A number between the two."""
        ...


class Session:
    """Owned by one `SiteSync`.  `up` is set while the hub takes what this process says."""

    def __init__(
        self, *, link: HubLink, memory: SiteMemory, clock: Clock, rng: Dice, hello: Callable[[str], sync.Hello],
        welcome: Callable[[sync.HelloReply], Awaitable[None]], said: Callable[[sync.Announcement], None],
        note: Callable[..., None],
    ) -> None:  # fmt: skip
        """Take the parts.

        `hello` makes the greeting with an answer to a challenge; `welcome` is awaited with the hub's, before `up`;
        `said` is told each announcement after that.
        """
        self.up = asyncio.Event()
        self.state: State = "away"
        self.why = "the hub was not asked yet"
        self.offset = ClockOffset(clock)
        self.heard_ns: int | None = None
        self._link = link
        self._memory = memory
        self._clock = clock
        self._rng = rng
        self._hello = hello
        self._welcome = welcome
        self._said = said
        self._note = note
        self._broken: asyncio.Future[LinkDown | HubRefused] | None = None
        self._instance = ""

    def hub_now_ns(self) -> int:
        """The hub's wall clock, as well as it is known; never before a time that it has said."""
        hub_ns = self.offset.hub_ns()
        return max(self._clock.wall_ns() if hub_ns is None else hub_ns, self._memory.hub_seen_ns)

    def pause(self) -> float:
        """Seconds to wait before something is tried again."""
        return self._rng.uniform(*PAUSE_S)

    async def call(self, name: str, message: sync.Message, reply: type[R], *, timeout_s: float = CALL_S) -> R:
        """One call.  What it tells of the hub's time is kept; a line that broke ends the session.

        Raises:
            LinkDown, HubRefused: as `HubLink.call`.
        """
        sent_ns = self._clock.now_ns()
        try:
            answer = sync.decode(await self._ask(name, sync.encode(message), timeout_s), reply)
        except LinkDown as error:
            self.end(error)
            raise
        except HubRefused as error:
            self._heard(sent_ns, error.hub_ns)
            if error.why in _ENDS:
                self.end(error)
            raise
        hub_ns = getattr(answer, "hub_ns", 0)
        self._heard(sent_ns, hub_ns)
        if hub_ns:
            await self._memory.saw_hub(hub_ns)
        return answer

    async def _ask(self, name: str, body: bytes, timeout_s: float) -> bytes:
        """The answer, or LinkDown as soon as the session is over: a dead line is noticed by one for all."""
        asked = self._link.call(name, body, timeout_s=timeout_s)
        broken = self._broken
        if broken is None:
            return await asked
        asking = asyncio.ensure_future(asked)
        try:
            both: set[asyncio.Future[Any]] = {asking, broken}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                return asking.result()
        finally:
            asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        raise LinkDown(f"{name}: the session was over before the hub answered: {broken.result().message}")

    def end(self, error: LinkDown | HubRefused) -> None:
        """The session is over for this reason, if there is one."""
        if self._broken is not None and not self._broken.done():
            self._broken.set_result(error)

    async def run(self) -> None:
        """Keep a session, until cancelled."""
        answer = ""
        while True:
            began_ns = self._clock.now_ns()
            try:
                greeting = self._hello(answer)
                self._instance = greeting.instance
                reply = await self.call("hello", greeting, sync.HelloReply, timeout_s=HELLO_S)
            except (LinkDown, HubRefused) as error:
                answer = ""
                await self._away(error, slow=self._clock.now_ns() - began_ns > SLOW_TRY_S * NS_PER_S)
                continue
            answer = reply.challenge
            if answer:
                await asyncio.sleep(self._rng.uniform(*PAUSE_AFTER_SLOW_S))
                continue
            if reply.wait_s > 0:
                self._set("waiting", "another process of this site was heard a moment ago")
                await asyncio.sleep(min(reply.wait_s, SLOW_PAUSE_S))
                continue
            await self._away(await self._held(reply), slow=False)

    async def _held(self, reply: sync.HelloReply) -> LinkDown | HubRefused:
        """The session, until it is over; why it is."""
        broken: asyncio.Future[LinkDown | HubRefused] = asyncio.get_running_loop().create_future()
        self._broken = broken
        try:
            await self._welcome(reply)
            self._set("joined", "")
            self.up.set()
            listening = asyncio.ensure_future(self._listen(reply.generation))
            listening.add_done_callback(self._heard_the_end)
            try:
                return await asyncio.shield(broken)
            finally:
                listening.cancel()
                await asyncio.gather(listening, return_exceptions=True)
        finally:
            self.up.clear()
            self.end(LinkDown("this site is stopping"))
            self._broken = None

    def _heard_the_end(self, listening: asyncio.Future[None]) -> None:
        if listening.cancelled():
            return
        error = listening.exception()
        if isinstance(error, LinkDown | HubRefused):
            self.end(error)
        elif error is not None:  # a mistake of ours: said, and the session begins again
            self.end(LinkDown(f"the watch failed: {type(error).__name__}: {error}"))
        else:
            self.end(LinkDown("the hub ended the watch"))

    async def _listen(self, generation: int) -> None:
        message = sync.encode(sync.Watch(instance=self._instance, generation=generation))
        async with aclosing(self._link.watch(message, silence_s=sync.SILENCE_S)) as lines:  # type: ignore[type-var]
            async for line in lines:
                try:
                    said = msgspec.json.decode(line, type=sync.Announcement)
                except msgspec.MsgspecError as error:
                    raise LinkDown(f"the watch said something that is no announcement: {error}") from error
                self.heard_ns = self._clock.now_ns()
                self._said(said)

    def _heard(self, sent_ns: int, hub_ns: int) -> None:
        self.heard_ns = self._clock.now_ns()
        if hub_ns:
            self.offset.seen(sent_ns=sent_ns, received_ns=self.heard_ns, hub_ns=hub_ns)

    async def _away(self, error: LinkDown | HubRefused, *, slow: bool) -> None:
        """Wait for a moment, as long as the reason asks for."""
        if isinstance(error, LinkDown):
            self._set("away", error.message)
            await asyncio.sleep(self._rng.uniform(*(PAUSE_AFTER_SLOW_S if slow else PAUSE_S)))
        elif error.why == "hello_again":
            await asyncio.sleep(self.pause())
        elif error.why in _TRANSIENT:
            self._set("away", error.message)
            await asyncio.sleep(max(error.retry_after_s or 0.0, self.pause()))
        else:
            clock_is_news = error.why == "invalid_api_key" and self.state == "away"
            self._set("fenced" if error.why == "fenced" else "refused", error.message)
            # A refusal tells the time: where only the clock was wrong, the next try is right.
            slow_s = max(error.retry_after_s or 0.0, SLOW_PAUSE_S * self._rng.uniform(0.7, 1.0))
            await asyncio.sleep(self.pause() if clock_is_news else slow_s)

    def _set(self, state: State, why: str) -> None:
        if state != self.state:
            self._note("hub_link", state=state, why=why)
        self.state, self.why = state, why
