"""Connections to one host and port, kept for the next request.

Invariant: a connection is here only while idle and clean; leaving a request in any other way,
cancellation included, closes its socket before control returns.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

from ondol.net.http1 import Connection, DeadlinePassed, HttpFailure

_IDLE_MAX: Final = 256
"""Idle connections kept; each costs a few KiB here and a slot at the server."""
_IDLE_S: Final = 55.0
"""Under nginx's 75 s and the 60 s of common load balancers; others close theirs, which is seen."""
_LINGER_S: Final = 1.0
Dial = Callable[[Callable[[], Connection]], Awaitable[Connection]]
"""From a maker of unconnected connections to a connected one; raises OSError, ssl.SSLError or HttpFailure."""


class Http1Client:
    """A pool of connections to one host and port.  Owned by one `Exchange`, on one event loop."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        tls: ssl.SSLContext | None,
        connect_timeout_s: float,
        read_timeout_s: float,
        dial: Dial | None = None,
    ) -> None:
        """Connect to nothing yet.  `dial` makes connections another way than straight to host and port."""
        self._host = host
        self._port = port
        self._tls = tls
        self._connect_timeout_s = connect_timeout_s
        self._read_timeout_s = read_timeout_s
        self._dial = self._straight if dial is None else dial
        self._idle: deque[Connection] = deque()
        self._live: set[Connection] = set()
        self._closed = False
        self._aborts = 0

    async def send(self, head: bytes, body: bytes, deadline: float) -> Connection:
        """Send a request and return its connection once status and headers are here.

        The caller gives it back with `release`, always.  A kept connection that the server closed
        without a byte of an answer is a race that nobody lost: the request goes out once more, on a
        new one.  Cancelling closes the socket.

        Raises:
            HttpFailure: no connection, or it broke, timed out or spoke no HTTP.
            DeadlinePassed: the deadline (on the loop's clock) came first.
        """
        loop, aborts = asyncio.get_running_loop(), self._aborts
        connection = self._take(loop.time())
        kept = connection is not None
        while True:
            if connection is None:
                connection = await self._connect(loop, deadline)
            self._live.add(connection)
            try:
                connection.begin(head, body, deadline, self._read_timeout_s)
                await connection.answered()
            except HttpFailure:
                stale = (
                    kept and not connection.received and not connection.usable() and aborts == self._aborts
                )
                self._drop(connection)
                if not stale or loop.time() >= deadline:
                    raise
                kept, connection = False, None
            except BaseException:
                self._drop(connection)
                raise
            else:
                return connection

    def release(self, connection: Connection, *, ended: bool = False) -> None:
        """Take a connection back: kept if its answer ended cleanly, else closed now.

        `ended` says that the caller has all it wants and only the end of the body may be missing (the
        last chunk after [DONE]): that may still come, for a second, while nobody waits for it.
        """
        if ended and not connection.complete and connection.usable() and not self._closed:
            connection.linger(self.release, _LINGER_S)
            return
        self._live.discard(connection)
        if not connection.finish():
            return
        if self._closed or len(self._idle) >= _IDLE_MAX:
            connection.abort()
            return
        now = asyncio.get_running_loop().time()
        while self._idle and self._idle[0].idle_since < now - _IDLE_S:
            self._idle.popleft().abort()
        connection.idle_since = now
        self._idle.append(connection)

    def forget_idle(self) -> None:
        """Close what is kept: after a broken connection its neighbours are likely to be dead, too."""
        while self._idle:
            self._idle.pop().abort()

    def abort(self) -> None:
        """Close every socket, with what runs on it, and stay usable: the server is known to be gone."""
        self._aborts += 1
        for connection in [*self._idle, *self._live]:
            connection.abort()
        self._idle.clear()

    async def close(self) -> None:
        """Close every socket, with what runs on it; returns when they are gone.  Idempotent."""
        self._closed = True
        everyone = [*self._idle, *self._live]
        self._idle.clear()
        for connection in everyone:
            connection.abort()
        if everyone:
            await asyncio.wait([connection.gone for connection in everyone], timeout=1.0)

    def _take(self, now: float) -> Connection | None:
        # The last one in is the likeliest to be open still.
        while self._idle:
            connection = self._idle.pop()
            if connection.usable() and connection.idle_since >= now - _IDLE_S:
                return connection
            connection.abort()
        return None

    def _drop(self, connection: Connection) -> None:
        self._live.discard(connection)
        connection.finish()
        connection.abort()

    async def _connect(self, loop: asyncio.AbstractEventLoop, deadline: float) -> Connection:
        if self._closed:
            raise HttpFailure("this engine is closed")
        limit = min(deadline, loop.time() + self._connect_timeout_s)
        try:
            async with asyncio.timeout_at(limit):
                connection = await self._dial(lambda: Connection(loop))
        except TimeoutError as error:
            if loop.time() >= deadline:
                raise DeadlinePassed from error
            raise HttpFailure(f"no connection within {self._connect_timeout_s:g} s") from error
        except ssl.SSLCertVerificationError as error:
            raise HttpFailure(f"its certificate is refused: {error.verify_message}") from error
        except ssl.SSLError as error:
            raise HttpFailure(f"TLS failed: {error.reason or type(error).__name__}") from error
        except OSError as error:
            raise HttpFailure(f"no connection: {_reason(error)}") from error
        return connection

    async def _straight(self, factory: Callable[[], Connection]) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(factory, self._host, self._port, ssl=self._tls)
        return connection


def _reason(error: OSError) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "connection refused, so nothing listens there"
    text = error.strerror or str(error) or type(error).__name__
    return text[:200]
