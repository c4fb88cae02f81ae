"""Reaching one host over TLS, also through an HTTP proxy, where the line may swallow packets without a word.

A lost SYN is sent again by the kernel after 1, 3, 7 … seconds, which is how long a link that has healed would
seem dead.  So while a try is open, another is begun every STAGGER_S, and the first to arrive is taken.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import socket
import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import msgspec

from ondol.net.http1 import Connection, HttpFailure

STAGGER_S: Final = 0.4
OPEN_MAX: Final = 10
NAMES_S: Final = 1.0
"""How long a name may take before the addresses of the last time are used."""
PROXY_HEAD_MAX: Final = 16 * 1024
UNHEARD_MS: Final = 2_000
UNHEARD_ROUNDS: Final = 10
"""A connection whose peer acknowledges nothing for so long (in round trips, and in ms at least) is dead."""
NO_CHECK_TIME: Final = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME, which Python does not name."""
_NOT_YET: Final = 9
_EXPIRED: Final = 10
_OTHER_NAME: Final = (62, 64)


class Proxy(msgspec.Struct, frozen=True, kw_only=True):
    """An HTTP proxy that opens tunnels; `authorization` is the header's value, or empty."""

    host: str
    port: int
    authorization: str = ""

    @staticmethod
    def of(url: str) -> Proxy:
        """The proxy of `http://[user:password@]host[:port]`.

        Raises:
            ValueError: it is no such address.
        """
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"proxy: found {parts.scheme}://{parts.hostname}, expected http://HOST:PORT")
        secret = ""
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            secret = "Basic " + base64.b64encode(pair.encode()).decode()
        return Proxy(host=parts.hostname, port=parts.port or 3128, authorization=secret)


def pinned(ca_pem: str) -> ssl.SSLContext:
    """TLS 1.3, and nobody is believed but who has a certificate of this CA."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=ca_pem)
    return context


class Dialer:
    """Makes connections to one host.  Owned by one link, on one event loop."""

    def __init__(self, host: str, port: int, *, ca_pem: str, proxy: Proxy | None = None) -> None:
        """Connect to nothing yet."""
        self._host = host
        self._port = port
        self._proxy = proxy
        self._tls = pinned(ca_pem)
        self._timeless = pinned(ca_pem)
        self._timeless.verify_flags |= ssl.VerifyFlags(NO_CHECK_TIME)
        self._names = _Names(*((host, port) if proxy is None else (proxy.host, proxy.port)))

    async def __call__(self, factory: Callable[[], Connection]) -> Connection:
        """A connection that has shaken hands; the caller bounds the time.

        Raises:
            HttpFailure: the certificate is not the hub's, the proxy refuses, or the name has no address.
            OSError: nothing was reached.
        """
        addresses = await self._names.addresses()
        running: set[asyncio.Task[Connection]] = set()
        begun = failed = 0
        try:
            while True:
                if len(running) < OPEN_MAX:
                    running.add(asyncio.ensure_future(self._try(factory, *addresses[begun % len(addresses)])))
                    begun += 1
                done, running = await asyncio.wait(
                    running, timeout=STAGGER_S, return_when=asyncio.FIRST_COMPLETED
                )
                good = [task for task in done if task.exception() is None]
                if good:
                    running.update(good[1:])
                    return good[0].result()
                failed += len(done)
                if failed >= len(addresses):
                    raise next(error for task in done if (error := task.exception()) is not None)
        finally:
            await _drop(running)

    def close(self) -> None:
        """Look up no more names."""
        self._names.close()

    async def _try(self, factory: Callable[[], Connection], family: int, address: Any) -> Connection:
        tls = self._tls
        try:
            return await self._connect(factory, family, address, tls)
        except ssl.SSLCertVerificationError as error:
            if error.verify_code != _NOT_YET or tls is self._timeless:
                raise HttpFailure(self._refused(error)) from error
        # This clock is behind the hub's: a site whose battery is empty starts in 1970, and must reach the hub to
        # learn the time.  The chain and the name are checked all the same.
        self._tls = self._timeless
        return await self._connect(factory, family, address, self._timeless)

    async def _connect(
        self, factory: Callable[[], Connection], family: int, address: Any, tls: ssl.SSLContext
    ) -> Connection:
        loop = asyncio.get_running_loop()
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            began = loop.time()
            await loop.sock_connect(sock, address)
            _bound_silence(sock, loop.time() - began)
        except BaseException:
            sock.close()
            raise
        # From here on the socket is the loop's to close.
        if self._proxy is not None:
            return await self._through(self._proxy, sock, factory, tls)
        _, connection = await loop.create_connection(factory, sock=sock, ssl=tls, server_hostname=self._host)
        return connection

    async def _through(
        self, proxy: Proxy, sock: socket.socket, factory: Callable[[], Connection], tls: ssl.SSLContext
    ) -> Connection:
        loop = asyncio.get_running_loop()
        transport, tunnel = await loop.create_connection(
            lambda: _Tunnel(loop, proxy, self._host, self._port), sock=sock
        )
        try:
            await tunnel.opened
            connection = factory()
            secure = await loop.start_tls(transport, connection, tls, server_hostname=self._host)
            if secure is None:
                raise HttpFailure(f"the proxy {proxy.host}:{proxy.port} closed the tunnel")
        except BaseException:
            transport.abort()
            raise
        connection.connection_made(secure)
        return connection

    def _refused(self, error: ssl.SSLCertVerificationError) -> str:
        if error.verify_code == _EXPIRED:
            return (
                "the hub's certificate has expired by this machine's clock; check the clock here, and the hub"
            )
        if error.verify_code in _OTHER_NAME:
            return f"the certificate is of this fleet and not for {self._host}: add that name to `names` of the hub"
        between = "the proxy" if self._proxy is not None else "something between (a proxy that opens TLS?)"
        return (
            f"the certificate is not of this fleet's CA ({error.verify_message}): {between} answers in the hub's "
            "place. It must pass TLS through; nothing was sent."
        )


class _Names:
    """The addresses of a host.  A name server that is away holds nobody up for long, and no other thread pool."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._known: list[tuple[int, Any]] = []
        self._asking: asyncio.Future[list[tuple[int, Any]]] | None = None
        self._executor: ThreadPoolExecutor | None = None
        try:
            version = ipaddress.ip_address(host).version
            self._known = [(socket.AF_INET if version == 4 else socket.AF_INET6, (host, port))]
        except ValueError:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="ondol-names")

    async def addresses(self) -> list[tuple[int, Any]]:
        if self._executor is None:
            return self._known
        if self._asking is None:
            self._asking = asyncio.get_running_loop().run_in_executor(self._executor, self._look_up)
            self._asking.add_done_callback(self._learn)
        await asyncio.wait({self._asking}, timeout=NAMES_S)
        if not self._known:
            raise HttpFailure(f"the name {self._host} has no address now; is there a name server?")
        return self._known

    def _look_up(self) -> list[tuple[int, Any]]:
        try:
            found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except OSError:
            return []
        return [(family, address) for family, _, _, _, address in found]

    def _learn(self, asked: asyncio.Future[list[tuple[int, Any]]]) -> None:
        self._asking = None
        if not asked.cancelled():
            self._known = asked.result() or self._known

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)


class _Tunnel(asyncio.Protocol):
    """The proxy's side of a connection until it says that the tunnel is open."""

    def __init__(self, loop: asyncio.AbstractEventLoop, proxy: Proxy, host: str, port: int) -> None:
        self.opened: asyncio.Future[None] = loop.create_future()
        self._proxy = proxy
        self._target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._head = b""

    def connection_made(self, transport: Any) -> None:
        secret = self._proxy.authorization
        lines = [f"CONNECT {self._target} HTTP/1.1", f"host: {self._target}"]
        lines += [f"proxy-authorization: {secret}"] if secret else []
        transport.write(("\r\n".join(lines) + "\r\n\r\n").encode())

    def data_received(self, data: bytes) -> None:
        self._head += data
        if len(self._head) > PROXY_HEAD_MAX:
            self._fail("sent more than 16 KiB of headers")
        elif b"\r\n\r\n" in self._head and not self.opened.done():
            first = self._head.split(b"\r\n", 1)[0].split()
            status = first[1] if len(first) > 1 and first[0].startswith(b"HTTP/1.") else b"no HTTP"
            if status == b"200":
                self.opened.set_result(None)
            else:
                self._fail(f"answered {status.decode('latin-1')[:20]} to CONNECT {self._target}")

    def connection_lost(self, _exc: Exception | None) -> None:
        self._fail("closed the connection before the tunnel was open")

    def _fail(self, what: str) -> None:
        if not self.opened.done():
            self.opened.set_exception(HttpFailure(f"the proxy {self._proxy.host}:{self._proxy.port} {what}"))


def _bound_silence(sock: socket.socket, round_trip_s: float) -> None:
    option = getattr(socket, "TCP_USER_TIMEOUT", None)  # Linux; elsewhere the calls' own time limits find it
    if option is not None:
        sock.setsockopt(
            socket.IPPROTO_TCP, option, max(UNHEARD_MS, int(UNHEARD_ROUNDS * round_trip_s * 1000))
        )


async def _drop(tasks: set[asyncio.Task[Connection]]) -> None:
    """End the tries that were not needed; one that arrived in the same moment is closed."""
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Connection):
            outcome.abort()
