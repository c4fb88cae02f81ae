"""Many sites in one process: each with its own key, over its own TLS connections to a real hub."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable

import msgspec

from ondol.adapters.link import HttpsLink
from ondol.core import dsse
from ondol.core.desired import assemble
from ondol.core.dsse import Envelope
from ondol.core.invites import parse_token
from ondol.core.trust import HUB, Trust, authorization
from ondol.wire import sync

AT_ONCE = 32
SAID_EVERY = 50


class Member:
    """One simulated site: joins, says hello, watches, fetches and checks what it fetched."""

    def __init__(self, name: str, url: str, ca_pem: str, clock_ns: Callable[[], int]) -> None:
        self.name = name
        self.private = dsse.new_private_key()
        self.instance = secrets.token_hex(16)
        self.generation = 0
        self._clock_ns = clock_ns
        self._credential: Envelope | None = None
        self._trust = Trust(fleet="", keys={})
        self.link = HttpsLink((url,), ca_pem=ca_pem, authorization=self._header)

    def _header(self) -> str:
        if self._credential is None:
            return "none"
        return authorization(
            self.private, self._credential, site=self.name, audience=HUB, now_ns=self._clock_ns()
        )

    async def join(self, token: str) -> None:
        message = sync.Join(token=token, key=dsse.public_key(self.private), site=self.name)
        reply = sync.decode(await self.link.call("join", sync.encode(message), timeout_s=60), sync.JoinReply)
        self._credential = reply.credential
        self._trust = Trust(fleet=reply.fleet, keys=reply.hub_keys)
        hello = sync.Hello(
            boot=1, instance=self.instance, gateway=f"gw-{self.name}", generation=0, epoch=0, acknowledged=0,
            wall_ns=self._clock_ns(),
        )  # fmt: skip
        await self.link.call("hello", sync.encode(hello), timeout_s=60)

    async def watch(self) -> None:
        body = sync.encode(sync.Watch(instance=self.instance))
        async for line in self.link.watch(body, silence_s=60):
            said = msgspec.json.decode(line, type=sync.Announcement)
            if said.generation > self.generation:
                await self._fetch()

    async def _fetch(self) -> None:
        raw = await self.link.call("desired", sync.encode(sync.Fetch(instance=self.instance)), timeout_s=60)
        reply = sync.decode(raw, sync.FetchReply)
        if reply.manifest is not None:
            state = assemble(
                reply.manifest,
                self._trust,
                site=self.name,
                known={},
                sent=reply.bodies,
                least=self.generation,
            )
            self.generation = state.manifest.generation


class Crowd:
    """All of them."""

    def __init__(self, port: int, ca_pem: str, count: int) -> None:
        url = f"https://127.0.0.1:{port}"
        self.members = [Member(f"shop-{number}", url, ca_pem, time.time_ns) for number in range(count)]
        self._watches: list[asyncio.Task[None]] = []

    async def join(self, token: str, say: Callable[[str], None]) -> None:
        """Join all, some at once, and open every watch; `say` is told how far it is."""
        proof = parse_token(token).proof
        gate = asyncio.Semaphore(AT_ONCE)

        async def one(member: Member) -> None:
            async with gate:
                await member.join(proof)
                self._watches.append(asyncio.ensure_future(member.watch()))
                if len(self._watches) % SAID_EVERY == 0:
                    say(f"{len(self._watches):,} of {len(self.members):,} sites have joined")

        await asyncio.gather(*(one(member) for member in self.members))
        await asyncio.sleep(3)

    async def until_all_have(self, generation: int) -> None:
        """Return once every member has checked this generation."""
        while any(member.generation < generation for member in self.members):
            for watch in self._watches:
                if watch.done():
                    watch.result()
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        await asyncio.gather(*(member.link.close() for member in self.members))
