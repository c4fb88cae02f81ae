"""Whether a server answers, and how far it is: one small request a second, judged by a few rules.

A server is away once two probes in a row got nothing within a second each; any answer, also a refusal, means that it
is there.  It is ready while it answers 200.  One that was away must answer twice in a row before it counts again, so
that a line that flaps does not pull callers to and fro.  What comes from the server by another way in the meantime
counts as an answer (`heard`): a full server that streams is not dead because a probe waited.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import statistics
from collections import deque
from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit

from ondol.errors import InvalidRequest
from ondol.net.connections import Http1Client
from ondol.net.http1 import DeadlinePassed, HttpFailure

INTERVAL_S: Final = 1.0
PROBE_S: Final = 1.0
SILENT_MAX: Final = 2
BACK_AFTER: Final = 2
_RTTS: Final = 8


def client_of(
    url: str, *, tls: ssl.SSLContext | None, connect_timeout_s: float, read_timeout_s: float
) -> Http1Client:
    """A pool of connections to an address like `https://host:8443`; `tls` None trusts the machine's authorities.

    Raises:
        InvalidRequest: it is no http or https address of a host alone.
    """
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = -1
    plain = parts.path in ("", "/") and not parts.query and parts.username is None and url.isascii()
    if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or not plain:
        raise InvalidRequest(
            f"found the address {url[:100]!r}, expected http://HOST:PORT or https://HOST[:PORT]"
        )
    secure = parts.scheme == "https"
    return Http1Client(
        parts.hostname, port or (443 if secure else 80), tls=(tls or ssl.create_default_context()) if secure else None,
        connect_timeout_s=connect_timeout_s, read_timeout_s=read_timeout_s,
    )  # fmt: skip


class Probe:
    """Asks one server's `/readyz` for as long as `run` runs.  `changed` is called when a judgement changes.

    Until the first answer or failure it counts as ready: whoever has just started must try somebody.
    `why` says, while it is not ready, what is wrong.
    """

    def __init__(
        self, url: str, *, tls: ssl.SSLContext | None = None, changed: Callable[[Probe], None] | None = None
    ) -> None:
        """Probe nothing yet.  Raises: as `client_of`."""
        self.url = url.rstrip("/")
        self.alive = True
        self.ready = True
        self.known = False
        self.why = ""
        self._changed = changed
        self._client = client_of(url, tls=tls, connect_timeout_s=PROBE_S, read_timeout_s=PROBE_S)
        self._head = (
            f"GET /readyz HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nUser-Agent: ondol\r\n\r\n"
        ).encode()
        self._rtts_ms: deque[float] = deque(maxlen=_RTTS)
        self._silent = 0
        self._good = 0
        self._heard_s = 0.0

    @property
    def rtt_ms(self) -> float | None:
        """The median of the last answers' times, in milliseconds; None before the first."""
        return statistics.median(self._rtts_ms) if self._rtts_ms else None

    def heard(self) -> None:
        """Something came from this server by another way."""
        self._heard_s = asyncio.get_running_loop().time()

    async def run(self) -> None:
        """Probe once a second, until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                began_s = loop.time()
                await self.once()
                await asyncio.sleep(max(0.0, began_s + INTERVAL_S - loop.time()))
        finally:
            await self.close()

    async def close(self) -> None:
        """Close the connection that is kept."""
        await self._client.close()

    async def once(self) -> None:
        """One probe; at most a second."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        status, why = 0, ""
        try:
            connection = await self._client.send(self._head, b"", began_s + PROBE_S)
            status = connection.status
            with contextlib.suppress(HttpFailure, DeadlinePassed):
                while await connection.read() is not None:
                    continue
            self._client.release(connection)
            self._rtts_ms.append(1000 * (loop.time() - began_s))
        except DeadlinePassed:
            why = f"it did not answer within {PROBE_S:g} s"
        except HttpFailure as error:
            why = str(error)
        self._judge(status, why, spoke=self._heard_s >= began_s)

    def _judge(self, status: int, why: str, *, spoke: bool) -> None:
        before = self.alive, self.ready
        if status or spoke:
            self._silent = 0
            self._good += 1
            self.alive = self.alive or self._good >= BACK_AFTER
            well = status == 200 or (not status and self.ready)
            self.ready = self.alive and well
            self.why = "" if well else f"it says that it is not ready (HTTP {status})"
        else:
            self._good = 0
            self._silent += 1
            self.why = why
            if self._silent >= SILENT_MAX or not self.known:
                self.alive = self.ready = False
        self.known = True
        if self._changed is not None and before != (self.alive, self.ready):
            self._changed(self)
