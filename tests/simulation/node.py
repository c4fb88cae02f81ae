"""A site and a hub as the simulation runs them: the real code on a faulty disk, with clocks that may be wrong."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import msgspec
from tests.faults.disk import FaultyDisk
from tests.simulation.network import SimLink, Weather

from ondol.adapters.database_sqlite import InlineDatabase
from ondol.adapters.ledger import SqliteLedger
from ondol.adapters.ledger_writer import Entry
from ondol.adapters.site_memory import SqliteSiteMemory
from ondol.core import dsse, trust
from ondol.core.catalog import BudgetDoc
from ondol.core.desired import Desired
from ondol.core.dsse import Envelope
from ondol.core.invites import HubPlace
from ondol.core.money import Money
from ondol.core.trust import HUB, Credential, Epoch, Trust
from ondol.core.usage import UsageRecord
from ondol.errors import OndolError
from ondol.gateway.budget import Budgets, Exhausted, NeedsGrant, NeedsLease
from ondol.gateway.fleet_leases import FleetLeases
from ondol.gateway.reconcile import Snapshot
from ondol.gateway.restore import earliest_ns, spent
from ondol.gateway.sync import SiteSync
from ondol.hub.enrol import Authority
from ondol.hub.schema import MIGRATIONS
from ondol.hub.service import Hub
from ondol.units import NS_PER_S

START_NS = 1_800_000_000 * NS_PER_S
BUDGET = "team"
_NAMES = itertools.count()


class SimClock:
    """The loop's time; the wall clock is off by `wrong_ns`."""

    def __init__(self) -> None:
        self.wrong_ns = 0

    def now_ns(self) -> int:
        return NS_PER_S + int(asyncio.get_running_loop().time() * NS_PER_S)

    def wall_ns(self) -> int:
        return START_NS + self.now_ns() + self.wrong_ns


class InlineLedger(SqliteLedger):
    """The real ledger and its real writer, without the thread: batches are committed between two turns."""

    def _begin_writing(self) -> None:
        self._waiting = False

    def _enqueue(self, payload: Any, subject: Any, time_ns: int) -> asyncio.Future[int]:
        future = super()._enqueue(payload, subject, time_ns)
        if not self._waiting:
            self._waiting = True
            self._loop.call_soon(self._flush)
        return future

    def _flush(self) -> None:
        self._waiting = False
        batch: list[Entry] = []
        while self._queue:
            batch.append(self._queue.popleft())
        if batch:
            self._writer._commit(batch)

    def probe(self) -> None:
        """What the writer's thread does while it rests: see whether a full disk has room again."""
        self._writer._probe_at = 0.0
        if self._writer._failure is not None:
            self._writer._rest()

    def close_now(self) -> None:
        self._closed = True
        for connection in (self._reader, self._sender, self._writer._connection):
            if connection is not None:
                connection.close(True)


class SimIdentity:
    """`core.ports.SiteIdentity` without files; what is durable of it lives as long as the machine's disk."""

    def __init__(
        self, site: str, private: bytes, credential: Envelope, known: Trust, boot: int, instance: str
    ) -> None:
        self.site, self.fleet, self.gateway = site, known.fleet, f"gw-{site}"
        self.instance, self.boot = instance, boot
        self._private, self._credential, self._trust = private, credential, known
        self.private = private

    @property
    def credential(self) -> Envelope:
        return self._credential

    @property
    def credential_ns(self) -> tuple[int, int]:
        found: Credential = trust.read_credential(self._credential, self._trust)
        return found.issued_ns, found.expires_ns

    def trust(self) -> Trust:
        return self._trust

    def authorization(self, audience: str, now_ns: int) -> str:
        return trust.authorization(
            self._private, self._credential, site=self.site, audience=audience, now_ns=now_ns
        )

    def sign(self, payload_type: str, payload: bytes) -> Envelope:
        return dsse.sign(self._private, payload_type, payload)

    def csr(self) -> bytes:
        return b""

    def keep_credential(self, credential: Envelope, *, hub_keys: Any, certificate: bytes = b"") -> None:
        trust.read_credential(credential, self._trust)
        self._credential = credential

    def take_epoch(self, epoch: Epoch) -> None:
        self._trust = msgspec.structs.replace(self._trust, epoch=epoch)


class Node:
    """What site and hub share: a disk that survives its processes, and tasks that do not survive a crash."""

    def __init__(self, name: str, place: Path, rng: random.Random) -> None:
        self.name, self._place, self.rng = name, place, rng
        self._lives = itertools.count()
        self.folder = place / f"{name}-{next(self._lives)}"
        self.folder.mkdir(parents=True)
        self.disk = FaultyDisk(f"sim-{name}-{next(_NAMES)}")
        self.clock = SimClock()
        self.alive = False
        self.tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def crash(self) -> None:
        """The power goes, at whatever await it was: nothing more is written or said, and unsynced writes vanish."""
        if not self.alive:
            return
        self.alive = False
        after = self._place / f"{self.name}-{next(self._lives)}"
        self.disk.cut(after, self.rng)
        tasks = list(self.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.disk.bury()
        self.close_files()
        self.disk.unregister()
        self.folder, self.disk = after, FaultyDisk(f"sim-{self.name}-{next(_NAMES)}")

    def close_files(self) -> None:
        raise NotImplementedError


class SimHub(Node):
    """The hub."""

    def __init__(self, place: Path, rng: random.Random) -> None:
        super().__init__("hub", place, rng)
        private = dsse.new_private_key()
        public = dsse.public_key(private)
        self.authority = Authority(
            fleet="sim", private=private, keys={dsse.key_id(public): public}, pepper=b"p" * 32,
            credential_s=3600, stale_s=86_400,
        )  # fmt: skip
        self.hub: Hub | None = None
        self.database: InlineDatabase | None = None

    async def start(self, *, restored: bool = False) -> None:
        self.database = InlineDatabase(self.folder / "hub.db", migrations=MIGRATIONS, vfs=self.disk.name)
        self.alive = True
        hub = Hub(
            database=self.database, authority=self.authority,
            place=HubPlace(urls=("https://hub:1",), ca="0" * 64), clock=self.clock,
            rng=random.Random(self.rng.random()), certify=lambda csr, site, address: b"",
            note=lambda event, **fields: None,
        )  # fmt: skip
        await hub.start(restored=restored)
        self.hub = hub
        self.spawn(self._tick(hub))

    async def _tick(self, hub: Hub) -> None:
        while True:
            await asyncio.sleep(1)
            try:
                await hub.tick()
            except OndolError:
                continue

    def face(self) -> Hub | None:
        """What a site reaches."""
        return self.hub if self.alive else None

    def close_files(self) -> None:
        self.hub = None
        if self.database is not None:
            self.database.close_now()

    async def restore(self, backup: Path, *, told: bool) -> None:
        """Come back from an older copy of the database; `told`: an operator says so."""
        await self.crash()
        for path in self.folder.glob("hub.db*"):
            path.unlink()
        (self.folder / "hub.db").write_bytes((backup / "hub.db").read_bytes())
        wal = backup / "hub.db-wal"
        if wal.exists():
            (self.folder / "hub.db-wal").write_bytes(wal.read_bytes())
        await self.start(restored=told)


class SimSite(Node):
    """One site, or a second machine with its disk."""

    def __init__(self, name: str, place: Path, rng: random.Random, weather: Weather, hub: SimHub) -> None:
        super().__init__(name, place, rng)
        self._weather, self._hub = weather, hub
        self.boots = 0
        self.private = dsse.new_private_key()
        self.credential: Envelope | None = None
        self.known = Trust(fleet="sim", keys=hub.authority.keys)
        self.generations: list[int] = []
        self.on_generation: Callable[[str, int], None] = lambda site, number: None

    def open(self) -> None:
        """Boot from the disk."""
        assert self.credential is not None
        self.boots += 1
        instance = f"{self.name.replace('-', '')}x{self.rng.getrandbits(60):015x}"
        self.identity = SimIdentity(
            self.name.partition("~")[0], self.private, self.credential, self.known, self.boots, instance
        )
        self.memory = SqliteSiteMemory(self.folder / "fleet.db", inline=True, vfs=self.disk.name)
        self.ledger = InlineLedger(
            self.folder / "ledger.db", gateway=self.identity.gateway, max_bytes=1 << 30,
            loop=asyncio.get_running_loop(), site=self.identity.site, vfs=self.disk.name,
        )  # fmt: skip
        self.alive = True
        docs = self._budget_docs(self.memory.desired())
        since = earliest_ns(docs, ZoneInfo, self.clock.wall_ns())
        used = spent(self.ledger.spent(since), docs, {}, ZoneInfo)
        self.budgets = Budgets(docs, {}, zone=ZoneInfo, spent=used, leases=self.ledger.leases())
        self.link = SimLink(
            self.name, self._weather, self._hub.face,
            lambda: self.identity.authorization(HUB, self.sync.hub_now_ns()),
        )  # fmt: skip
        self.sync = SiteSync(
            link=self.link, outbox=self.ledger, memory=self.memory, identity=self.identity, clock=self.clock,
            rng=random.Random(self.rng.random()), activate=self._activate, trusted=lambda: None,
            describe=Snapshot, note=self._noted, lease_ns=lambda: self.leases.answered_ns,
        )  # fmt: skip
        self.leases = FleetLeases(
            link=self.link, memory=self.memory, ledger=self.ledger, budgets=self.budgets, clock=self.clock,
            instance=instance, hub_now_ns=self.sync.hub_now_ns, link_up=lambda: self.sync.connected,
            noted=lambda event, what: None, hub_era=self.sync.hub_era,
        )  # fmt: skip
        self.spawn(self.sync.run())
        self.spawn(self.leases.run())
        desired = self.memory.desired()
        self.saw(0 if desired is None else desired.manifest.generation)

    def _noted(self, event: str, **fields: str) -> None:
        if event == "generation":
            self.saw(int(fields["number"]))

    def saw(self, number: int) -> None:
        if not self.generations or self.generations[-1] != number:
            self.generations.append(number)
            self.on_generation(self.name, number)

    @staticmethod
    def _budget_docs(desired: Desired | None) -> dict[str, BudgetDoc]:
        found = {}
        for body in () if desired is None else desired.documents():
            if b'"kind":"Budget"' in body:
                doc = msgspec.json.decode(body, type=BudgetDoc)
                found[doc.name] = doc
        return found

    async def _activate(self, desired: Desired) -> None:
        await asyncio.sleep(0)
        docs = self._budget_docs(desired)
        brought = {name: docs[name] for name in self.budgets.brought(docs)}
        since = earliest_ns(brought, ZoneInfo, self.clock.wall_ns())
        used = spent(self.ledger.spent(since), brought, {}, ZoneInfo) if brought else {}
        self.budgets.reload(docs, {}, spent=used, leases=self.ledger.leases())

    def close_files(self) -> None:
        self.memory.close()
        self.ledger.close_now()

    async def ask(self, number: int, cost: int, budgets: tuple[str, ...]) -> UsageRecord | None:
        """One request, as the pipeline does it: reserve, pay, settle, record.  The record, once it is durable."""
        wall_ns, since_ns, alone = self.clock.wall_ns(), self.clock.now_ns(), False
        worst = Money(cost, "USD")
        while True:
            answer = self.budgets.reserve(budgets, worst, wall_ns, now_ns=self.clock.now_ns(), alone=alone)
            if isinstance(answer, NeedsLease):
                await self.ledger.lease(answer.budget, answer.period, answer.total)
                self.budgets.leased(answer.budget, answer.period, answer.total)
            elif isinstance(answer, NeedsGrant):
                alone = not await self.leases.ask(answer, since_ns)
            elif isinstance(answer, Exhausted):
                return None
            else:
                break
        await asyncio.sleep(self.rng.uniform(0, 0.5))
        actual = self.rng.randint(cost // 2, cost)
        self.budgets.settle(answer, Money(actual, "USD"))
        record = UsageRecord(
            request_id=f"{self.name}-{number}", time_ns=wall_ns, site=self.identity.site, gateway=self.identity.gateway,
            tenant="default", team="a", key_id="k", route="r", task="chat", outcome="completed", status=200,
            cost=actual, clock_offset_ns=self.sync.offset.ns,
        )  # fmt: skip
        await self.ledger.submit(record)
        return record
