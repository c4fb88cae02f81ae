"""The heart of `ondol client-proxy`: a request goes to the first good site of a list, and to the next when that fails.

A request may be sent again only while its caller has no byte of an answer: a stream once begun ends with an error
event, an answer in one piece is handed on when it is whole.  What changes something at a site (keys, a reload) is
sent once.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Sequence
from typing import Any, Final
from urllib.parse import quote, urlsplit

import msgspec

from ondol.core.catalog import Limits
from ondol.core.ports import Clock
from ondol.gateway.watch import Stopped, Watch
from ondol.net.connections import Http1Client
from ondol.net.health import Probe, client_of
from ondol.net.http1 import Connection, DeadlinePassed, HttpFailure
from ondol.wire.guard import AddressGate, HeadGuard, Refusal
from ondol.wire.openai_replies import error_body

CONNECT_S: Final = 2.0
AWAY_S: Final = 3.0
SILENCE_S: Final = 600.0
"""The longest silence within an answer: a site has deadlines of its own, and whether it lives is the probe's to say."""
DEADLINE_S: Final = 3600.0
ANSWER_BYTES_MAX: Final = 64 * 1024 * 1024
EVENT_BYTES_MAX: Final = 8 * 1024 * 1024
STATE_PATH: Final = "/v1/ondol/proxy"
_HOP_BY_HOP: Final = frozenset(
    {
        "connection", "content-length", "expect", "host", "keep-alive", "proxy-authorization", "proxy-connection", "te",
        "trailer", "transfer-encoding", "upgrade",
    }
)  # fmt: skip
"""RFC 9110, 7.6.1, and what this side says itself."""
_ASK_ANOTHER: Final = frozenset({502, 503})
_SAFE_PATH: Final = "/:@!$&'()*+,;=-._~"
_JSON: Final = [("content-type", "application/json")]


class Way:
    """One site: the connections to it, and what its probe says."""

    def __init__(self, url: str, tls: ssl.SSLContext | None, changed: Callable[[Way], None]) -> None:
        """Raises InvalidRequest where the address is none."""
        self.url = url.rstrip("/")
        self.netloc = urlsplit(url).netloc
        self.client: Http1Client = client_of(
            url, tls=tls, connect_timeout_s=CONNECT_S, read_timeout_s=SILENCE_S
        )
        self.probe = Probe(url, tls=tls, changed=lambda _: self._judged(changed))

    def _judged(self, changed: Callable[[Way], None]) -> None:
        if not self.probe.alive:
            self.client.abort()  # whoever waits for it goes on to the next site now
        changed(self)

    @property
    def state(self) -> str:
        """`ready`, `not ready` (it answers, and takes no requests) or `away`."""
        if self.probe.ready:
            return "ready"
        return "not ready" if self.probe.alive else "away"


class _Asked(msgspec.Struct, frozen=True):
    """A request as it is sent on; `head` lacks the request's Host, which is each site's own."""

    method: str
    target: str
    lines: str
    body: bytes
    once: bool


class _Failed(Exception):
    """One site did not answer; `reply` is what it said, where it said something."""

    def __init__(self, why: str, reply: tuple[int, list[tuple[str, str]], bytes] | None = None) -> None:
        super().__init__(why)
        self.reply = reply


class Forwarder:
    """An RSGI application.  `ways` is the order of preference; it may grow while this runs."""

    def __init__(self, ways: list[Way], *, hosts: frozenset[str], clock: Clock) -> None:
        """`hosts` are the Host headers that are answered: a page in a browser shall not reach the sites through us."""
        self.ways = ways
        self._clock = clock
        self._limits = Limits()
        self._guard = HeadGuard(hosts, self._limits)
        self._gate = AddressGate(self._limits.requests_per_address)

    def order(self) -> list[Way]:
        """Whom to try: the ready ones as listed, then those that answer, then those that are away, in case."""
        return sorted(self.ways, key=lambda way: (not way.probe.ready, not way.probe.alive))

    async def __rsgi__(self, scope: Any, proto: Any) -> None:
        """Serve one request."""
        headers = scope.headers
        refusal = self._guard.check(
            scope.method, scope.path, scope.authority, headers.items(), headers.keys()
        )
        refusal = refusal or self._gate.enter(scope.client)
        if refusal is not None:
            _refuse(proto, refusal)
            return
        try:
            await self._serve(scope, proto)
        finally:
            self._gate.leave(scope.client)

    async def _serve(self, scope: Any, proto: Any) -> None:
        if scope.path == STATE_PATH:
            proto.response_bytes(200, _JSON, msgspec.json.encode({"data": self.states()}))
            return
        watch = Watch(proto, self._clock)
        try:
            length = scope.headers.get("content-length")
            body = await watch.body(length, self._limits, self._clock.now_ns())
            await self._forward(_asked(scope, body), proto)
        except Stopped as stopped:
            _refuse(proto, stopped.refusal)
        except asyncio.CancelledError:
            if not watch.gone:
                raise
        finally:
            watch.stop()

    def states(self) -> list[dict[str, Any]]:
        """Each site with its state and distance, in the order in which they would be tried."""
        return [
            {"url": one.url, "state": one.state, "why": one.probe.why, "rtt_ms": one.probe.rtt_ms}
            for one in self.order()
        ]

    async def _forward(self, asked: _Asked, proto: Any) -> None:
        failures: list[str] = []
        last: tuple[int, list[tuple[str, str]], bytes] | None = None
        for way in self.order():
            try:
                await self._ask(way, asked, proto)
            except _Failed as error:
                failures.append(f"{way.url}: {error}")
                last = error.reply or last
                if asked.once:
                    break
            else:
                return
        if last is not None:
            proto.response_bytes(*last)
            return
        message = "no site answered: " + "; ".join(failures)
        body = error_body(message=message, kind="server_error", code="no_site")
        proto.response_bytes(503, [*_JSON, ("retry-after", "1")], body)

    async def _ask(self, way: Way, asked: _Asked, proto: Any) -> None:
        """Ask one site, and hand its answer on.

        Raises:
            _Failed: the caller has no byte of an answer, and another site may give one.
        """
        head = f"{asked.method} {asked.target} HTTP/1.1\r\nHost: {way.netloc}\r\n{asked.lines}\r\n".encode(
            "latin-1"
        )
        deadline = asyncio.get_running_loop().time() + DEADLINE_S
        try:
            # Nobody will say of a site that is away already that it went away: so no request waits there for long.
            async with asyncio.timeout(None if way.probe.alive else AWAY_S):
                connection = await way.client.send(head, asked.body, deadline)
        except TimeoutError as error:
            raise _Failed(f"nothing within {AWAY_S:g} s") from error
        except (HttpFailure, DeadlinePassed) as error:
            raise _Failed(str(error) or "too slow") from error
        try:
            way.probe.heard()
            if "event-stream" in (connection.header(b"content-type") or ""):
                await self._stream(way, connection, proto)
            else:
                await self._whole(connection, proto)
        finally:
            way.client.release(connection)

    async def _whole(self, connection: Connection, proto: Any) -> None:
        try:
            body = await _all(connection)
        except (HttpFailure, DeadlinePassed) as error:
            raise _Failed(str(error) or "too slow") from error
        reply = connection.status, _headers(connection), body
        if connection.status in _ASK_ANOTHER:
            raise _Failed(f"HTTP {connection.status}", reply)
        proto.response_bytes(*reply)

    async def _stream(self, way: Way, connection: Connection, proto: Any) -> None:
        events = _Events()
        try:
            whole = events.feed(await connection.read())
        except (HttpFailure, DeadlinePassed) as error:
            raise _Failed(str(error) or "too slow") from error
        send = proto.response_stream(connection.status, _headers(connection)).send_bytes
        try:
            while whole is not None:
                if whole:
                    await send(whole)
                whole = events.feed(await connection.read())
                way.probe.heard()
        except (HttpFailure, DeadlinePassed) as error:
            why = f"{way.url} ended within its answer ({str(error) or 'too slow'}); ask again, another site will answer"
            body = error_body(message=why, kind="server_error", code="site_lost")
            await send(b"data: " + body + b"\n\n")
        except RuntimeError as error:
            if type(error).__name__ != "RSGIProtocolClosed":  # the caller has hung up
                raise


class _Events:
    """Whole events of a stream (they end with an empty line), so that an error can be said between two of them."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes | None) -> bytes | None:
        """What of it ends an event, perhaps nothing; at the end (None) what is left, and then None."""
        if piece is None:
            rest, self._rest = self._rest, b""
            return rest or None
        data = self._rest + piece
        end = data.rfind(b"\n\n") + 2
        if end < 2 and len(data) <= EVENT_BYTES_MAX:
            self._rest = data
            return b""
        end = len(data) if end < 2 else end
        self._rest = data[end:]
        return data[:end]


async def _all(connection: Connection) -> bytes:
    parts: list[bytes] = []
    size = 0
    while (piece := await connection.read()) is not None:
        size += len(piece)
        if size > ANSWER_BYTES_MAX:
            raise HttpFailure(f"its answer passes {ANSWER_BYTES_MAX} bytes")
        parts.append(piece)
    return b"".join(parts)


def _asked(scope: Any, body: bytes) -> _Asked:
    target = quote(scope.path, safe=_SAFE_PATH) + (f"?{scope.query_string}" if scope.query_string else "")
    lines = "".join(
        [f"{name}: {value}\r\n" for name, value in scope.headers.items() if name not in _HOP_BY_HOP]
    )
    method = "GET" if scope.method == "HEAD" else scope.method
    once = method not in ("GET", "OPTIONS") and scope.path.startswith("/v1/ondol/")
    return _Asked(method, target, f"{lines}Content-Length: {len(body)}\r\n", body, once)


def _headers(connection: Connection) -> list[tuple[str, str]]:
    return [(name, value) for name, value in connection.headers().items() if name not in _HOP_BY_HOP]


def _refuse(proto: Any, refusal: Refusal) -> None:
    body = error_body(message=refusal.message, kind="invalid_request_error", code=refusal.code)
    proto.response_bytes(refusal.status, [*_JSON, ("connection", "close")], body)


def tls_of(ca: str | None) -> ssl.SSLContext | None:
    """A context that trusts the authority of this PEM file alone; None where none is given."""
    return None if ca is None else ssl.create_default_context(cafile=ca)


def wanted(found: Sequence[str], known: Sequence[str], most: int) -> list[str]:
    """The addresses of `found` that are new, as many as fit below `most` in all."""
    have = {one.rstrip("/") for one in known}
    fresh = [one for one in dict.fromkeys(url.rstrip("/") for url in found) if one not in have]
    return fresh[: max(most - len(known), 0)]
