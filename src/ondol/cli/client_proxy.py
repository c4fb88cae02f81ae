"""`ondol client-proxy`: a small local forwarder with a list of sites, for clients that know one address."""

from __future__ import annotations

import asyncio
import os
import signal
import ssl
import sys
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import uvloop
from cyclopts import Parameter
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.server.embed import Server

from ondol.adapters.clock import SystemClock
from ondol.adapters.lock import must_be_free
from ondol.cli.forwarder import Forwarder, Way, tls_of, wanted
from ondol.cli.installation import AsJson
from ondol.config.network import is_loopback
from ondol.errors import ConfigError, InvalidRequest
from ondol.net.http1 import DeadlinePassed, HttpFailure
from ondol.wire.guard import allowed_hosts

SITES_MAX: Final = 16
LEARN_S: Final = 30.0
_LEARN_WAIT_S: Final = 5.0
_NEAREST_BYTES_MAX: Final = 256 * 1024
BACKLOG: Final = 4096
HEADER_READ_MS: Final = 10_000
END_S: Final = 5.0
KEY: Final = "ONDOL_API_KEY"


def client_proxy(
    *,
    site: Annotated[tuple[str, ...], Parameter(negative="")],
    listen: str = "127.0.0.1:8090",
    ca: Path | None = None,
    insecure: bool = False,
    as_json: AsJson = False,
) -> int:
    """Hand requests on to the first site that answers, until stopped.

    Point clients at the address that it listens on.  A site that dies, refuses or falls silent is left within 5 s, also
    by requests that wait for their first byte.  With a key in ONDOL_API_KEY it also asks the sites for their neighbours
    (GET /v1/ondol/nearest) and goes to those when all that were given are away.

    Args:
        site: A site's address, the preferred one first; give several.
        listen: Where to listen.
        ca: The authority that signed the sites' certificates, as a PEM file (the hub's ca.pem).
        insecure: Allow an address that is not loopback: whoever reaches it gets as far as the sites' keys let him.
    """
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise ConfigError(f"--listen: found {listen[:60]!r}, expected HOST:PORT such as 127.0.0.1:8090")
    if not insecure and not is_loopback(host.strip("[]")):
        raise ConfigError(
            f"--listen: {host} is not this machine's own, and the proxy speaks plain HTTP; use 127.0.0.1, or --insecure"
        )
    if len(site) > SITES_MAX:
        raise ConfigError(f"--site: found {len(site)} addresses, expected at most {SITES_MAX}")
    must_be_free(listen)
    try:
        tls = tls_of(None if ca is None else str(ca))
    except ssl.SSLError as error:
        raise ConfigError(f"--ca: {ca} holds no certificate in PEM form") from error
    running = _Proxy(listen, list(dict.fromkeys(one.rstrip("/") for one in site)), tls, as_json=as_json)
    return uvloop.run(running.run())


class _Proxy:
    """The process: the server, a probe for each site, and what is learnt of their neighbours."""

    def __init__(self, listen: str, urls: list[str], tls: ssl.SSLContext | None, *, as_json: bool) -> None:
        self._listen = listen
        self._urls = urls
        self._tls = tls
        self._as_json = as_json
        self._key = os.environ.get(KEY, "")
        self._tasks: list[asyncio.Task[None]] = []
        self._first: Way | None = None

    async def run(self) -> int:
        """Serve until SIGTERM or Ctrl-C."""
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        self._forwarder = Forwarder([], hosts=allowed_hosts(self._listen), clock=SystemClock())
        for url in self._urls:
            self._add(url)
        host, _, port = self._listen.rpartition(":")
        server = Server(
            self._forwarder, address=host.strip("[]"), port=int(port), interface=Interfaces.RSGI,
            http=HTTPModes.http1, websockets=False, backlog=BACKLOG, backpressure=BACKLOG, log_enabled=False,
            http1_settings=HTTP1Settings(header_read_timeout=HEADER_READ_MS),
        )  # fmt: skip
        serving = loop.create_task(server.serve())
        if self._key:
            self._tasks.append(loop.create_task(self._learn()))
        self._say("listening", f"http://{self._listen} hands on to {', '.join(self._urls)}")
        stopping = loop.create_task(stop.wait())
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        failed = serving.done() and not stop.is_set()
        server.interrupt_signal = True
        server.main_loop_interrupt.set()
        await asyncio.wait({serving}, timeout=END_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for way in self._forwarder.ways:
            await way.client.close()
        return 1 if failed else 0

    def _add(self, url: str) -> None:
        """Raises InvalidRequest where it is no address."""
        way = Way(url, self._tls, self._changed)
        self._forwarder.ways.append(way)
        self._tasks.append(asyncio.get_running_loop().create_task(way.probe.run()))

    def _changed(self, way: Way) -> None:
        why = f": {way.probe.why}" if way.probe.why else ""
        self._say("site", f"{way.url} is {way.state}{why}", url=way.url, state=way.state, why=way.probe.why)
        first = self._forwarder.order()[0]
        if first is not self._first and first.probe.ready:
            self._first = first
            self._say("goes_to", f"requests go to {first.url}", url=first.url)

    async def _learn(self) -> None:
        """Ask the first site that is ready for its neighbours, now and then."""
        while True:
            first = self._forwarder.order()[0]
            if first.probe.ready:
                try:
                    addresses = await self._nearest(first)
                except (HttpFailure, DeadlinePassed, msgspec.DecodeError) as error:
                    self._say("neighbours", f"{first.url} did not name its neighbours: {error}")
                else:
                    self._take(addresses)
            await asyncio.sleep(LEARN_S)

    def _take(self, addresses: list[str]) -> None:
        known = [way.url for way in self._forwarder.ways]
        for url in wanted(addresses, known, SITES_MAX):
            try:
                self._add(url)
            except InvalidRequest as error:
                self._say("neighbours", error.message)
            else:
                self._say("neighbours", f"{url} can take over", url=url)

    async def _nearest(self, way: Way) -> list[str]:
        head = (
            f"GET /v1/ondol/nearest HTTP/1.1\r\nHost: {way.netloc}\r\nUser-Agent: ondol\r\n"
            f"Authorization: Bearer {self._key}\r\n\r\n"
        )
        if head.count("\n") != head.count("\r\n") or head.count("\r\n") != 5 or not head.isascii():
            raise HttpFailure(f"{KEY} holds no key")
        deadline = asyncio.get_running_loop().time() + _LEARN_WAIT_S
        connection = await way.client.send(head.encode(), b"", deadline)
        try:
            raw = b""
            while (piece := await connection.read()) is not None and len(raw) <= _NEAREST_BYTES_MAX:
                raw += piece
        finally:
            way.client.release(connection)
        if connection.status != 200:
            raise HttpFailure(f"HTTP {connection.status}")
        found = msgspec.json.decode(raw, type=_Nearest)
        return [one.address for one in found.data if one.address is not None]

    def _say(self, event: str, text: str, **fields: Any) -> None:
        line = (
            msgspec.json.encode({"event": event, "text": text} | fields).decode() if self._as_json else text
        )
        print(line, file=sys.stderr, flush=True)


class _Place(msgspec.Struct):
    address: str | None = None


class _Nearest(msgspec.Struct):
    data: list[_Place]
