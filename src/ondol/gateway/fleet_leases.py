"""The site's parts of the fleet's budgets: asked for at the hub, kept durably, and given back.

`FleetLeases` owns what is held.  What makes it safe to spend with the hub away, and to lose any message:

- A grant is durable here before `grant` shows it, and the hub counted it before it answered.
- What is given back is taken off here, durably, before the hub hears of it.
- Calls are numbered, the number is durable before the call leaves, and only the answer to the newest counts.

So at any time   used here <= held here <= granted at the hub.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from ondol.core.ports import Clock, HeldLease, HubLink, Ledger, SiteMemory
from ondol.errors import HubRefused, InvalidRequest, LinkDown, OndolError
from ondol.gateway.budget import Budgets, NeedsGrant, NeedsLease, Position
from ondol.gateway.budget_state import Grant
from ondol.gateway.shares import REPORT_NS, Holding, Step, next_step
from ondol.units import NS_PER_S
from ondol.wire import sync

ASK_S: Final = 2.0
"""How long a request waits for the hub, at most."""
CLOSE_S: Final = 2.0
_CALL_S: Final = 5.0
_TICK_S: Final = 5.0
_RETRY_S: Final = (1.0, 30.0)
_REFUSED_S: Final = 30.0
_FROZEN_S: Final = 5.0
"""How soon a hub is asked again that grants nothing because it has just started, or went back."""

_FORGET_NS: Final = 40 * 86_400 * NS_PER_S
"""Longer than any period: what a budget held that is here no more is kept so long, with the number of its calls."""

Key = tuple[str, str]
"""A budget with its currency (`shop USD`), and a period."""


class _Need:
    """The requests that wait for one budget: what each lacks, and what wakes them."""

    __slots__ = ("answered", "lacks")

    def __init__(self) -> None:
        self.lacks: dict[int, int] = {}
        self.answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class FleetLeases:
    """All grants of one site.  On one loop; `run` is its only task, and ends by being cancelled.

    `hub_now_ns` is the hub's time as far as the site knows it; `link_up` whether the hub was heard just now.
    """

    def __init__(
        self, *, link: HubLink, memory: SiteMemory, ledger: Ledger, budgets: Budgets, clock: Clock, instance: str,
        hub_now_ns: Callable[[], int], link_up: Callable[[], bool], noted: Callable[[str, str], None],
        hub_era: Callable[[], int] = lambda: 0,
    ) -> None:  # fmt: skip
        """Take up what the site held before, and make the budgets those of a fleet.

        `noted` is told an event and a sentence: what an operator should see.  `hub_era` is the hub's present era: with
        another one each budget is said again.
        """
        self._link, self._memory, self._ledger, self._budgets = link, memory, ledger, budgets
        self._clock, self._instance = clock, instance
        self._hub_now_ns, self._link_up, self._noted = hub_now_ns, link_up, noted
        self._hub_era = hub_era
        self.answered_ns = 0
        self._held: dict[Key, Holding] = {}
        self._needs: dict[Key, _Need] = {}
        self._wishes: set[Key] = set()
        self._calls: dict[Key, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()
        self._failures = 0
        self._retry_ns = 0
        self._minute_ns = clock.now_ns() + REPORT_NS
        self._tickets = 0
        self._closed = False
        hub_ns = max(hub_now_ns(), memory.hub_seen_ns)
        for one in memory.leases():
            rest_ns = one.until_ns - hub_ns
            until_ns = clock.now_ns() + rest_ns if rest_ns > 0 else 0
            self._held[one.budget, one.period] = Holding(
                number=one.number, granted=one.granted, until_ns=until_ns, until_hub_ns=one.until_ns
            )
        budgets.join(self)

    # ---- what the budgets and requests see

    def grant(self, budget: str, period: str) -> Grant | None:
        """What the site holds; None before the hub has given any."""
        holding = self._held.get((budget, period))
        return None if holding is None else holding.grant()

    def away(self, budget: str) -> bool:
        """Whether the hub cannot be asked for this budget now."""
        if self._closed or self._failures > 0 or not self._link_up():
            return True
        now_ns = self._clock.now_ns()
        return any(one.refused_ns > now_ns for (share, _), one in self._held.items() if share == budget)

    def wish(self, budget: str, period: str) -> None:
        """Ask for more in the background.  Costs nothing when it is under way."""
        key = budget, period
        if key not in self._wishes and key not in self._calls:
            self._wishes.add(key)
            self._wake.set()

    async def ask(self, need: NeedsGrant, since_ns: int) -> bool:
        """Ask now, and wait until the hub has answered; False when it has not within 2 s of `since_ns`."""
        rest_s = ASK_S - (self._clock.now_ns() - since_ns) / NS_PER_S
        if rest_s <= 0 or self.away(need.budget):
            return False
        key = need.budget, need.period
        waiting = self._needs.get(key)
        if waiting is None:
            waiting = self._needs[key] = _Need()
        self._tickets += 1
        ticket = self._tickets
        waiting.lacks[ticket] = need.least
        self._wake.set()
        try:
            async with asyncio.timeout(rest_s):
                await asyncio.shield(waiting.answered)
        except TimeoutError:
            return False
        finally:
            waiting.lacks.pop(ticket, None)
        return not self.away(need.budget)

    def connected(self) -> None:
        """The hub was heard again: ask for what is due without waiting for the next try."""
        self._failures, self._retry_ns = 0, 0
        self._wake.set()

    # ---- the runner

    async def run(self) -> None:
        """Make the calls that are due, until cancelled."""
        try:
            while True:
                self._wake.clear()
                self._look()
                try:
                    async with asyncio.timeout(self._pause_s()):
                        await self._wake.wait()
                except TimeoutError:
                    continue
        finally:
            await self._stop_calls()

    async def close(self) -> None:
        """Give the unused part back, within 2 s; what the hub does not hear of now it hears at the next start.

        To be called after the last settlement and once `closing_leases` are written, with `run` ended.
        """
        can_tell = not self._closed and self._failures == 0 and self._link_up()
        self._closed = True
        if not can_tell:
            return
        positions = self._budgets.positions(self._clock.wall_ns())
        due = [one for one in positions if one.hard and self._open(one) > 0]
        try:
            async with asyncio.timeout(CLOSE_S):
                await asyncio.gather(
                    *(self._call(one, self._held[one.share, one.period], Step(0, keep=0)) for one in due)
                )
        except TimeoutError:
            self._noted(
                "leases_not_returned", "the hub did not answer in time; it hears of it at the next start"
            )

    def _open(self, position: Position) -> int:
        holding = self._held.get((position.share, position.period))
        return 0 if holding is None else holding.granted - position.used

    def _pause_s(self) -> float:
        wait_ns = self._retry_ns - self._clock.now_ns()
        return min(_TICK_S, wait_ns / NS_PER_S) if wait_ns > 0 else _TICK_S

    def _look(self) -> None:
        """Begin every call that is due.  While the hub is away one at a time tries."""
        now_ns = self._clock.now_ns()
        positions = self._budgets.positions(self._clock.wall_ns())
        if now_ns >= self._minute_ns:
            self._minute_ns = now_ns + REPORT_NS
            self._minute(positions)
        if not self._link_up() or now_ns < self._retry_ns:
            return
        for position in positions:
            key = position.share, position.period
            if key in self._calls or (self._failures and self._calls):
                continue
            if key not in self._held:
                if not position.now:
                    continue
                self._held[key] = Holding(used=position.used)
            holding = self._held[key]
            step = self._due(key, position, holding, now_ns)
            if step is not None:
                self._wishes.discard(key)
                self._calls[key] = asyncio.get_running_loop().create_task(self._serve(key, step))

    def _due(self, key: Key, position: Position, holding: Holding, now_ns: int) -> Step | None:
        if now_ns < holding.refused_ns:
            return None
        waiting = self._needs.get(key)
        lacks = list(waiting.lacks.values()) if waiting is not None else []
        # All waiting requests want their worst case beside each other; each lacks it counted alone.
        step = next_step(
            position,
            holding,
            missing=sum(lacks),
            least=min(lacks, default=0),
            wished=key in self._wishes,
            now_ns=now_ns,
        )
        return Step(0) if step is None and position.hard and holding.era != self._hub_era() else step

    def _minute(self, positions: list[Position]) -> None:
        """Note what the minute used, and forget periods that are over with nothing open."""
        current = {(one.share, one.period): one for one in positions}
        hub_ns = self._hub_now_ns()
        ended = []
        for key, holding in self._held.items():
            position = current.get(key)
            if position is not None:
                holding.minute(position.used)
                over = not position.now and holding.granted <= position.used and position.reserved == 0
            else:
                over = holding.until_hub_ns + _FORGET_NS < hub_ns
            if over and key not in self._calls:
                ended.append(key)
        self._wishes &= current.keys()
        for key in ended:
            del self._held[key]
        if ended:
            self._calls["", ""] = asyncio.get_running_loop().create_task(self._forget(ended))

    async def _forget(self, ended: list[Key]) -> None:
        try:
            await self._memory.drop_leases(ended)
        except OndolError as error:
            self._noted("leases_not_forgotten", error.message)
        finally:
            self._calls.pop(("", ""), None)

    async def _serve(self, key: Key, step: Step) -> None:
        """One call, and the end of the wait of those who wait for it."""
        waiting = self._needs.pop(key, None)
        position = self._position(key)
        try:
            if position is not None and not await self._call(position, self._held[key], step) and step.want:
                self._wishes.add(key)  # so that it is tried again, whoever asked
        finally:
            self._calls.pop(key, None)
            if waiting is not None and not waiting.answered.done():
                waiting.answered.set_result(None)
            self._wake.set()

    def _position(self, key: Key) -> Position | None:
        positions = self._budgets.positions(self._clock.wall_ns())
        return next((one for one in positions if (one.share, one.period) == key), None)

    async def _call(self, position: Position, holding: Holding, step: Step) -> bool:
        """One numbered call: durable before it leaves, its answer durable before it is used; whether it went well."""
        try:
            message = await self._prepare(position, holding, step)
            sent_ns, sent_hub_ns = self._clock.now_ns(), max(self._hub_now_ns(), self._memory.hub_seen_ns)
            raw = await self._link.call("lease", sync.encode(message), timeout_s=_CALL_S)
            await self._take(holding, message, sync.decode(raw, sync.LeaseReply), sent_ns, sent_hub_ns)
        except LinkDown:
            self._failed()
        except HubRefused as error:
            self._refused(position.share, holding, error.message, error.retry_after_s)
        except OndolError as error:  # an answer that is none, or a disk that does not take it
            self._refused(position.share, holding, error.message, None)
        else:
            self._failures, self._retry_ns = 0, 0
            return True
        return False

    async def _prepare(self, position: Position, holding: Holding, step: Step) -> sync.Lease:
        back = 0
        if step.keep is not None:
            kept, lease = self._budgets.shrink(position.budget, position.period, step.keep)
            back = max(holding.granted - kept, 0)
            holding.granted -= back
            if lease is not None:
                await self._write(lease)
        holding.number += 1
        number = holding.number
        await self._keep(position.share, position.period, holding)
        now = self._position((position.share, position.period)) or position
        return sync.Lease(
            instance=self._instance, budget=position.budget, period=position.period, number=number,
            spent=str(now.used), want=str(step.want), give_back=str(back), granted=str(holding.granted),
            least=str(step.least), currency=position.currency, era=self._hub_era(),
        )  # fmt: skip

    async def _take(
        self, holding: Holding, message: sync.Lease, reply: sync.LeaseReply, sent_ns: int, sent_hub_ns: int
    ) -> None:
        granted, left = _units(reply.granted), _units(reply.left)
        if (reply.budget, reply.period) != (message.budget, message.period):
            raise InvalidRequest(f"lease: the hub answered for {reply.budget[:64]!r}, not {message.budget!r}")
        if reply.number != message.number:
            await self._behind(holding, message, reply.number, granted)
            return
        until_hub_ns = sent_hub_ns + int(min(max(reply.term_s, 0.0), 86_400.0) * NS_PER_S)
        kept = HeldLease(
            budget=f"{message.budget} {message.currency}", period=message.period, number=message.number,
            granted=granted, until_ns=until_hub_ns,
        )  # fmt: skip
        await self._memory.keep_lease(kept)
        holding.told(
            granted=granted, left=None if reply.frozen else left, used=int(message.spent), term_s=reply.term_s,
            sent_ns=sent_ns,
        )  # fmt: skip
        holding.until_hub_ns, holding.era = until_hub_ns, message.era or 0
        self.answered_ns = reply.hub_ns
        if reply.frozen:
            self._refused(f"{message.budget} {message.currency}", holding, reply.frozen, _FROZEN_S)

    async def _behind(self, holding: Holding, message: sync.Lease, number: int, granted: int) -> None:
        """The hub knows later calls of ours than we do: our memory went back, and what they gave may be spent."""
        if number < message.number:
            return
        self._noted(
            "leases_went_back",
            f"budget {message.budget}: the hub has had call {number} of this site, whose memory ends at "
            f"{message.number}: all that it was granted in {message.period} counts as spent",
        )
        lease = self._budgets.write_off(message.budget, message.period, granted)
        if lease is not None:
            await self._write(lease)
        holding.number, holding.granted = number, max(granted, holding.granted)
        await self._keep(f"{message.budget} {message.currency}", message.period, holding)

    async def _write(self, lease: NeedsLease) -> None:
        await self._ledger.lease(lease.budget, lease.period, lease.total)

    async def _keep(self, share: str, period: str, holding: Holding) -> None:
        await self._memory.keep_lease(
            HeldLease(
                budget=share,
                period=period,
                number=holding.number,
                granted=holding.granted,
                until_ns=holding.until_hub_ns,
            )  # fmt: skip
        )

    def _failed(self) -> None:
        low, high = _RETRY_S
        wait_s = min(high, low * 2 ** min(self._failures, 10))
        self._failures += 1
        self._retry_ns = self._clock.now_ns() + int(wait_s * NS_PER_S)

    def _refused(self, share: str, holding: Holding, why: str, wait_s: float | None) -> None:
        holding.refused_ns = self._clock.now_ns() + int((wait_s or _REFUSED_S) * NS_PER_S)
        self._noted("lease_refused", f"budget {share}: {why}")

    async def _stop_calls(self) -> None:
        tasks = list(self._calls.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _units(text: str) -> int:
    if not (0 < len(text) <= 30 and text.isascii() and text.isdigit()):
        raise InvalidRequest(f"lease: the hub says {text[:40]!r}; expected scaled units as decimal digits")
    return int(text)
