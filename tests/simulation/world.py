"""A hub, some sites, bad weather and worse luck; and what must hold all the same.

P1   every record that a client was acknowledged is at the hub, once, to the nano-unit; nothing else is
P5   a site that is cut off goes on: a free request fails only while its own machine is down or its disk full
generations at a site only rise; the sum of grants and of spending never passes the budget
ledger numbers have no holes, and the chain at the hub holds
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
from tests.simulation.network import Weather
from tests.simulation.node import BUDGET, SimHub, SimSite

from ondol.core import dsse
from ondol.core.catalog import (
    AnyDocument,
    BudgetDoc,
    BudgetScope,
    DeploymentDoc,
    ModelDoc,
    RouteDoc,
    Selector,
    SiteDoc,
)
from ondol.core.invites import parse_token
from ondol.core.ports import Tx
from ondol.core.usage import GENESIS, UsageRecord, decode_record, link
from ondol.errors import LedgerUnavailable, OndolError, StateError
from ondol.hub import enrol, ingest, publish
from ondol.hub.enrol import Invitation
from ondol.hub.freeze import SETTLE_S
from ondol.wire import sync

AMOUNT = 200_000
"""Of the budget, in nano-dollars: some twenty requests of it, so that it runs out."""


class Violation(AssertionError):
    """Something that must always hold did not."""


class World:
    """One run of one seed."""

    def __init__(self, seed: int, place: Path) -> None:
        self.rng = random.Random(seed)
        self.seed = seed
        self.trace: list[str] = []
        self._hash = hashlib.sha256()
        self.weather = Weather(random.Random(self.rng.random()))
        self.hub = SimHub(place, random.Random(self.rng.random()))
        self._place = place
        self.sites = [self._site(f"shop-{number}") for number in range(self.rng.randint(2, 4))]
        self.clones: list[SimSite] = []
        self.acknowledged: dict[str, UsageRecord] = {}
        self.asked: set[str] = set()
        self.free_failed = 0
        self._number = 0
        self._documents = 0
        self._backup: Path | None = None
        self._stormy = True

    def _site(self, name: str) -> SimSite:
        site = SimSite(name, self._place, random.Random(self.rng.random()), self.weather, self.hub)
        site.on_generation = self._saw_generation
        return site

    def say(self, what: str) -> None:
        """One line of the trace; its hash proves that a seed replays."""
        line = f"{asyncio.get_running_loop().time():9.3f} {what}"
        self.trace.append(line)
        self._hash.update(line.encode())

    @property
    def fingerprint(self) -> str:
        return self._hash.hexdigest()

    # ---- the course of things

    async def run(self, stormy_s: float) -> None:
        """Trouble for a while, then calm until all has arrived; then look."""
        await self.hub.start()
        for site in self.sites:
            await self._enrol(site)
        await self._apply()
        work = [asyncio.ensure_future(self._clients(site)) for site in self.sites]
        chaos = asyncio.ensure_future(self._chaos(stormy_s))
        await chaos
        self._stormy = False
        await self._heal()
        await asyncio.gather(*work)
        await self._until_all_is_there()
        self.check()
        for node in (*self.sites, *self.clones, self.hub):
            await node.crash()

    async def _enrol(self, site: SimSite) -> None:
        doc = SiteDoc(name=site.name, tier="edge", region="kr", country="KR", grid_zone="KR")
        hub = self.hub.hub
        assert hub is not None
        now_ns = hub.clock.wall_ns()
        made = await hub.database.write(
            lambda tx: enrol.invite(
                tx, [Invitation(doc=doc)], hub.place, hub.authority, rng=hub.rng, now_ns=now_ns
            )
        )
        message = sync.Join(token=parse_token(made[0][1]).proof, key=dsse.public_key(site.private))
        reply = sync.decode(await hub.handle("join", None, sync.encode(message)), sync.JoinReply)
        site.credential = reply.credential
        site.open()

    async def _apply(self) -> None:
        """A new generation, whose route differs from all before."""
        hub = self.hub.hub
        if hub is None:
            return
        self._documents += 1
        everywhere = Selector(names=("shop-*",))
        documents: list[tuple[str, AnyDocument]] = [
            ("Model", ModelDoc(name="helper")),
            ("Deployment", DeploymentDoc(name="local", model="helper", engine="fake", sites=everywhere)),
            ("Route", RouteDoc(name="assistant", deployments=("local",), max_output_tokens=self._documents)),
            (
                "Budget",
                BudgetDoc(
                    name=BUDGET, scope=BudgetScope(team="a"), amount=f"{AMOUNT / 10**9:.9f}", period="month"
                ),
            ),
        ]
        now_ns = hub.clock.wall_ns()
        try:
            number = await hub.database.write(
                lambda tx: publish.apply(tx, documents, author="", message="", now_ns=now_ns, everywhere=True)
            )
            await hub.look()
            self.say(f"applied {number}")
        except OndolError as error:
            self.say(f"not applied: {error.code}")

    async def _clients(self, site: SimSite) -> None:
        """Requests to one site, some of them paid for by the fleet's budget."""
        while self._stormy:
            await asyncio.sleep(self.rng.uniform(0.05, 1.0))
            if not site.alive:
                continue
            self._number += 1
            paid = self.rng.random() < 0.6
            site.spawn(self._request(site, self._number, paid=paid))

    async def _request(self, site: SimSite, number: int, *, paid: bool) -> None:
        name = f"{site.name}-{number}"
        self.asked.add(name)
        has_budget = BUDGET in {status.name for status in site.budgets.status(site.clock.wall_ns())}
        cost = self.rng.randint(2_000, 20_000) if paid and has_budget else 0
        try:
            record = await site.ask(number, cost, (BUDGET,) if cost else ())
        except (LedgerUnavailable, StateError):
            if site.alive and site.disk.room is None and cost == 0:
                self.free_failed += 1
            return
        if record is not None and site.alive:
            self.acknowledged[name] = record
            self.say(f"{name} cost {record.cost}")

    # ---- trouble

    async def _chaos(self, stormy_s: float) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + stormy_s
        actions: list[tuple[int, Callable[[], object]]] = [
            (6, self._change_weather), (4, self._cut), (3, self._crash_site), (2, self._crash_hub), (3, self._apply),
            (2, self._fill_disk), (2, self._set_clock), (2, self._back_up), (2, self._restore), (1, self._clone),
        ]  # fmt: skip
        while loop.time() < end:
            await asyncio.sleep(self.rng.expovariate(0.5))
            # Also between any two awaits of what runs.
            for _ in range(self.rng.randrange(12)):
                await asyncio.sleep(0)
            weights = [weight for weight, _ in actions]
            done = self.rng.choices([action for _, action in actions], weights)[0]()
            if asyncio.iscoroutine(done):
                await done

    def _change_weather(self) -> None:
        weather = self.weather
        weather.loss = self.rng.choice((0.0, 0.05, 0.3))
        weather.repeat = self.rng.choice((0.0, 0.1, 0.4))
        weather.delay_s = self.rng.choice(((0.001, 0.02), (0.01, 0.5), (0.5, 3.0)))
        self.say(f"weather {weather.loss} {weather.repeat} {weather.delay_s}")

    def _cut(self) -> None:
        name = self.rng.choice(self.sites).name
        way = self.rng.choice((self.weather.up_cut, self.weather.down_cut))
        (way.discard if name in way else way.add)(name)
        self.say(f"cut {name}")

    async def _crash_site(self) -> None:
        site = self.rng.choice(self.sites)
        if site.alive:
            await site.crash()
            self.say(f"{site.name} crashed")
            await asyncio.sleep(self.rng.uniform(0, 4))
            site.open()

    async def _crash_hub(self) -> None:
        if self.hub.alive:
            await self.hub.crash()
            self.say("the hub crashed")
            await asyncio.sleep(self.rng.uniform(0, 8))
            await self.hub.start()

    def _fill_disk(self) -> None:
        node = self.rng.choice((*self.sites, self.hub))
        node.disk.room = None if node.disk.room is not None else self.rng.randrange(20_000)
        self.say(f"disk of {node.name} {'full' if node.disk.room is not None else 'free'}")

    def _set_clock(self) -> None:
        site = self.rng.choice(self.sites)
        site.clock.wrong_ns = self.rng.choice((0, -90, 90, 3600, -7200)) * 1_000_000_000
        self.say(f"clock of {site.name} {site.clock.wrong_ns}")

    def _back_up(self) -> None:
        if self.hub.alive and self.hub.disk.room is None:
            self._backup = self._place / f"backup-{self._number}-{len(self.trace)}"
            self.hub.disk.snapshot(self._backup)
            self.say("backed up")

    async def _restore(self) -> None:
        """Told by an operator; or, where every site can speak, found out by the hub within its first half minute."""
        if self._backup is None or not self.hub.alive:
            return
        told = self.rng.random() < 0.6 or not all(
            site.alive and site.sync.connected and site.disk.room is None for site in self.sites
        )
        if not told:
            self.weather.calm()
        await self.hub.restore(self._backup, told=told)
        self.say(f"the hub was restored{'' if told else ', and nobody told it'}")
        if not told:
            self.hub.disk.room = None
            await asyncio.sleep(SETTLE_S)

    async def _clone(self) -> None:
        """A second machine with the disk of a site that is there and connected."""
        site = self.rng.choice(self.sites)
        if self.clones or not site.alive or not site.sync.connected or site.disk.room is not None:
            return
        twin = self._site(site.name + "~twin")
        site.disk.snapshot(twin.folder)
        twin.private, twin.credential, twin.boots = site.private, site.credential, site.boots
        twin.on_generation = lambda name, number: None
        twin.open()
        self.clones.append(twin)
        self.say(f"a twin of {site.name}")
        for number in range(3):
            twin.spawn(twin.ask(number, 0, ()))

    # ---- calm

    async def _heal(self) -> None:
        self.weather.calm()
        for node in (*self.sites, *self.clones, self.hub):
            node.disk.room = None
        for site in self.sites:
            site.clock.wrong_ns = 0
            if not site.alive:
                site.open()
        if not self.hub.alive:
            await self.hub.start()
        for twin in self.clones:
            await twin.crash()
        self.say("calm")

    async def _until_all_is_there(self) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + 240
        while loop.time() < end:
            await asyncio.sleep(0.5)
            for site in self.sites:
                site.ledger.probe()
            if all(site.tasks and self._settled(site) for site in self.sites):
                return
        state = {site.name: msgspec.to_builtins(site.sync.status()) for site in self.sites}
        raise Violation(f"after 240 s of calm the hub has not got everything: {state}")

    def _settled(self, site: SimSite) -> bool:
        hub, database = self.hub.hub, self.hub.database
        if hub is None or database is None:
            return False
        wanted, status = hub.numbers.of(site.name), site.sync.status()
        # What the hub has, not what the site was told: the hub may have been restored a moment ago.
        mark, _ = database.write_now(lambda tx: ingest.mark_of(tx, site.identity.gateway))
        return (
            status.acknowledged == mark == site.ledger.last_seq
            and status.generation >= wanted
            and len(site.tasks) <= 2
        )

    # ---- what must hold

    def _saw_generation(self, site: str, number: int) -> None:
        seen = next(one for one in self.sites if one.name == site).generations
        if seen != sorted(seen):
            raise Violation(f"{site} went back: {seen}")

    def check(self) -> None:
        """P1, the chain, the budget; on the hub's database as it is now."""
        database = self.hub.database
        assert database is not None
        found: dict[str, UsageRecord] = {}
        for site in self.sites:
            rows = database.write_now(lambda tx: _rows(tx, site.identity.gateway))  # noqa: B023
            previous = GENESIS
            for expected, (seq, payload, hash_) in enumerate(rows, 1):
                previous = link(previous, seq, payload)
                if (seq, previous) != (expected, hash_):
                    raise Violation(
                        f"{site.name}: row {expected} of the hub's copy is {seq}, or its hash does not hold"
                    )
                record = decode_record(payload)
                if record.request_id in found:
                    raise Violation(f"{record.request_id} is at the hub twice")
                found[record.request_id] = record
            if len(rows) != site.ledger.last_seq:
                raise Violation(f"{site.name} has {site.ledger.last_seq} rows, the hub {len(rows)}")
        for name, record in self.acknowledged.items():
            if found.get(name) != record:
                raise Violation(f"{name} was acknowledged, and the hub has {found.get(name)}")
        extra = set(found) - self.asked
        if extra:
            raise Violation(f"the hub has what nobody asked for: {sorted(extra)[:5]}")
        spent = sum(record.cost for record in found.values())
        granted = database.write_now(lambda tx: tx.run("SELECT granted FROM lease_grants"))
        total = sum(int(row[0]) for row in granted)
        held = sum(one.granted for site in self.sites for one in site.memory.leases())
        if max(spent, total, held) > AMOUNT:
            raise Violation(f"of {AMOUNT} the sites spent {spent} and hold {held}; the hub granted {total}")
        if self.free_failed:
            raise Violation(f"{self.free_failed} free requests failed at sites that were well")


def _rows(tx: Tx, gateway: str) -> list[tuple[int, bytes, bytes]]:
    rows = tx.run("SELECT seq, payload, hash FROM usage WHERE gateway = ? ORDER BY seq", (gateway,))
    return [(int(seq), bytes(payload), bytes(hash_)) for seq, payload, hash_ in rows]


def clear(place: Path) -> None:
    """What a run left behind."""
    shutil.rmtree(place, ignore_errors=True)
