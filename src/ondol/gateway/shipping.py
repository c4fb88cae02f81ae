"""What goes up: ranges of the ledger first, then audit, then telemetry; each until the hub has it durably.

Nothing is taken away here before the hub's answer from its disk.  The hub's mark says what is sent next: after a
gap, a lost answer or a restored backup that is simply another number.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import msgspec

from ondol.core.ports import Clock, EventClass, LedgerRange, Outbox, SiteEvent, SiteIdentity, SiteMemory
from ondol.errors import HubRefused, LedgerUnavailable, LinkDown, RangeRefused
from ondol.gateway.reconcile import BUSY_BYTES_PER_S, RangePace
from ondol.gateway.session import Session
from ondol.units import NS_PER_S
from ondol.wire import sync

GATHER_S: Final = 0.05
"""After a quiet time the first record goes up at once; further ones are gathered for so long."""
BREATH_S: Final = 0.002
BUSY_S: Final = 1.0
"""So long after a request's record the site counts as busy: short requests are hardly ever seen running."""
STOPPED_S: Final = 60.0
"""How long shipping rests after a refusal that only an operator can mend, before it is tried again."""
SAY_AGAIN_S: Final = 600.0
EVENTS_EVERY_S: Final = 5.0
EVENTS_PATIENCE_S: Final = 30.0
"""Events give way to usage for at most so long."""
EVENT_ROWS: Final = 200
_FATAL: Final = frozenset({"range_refused", "bad_signature", "forbidden", "invalid_request"})


class Shipper:
    """Owned by one `SiteSync`."""

    def __init__(
        self, *, session: Session, outbox: Outbox, memory: SiteMemory, identity: SiteIdentity, clock: Clock,
        busy: Callable[[], int], note: Callable[..., None],
    ) -> None:  # fmt: skip
        """Take the parts; `busy` is how many requests run now, which have the right of way."""
        self.stopped = ""
        self.pace = RangePace()
        self._session = session
        self._outbox = outbox
        self._memory = memory
        self._identity = identity
        self._clock = clock
        self._busy = busy
        self._note = note
        self._sent_to = outbox.acknowledged_seq
        self._went_back = asyncio.Event()
        self._mark: tuple[int, bytes] | None = None
        self._told_ns = 0
        self._last_seq = outbox.last_seq
        self._busy_until_ns = 0
        self._said_stopped = ""

    @property
    def backlog(self) -> int:
        """Rows that the hub has not got, as far as is known."""
        return max(0, self._outbox.last_seq - self._sent_to)

    # ---- usage

    async def take_mark(self, mark: int, hash_: bytes) -> None:
        """What the hub has durably; more than there is here, or another hash, is a fork of this ledger."""
        if mark < self._sent_to:
            self._went_back.set()
        self._sent_to = mark
        if mark == self._outbox.acknowledged_seq and self._mark == (mark, hash_):
            return
        await self._tell(mark, hash_)

    async def say_again(self) -> None:
        """Now and then the mark of before: its rows age by the hub's clock, and are pruned on a quiet site, too."""
        if self._mark is not None and self._clock.now_ns() - self._told_ns > SAY_AGAIN_S * NS_PER_S:
            await self._tell(*self._mark)

    async def _tell(self, mark: int, hash_: bytes) -> None:
        try:
            await self._outbox.acknowledged(mark, hash_, hub_ns=self._session.hub_now_ns())
        except RangeRefused as error:
            self._stop(error.message)
        except LedgerUnavailable as error:
            # The rows are at the hub all the same; the next report tries again.
            self._note("mark_not_kept", why=error.message)
            self._mark, self._told_ns = (mark, hash_), self._clock.now_ns() - int(SAY_AGAIN_S * NS_PER_S)
        else:
            self._mark, self._told_ns = (mark, hash_), self._clock.now_ns()

    def try_again(self) -> None:
        """A new session has begun: what was refused before may be mended."""
        self.stopped = ""

    async def ship(self) -> None:
        """Send ranges, one after the other, as long as there are rows; then wait for the next."""
        while True:
            await self._session.up.wait()
            if self.stopped:
                await asyncio.sleep(STOPPED_S)
                self.try_again()
                continue
            sent_to = self._sent_to
            try:
                found = await self._outbox.range_after(
                    sent_to, rows=self.pace.rows, size=self.pace.size(self._is_busy())
                )
            except LedgerUnavailable as error:
                self._stop(error.message)
                continue
            if found is not None:
                await self._ship(found)
                continue
            self._said_stopped = ""
            if self._sent_to == sent_to:
                await self._more_to_send(sent_to)
                await asyncio.sleep(GATHER_S)

    async def _more_to_send(self, sent_to: int) -> None:
        """Wait for a record after `sent_to`, or for a hub that has less than it had: a restored one."""
        self._went_back.clear()
        either = (
            asyncio.ensure_future(self._outbox.grown(sent_to)),
            asyncio.ensure_future(self._went_back.wait()),
        )
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in either:
                one.cancel()
            await asyncio.gather(*either, return_exceptions=True)

    async def _ship(self, found: LedgerRange) -> None:
        began_ns = self._clock.now_ns()
        full = len(found.rows) >= self.pace.rows
        try:
            reply = await self._session.call(
                "usage", self._message(found), sync.RangeReply, timeout_s=self.pace.wait_s
            )
        except LinkDown:
            self.pace.failed()
            raise
        except HubRefused as error:
            await self._refused(error, len(found.rows))
            return
        took_s = (self._clock.now_ns() - began_ns) / NS_PER_S
        self.pace.took(took_s, full=full)
        await self.take_mark(reply.mark, reply.mark_hash)
        if reply.mark < found.first:
            self._note("gap", sent_from=str(found.first), hub_has=str(reply.mark))
            await asyncio.sleep(self._session.pause())
        await asyncio.sleep(max(BREATH_S, self._room_s(found, took_s)))

    def _is_busy(self) -> bool:
        """Whether requests run, or did a moment ago."""
        last_seq, now_ns = self._outbox.last_seq, self._clock.now_ns()
        if last_seq != self._last_seq:
            self._last_seq, self._busy_until_ns = last_seq, now_ns + int(BUSY_S * NS_PER_S)
        return now_ns < self._busy_until_ns or self._busy() > 0

    def _room_s(self, sent: LedgerRange, took_s: float) -> float:
        """How long the next range waits for the sake of requests."""
        return sum(map(len, sent.rows)) / BUSY_BYTES_PER_S - took_s if self._is_busy() else 0.0

    def _message(self, found: LedgerRange) -> sync.Range:
        last = found.first + len(found.rows) - 1
        who = self._identity
        head = sync.Head(site=who.site, gateway=who.gateway, seq=last, hash=found.last_hash)
        return sync.Range(
            instance=who.instance, gateway=who.gateway, first=found.first, previous=found.previous, rows=found.rows,
            head=who.sign(sync.HEAD_TYPE, sync.encode(head)),
        )  # fmt: skip

    async def _refused(self, error: HubRefused, rows: int) -> None:
        if error.why == "request_too_large" and rows > 1:
            self.pace.failed()
        elif error.why in _FATAL or error.why == "request_too_large":
            self._stop(error.message)
        else:
            await asyncio.sleep(max(error.retry_after_s or 0.0, self._session.pause()))

    def _stop(self, why: str) -> None:
        """Serve on, and say loudly that records no longer go up; the same reason once."""
        self.stopped = why
        if why != self._said_stopped:
            self._said_stopped = why
            self._note("shipping_stopped", why=why)

    # ---- events

    async def send_events(self) -> None:
        """Send audit, then telemetry, a batch at a time, when what was used has gone."""
        waited_s = 0.0
        while True:
            await self._session.up.wait()
            if self.backlog > self.pace.rows and waited_s < EVENTS_PATIENCE_S and not self.stopped:
                await asyncio.sleep(1.0)
                waited_s += 1.0
                continue
            waited_s = 0.0
            if not await self._send_batch():
                await asyncio.sleep(EVENTS_EVERY_S)

    async def _send_batch(self) -> bool:
        """Whether there may be more."""
        marks = self._memory.event_marks()
        audit = await self._waiting("audit", marks["audit"][0], EVENT_ROWS)
        telemetry = await self._waiting("telemetry", marks["telemetry"][0], EVENT_ROWS - len(audit))
        if not audit and not telemetry:
            return False
        message = sync.Events(
            instance=self._identity.instance, audit=audit, telemetry=telemetry, thinned=self._memory.thinned
        )
        reply = await self._session.call("events", message, sync.EventsReply)
        if reply.audit < marks["audit"][0]:
            self._note("hub_went_back", had=f"audit {marks['audit'][0]}", has=str(reply.audit))
        await self._memory.events_acknowledged(audit=reply.audit, telemetry=reply.telemetry)
        return len(audit) + len(telemetry) >= EVENT_ROWS

    async def _waiting(self, event_class: EventClass, after: int, rows: int) -> tuple[sync.Event, ...]:
        found = await self._memory.events_after(event_class, after, rows=rows) if rows > 0 else ()
        return tuple([_event(one) for one in found])


def _event(kept: SiteEvent) -> sync.Event:
    return msgspec.convert(kept, sync.Event, from_attributes=True)
