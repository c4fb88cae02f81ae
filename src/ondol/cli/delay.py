"""A simulated line: a TCP relay that hands every byte on a fixed time later, in order.

It stands in for distance where a "cloud" runs on the same machine.  Only data is delayed: opening a
connection is not, because the kernel does that before anybody is asked.  Throughput is not limited, up to
`IN_FLIGHT_BYTES` on the way in each direction (at 40 ms that is 400 MB/s); past that the sender waits.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final, cast

IN_FLIGHT_BYTES: Final = 16 * 1024 * 1024
CONNECT_TIMEOUT_S: Final = 5.0


class _End(asyncio.Protocol):
    """One end of a relayed connection: what arrives here leaves at `other`, `delay_s` later.

    The queue holds what is on the way: bytes, `b""` for the end of the stream, None for the close of the
    connection.  Every item has a timer, and a timer takes the oldest item, so order holds also where two
    timers fall together.  Timers that fall before the far side is connected are counted as `overdue`.
    """

    def __init__(self, line: Line) -> None:
        self.line = line
        self.other: _End | None = None
        self.transport: asyncio.Transport | None = None
        self.queue: deque[bytes | None] = deque()
        self.queued_bytes = 0
        self.overdue = 0
        self.far_is_full = False
        self.has_ended = False
        self.gone = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # The loop hands a protocol of a stream socket a stream transport.
        self.transport = cast(asyncio.Transport, transport)
        self.line.ends.add(self)

    def data_received(self, data: bytes) -> None:
        self.queued_bytes += len(data)
        self._later(data)
        self._regulate()

    def eof_received(self) -> bool:
        self._later(b"")
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.line.ends.discard(self)
        self.gone.set()
        if exc is None:
            self._later(None)
        elif self.other is not None and self.other.transport is not None:
            self.other.transport.abort()

    def pause_writing(self) -> None:
        if self.other is not None:
            self.other.far_is_full = True
            self.other._regulate()

    def resume_writing(self) -> None:
        if self.other is not None:
            self.other.far_is_full = False
            self.other._regulate()

    def join(self, other: _End) -> None:
        """Name the far side, and hand on what came in before it was there."""
        self.other = other
        for _ in range(self.overdue):
            self._deliver()
        self._regulate()

    def _later(self, item: bytes | None) -> None:
        self.queue.append(item)
        asyncio.get_running_loop().call_later(self.line.delay_s, self._deliver)

    def _deliver(self) -> None:
        if self.other is None:
            self.overdue += 1
            return
        item = self.queue.popleft()
        self.queued_bytes -= len(item or b"")
        out = self.other.transport
        if out is None or out.is_closing():
            return
        if item is None:
            out.close()
        elif item:
            out.write(item)
        else:
            self._hand_on_end(self.other, out)
        self._regulate()

    def _hand_on_end(self, other: _End, out: asyncio.Transport) -> None:
        """Pass the end of the stream on; after both directions have ended the connection is over."""
        self.has_ended = True
        if other.has_ended:
            out.close()
            if self.transport is not None:
                self.transport.close()
        elif out.can_write_eof():
            out.write_eof()

    def _regulate(self) -> None:
        """Read on only while the far side takes the bytes and the line has room."""
        if self.transport is None or self.transport.is_closing():
            return
        if self.far_is_full or self.queued_bytes > IN_FLIGHT_BYTES:
            self.transport.pause_reading()
        else:
            self.transport.resume_reading()


class Line:
    """A relay from a port of this machine to another, each direction `delay_s` late.

    It owns its listening socket and every connection through it; `close` ends them all.
    """

    def __init__(self, *, to_port: int, delay_s: float, host: str = "127.0.0.1") -> None:
        """Name the far end; nothing is opened before `open`."""
        self.to_port = to_port
        self.delay_s = delay_s
        self.host = host
        self.ends: set[_End] = set()
        self._joins: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def open(self, port: int = 0) -> int:
        """Listen; the port that it listens on.

        Raises:
            OSError: the port is taken.
        """
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._accept, self.host, port, backlog=1024)
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    async def close(self) -> None:
        """End every connection and stop listening."""
        if self._server is not None:
            self._server.close()
        for join in list(self._joins):
            join.cancel()
        await asyncio.gather(*self._joins, return_exceptions=True)
        ends = list(self.ends)
        for end in ends:
            if end.transport is not None:
                end.transport.abort()
        # An aborted transport closes its socket at the loop's next turn.
        await asyncio.gather(*(end.gone.wait() for end in ends))
        if self._server is not None:
            await self._server.wait_closed()

    def _accept(self) -> _End:
        near = _End(self)
        join = asyncio.get_running_loop().create_task(self._join(near))
        self._joins.add(join)
        join.add_done_callback(self._joins.discard)
        return near

    async def _join(self, near: _End) -> None:
        """Connect the far side; a caller of a far side that is gone sees its connection end unanswered."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, far = await loop.create_connection(lambda: _End(self), self.host, self.to_port)
        except (OSError, TimeoutError):
            await asyncio.sleep(self.delay_s)
            if near.transport is not None:
                near.transport.abort()
            return
        near.join(far)
        far.join(near)
