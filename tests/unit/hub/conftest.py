"""A hub in this process, on a real SQLite file, and sites that speak to it without a network."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from ondol.adapters.database_sqlite import SqliteDatabase
from ondol.core import dsse
from ondol.core.catalog import AnyDocument, SiteDoc
from ondol.core.invites import HubPlace, parse_token
from ondol.core.ports import Tx
from ondol.core.trust import HUB, authorization
from ondol.core.usage import GENESIS, UsageRecord, encode_record, link
from ondol.hub import enrol, publish
from ondol.hub.enrol import Authority, Invitation
from ondol.hub.schema import MIGRATIONS
from ondol.hub.service import Hub
from ondol.units import NS_PER_S
from ondol.wire import sync

PLACE = HubPlace(urls=("https://127.0.0.1:8443",), ca="0" * 64)
START_NS = 1_800_000_000 * NS_PER_S


class HandClock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.mono_ns = NS_PER_S
        self.offset_ns = START_NS

    def now_ns(self) -> int:
        return self.mono_ns

    def wall_ns(self) -> int:
        return self.mono_ns + self.offset_ns

    def move(self, seconds: float) -> None:
        self.mono_ns += int(seconds * NS_PER_S)


def site_doc(name: str, **fields: object) -> SiteDoc:
    known = {"name": name, "tier": "edge", "region": "kr-seoul", "country": "KR", "grid_zone": "KR"}
    return msgspec.convert({**known, **fields}, SiteDoc)


class Speaker:
    """A site's process, by hand."""

    def __init__(
        self, hub: Hub, clock: HandClock, name: str, instance: str = "aaaaaaaa", boot: int = 1
    ) -> None:
        self.hub, self.clock, self.name = hub, clock, name
        self.private = dsse.new_private_key()
        self.instance, self.boot = instance, boot
        self.gateway = f"gateway-of-{name}"
        self.seq, self.hash = 0, GENESIS
        self.joined: sync.JoinReply | None = None

    def copy(self, instance: str) -> Speaker:
        """Another machine with this one's disk."""
        twin = Speaker(self.hub, self.clock, self.name, instance, self.boot + 1)
        twin.private, twin.joined, twin.gateway = self.private, self.joined, self.gateway
        twin.seq, twin.hash = self.seq, self.hash
        return twin

    async def join(self, token: str) -> sync.JoinReply:
        message = sync.Join(token=parse_token(token).proof, key=dsse.public_key(self.private))
        self.joined = sync.decode(await self.hub.handle("join", None, sync.encode(message)), sync.JoinReply)
        return self.joined

    @property
    def header(self) -> str:
        assert self.joined is not None
        return authorization(
            self.private, self.joined.credential, site=self.name, audience=HUB, now_ns=self.clock.wall_ns()
        )

    async def call(self, name: str, message: sync.Message, reply: type[sync.M]) -> sync.M:
        return sync.decode(await self.hub.handle(name, self.header, sync.encode(message)), reply)

    async def hello(self, answer: str = "") -> sync.HelloReply:
        message = sync.Hello(
            boot=self.boot, instance=self.instance, gateway=self.gateway, generation=0, epoch=0, acknowledged=0,
            wall_ns=self.clock.wall_ns(), answer=answer,
        )  # fmt: skip
        return await self.call("hello", message, sync.HelloReply)

    async def report(self, generation: int = 0, **fields: object) -> sync.ReportReply:
        message = sync.Report(
            instance=self.instance, generation=generation, epoch=0, last_seq=self.seq, acknowledged=self.seq,
            wall_ns=self.clock.wall_ns(), **fields,  # type: ignore[arg-type]
        )  # fmt: skip
        return await self.call("report", message, sync.ReportReply)

    async def fetch(self, have: tuple[str, ...] = ()) -> sync.FetchReply:
        return await self.call("desired", sync.Fetch(instance=self.instance, have=have), sync.FetchReply)

    def rows(self, count: int) -> sync.Range:
        """The next rows of its ledger, signed; they count as written from now on."""
        first, previous, rows = self.seq + 1, self.hash, []
        for _ in range(count):
            self.seq += 1
            record = UsageRecord(
                request_id=f"{self.name}-{self.seq}", time_ns=self.clock.wall_ns(), site=self.name,
                gateway=self.gateway, tenant="default", team="a", key_id="k", route="r", task="chat",
                outcome="completed", status=200, cost=self.seq,
            )  # fmt: skip
            rows.append(encode_record(record))
            self.hash = link(self.hash, self.seq, rows[-1])
        head = sync.Head(site=self.name, gateway=self.gateway, seq=self.seq, hash=self.hash)
        return sync.Range(
            instance=self.instance, gateway=self.gateway, first=first, previous=previous, rows=tuple(rows),
            head=dsse.sign(self.private, sync.HEAD_TYPE, sync.encode(head)),
        )  # fmt: skip

    async def send(self, message: sync.Range) -> sync.RangeReply:
        return await self.call("usage", message, sync.RangeReply)


class Fleet:
    """A hub and its clock; sites join by name."""

    def __init__(self, hub: Hub, clock: HandClock) -> None:
        self.hub, self.clock = hub, clock

    async def token(self, name: str, count: int = 1, minutes: int = 15) -> str:
        wanted = [Invitation(doc=site_doc(name), count=count, minutes=minutes)]
        made = await self.hub.database.write(
            lambda tx: enrol.invite(
                tx, wanted, PLACE, self.hub.authority, rng=self.hub.rng, now_ns=self.clock.wall_ns()
            )
        )
        return made[0][1]

    async def joined(self, name: str) -> Speaker:
        """A site that has joined and said hello."""
        site = Speaker(self.hub, self.clock, name)
        await site.join(await self.token(name))
        await site.hello()
        return site

    async def apply(self, *documents: tuple[str, AnyDocument]) -> int:
        def work(tx: Tx) -> int:
            return publish.apply(
                tx, documents, author="a", message="m", now_ns=self.clock.wall_ns(), everywhere=True
            )

        number = await self.hub.database.write(work)
        await self.hub.look()
        return number


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    clock = HandClock()
    private = dsse.new_private_key()
    public = dsse.public_key(private)
    authority = Authority(
        fleet="test", private=private, keys={dsse.key_id(public): public}, pepper=b"p" * 32,
        credential_s=72 * 3600, stale_s=7 * 86_400,
    )  # fmt: skip
    database = SqliteDatabase(tmp_path / "hub.db", migrations=MIGRATIONS)
    hub = Hub(
        database=database, authority=authority, place=PLACE, clock=clock, rng=random.Random(7),
        certify=lambda csr, site, address: b"", note=lambda event, **fields: None,
    )  # fmt: skip
    await hub.start()
    yield Fleet(hub, clock)
    await database.close()
