"""An SSE upstream that sends each token at its time, and says in the token when it sent it.

The request's prompt says the pace, so that it passes any gateway unchanged: `rate=5 tokens=100` gives 100
tokens, 5 a second, the first at once.  A token's text is the time of sending (CLOCK_MONOTONIC, ns), so a
client on the same machine sees how long each one took, whatever a gateway did to the JSON around it.
Without `"stream": true` the answer is the fixed completion, after `wait=2` seconds where the prompt says so.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import signal
import time
from typing import cast

import uvloop

from benchmarks.target import completion

PACE = re.compile(rb"rate=([0-9.]+) tokens=(\d+)")
WAIT = re.compile(rb"wait=([0-9.]+)")
LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
STREAM = re.compile(rb'"stream": *true')
HEADER = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
EVENT = (
    b'data: {"id":"chatcmpl-paced","object":"chat.completion.chunk","created":1760000000,'
    b'"model":"bench-model","choices":[{"index":0,"delta":{%s"content":"%d "},"finish_reason":%s}]}\n\n'
)
USAGE = (
    b'data: {"id":"chatcmpl-paced","object":"chat.completion.chunk","created":1760000000,'
    b'"model":"bench-model","choices":[],"usage":{"prompt_tokens":34,"completion_tokens":%d,'
    b'"total_tokens":%d}}\n\n'
)
LAST = b"data: [DONE]\n\n"
RATE_MAX = 1000.0
TOKENS_MAX = 10_000
WAIT_S_MAX = 60.0


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class Paced(asyncio.Protocol):
    """One connection; requests on it are answered one after the other."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Keep the loop for its timers."""
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        # A cast: uvloop's transports have the methods, but not the class.
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio calls it so
        """Stop sending."""
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Answer once the request is whole."""
        self._received += data
        end = self._received.find(b"\r\n\r\n")
        if end < 0 or self._transport is None:
            return
        length = LENGTH.search(self._received, 0, end)
        whole = end + 4 + (int(length[1]) if length else 0)
        if len(self._received) < whole:
            return
        body, self._received = self._received[end + 4 : whole], self._received[whole:]
        if not STREAM.search(body):
            wait = WAIT.search(body)
            if wait is None:
                self._answer()
            else:
                self._timer = self._loop.call_later(min(float(wait[1]), WAIT_S_MAX), self._answer)
            return
        pace = PACE.search(body)
        rate = min(float(pace[1]), RATE_MAX) if pace else 50.0
        tokens = min(int(pace[2]), TOKENS_MAX) if pace else 10
        self._transport.write(HEADER)
        self._send(0, tokens, 1.0 / rate, self._loop.time())

    def _answer(self) -> None:
        if self._transport is None:
            return
        answer = completion()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        self._transport.write(head % len(answer) + answer)

    def _send(self, index: int, tokens: int, interval_s: float, due_s: float) -> None:
        if self._transport is None:
            return
        role = b'"role":"assistant",' if index == 0 else b""
        last = index + 1 == tokens
        event = EVENT % (role, time.monotonic_ns(), b'"stop"' if last else b"null")
        if not last:
            self._transport.write(_chunk(event))
            due_s += interval_s  # from the plan, not from now: a late token does not delay the rest
            self._timer = self._loop.call_at(due_s, self._send, index + 1, tokens, interval_s, due_s)
            return
        self._transport.write(
            _chunk(event) + _chunk(USAGE % (tokens, 34 + tokens)) + _chunk(LAST) + b"0\r\n\r\n"
        )


async def serve(port: int) -> None:
    """Serve until SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stop.set)
    server = await loop.create_server(lambda: Paced(loop), "127.0.0.1", port, backlog=8192)
    async with server:
        await stop.wait()


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(options.port))


if __name__ == "__main__":
    main()
