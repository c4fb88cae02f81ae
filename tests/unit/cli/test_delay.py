"""The simulated line, with real sockets: late, in order, whole."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from ondol.cli.delay import Line

pytestmark = pytest.mark.anyio

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[int]:
    """A server; its port.  At the end every handler has ended too, and closed its connection."""
    running: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await handler(reader, writer)
        with contextlib.suppress(ConnectionError):
            await close(writer)

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(handle(reader, writer))
        running.add(task)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await asyncio.gather(*running)
        await server.wait_closed()


@asynccontextmanager
async def behind_a_line(handler: Handler, delay_s: float) -> AsyncIterator[int]:
    """A server behind a line; the port of the line."""
    async with serving(handler) as far:
        line = Line(to_port=far, delay_s=delay_s)
        port = await line.open()
        try:
            yield port
        finally:
            await line.close()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send back what comes, until its end."""
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


async def close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    await writer.wait_closed()


async def test_a_round_trip_takes_both_delays() -> None:
    async with behind_a_line(echo, 0.05) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        loop = asyncio.get_running_loop()
        start = loop.time()

        writer.write(b"ping")
        answer = await reader.readexactly(4)

        # A lower bound only: a busy machine may be later, never earlier (the clock's step aside).
        assert loop.time() - start >= 0.099
        assert answer == b"ping"
        await close(writer)


async def test_many_bytes_arrive_whole_and_in_order_and_the_end_comes_last() -> None:
    sent = bytes(range(256)) * 4096 * 24  # more than a line holds at once
    async with behind_a_line(echo, 0.01) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)

        async def send() -> None:
            writer.write(sent)
            await writer.drain()
            writer.write_eof()

        sending = asyncio.create_task(send())
        received = await reader.read(-1)
        await sending

        assert hashlib.sha256(received).digest() == hashlib.sha256(sent).digest()
        await close(writer)


async def test_pieces_of_a_stream_are_not_held_back_for_each_other() -> None:
    gate = asyncio.Event()

    async def two_pieces(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"first")
        await gate.wait()
        writer.write(b"second")

    async with behind_a_line(two_pieces, 0.01) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)

        assert await reader.readexactly(5) == b"first"
        gate.set()
        assert await reader.read(-1) == b"second"
        await close(writer)


async def test_a_server_that_is_gone_leaves_the_caller_without_an_answer() -> None:
    async with serving(echo) as port_of_nobody:
        pass
    line = Line(to_port=port_of_nobody, delay_s=0.01)
    port = await line.open()

    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"hello")

    assert await reader.read(-1) == b""
    await close(writer)
    await line.close()


async def test_closing_the_line_ends_every_connection() -> None:
    async with serving(echo) as far:
        line = Line(to_port=far, delay_s=0.01)
        port = await line.open()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"x")
        await reader.readexactly(1)

        await line.close()

        assert await reader.read(-1) == b""
        with pytest.raises(ConnectionError):
            await asyncio.open_connection("127.0.0.1", port)
        await close(writer)
