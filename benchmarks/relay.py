"""Bare servers of the gateway's own parts: relays without any pipeline, and a fixed answer.

python -m benchmarks.relay --port P --instant PORT --paced PORT    what server and pyreqwest can do
… --own-client                                                     and with the client of our engines
python -m benchmarks.relay --port P --fixed                        what the server alone can do
"""

from __future__ import annotations

import argparse
import asyncio
import signal
from typing import Any

import uvloop
from granian.constants import HTTPModes, Interfaces
from granian.server.embed import Server
from pyreqwest.client import Client, ClientBuilder

from benchmarks.target import completion
from ondol.net.connections import Http1Client

JSON = [("content-type", "application/json")]
EVENTS = [("content-type", "text/event-stream"), ("cache-control", "no-store")]
TEXT = [("content-type", "text/plain")]
OWN_HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n"
)
BACKLOG = 8192
"""The default of 128 would cap the open connections too."""


class Relay:
    """Passes a body on and the answer back; `/stream/…` goes to the paced upstream, as it comes."""

    def __init__(self, instant_port: int, paced_port: int) -> None:
        """The client is made on first use, inside the running loop."""
        self._instant = f"http://127.0.0.1:{instant_port}/v1/chat/completions"
        self._paced = f"http://127.0.0.1:{paced_port}/v1/chat/completions"
        self._client: Client | None = None

    async def __call__(self, scope: Any, protocol: Any) -> None:
        """Answer one request (RSGI)."""
        if self._client is None:
            self._client = ClientBuilder().no_proxy().pool_max_idle_per_host(4096).build()
        if scope.path == "/healthz":
            protocol.response_str(200, TEXT, "ok")
            return
        body = await protocol()
        if scope.path.startswith("/stream/"):
            await self._stream(self._client, body, protocol)
            return
        request = self._client.post(self._instant).header("content-type", "application/json")
        response = await request.body_bytes(body).build().send()
        protocol.response_bytes(response.status, JSON, bytes(await response.bytes()))

    async def _stream(self, client: Client, body: bytes, protocol: Any) -> None:
        request = client.post(self._paced).header("content-type", "application/json").body_bytes(body)
        # 0: hand on what has come; the default reads 64 KiB ahead and holds events back.
        async with request.streamed_read_buffer_limit(0).build_streamed() as response:
            transport = protocol.response_stream(response.status, EVENTS)
            reader = response.body_reader
            while (chunk := await reader.read_chunk()) is not None:
                await transport.send_bytes(bytes(chunk))


class OwnRelay:
    """The same relay on `ondol.net.connections`."""

    def __init__(self, instant_port: int, paced_port: int) -> None:
        """One pool for each upstream; imported here, so that the other servers need nothing of ours."""
        self._instant, self._paced = (
            Http1Client("127.0.0.1", port, tls=None, connect_timeout_s=5.0, read_timeout_s=60.0)
            for port in (instant_port, paced_port)
        )

    async def __call__(self, scope: Any, protocol: Any) -> None:
        """Answer one request (RSGI)."""
        if scope.path == "/healthz":
            protocol.response_str(200, TEXT, "ok")
            return
        body = await protocol()
        head = OWN_HEAD % len(body)
        deadline = asyncio.get_running_loop().time() + 120.0
        if scope.path.startswith("/stream/"):
            connection = await self._paced.send(head, body, deadline)
            try:
                transport = protocol.response_stream(connection.status, EVENTS)
                while (chunk := await connection.read()) is not None:
                    await transport.send_bytes(chunk)
            finally:
                self._paced.release(connection)
            return
        connection = await self._instant.send(head, body, deadline)
        try:
            parts = []
            while (part := await connection.read()) is not None:
                parts.append(part)
        finally:
            self._instant.release(connection)
        protocol.response_bytes(connection.status, JSON, b"".join(parts))


class Fixed:
    """Reads the body and gives one answer."""

    def __init__(self) -> None:
        """Encode the answer once."""
        self._answer = completion()

    async def __call__(self, scope: Any, protocol: Any) -> None:
        """Answer one request (RSGI)."""
        if scope.method == "POST":
            await protocol()
        protocol.response_bytes(200, JSON, self._answer)


async def serve(app: Relay | OwnRelay | Fixed, port: int) -> None:
    """Serve until SIGTERM or SIGINT."""
    server = Server(
        app,
        address="127.0.0.1",
        port=port,
        interface=Interfaces.RSGI,
        http=HTTPModes.http1,
        websockets=False,
        backlog=BACKLOG,
        log_enabled=False,
    )
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, server.stop)
    await server.serve()


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--instant", type=int, default=0)
    parser.add_argument("--paced", type=int, default=0)
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--own-client", action="store_true")
    options = parser.parse_args()
    kind = OwnRelay if options.own_client else Relay
    app = Fixed() if options.fixed else kind(options.instant, options.paced)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(app, options.port))


if __name__ == "__main__":
    main()
