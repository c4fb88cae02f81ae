"""Many open streams at once, from one process: none may break, no token may be held back.

Reads one job as JSON on standard input and writes the figures as JSON on standard output.
"""

from __future__ import annotations

import asyncio
import re
import resource
import sys
import time
from typing import cast

import msgspec
import uvloop

from benchmarks.target import Target

STAMP = re.compile(rb'"content": ?"(\d{6,}) ')


class StreamJob(msgspec.Struct, frozen=True, kw_only=True):
    """`streams` of `tokens` each at `rate` a second, opened at `opened_per_s`."""

    target: Target
    streams: int
    rate: float
    tokens: int
    opened_per_s: float = 400.0


class StreamFigures(msgspec.Struct, kw_only=True):
    """What was seen; times in nanoseconds.

    `held_back` counts tokens that arrived only after the next one of their stream had been sent.
    `broken` counts streams that did not end with all tokens and `[DONE]`, by their cause.
    """

    completed: int = 0
    broken: dict[str, int] = {}
    tokens: int = 0
    held_back: int = 0
    all_open_s: float = 0.0
    delay_p50: int = 0
    delay_p99: int = 0
    delay_max: int = 0
    first_p50: int = 0
    first_p99: int = 0


class Stream(asyncio.Protocol):
    """One request and its stream."""

    def __init__(self, request: bytes, tokens: int, delays: list[int]) -> None:
        """`delays` is shared by all streams."""
        self._request = request
        self._tokens = tokens
        self._delays = delays
        self._tail = b""
        self._seen = 0
        self._sent_ns = 0
        self.first_ns = 0
        self.ended: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        # A cast: uvloop's transports have the methods, but not the class.
        self._transport = cast(asyncio.Transport, transport)
        self._sent_ns = time.monotonic_ns()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Count tokens and how long each took."""
        now = time.monotonic_ns()
        if not self._seen and not self._tail and not data.startswith(b"HTTP/1.1 200"):
            self._end(f"status {data[9:12].decode('latin-1')}")
            return
        text = self._tail + data
        at = 0
        for match in STAMP.finditer(text):
            if not self._seen:
                self.first_ns = now - self._sent_ns
            self._seen += 1
            self._delays.append(now - int(match[1]))
            at = match.end()
        if b"[DONE]" in text[at:]:
            self._end(None if self._seen == self._tokens else f"{self._seen} of {self._tokens} tokens")
        self._tail = text[max(at, len(text) - 64) :]

    def connection_lost(self, exc: Exception | None) -> None:
        """A loss before the end breaks the stream."""
        self._end(f"closed ({type(exc).__name__})" if exc else "closed early")

    def _end(self, problem: str | None) -> None:
        if not self.ended.done():
            self.ended.set_result(problem)

    def close(self) -> None:
        """Close the connection."""
        self._transport.close()


async def open_streams(job: StreamJob) -> StreamFigures:
    """Open them all, wait for their ends, and sum up."""
    loop = asyncio.get_running_loop()
    figures = StreamFigures()
    delays: list[int] = []
    prompt = f"rate={job.rate:g} tokens={job.tokens}"
    request = job.target.request(prompt, stream=True)
    start = loop.time()
    streams: list[Stream] = []
    for index in range(job.streams):
        await asyncio.sleep(max(0.0, start + index / job.opened_per_s - loop.time()))
        try:
            _, stream = await loop.create_connection(
                lambda: Stream(request, job.tokens, delays), "127.0.0.1", job.target.port
            )
        except OSError as error:
            _count(figures.broken, f"not opened ({type(error).__name__})")
            continue
        streams.append(stream)
    figures.all_open_s = loop.time() - start
    limit_s = job.tokens / job.rate * 2 + 30
    await asyncio.wait([stream.ended for stream in streams], timeout=limit_s)
    for stream in streams:
        problem = stream.ended.result() if stream.ended.done() else f"no end after {limit_s:.0f} s"
        if problem is None:
            figures.completed += 1
        else:
            _count(figures.broken, problem)
        stream.close()
    firsts = sorted(stream.first_ns for stream in streams if stream.first_ns)
    delays.sort()
    figures.tokens = len(delays)
    figures.held_back = sum(delay > 1e9 / job.rate for delay in delays)
    figures.delay_p50, figures.delay_p99, figures.delay_max = (_at(delays, q) for q in (0.5, 0.99, 1.0))
    figures.first_p50, figures.first_p99 = (_at(firsts, q) for q in (0.5, 0.99))
    return figures


def _count(counts: dict[str, int], key: str) -> None:
    counts[key] = counts.get(key, 0) + 1


def _at(ordered: list[int], quantile: float) -> int:
    return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))] if ordered else 0


def main() -> None:
    """Run the job of standard input."""
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=StreamJob)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        figures = runner.run(open_streams(job))
    sys.stdout.buffer.write(msgspec.json.encode(figures))


if __name__ == "__main__":
    main()
