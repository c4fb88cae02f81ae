"""A model over a line that is cut again and again: how many bytes did it cost?  Used by tests and by the benchmark."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from zoneinfo import ZoneInfo

import msgspec
from tests.model_files import KEYS, RangeServer, model, signed

from ondol.adapters.clock import SystemClock
from ondol.adapters.fleet_models import FleetModels
from ondol.adapters.model_transfer import ModelTransfer, Terms
from ondol.adapters.transfer_sources import HttpSource

_LINE_BYTES = 16 * 1024


class CutResult(msgspec.Struct, frozen=True, kw_only=True):
    """`wire` counts every byte that the sender put on the line, headers and lost ones too."""

    size: int
    wire: int
    cuts: int
    requests: int

    @property
    def ratio(self) -> float:
        """Bytes on the wire for each byte of the model."""
        return self.wire / self.size


class CuttingRelay:
    """Passes bytes to a server and back, and resets both sides each time `every` more bytes have come back.

    It stands for the line, so it holds as little as one does: what is counted has left the sender, and only what is
    in these buffers is lost by a cut.
    """

    def __init__(self, port: int, *, every: int, cuts: int) -> None:
        self.wire = 0
        self.cuts = 0
        self._target = port
        self._every = every
        self._left = cuts
        self._next = every

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        """Listen; the address."""
        server = await asyncio.start_server(self._pass, "127.0.0.1", 0)
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            await server.wait_closed()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, out = await asyncio.open_connection("127.0.0.1", self._target, limit=_LINE_BYTES)
        writer.transport.set_write_buffer_limits(high=0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LINE_BYTES)
        up = asyncio.create_task(_copy(reader, out))
        try:
            while data := await there.read(_LINE_BYTES):
                self.wire += len(data)
                if self._left and self.wire >= self._next:
                    self._left -= 1
                    self.cuts += 1
                    self._next = self.wire + self._every
                    return  # what was just read is lost
                writer.write(data)
                await writer.drain()
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            up.cancel()
            for one in (writer, out):
                raw = one.get_extra_info("socket")
                if raw is not None and raw.fileno() >= 0:
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                one.transport.abort()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(_LINE_BYTES):
            writer.write(data)
            await writer.drain()


async def cut_transfer(folder: Path, *, megabytes: float = 90, cuts: int = 50) -> CutResult:
    """Fetch a model of that size over loopback while the line is reset `cuts` times, evenly over its bytes."""
    path = folder / "model.gguf"
    path.write_bytes(model(megabytes, seed=7))
    artifact, envelope = signed(path)
    server = RangeServer()
    server.offer(path, envelope, artifact)
    clock = SystemClock()
    transfer = ModelTransfer(
        FleetModels(folder / "models"),
        keys=lambda: KEYS,
        clock=clock,
        terms=lambda: Terms(zone=ZoneInfo("UTC")),
    )
    async with server.running():
        relay = CuttingRelay(server.port, every=artifact.size // (cuts + 1), cuts=cuts)
        async with relay.running() as url:
            source = HttpSource(url, name="hub")
            try:
                fetched = await transfer.fetch(artifact.digest, [source])
            finally:
                await source.close()
    assert fetched.held.path.read_bytes() == path.read_bytes()
    return CutResult(size=artifact.size, wire=relay.wire, cuts=relay.cuts, requests=fetched.requests)
