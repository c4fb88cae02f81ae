"""The site's side of the fleet: desired state down, records and events up, and how the site is.

Nothing on a request's path waits for any of it.  Without a hub everything here waits.

    session   hello, then watch until the line breaks (`session.py`)
    fetch     when the watch names something new, and once a minute whatever it said
    ship      ranges of the ledger as soon as they are committed, then events (`shipping.py`)
    report    how the site is, every 10 s and when something changed; a new credential at half of its life
    sample    figures of the site, kept every 10 s also without a hub
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from ondol.core.desired import Desired
from ondol.core.dsse import Envelope
from ondol.core.ports import Clock, HubLink, Outbox, SiteEvent, SiteIdentity, SiteMemory
from ondol.core.trust import read_epoch
from ondol.errors import BadSignature, HubRefused, OndolError
from ondol.gateway.clocks import ClockOffset
from ondol.gateway.reconcile import Have, Snapshot, judge, newer_epoch, shall_fetch
from ondol.gateway.session import Dice, Session, State, is_lasting
from ondol.gateway.shipping import Shipper
from ondol.units import NS_PER_S
from ondol.wire import sync

FETCH_EVERY_S: Final = 60.0
FETCH_S: Final = 120.0
"""A thin line takes long over the first desired state; a dead one is noticed by the session."""
TELEMETRY_EVERY_S: Final = 10.0
RENEW_AGAIN_S: Final = 60.0


class SyncStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How the site stands with its hub: for `status`, metrics and people.

    `heard_ago_s`: since the hub was last heard, None if never by this process.  `state_age_s`: how old the desired
    state is that runs, by the hub's clock; None before the first.  `stopped`: why records no longer go up.
    """

    state: State
    why: str
    generation: int
    epoch: int
    heard_ago_s: float | None
    state_age_s: float | None
    records: int
    acknowledged: int
    clock_offset_s: float | None
    stopped: str
    refused: str


class SiteSync:
    """Runs on one event loop, until cancelled.  Paces itself by that loop's time alone."""

    def __init__(
        self, *, link: HubLink, outbox: Outbox, memory: SiteMemory, identity: SiteIdentity, clock: Clock, rng: Dice,
        activate: Callable[[Desired], Awaitable[None]], trusted: Callable[[], None],
        describe: Callable[[], Snapshot], note: Callable[..., None], software: str = "",
        busy: Callable[[], int] = lambda: 0, lease_ns: Callable[[], int] = lambda: 0,
    ) -> None:  # fmt: skip
        """Take the parts.

        `activate` makes the site run a desired state, or raises and leaves the old one; `trusted` is told that
        the trust has changed (a new epoch or hub key); `note(event, **fields)` goes to the log; `busy` is how many
        requests run now: they have the right of way; `lease_ns` is when the hub wrote down its last word on budgets.
        """
        self._outbox = outbox
        self._memory = memory
        self._identity = identity
        self._clock = clock
        self._activate = activate
        self._trusted = trusted
        self._describe = describe
        self._note = note
        self._software = software
        self._lease_ns = lease_ns
        self._era = 0
        self._session = Session(
            link=link, memory=memory, clock=clock, rng=rng, hello=self._hello, welcome=self._welcome, said=self._said,
            note=note,
        )  # fmt: skip
        self._shipper = Shipper(
            session=self._session, outbox=outbox, memory=memory, identity=identity, clock=clock, busy=busy, note=note
        )  # fmt: skip
        self._refused = ""
        self._refused_generation = 0
        self._announced: sync.Announcement | None = None
        self._news = asyncio.Event()
        self._report_now = asyncio.Event()
        self._hub_notes: tuple[str, ...] = ()
        self._renew_at_ns = 0

    # ---- what others ask

    @property
    def connected(self) -> bool:
        """Whether the hub takes what this process says, as far as is known."""
        return self._session.up.is_set()

    @property
    def offset(self) -> ClockOffset:
        """This site's clock against the hub's."""
        return self._session.offset

    def hub_now_ns(self) -> int:
        """The hub's wall clock, as well as it is known; never before a time that the hub has said."""
        return self._session.hub_now_ns()

    def hub_era(self) -> int:
        """The era that the hub said last; a new one wants to hear again what is held of each budget."""
        return self._era

    def status(self) -> SyncStatus:
        """How the site stands with its hub."""
        session, desired, have = self._session, self._memory.desired(), self._have()
        heard_ns, offset_ns = session.heard_ns, self.offset.ns
        ago_s = None if heard_ns is None else round((self._clock.now_ns() - heard_ns) / NS_PER_S, 1)
        age_s = None
        if desired is not None:
            age_s = round(max(0, self.hub_now_ns() - desired.manifest.issued_ns) / NS_PER_S, 1)
        return SyncStatus(
            state=session.state, why=session.why, generation=have.generation, epoch=have.epoch, heard_ago_s=ago_s,
            state_age_s=age_s, records=self._outbox.last_seq, acknowledged=self._outbox.acknowledged_seq,
            clock_offset_s=None if offset_ns is None else round(offset_ns / NS_PER_S, 3),
            stopped=self._shipper.stopped, refused=self._refused,
        )  # fmt: skip

    def report_soon(self) -> None:
        """Something changed that the hub should know before the next report is due."""
        self._report_now.set()

    async def run(self) -> None:
        """Keep the session and everything in it going."""
        self._begin_trust()
        works = (
            self._session.run, self._fetches, self._shipper.ship, self._shipper.send_events, self._reports,
            self._samples,
        )  # fmt: skip
        async with asyncio.TaskGroup() as tasks:
            for work in works:
                tasks.create_task(self._for_ever(work))

    async def _for_ever(self, work: Callable[[], Awaitable[None]]) -> None:
        """One loop of the site; a fault in one must not stop the others."""
        name = getattr(work, "__name__", "work").strip("_")
        while True:
            try:
                await work()
            except OndolError as error:
                self._note("sync_paused", what=name, why=error.message)
            except Exception as error:  # a task's top: said, and tried again
                self._note("sync_failed", what=name, why=f"{type(error).__name__}: {error}")
            await asyncio.sleep(self._session.pause())

    def _begin_trust(self) -> None:
        """Judge others by the newest list that was kept."""
        kept = self._memory.epoch()
        if kept is not None:
            try:
                self._identity.take_epoch(read_epoch(kept, self._identity.trust()))
            except BadSignature as error:
                self._note("epoch_refused", why=error.message)
        self._trusted()

    # ---- the session

    def _have(self) -> Have:
        desired, epoch = self._memory.desired(), self._identity.trust().epoch
        return Have(
            generation=0 if desired is None else desired.manifest.generation,
            epoch=0 if epoch is None else epoch.number,
            refused=self._refused_generation,
        )

    def _hello(self, answer: str) -> sync.Hello:
        who, have = self._identity, self._have()
        return sync.Hello(
            boot=who.boot, instance=who.instance, gateway=who.gateway, generation=have.generation, epoch=have.epoch,
            acknowledged=self._outbox.acknowledged_seq, wall_ns=self._clock.wall_ns(), software=self._software,
            answer=answer, lease_ns=self._lease_ns(), era=self._era,
        )  # fmt: skip

    async def _welcome(self, reply: sync.HelloReply) -> None:
        """The session begins: what the hub has is what we go on from, also where that is less than before."""
        self._era = reply.era
        had, runs = self._outbox.acknowledged_seq, self._have().generation
        if reply.mark < had:
            self._note("hub_went_back", had=str(had), has=str(reply.mark))
        if reply.generation < runs:
            self._note("hub_went_back", runs=str(runs), offered=str(reply.generation))
        self._shipper.try_again()
        await self._shipper.take_mark(reply.mark, reply.mark_hash)
        self._announced = None
        self._news.set()  # what changed while nobody listened
        self._report_now.set()

    def _said(self, said: sync.Announcement) -> None:
        before, self._announced, self._era = self._announced, said, said.era
        if shall_fetch(said, before, self._have()):
            self._news.set()

    # ---- down

    async def _fetches(self) -> None:
        """Fetch when there is news, and once a minute: a watch may have missed something."""
        while True:
            try:
                async with asyncio.timeout(FETCH_EVERY_S):
                    await self._news.wait()
            except TimeoutError:
                pass
            await self._session.up.wait()
            self._news.clear()
            await self._fetch()

    async def _fetch(self) -> None:
        kept = self._memory.desired()
        have = () if kept is None else tuple(kept.bodies)
        message = sync.Fetch(instance=self._identity.instance, have=have)
        try:
            reply = await self._session.call("desired", message, sync.FetchReply, timeout_s=FETCH_S)
        except HubRefused as error:
            if not is_lasting(error):
                raise
            self._refuse(0 if self._announced is None else self._announced.generation, error.message)
            return
        await self._take_epoch(reply.epoch)
        if reply.manifest is None:
            return
        found = judge(
            reply.manifest, reply.bodies, kept=kept, trust=self._identity.trust(), site=self._identity.site
        )
        if found.what == "refuse" or found.desired is None:
            self._refuse(found.generation, found.why)
            return
        if found.what == "take":
            try:
                await self._activate(found.desired)
            except OndolError as error:
                self._refuse(found.generation, error.message)
                return
        await self._keep(found.what, found.desired)

    async def _keep(self, what: str, desired: Desired) -> None:
        """It runs, or ran already; after a power cut it shall run as well."""
        changed = what == "take" or bool(self._refused)
        self._refused, self._refused_generation = "", 0
        if what != "same":
            await self._memory.keep_desired(desired)
            self._trusted()
        if what == "take":
            self._note("generation", number=str(desired.manifest.generation))
        if changed:
            self._report_now.set()

    def _refuse(self, generation: int, why: str) -> None:
        """The old one stays; the hub hears why."""
        if why != self._refused:
            self._note("generation_refused", generation=str(generation), why=why)
            self._report_now.set()
        self._refused, self._refused_generation = why, generation

    async def _take_epoch(self, envelope: Envelope) -> None:
        """A newer list of who is out counts at once, and is durable before that."""
        try:
            epoch = newer_epoch(envelope, self._identity.trust())
        except BadSignature as error:
            self._note("epoch_refused", why=error.message)
            return
        if epoch is not None:
            await self._memory.keep_epoch(envelope)
            self._identity.take_epoch(epoch)
            self._trusted()

    # ---- how the site is

    async def _samples(self) -> None:
        """Keep a sample of the site's figures, whether the hub is there or not."""
        while True:
            await asyncio.sleep(TELEMETRY_EVERY_S)
            event = SiteEvent(
                time_ns=self._clock.wall_ns(), kind="sample", fields=self._describe().telemetry,
                offset_ns=self.offset.ns,
            )  # fmt: skip
            await self._memory.note("telemetry", event)

    async def _reports(self) -> None:
        """Say how the site is: every 10 s, and sooner after a change; and see to the credential."""
        while True:
            await self._session.up.wait()
            self._report_now.clear()
            await self._report()
            await self._shipper.say_again()
            await self._renew()
            try:
                async with asyncio.timeout(sync.REPORT_S):
                    await self._report_now.wait()
                await asyncio.sleep(self._session.pause())
            except TimeoutError:
                continue

    async def _report(self) -> None:
        snapshot, have = self._describe(), self._have()
        own = (self.offset.sentence(), self._shipper.stopped)
        message = sync.Report(
            instance=self._identity.instance, generation=have.generation, epoch=have.epoch,
            last_seq=self._outbox.last_seq, acknowledged=self._outbox.acknowledged_seq, wall_ns=self._clock.wall_ns(),
            offset_ns=self.offset.ns, refused=self._refused, refused_generation=self._refused_generation,
            ledger=snapshot.ledger, deployments=snapshot.deployments, figures=snapshot.figures,
            notes=(*snapshot.notes, *[one for one in own if one]),
        )  # fmt: skip
        reply = await self._session.call("report", message, sync.ReportReply)
        for sentence in reply.notes:
            if sentence not in self._hub_notes:
                self._note("hub_says", what=sentence)
        self._hub_notes = reply.notes

    async def _renew(self) -> None:
        """A new credential at half of the old one's life; after a failure once a minute."""
        issued_ns, expires_ns = self._identity.credential_ns
        now_ns = self.hub_now_ns()
        if now_ns < (issued_ns + expires_ns) // 2 or self._clock.now_ns() < self._renew_at_ns:
            return
        self._renew_at_ns = self._clock.now_ns() + int(RENEW_AGAIN_S * NS_PER_S)
        reply = await self._session.call("renew", sync.Renew(csr=self._identity.csr()), sync.RenewReply)
        self._identity.keep_credential(
            reply.credential, hub_keys=reply.hub_keys, certificate=reply.certificate
        )
        self._renew_at_ns = 0
        self._trusted()
        self._note("credential_renewed", hours=str(round((expires_ns - issued_ns) / 3600 / NS_PER_S)))
