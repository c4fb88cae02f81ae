"""A server for `test_http_payloads`: granian with the guard in front of a handler that says what it saw.

Usage: http_echo_app.py HEADER_TIMEOUT_S CONNECTIONS.  Prints the port, then serves until it is ended.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from typing import Any

from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.server.embed import Server

from ondol.core.catalog import Limits
from ondol.units import NS_PER_S
from ondol.wire.guard import BodyMeter, HeadGuard, Refusal

LIMITS = Limits(body_grace_s=2.0)
GUARD = HeadGuard(["ok"], LIMITS)


async def read_body(scope: Any, proto: Any) -> bytes | Refusal:
    """The whole body, or why there is none; as the gateway reads it."""
    meter = BodyMeter(LIMITS, time.monotonic_ns(), scope.headers.get("content-length"))
    if refusal := meter.begin():
        return refusal
    parts: list[bytes] = []
    chunks = aiter(proto)
    while True:
        try:
            async with asyncio.timeout(meter.patience_ns(time.monotonic_ns()) / NS_PER_S):
                chunk = await anext(chunks)
        except TimeoutError:
            return meter.too_slow()
        except StopAsyncIteration:
            return meter.finish() or b"".join(parts)
        if refusal := meter.feed(chunk):
            return refusal
        parts.append(chunk)


async def app(scope: Any, proto: Any) -> None:
    """Check, read, echo."""
    headers = scope.headers
    answer = GUARD.check(scope.method, scope.path, scope.authority, headers.items(), headers.keys())
    body = answer or await read_body(scope, proto)
    if isinstance(body, Refusal):
        proto.response_str(
            body.status, [("content-type", "text/plain"), ("connection", "close")], body.message
        )
        return
    seen = json.dumps({"path": scope.path, "body": body.decode("latin-1"), "headers": headers.items()})
    proto.response_str(200, [("content-type", "application/json")], seen)


async def main(header_timeout_s: int, connections: int) -> None:
    """Serve on a port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = Server(
        app,
        address="127.0.0.1",
        port=port,
        interface=Interfaces.RSGI,
        http=HTTPModes.http1,
        websockets=False,
        backlog=1024,
        backpressure=connections,
        log_enabled=False,
        http1_settings=HTTP1Settings(header_read_timeout=header_timeout_s * 1000),
    )
    serving = asyncio.create_task(server.serve())
    while not serving.done():
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.02)
            continue
        writer.close()
        await writer.wait_closed()
        break
    print(port, flush=True)
    await serving


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
