"""A site's sync in virtual time: a small hub behind `HubLink`, an outbox and an identity in memory."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from tests.simulation.loop import run as run_virtual

from ondol.adapters.site_memory import SqliteSiteMemory
from ondol.core import dsse, trust
from ondol.core.desired import Desired, DocumentRef, Manifest, digest_of, sign_manifest
from ondol.core.dsse import Envelope
from ondol.core.ports import LedgerRange
from ondol.core.trust import Epoch, Trust, issue_epoch
from ondol.core.usage import GENESIS, link
from ondol.errors import HubRefused, LinkDown, OndolError, RangeRefused
from ondol.gateway.reconcile import Snapshot
from ondol.gateway.sync import SiteSync
from ondol.units import NS_PER_S
from ondol.wire import sync

T = TypeVar("T")
HUB_KEY = dsse.new_private_key()
SITE_KEY = dsse.new_private_key()
HUB_KEYS = {dsse.key_id(dsse.public_key(HUB_KEY)): dsse.public_key(HUB_KEY)}
LIFE_S = 1200
"""Of a credential."""
START_NS = 1_800_000_000 * NS_PER_S
Reply = Callable[[], "sync.Message | OndolError"]


class LoopClock:
    """The virtual loop's time; the wall clock may be `ahead_s` of the hub's."""

    def __init__(self, ahead_s: float = 0.0) -> None:
        self.ahead_s = ahead_s

    def now_ns(self) -> int:
        return int(asyncio.get_running_loop().time() * NS_PER_S)

    def wall_ns(self) -> int:
        return START_NS + self.now_ns() + int(self.ahead_s * NS_PER_S)


class Outbox:
    """`core.ports.Outbox` in memory."""

    def __init__(self) -> None:
        self.rows: list[tuple[bytes, bytes]] = []
        self.marks: list[int] = []
        self._grown = asyncio.Event()

    def add(self, count: int, size: int = 10) -> None:
        for _ in range(count):
            payload = b"%d " % (len(self.rows) + 1) + b"x" * size
            previous = self.rows[-1][1] if self.rows else GENESIS
            self.rows.append((payload, link(previous, len(self.rows) + 1, payload)))
        self._grown.set()

    def hash_at(self, seq: int) -> bytes:
        return self.rows[seq - 1][1] if seq else GENESIS

    async def range_after(self, seq: int, *, rows: int, size: int) -> LedgerRange | None:
        found = self.rows[seq : seq + rows]
        while len(found) > 1 and sum(len(payload) for payload, _ in found) > size:
            found.pop()
        if not found:
            return None
        return LedgerRange(
            first=seq + 1, previous=self.hash_at(seq), rows=tuple(p for p, _ in found), last_hash=found[-1][1]
        )

    async def acknowledged(self, seq: int, hash_: bytes, *, hub_ns: int) -> None:
        if seq > len(self.rows) or hash_ != self.hash_at(seq):
            raise RangeRefused(f"row {seq} is another one here")
        self.marks.append(seq)

    @property
    def acknowledged_seq(self) -> int:
        return self.marks[-1] if self.marks else 0

    @property
    def last_seq(self) -> int:
        return len(self.rows)

    async def grown(self, seq: int) -> None:
        while len(self.rows) <= seq:
            self._grown.clear()
            await self._grown.wait()


class Identity:
    """`core.ports.SiteIdentity` in memory, with real keys."""

    site, fleet, gateway, instance, boot = "s", "shops", "g", "instance1", 1

    def __init__(self) -> None:
        self._trust = Trust(fleet="shops", keys=HUB_KEYS)
        self.credential_ns = (START_NS, START_NS + LIFE_S * NS_PER_S)
        self.kept: list[Envelope] = []

    def trust(self) -> Trust:
        return self._trust

    def authorization(self, audience: str, now_ns: int) -> str:
        return f"{audience} {now_ns}"

    def sign(self, payload_type: str, payload: bytes) -> Envelope:
        return dsse.sign(SITE_KEY, payload_type, payload)

    def csr(self) -> bytes:
        return b"csr"

    def keep_credential(
        self, credential: Envelope, *, hub_keys: Mapping[str, bytes], certificate: bytes = b""
    ) -> None:
        found = trust.read_credential(credential, self._trust)
        self.credential_ns = (found.issued_ns, found.expires_ns)
        self.kept.append(credential)

    def take_epoch(self, epoch: Epoch) -> None:
        self._trust = msgspec.structs.replace(self._trust, epoch=epoch)


class Hub:
    """`core.ports.HubLink` and the hub behind it.  Faults are set from outside, by call."""

    def __init__(self) -> None:
        self.down = self.silent = False
        self.delay_s = 0.005
        self.row_s = 0.0
        self.rows: list[bytes] = []
        self.hashes: list[bytes] = []
        self.texts: tuple[str, ...] = ()
        self.generation = 0
        self.epoch = self.epoch_of(1)
        self.numbers = (0, 1)
        self.changes = 0
        self.events: dict[str, list[sync.Event]] = {"audit": [], "telemetry": []}
        self.asked: list[tuple[float, str, bytes]] = []
        self.answers: dict[str, list[Reply]] = {}
        self.lose_answers: set[str] = set()
        self.reports: list[sync.Report] = []
        self.notes: tuple[str, ...] = ()
        self.watching = 0
        self._news = asyncio.Event()

    @staticmethod
    def epoch_of(number: int) -> Envelope:
        return issue_epoch(HUB_KEY, Epoch(fleet="shops", number=number, issued_ns=number, stale_s=10**6))

    def hub_ns(self) -> int:
        return START_NS + int(asyncio.get_running_loop().time() * NS_PER_S)

    def publish(self, generation: int, *texts: str) -> None:
        self.generation, self.texts = generation, texts
        self.numbers = (generation, self.numbers[1])
        self.say()

    def say(self) -> None:
        self._news.set()

    def times(self, name: str) -> list[float]:
        return [at for at, asked, _ in self.asked if asked == name]

    async def call(self, name: str, body: bytes, *, timeout_s: float) -> bytes:
        try:
            async with asyncio.timeout(timeout_s):
                return await self._call(name, body)
        except TimeoutError:
            raise LinkDown("no answer in time") from None

    async def _call(self, name: str, body: bytes) -> bytes:
        await asyncio.sleep(self.delay_s / 2)
        if self.silent:
            await asyncio.sleep(10**6)
        if self.down:
            raise LinkDown("connection refused")
        self.asked.append((asyncio.get_running_loop().time(), name, body))
        queue = self.answers.get(name)
        said = queue.pop(0)() if queue else self._answer(name, body)
        if name == "usage" and not isinstance(said, OndolError):
            await asyncio.sleep(self.row_s * len(sync.decode(body, sync.Range).rows))
        await asyncio.sleep(self.delay_s / 2)
        if isinstance(said, OndolError):
            raise said
        if self._is_lost(name):
            raise LinkDown("the connection was reset")
        return sync.encode(said)

    def _is_lost(self, name: str) -> bool:
        return self.silent or self.down or name in self.lose_answers

    def _answer(self, name: str, body: bytes) -> sync.Message:
        if name == "hello":
            return self.hello()
        if name == "usage":
            return self._take(sync.decode(body, sync.Range))
        if name == "desired":
            return self.desired(sync.decode(body, sync.Fetch))
        if name == "events":
            message = sync.decode(body, sync.Events)
            self.events["audit"] += message.audit
            self.events["telemetry"] += message.telemetry
            return sync.EventsReply(
                audit=self.events["audit"][-1].id if self.events["audit"] else 0,
                telemetry=self.events["telemetry"][-1].id if self.events["telemetry"] else 0,
            )
        if name == "report":
            self.reports.append(sync.decode(body, sync.Report))
            return sync.ReportReply(hub_ns=self.hub_ns(), notes=self.notes)
        assert name == "renew"
        now_ns = self.hub_ns()
        credential = trust.Credential(
            fleet="shops", site="s", key=dsse.public_key(SITE_KEY), issued_ns=now_ns,
            expires_ns=now_ns + LIFE_S * NS_PER_S,
        )  # fmt: skip
        return sync.RenewReply(credential=trust.issue_credential(HUB_KEY, credential), hub_keys=HUB_KEYS)

    def hello(self, *, wait_s: float = 0.0, challenge: str = "") -> sync.HelloReply:
        mark = len(self.rows)
        return sync.HelloReply(
            hub_ns=self.hub_ns(), generation=self.generation, epoch=self.numbers[1], mark=mark,
            mark_hash=self.hashes[-1] if mark else GENESIS, wait_s=wait_s, challenge=challenge,
        )  # fmt: skip

    def _take(self, message: sync.Range) -> sync.RangeReply:
        if message.first <= len(self.rows) + 1:
            previous = message.previous
            for seq, row in enumerate(message.rows, message.first):
                previous = link(previous, seq, row)
                if seq > len(self.rows):
                    self.rows.append(row)
                    self.hashes.append(previous)
        return sync.RangeReply(mark=len(self.rows), mark_hash=self.hashes[-1] if self.rows else GENESIS)

    def desired(self, message: sync.Fetch) -> sync.FetchReply:
        if not self.generation:
            return sync.FetchReply(manifest=None, bodies=(), epoch=self.epoch)
        refs = tuple(
            DocumentRef("Model", f"m{at}", digest_of(text.encode())) for at, text in enumerate(self.texts)
        )
        manifest = Manifest(
            fleet="shops", site="s", generation=self.generation, issued_ns=self.hub_ns() // NS_PER_S // 10**6,
            documents=refs,
        )  # fmt: skip
        sent = tuple(text.encode() for text in self.texts if digest_of(text.encode()) not in message.have)
        return sync.FetchReply(manifest=sign_manifest(HUB_KEY, manifest), bodies=sent, epoch=self.epoch)

    async def watch(self, body: bytes, *, silence_s: float) -> AsyncIterator[bytes]:
        if self.down:
            raise LinkDown("connection refused")
        self.watching += 1
        try:
            while True:
                if self.down:
                    raise LinkDown("the connection was reset")
                if self.silent:
                    await asyncio.sleep(silence_s)
                    raise LinkDown(f"nothing for {silence_s:g} s")
                said = sync.Announcement(
                    generation=self.numbers[0],
                    epoch=self.numbers[1],
                    hub_ns=self.hub_ns(),
                    changes=self.changes,
                )
                yield msgspec.json.encode(said)
                try:
                    async with asyncio.timeout(sync.HEARTBEAT_S):
                        await self._news.wait()
                except TimeoutError:
                    pass
                self._news.clear()
        finally:
            self.watching -= 1

    def cut(self) -> None:
        self.down = True
        self.say()

    async def close(self) -> None:
        """Nothing is open."""


class World:
    """One site and its hub.  `noted` are the events that an operator would see."""

    def __init__(self, folder: Path, *, ahead_s: float = 0.0) -> None:
        self.clock = LoopClock(ahead_s)
        self.hub = Hub()
        self.outbox = Outbox()
        self.identity = Identity()
        self.memory = SqliteSiteMemory(folder / "fleet.db", inline=True)
        self.noted: list[tuple[str, dict[str, str]]] = []
        self.activated: list[int] = []
        self.refuse: OndolError | None = None
        self.running = 0
        self.snapshot = Snapshot(telemetry={"requests": 1})
        self.retrusted = 0
        self.sync = SiteSync(
            link=self.hub, outbox=self.outbox, memory=self.memory, identity=self.identity, clock=self.clock,
            rng=random.Random(5), activate=self._activate, trusted=self._trusted, describe=lambda: self.snapshot,
            note=lambda event, **fields: self.noted.append((event, fields)), software="test", busy=lambda: self.running,
        )  # fmt: skip

    async def _activate(self, desired: Desired) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.activated.append(desired.manifest.generation)

    def _trusted(self) -> None:
        self.retrusted += 1

    def events(self, name: str) -> list[dict[str, str]]:
        return [fields for event, fields in self.noted if event == name]

    async def until(self, holds: Callable[[], bool], *, within_s: float) -> float:
        """Wait for it in virtual time; how long it took."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        while not holds():
            assert loop.time() - began < within_s, f"not within {within_s:g} s; noted: {self.noted[-8:]}"
            await asyncio.sleep(0.01)
        return loop.time() - began


def live(folder: Path, story: Callable[[World], Coroutine[Any, Any, T]], *, ahead_s: float = 0.0) -> T:
    """Run a story beside a running `SiteSync`, in virtual time."""

    async def whole() -> T:
        world = World(folder, ahead_s=ahead_s)
        running = asyncio.ensure_future(world.sync.run())
        try:
            return await story(world)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            assert world.hub.watching == 0
            world.memory.close()

    return run_virtual(whole(), limit_s=10**7)


def refused(why: str, message: str = "no", *, hub_ns: int = 0) -> Reply:
    return lambda: HubRefused(message, why=why, hub_ns=hub_ns)
