"""One HTTP/1.1 connection to a server, and the time limits on what is asked over it.

Owns a socket and its framing (llhttp, through httptools, does the parsing, with no leniency on) and
knows nothing of JSON or SSE.  Not here on purpose: redirects, cookies, proxies, compression.
Invariant: a connection may serve again only when its last answer ended cleanly.  See
docs/adr/0005-http-client.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, cast

import httptools

HEAD_BYTES_MAX: Final = 64 * 1024
_UNREAD_HIGH: Final = 256 * 1024
"""Above this much unread body the socket is left alone, so that a slow reader slows the sender."""
_TWO_ANSWERS: Final = "the server sent more than one answer to a request"


class HttpFailure(Exception):
    """The exchange broke; the text says how, and never holds content."""


class DeadlinePassed(Exception):
    """The absolute deadline of the request came first."""


class Connection(asyncio.Protocol):
    """One socket, one request at a time.  Owned by the pool while idle, by the request otherwise."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start without a transport; the loop hands it over."""
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._error: Exception | None = None
        self._busy = False
        self._then: Callable[[Connection], None] | None = None
        self.gone = loop.create_future()
        self.idle_since = 0.0
        self.taken = False
        self._reset()

    def _reset(self) -> None:
        self.status = 0
        self._headers: list[tuple[bytes, bytes]] = []
        self._parts: list[bytes] = []
        self._unread = 0
        self._paused = False
        self._head_bytes = 0
        self._has_head = False
        self._sized = False
        self._complete = False
        self._keep = False
        self.received = False

    # -- the request's side ------------------------------------------------------------------------

    def begin(self, head: bytes, body: bytes, deadline: float, read_timeout_s: float) -> None:
        """Send a request.  `deadline` is on the loop's clock; `read_timeout_s` is the longest silence."""
        self._reset()
        self._busy = True
        self._deadline = deadline
        self._read_timeout_s = read_timeout_s
        now = self._loop.time()
        self._waiting_since = now
        self._timer = self._loop.call_at(min(deadline, now + read_timeout_s), self._tick)
        if self._error is None and self._transport is not None:
            if len(body) < 64 * 1024:
                self._transport.write(head + body)
            else:
                self._transport.writelines((head, body))

    async def answered(self) -> None:
        """Return once status and headers are here.

        Raises:
            HttpFailure: the connection broke, timed out or spoke no HTTP.
            DeadlinePassed: the deadline came first.
        """
        while not self._has_head:
            if self._error is not None:
                raise self._error
            await self._wait()

    async def read(self) -> bytes | None:
        """What has come of the body, as soon as anything has; None at its end.

        Raises: as `answered`.
        """
        while True:
            parts = self._parts
            if parts:
                data = parts[0] if len(parts) == 1 else b"".join(parts)
                self._parts = []
                self._unread = 0
                if self._paused and self._transport is not None:
                    self._paused = False
                    self._transport.resume_reading()
                return data
            if self._complete:
                return None
            if self._error is not None:
                raise self._error
            await self._wait()

    def header(self, name: bytes) -> str | None:
        """The first header of this lower-case name; None when there is none."""
        for key, value in self._headers:
            if len(key) == len(name) and key.lower() == name:
                return value.decode("latin-1").strip()
        return None

    def headers(self) -> dict[str, str]:
        """All headers by lower-case name; of several with one name the first."""
        found: dict[str, str] = {}
        for key, value in self._headers:
            found.setdefault(key.decode("latin-1").lower(), value.decode("latin-1").strip())
        return found

    def finish(self) -> bool:
        """End the request; true when the connection may serve another, else it is closed now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._busy = False
        if self._error is not None:
            # It was raised through the frames of whoever asked, which hold us: a circle that would keep, until some
            # garbage collection, also the caller's reply open.
            self._error.__traceback__ = None
        if (
            self._complete
            and self._error is None
            and not self._parts
            and self._transport is not None
            and not self._transport.is_closing()
            # An answer before the request has left (a 413) leaves the rest of it in the way.
            and self._transport.get_write_buffer_size() == 0
            and self._keep
        ):
            return True
        self.abort()
        return False

    def linger(self, then: Callable[[Connection], None], limit_s: float) -> None:
        """Let the rest of an answer come that nobody waits for; `then` runs once, at its end.

        The end is the last of the body, a broken connection, or `limit_s`.
        """
        if self._timer is not None:
            self._timer.cancel()
        self._parts = []
        self._unread = 0
        self._then = then
        self._timer = self._loop.call_later(limit_s, self._fail, HttpFailure("the answer did not end"))

    @property
    def complete(self) -> bool:
        """Whether the whole answer has come."""
        return self._complete

    def abort(self) -> None:
        """Close the socket at once."""
        if self._transport is not None:
            self._transport.abort()

    def usable(self) -> bool:
        """Whether an idle connection is still open, as far as this side can know."""
        return self._error is None and self._transport is not None and not self._transport.is_closing()

    # -- the loop's side ---------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        # uvloop's transports are no subclass of asyncio.Transport, so isinstance cannot tell.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Parse what came; a word out of turn closes the connection."""
        if not self._busy or self._complete:
            self._fail(HttpFailure(_TWO_ANSWERS))
            return
        self.received = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if not self.complete:
                self._fail(HttpFailure(f"what the server sent is not HTTP/1.1 ({type(error).__name__})"))
                return
            # A whole answer, and then something else: the answer counts, the connection does not.
            self._error = HttpFailure(_TWO_ANSWERS)
        if not self._has_head:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES_MAX:
                self._fail(HttpFailure(f"the headers of the answer pass {HEAD_BYTES_MAX} bytes"))
                return
        if self._unread > _UNREAD_HIGH and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> bool:
        """Let the transport close; what that means is decided in `connection_lost`."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """End what waits.  An answer without a length ends here, every other one is broken."""
        if self._busy and self._has_head and not self._sized and not self._complete and exc is None:
            self._complete = True
        if self._error is None:
            cause = "reset" if isinstance(exc, ConnectionError) else "closed"
            place = "the connection before any answer" if not self._has_head else "it within the answer"
            self._error = HttpFailure(f"the server {cause} {place}")
        if not self.gone.done():
            self.gone.set_result(None)
        self._wake()

    # -- the parser's side -------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header, and note whether the answer has an end of its own."""
        if self._has_head:
            return  # a trailer
        self._headers.append((name, value))
        if len(name) in {14, 17} and name.lower() in {b"content-length", b"transfer-encoding"}:
            self._sized = True

    def on_headers_complete(self) -> None:
        """Take the status; an interim answer (1xx) is not the answer."""
        status = self._parser.get_status_code()
        if self._has_head:
            self._error = HttpFailure(_TWO_ANSWERS)
        elif status >= 200:
            self._keep = self._parser.should_keep_alive()
            self.status = status
            self._has_head = True
            self._sized = self._sized or status in {204, 304}

    def on_body(self, body: bytes) -> None:
        """Keep a piece of the body."""
        if not self._complete and self._then is None:
            self._parts.append(body)
            self._unread += len(body)

    def on_message_complete(self) -> None:
        """Note the end; after an interim answer the headers start anew."""
        if self._has_head:
            self._complete = True
        else:
            self._headers = []
            self._sized = False

    # -- waiting -----------------------------------------------------------------------------------

    async def _wait(self) -> None:
        # The wait for the server starts here: time in which nobody asks is not the server's.
        self._waiting_since = self._loop.time()
        waiter = self._waiter = self._loop.create_future()
        try:
            await waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
        elif self._then is not None and (self._complete or self._error is not None):
            then, self._then = self._then, None
            then(self)

    def _fail(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
        self.abort()
        self._wake()

    def _tick(self) -> None:
        # One timer a request, moved when it fires, instead of one a read: reads cost no timer.
        now = self._loop.time()
        due = self._deadline
        if now >= due:
            self._fail(DeadlinePassed())
            return
        if self._waiter is not None:
            idle_due = self._waiting_since + self._read_timeout_s
            if now >= idle_due:
                self._fail(HttpFailure(f"the server sent nothing for {self._read_timeout_s:g} s"))
                return
            due = min(due, idle_due)
        else:
            due = min(due, now + self._read_timeout_s)
        # A clock of coarse ticks may fire early; a step forward keeps that from spinning.
        self._timer = self._loop.call_at(max(due, now + 0.001), self._tick)
