"""The way to the hub: HTTPS that believes one CA alone, to several addresses in turn, also through a proxy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from http import HTTPStatus
from typing import Final
from urllib.parse import urlsplit

from ondol.errors import ConfigError, HubRefused, InvalidRequest, LinkDown
from ondol.net.connections import Http1Client
from ondol.net.dial import Dialer, Proxy
from ondol.net.http1 import Connection, DeadlinePassed, HttpFailure
from ondol.wire import sync

CONNECT_S: Final = 4.0
"""For a handshake; a line that swallows packets is tried anew within it, every 0.4 s."""
REPLY_MAX: Final = {"desired": 64 * 1024 * 1024}
REPLY_MAX_OTHER: Final = 1024 * 1024
LINE_MAX: Final = 64 * 1024
_FOREVER: Final = 1e12


class _Place:
    """One address of the hub."""

    def __init__(self, url: str, ca_pem: str, proxy: Proxy | None) -> None:
        parts = urlsplit(url)
        if parts.scheme != "https" or not parts.hostname or parts.path.strip("/"):
            raise ConfigError(f"hub: found the address {url!r}, expected https://HOST[:PORT]")
        self.url = url
        self.authority = parts.netloc.rpartition("@")[2]
        self.dialer = Dialer(parts.hostname, parts.port or 443, ca_pem=ca_pem, proxy=proxy)
        self.calls = self.client(_FOREVER)

    def client(self, read_timeout_s: float) -> Http1Client:
        return Http1Client(
            self.authority, 0, tls=None, connect_timeout_s=CONNECT_S, read_timeout_s=read_timeout_s, dial=self.dialer
        )  # fmt: skip


class HttpsLink:
    """`core.ports.HubLink` over HTTP/1.1 and TLS 1.3.  Made, used and closed on one event loop.

    A call goes to one address; after one that failed, the next call goes to the next.  Where there are several, a
    replica that stops or cannot reach its database (503) is down, too: its watch would say nothing new.
    """

    def __init__(
        self, urls: Sequence[str], *, ca_pem: str, authorization: Callable[[], str], proxy: str | None = None
    ) -> None:
        """Connect to nothing yet.  `authorization` gives the header's value, now.

        Raises:
            ConfigError: an address or the proxy is none, or the CA is no certificate.
        """
        try:
            through = None if proxy is None else Proxy.of(proxy)
            self._places = [_Place(url, ca_pem, through) for url in urls]
        except (ValueError, OSError) as error:
            raise ConfigError(f"hub: {error}") from error
        if not self._places:
            raise ConfigError("hub: found no address, expected at least one")
        self._authorization = authorization
        self._at = 0

    @property
    def url(self) -> str:
        """The address that the next call goes to."""
        return self._places[self._at].url

    async def call(self, name: str, body: bytes, *, timeout_s: float) -> bytes:
        """POST `/v1/sync/<name>`: the answer's body.

        Raises:
            LinkDown: the hub was not reached, or did not answer in time.
            HubRefused: it answered with an error.
        """
        place = self._places[self._at]
        deadline = asyncio.get_running_loop().time() + timeout_s
        try:
            connection = await place.calls.send(self._head(place, name, len(body)), body, deadline)
            try:
                raw = await _whole(connection, REPLY_MAX.get(name, REPLY_MAX_OTHER))
            finally:
                place.calls.release(connection)
        except HttpFailure as error:
            raise self._down(place, str(error)) from error
        except DeadlinePassed as error:
            raise self._down(place, f"no answer to {name} within {timeout_s:.1f} s") from error
        if connection.status != 200:
            raise self._no(place, connection.status, raw)
        return raw

    async def watch(self, body: bytes, *, silence_s: float) -> AsyncIterator[bytes]:
        """POST `/v1/sync/watch`: each line as it comes.

        Raises (from the iterator): as `call`; LinkDown also when nothing came for `silence_s`.
        """
        place = self._places[self._at]
        client = place.client(silence_s)
        try:
            connection = await client.send(self._head(place, "watch", len(body)), body, _FOREVER)
            if connection.status != 200:
                raise self._no(place, connection.status, await _whole(connection, REPLY_MAX_OTHER))
            rest = b""
            while (piece := await connection.read()) is not None:
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    yield line
                if len(rest) > LINE_MAX:
                    raise self._down(place, f"a line of the watch passes {LINE_MAX} bytes")
        except HttpFailure as error:
            raise self._down(place, str(error)) from error
        finally:
            await client.close()

    async def close(self) -> None:
        """Close every connection."""
        for place in self._places:
            place.dialer.close()
            await place.calls.close()

    def _head(self, place: _Place, name: str, length: int) -> bytes:
        return (
            f"POST {sync.PREFIX}{name} HTTP/1.1\r\nhost: {place.authority}\r\n"
            f"authorization: {self._authorization()}\r\ncontent-type: {sync.CONTENT_TYPE}\r\n"
            f"content-length: {length}\r\n\r\n"
        ).encode("latin-1")

    def _down(self, place: _Place, why: str) -> LinkDown:
        place.calls.forget_idle()
        if self._places[self._at] is place:
            self._at = (self._at + 1) % len(self._places)
        return LinkDown(f"the hub at {place.url}: {why}")

    def _no(self, place: _Place, status: int, raw: bytes) -> LinkDown | HubRefused:
        try:
            said = sync.decode(raw, sync.Error)
        except InvalidRequest:
            return self._down(place, f"it answered {status}, and not as a hub does")
        if status == HTTPStatus.SERVICE_UNAVAILABLE and len(self._places) > 1:
            return self._down(place, said.message)
        return HubRefused(said.message, why=said.code, retry_after_s=said.retry_after_s, hub_ns=said.hub_ns)


async def _whole(connection: Connection, most: int) -> bytes:
    parts, size = [], 0
    while (piece := await connection.read()) is not None:
        size += len(piece)
        if size > most:
            raise HttpFailure(f"its answer passes {most} bytes")
        parts.append(piece)
    return b"".join(parts)
