"""The hub as sites see it: who calls is checked once, then the call is one transaction.

No sockets and no threads here: `hub/app.py` serves it over HTTPS, and the simulation calls it in one thread.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from random import Random
from typing import Final, TypeVar

import msgspec

from ondol.core.dsse import Envelope
from ondol.core.fleet import Fleet
from ondol.core.identity import ApiKey
from ondol.core.invites import HubPlace
from ondol.core.ports import Clock, Database, Tx
from ondol.core.trust import HUB, Credential, Trust, authenticate_site
from ondol.errors import ConfigError, HubRefused, NotFound, OndolError, Unauthenticated
from ondol.hub import enrol, freeze, ingest, keys, leases, publish, rollouts, sessions, sites
from ondol.hub.enrol import Authority
from ondol.hub.liveness import Liveness
from ondol.hub.publish import Numbers
from ondol.hub.roster import Roster
from ondol.units import NS_PER_S
from ondol.wire import sync

T = TypeVar("T")
PROOFS_MAX: Final = 20_000
FLEETS_MAX: Final = 4
"""Fleets of generations that are kept ready: the present one, the next, and those of a rollback."""
PROOF_S: Final = 60
Certify = Callable[[bytes, str, str], bytes]
"""(CSR as PEM, site, address) to a TLS certificate as PEM."""
Note = Callable[..., None]


class Hub:
    """One replica.  Made on an event loop; `start` before anything else, `tick` about once a second."""

    def __init__(
        self, *, database: Database, authority: Authority, place: HubPlace, clock: Clock, rng: Random,
        certify: Certify, note: Note,
    ) -> None:  # fmt: skip
        """Take the parts.  `note(event, **fields)` is told what an operator should see."""
        self.database = database
        self.authority = authority
        self.place = place
        self.clock = clock
        self.rng = rng
        self.liveness = Liveness()
        self._roster = Roster()
        self._certify = certify
        self._note = note
        self._trust = Trust(fleet=authority.fleet, keys=authority.keys)
        self._proofs: OrderedDict[bytes, tuple[Credential, int]] = OrderedDict()
        self._fleets: OrderedDict[int, tuple[int, Fleet]] = OrderedDict()
        self._loading = asyncio.Lock()
        self._looking = asyncio.Lock()
        self.numbers = Numbers(generation=0, wanted={}, epoch=0, changes=0)
        self._news = asyncio.Event()
        self._unheard: set[str] = set()
        self._settled_ns = 0
        self.watches = 0
        self._calls: dict[str, Callable[[Credential, bytes], Awaitable[sync.Message]]] = {
            "hello": self._hello, "renew": self._renew, "desired": self._desired, "usage": self._usage,
            "events": self._events, "report": self._report, "lease": self._lease,
        }  # fmt: skip

    async def start(self, *, restored: bool = False) -> None:
        """Issue the first list of who is out, and learn the newest numbers.  `restored`: an operator says so."""
        now_ns = self.clock.wall_ns()

        def work(tx: Tx) -> set[str]:
            enrol.ensure_epoch(tx, self.authority, now_ns=now_ns)
            if restored:
                freeze.begin(tx, "an operator said that the hub was restored", now_ns=now_ns)
            return {
                name for name, one in sites.speakers(tx).items() if one.key is not None and not one.is_out
            }

        self._unheard = await self.database.write(work)
        self._settle(went_back=restored)
        await self.look()

    def _settle(self, *, went_back: bool) -> None:
        """Grant nothing for half a minute, or until all known sites spoke; a hub that went back may not know all."""
        self._unheard |= {""} if went_back else set()
        self._settled_ns = self.clock.now_ns() + int(freeze.SETTLE_S * NS_PER_S)

    # ---- what sites call

    async def handle(self, name: str, authorization: str | None, body: bytes) -> bytes:
        """Answer one call of a site.

        Raises:
            OndolError: the call is refused, and why.
        """
        if name == "join":
            return sync.encode(await self._join(sync.decode(body, sync.Join)))
        call = self._calls.get(name)
        if call is None:
            calls = ", ".join(["join", "watch", *self._calls])
            raise NotFound(f"sync: there is no call {name[:32]!r}; there are {calls}")
        return sync.encode(await call(self.authenticate(authorization), body))

    async def watch(self, authorization: str | None, body: bytes) -> AsyncIterator[bytes]:
        """The newest numbers at once, then with every change, and every 5 s without one.

        Ends when the process speaks for its site no longer.  A watch that waits costs one timer.
        """
        credential = self.authenticate(authorization)
        message = sync.decode(body, sync.Watch)
        site, instance = credential.site, message.instance
        await self._as(credential, instance, lambda _: None)
        since = self._roster.begun
        self.liveness.watching(site, instance)
        self.watches += 1
        try:
            while not self._roster.has_ended(credential, instance, since):
                news, said = self._news, self._announcement(site)
                yield msgspec.json.encode(said) + b"\n"
                await _until(news)
        finally:
            self.watches -= 1
            self.liveness.hung_up(site, instance)

    def wake(self) -> None:
        """Let every watch say a line now."""
        news, self._news = self._news, asyncio.Event()
        news.set()

    def _announcement(self, site: str) -> sync.Announcement:
        now = self.numbers
        return sync.Announcement(
            generation=now.of(site), epoch=now.epoch, hub_ns=self.clock.wall_ns(), changes=now.changes, era=now.era
        )  # fmt: skip

    async def let_in(self, authorization: str | None) -> str:
        """The name of the site that asks for a file.

        Raises:
            Unauthenticated, Forbidden: it is none of this fleet's, or is out.
        """
        credential = self.authenticate(authorization)
        if not self._roster.lets_in(credential, self.clock.now_ns()):
            await self.database.read(lambda tx: sites.require(tx, credential))
        return credential.site

    def authenticate(self, authorization: str | None) -> Credential:
        """Who speaks, by his signatures alone; a header that was proved good is known for a minute.

        Raises:
            Unauthenticated: the header proves nothing.
        """
        if authorization is None:
            raise Unauthenticated("sync: expected `authorization: Ondol-Site …`; join the fleet first")
        name, now_ns = hashlib.sha256(authorization.encode()).digest(), self.clock.now_ns()
        known = self._proofs.get(name)
        if known is not None and now_ns < known[1]:
            return known[0]
        credential = authenticate_site(
            authorization, self._trust, audience=HUB, now_ns=self.clock.wall_ns(), expired_ok=True
        )
        self._proofs[name] = credential, now_ns + PROOF_S * NS_PER_S
        if len(self._proofs) > PROOFS_MAX:
            self._proofs.popitem(last=False)
        return credential

    async def _as(self, credential: Credential, instance: str, work: Callable[[Tx], T]) -> T:
        """One transaction for the process that speaks for its site."""
        site, now_ns, mono_ns = credential.site, self.clock.wall_ns(), self.clock.now_ns()
        due = self.liveness.due(site, mono_ns)

        def whole(tx: Tx) -> T:
            sites.require(tx, credential)
            sessions.require_instance(tx, site, instance)
            if due:
                sites.heard(tx, site, now_ns, 0)
            return work(tx)

        answer = await self.database.write(whole)
        # Not before: what a process says that may not speak must not keep another alive.
        self.liveness.heard(site, mono_ns, written=due)
        return answer

    async def _join(self, message: sync.Join) -> sync.JoinReply:
        now_ns = self.clock.wall_ns()

        def work(tx: Tx) -> sync.JoinReply | OndolError:
            try:
                reply = enrol.join(tx, message, self.authority, now_ns=now_ns)
            except Unauthenticated as error:  # kept, not rolled back: the audit says who tried
                return error
            publish.changed(tx)
            # In here, so that a request for a certificate that is refused does not use the invitation up.
            certificate = self._certificate(message.csr, reply.site, message.address)
            return msgspec.structs.replace(reply, certificate=certificate)

        reply = await self.database.write(work)
        if isinstance(reply, OndolError):
            self._note("join_refused", why=reply.message)
            raise reply
        self._note("joined", site=reply.site)
        await self.look()
        return reply

    def _certificate(self, csr: bytes, site: str, address: str) -> bytes:
        return self._certify(csr, site, address) if csr and address else b""

    async def _hello(self, credential: Credential, body: bytes) -> sync.HelloReply:
        message, site = sync.decode(body, sync.Hello), credential.site
        now_ns, mono_ns = self.clock.wall_ns(), self.clock.now_ns()

        def work(tx: Tx) -> tuple[sync.HelloReply | OndolError, str]:
            try:
                sites.require(tx, credential)
            except Unauthenticated as error:
                if not freeze.stranger(tx, credential, now_ns=now_ns):
                    raise
                return error, f"{site} has joined, and this hub does not know it"  # kept, not rolled back
            return self._greet(tx, site, message, now_ns, mono_ns)

        reply, why = await self.database.write(work)
        if why:
            self._note("grants_frozen", site=site, why=why)
            self._settle(went_back=True)
            await self.look()
        if isinstance(reply, OndolError):
            raise reply
        if not reply.wait_s and not reply.challenge:
            self.liveness.heard(site, mono_ns)
            self._unheard.discard(site)
        if message.acknowledged > reply.mark:
            self._note("hub_went_back", site=site, had=str(message.acknowledged), has=str(reply.mark))
        return reply

    def _greet(
        self, tx: Tx, site: str, message: sync.Hello, now_ns: int, mono_ns: int
    ) -> tuple[sync.HelloReply, str]:
        """The answer to a hello, and why a freeze of grants began with it."""
        row = sites.get(tx, site)
        live = self.liveness.live(site, row.instance, mono_ns, now_ns - row.heard_ns)
        wait_s, challenge = sessions.hello(
            tx, site, message, now_ns=now_ns, live=live, new_challenge=lambda: self.rng.randbytes(16).hex()
        )  # fmt: skip
        mark, mark_hash = ingest.mark_of(tx, message.gateway)
        why = ""
        if not wait_s and not challenge:
            why = freeze.greeted(tx, row, message, newest=publish.newest(tx), mark=mark, now_ns=now_ns)
            sites.heard(tx, site, now_ns, message.generation)
        reply = sync.HelloReply(
            hub_ns=now_ns, generation=publish.wanted(tx, site), epoch=enrol.newest_number(tx), mark=mark,
            mark_hash=mark_hash, wait_s=wait_s, challenge=challenge, era=freeze.era(tx),
        )  # fmt: skip
        return reply, why

    async def _renew(self, credential: Credential, body: bytes) -> sync.RenewReply:
        message, now_ns = sync.decode(body, sync.Renew), self.clock.wall_ns()

        def work(tx: Tx) -> str:
            sites.require(tx, credential)
            return sites.get(tx, credential.site).doc.address or ""

        address = await self.database.read(work)
        return sync.RenewReply(
            credential=enrol.credential(self.authority, credential.site, credential.key, now_ns=now_ns),
            hub_keys=dict(self.authority.keys),
            certificate=self._certificate(message.csr, credential.site, address),
        )

    async def _desired(self, credential: Credential, body: bytes) -> sync.FetchReply:
        message, site, now_ns = sync.decode(body, sync.Fetch), credential.site, self.clock.wall_ns()

        def work(tx: Tx) -> tuple[int, int, tuple[ApiKey, ...], Envelope]:
            sites.require(tx, credential)
            sessions.require_instance(tx, site, message.instance)
            epoch = enrol.current_epoch(tx, self.authority, now_ns=now_ns)
            return publish.wanted(tx, site), publish.changes(tx), keys.good(tx, now_ns), epoch

        generation, changes, good, epoch = await self.database.read(work)
        if generation == 0:
            return sync.FetchReply(manifest=None, bodies=(), epoch=epoch)
        fleet = await self._fleet(generation, changes)
        try:
            manifest, bodies = publish.desired_for(
                fleet, site, self.authority, generation=generation, keys=good, now_ns=now_ns
            )
        except ConfigError as error:
            raise HubRefused(
                f"generation {generation} does not fit {site}: {error.message}", why=error.code
            ) from error
        have = set(message.have)
        sent = tuple([text for digest, text in bodies.items() if digest not in have])
        return sync.FetchReply(manifest=manifest, bodies=sent, epoch=epoch)

    async def _fleet(self, generation: int, changes: int) -> Fleet:
        """The fleet of a generation, not older than `changes`: read once, however many sites ask at once."""
        known = self._fleets.get(generation)
        if known is not None and known[0] >= changes:
            return known[1]
        async with self._loading:
            known = self._fleets.get(generation)
            if known is None or known[0] < changes:
                known = await self.database.read(
                    lambda tx: (publish.changes(tx), publish.fleet_at(tx, generation))
                )
                self._fleets[generation] = known
                self._fleets.move_to_end(generation)
                if len(self._fleets) > FLEETS_MAX:
                    self._fleets.popitem(last=False)
        return known[1]

    async def _usage(self, credential: Credential, body: bytes) -> sync.RangeReply:
        message, now_ns = sync.decode(body, sync.Range), self.clock.wall_ns()
        site, key = credential.site, credential.key
        return await self._as(
            credential, message.instance,
            lambda tx: ingest.take_range(tx, site, message, site_key=key, now_ns=now_ns),
        )  # fmt: skip

    async def _events(self, credential: Credential, body: bytes) -> sync.EventsReply:
        message, now_ns = sync.decode(body, sync.Events), self.clock.wall_ns()
        site = credential.site
        return await self._as(
            credential, message.instance, lambda tx: ingest.take_events(tx, site, message, now_ns=now_ns)
        )

    async def _report(self, credential: Credential, body: bytes) -> sync.ReportReply:
        message, now_ns = sync.decode(body, sync.Report), self.clock.wall_ns()

        def work(tx: Tx) -> sync.ReportReply:
            sites.heard(tx, credential.site, now_ns, message.generation)
            return ingest.take_report(tx, credential.site, message, now_ns=now_ns)

        return await self._as(credential, message.instance, work)

    async def _lease(self, credential: Credential, body: bytes) -> sync.LeaseReply:
        message, site, now_ns = sync.decode(body, sync.Lease), credential.site, self.clock.wall_ns()
        fleet = await self._fleet(
            *await self.database.read(lambda tx: (publish.wanted(tx, site), publish.changes(tx)))
        )
        budget = fleet.budgets.get(message.budget)
        if budget is None:
            raise NotFound(f"lease: the fleet has no budget {message.budget[:64]!r} at {site}")
        settling = bool(self._unheard) and self.clock.now_ns() < self._settled_ns
        return await self._as(
            credential,
            message.instance,
            lambda tx: leases.take_lease(tx, site, message, budget=budget, now_ns=now_ns, settling=settling),
        )

    # ---- what the hub does by itself

    async def tick(self) -> None:
        """Once a second: move rollouts on, renew the list of who is out, and see what other replicas did."""
        now_ns, mono_ns = self.clock.wall_ns(), self.clock.now_ns()

        def work(tx: Tx) -> list[str]:
            enrol.refresh_epoch(tx, self.authority, now_ns=now_ns)
            return rollouts.advance(
                tx, now_ns=now_ns,
                stale=lambda row: self.liveness.stale(row.name, mono_ns, now_ns - row.heard_ns),
            )  # fmt: skip

        for sentence in await self.database.write(work):
            self._note("rollout", what=sentence)
        await self.look()

    async def look(self) -> None:
        """Learn the newest numbers and who speaks for whom, and wake the watches where there is news for them."""
        async with self._looking:  # one after the other, so that no older reading replaces a newer one
            before, now_ns = self.numbers, self.clock.now_ns()
            number, is_due = self._roster.begin(), self._roster.due(now_ns)

            def work(tx: Tx) -> tuple[Numbers, dict[str, sites.Speaker] | None]:
                now = publish.numbers(tx)
                return now, sites.speakers(tx) if is_due or now != before else None

            now, speakers = await self.database.read(work)
            if speakers is not None:
                self._roster.take(speakers, number, now_ns)
            self.numbers = now
        if msgspec.structs.replace(now, changes=0) != msgspec.structs.replace(before, changes=0):
            self.wake()


async def _until(news: asyncio.Event) -> None:
    """Wait for news, or for the time of the next heartbeat."""
    try:
        async with asyncio.timeout(sync.HEARTBEAT_S):
            await news.wait()
    except TimeoutError:
        return
