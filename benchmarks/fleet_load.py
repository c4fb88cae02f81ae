"""Clients of a site that note how each request ended, also when it ended badly."""

from __future__ import annotations

import asyncio
import time

import msgspec

from benchmarks.target import Target

FIRST_TEXT = b'"content":'


class Ended(msgspec.Struct, kw_only=True):
    """One request.  Times are CLOCK_MONOTONIC in seconds; `first_s` is 0 where no byte of an answer came.

    `status` is 0 where the connection ended before one.  `said_error` and `done` are what a stream's last events
    said; an answer in one piece is `done` when it is whole.
    """

    stream: bool
    began_s: float
    status: int = 0
    first_s: float = 0.0
    ended_s: float = 0.0
    deployment: str = ""
    said_error: bool = False
    done: bool = False

    @property
    def good(self) -> bool:
        """Answered to the end."""
        return self.status == 200 and self.done and not self.said_error

    @property
    def broken(self) -> bool:
        """The caller had a part of an answer, and the rest did not come."""
        return self.status == 200 and self.first_s > 0 and not self.good

    @property
    def failed(self) -> bool:
        """No byte of an answer was sent, and none came."""
        return not self.good and not self.broken


async def ask(target: Target, prompt: str, *, stream: bool, limit_s: float) -> Ended:
    """One request on a connection of its own, for `limit_s` at most."""
    ended = Ended(stream=stream, began_s=time.monotonic())
    try:
        async with asyncio.timeout(limit_s):
            await _exchange(target, prompt, ended)
    except (OSError, TimeoutError, asyncio.IncompleteReadError):
        pass  # what is noted so far says how it ended
    ended.ended_s = time.monotonic()
    return ended


async def _exchange(target: Target, prompt: str, ended: Ended) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
    try:
        writer.write(target.request(prompt, stream=ended.stream))
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        ended.status = int(head[9:12])
        fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
        ended.deployment = fields.get("x-ondol-deployment", "")
        if "content-length" in fields:
            body = await reader.readexactly(int(fields["content-length"]))
            ended.first_s = time.monotonic()
            ended.done = FIRST_TEXT in body
            return
        await _events(reader, ended)
    finally:
        writer.close()


async def _events(reader: asyncio.StreamReader, ended: Ended) -> None:
    tail = b""
    while data := await reader.read(65_536):
        tail += data
        if not ended.first_s and FIRST_TEXT in tail:
            ended.first_s = time.monotonic()
        ended.said_error |= b'data: {"error"' in tail
        ended.done |= b"data: [DONE]" in tail
        if tail.endswith(b"0\r\n\r\n"):
            return
        tail = tail[-256:]


class Load:
    """Clients that ask one after the other until told to stop."""

    def __init__(
        self, target: Target, *, clients: int, prompt: str, stream: bool, limit_s: float = 60.0
    ) -> None:
        """`prompt` says the pace, as benchmarks/paced_upstream.py reads it."""
        self.ended: list[Ended] = []
        self._stop = False
        self._tasks = [
            asyncio.create_task(
                self._client(target, f"{prompt} client={number}", stream=stream, limit_s=limit_s)
            )
            for number in range(clients)
        ]

    async def _client(self, target: Target, prompt: str, *, stream: bool, limit_s: float) -> None:
        while not self._stop:
            found = await ask(target, prompt, stream=stream, limit_s=limit_s)
            self.ended.append(found)
            if found.failed:
                await asyncio.sleep(0.05)  # a refusal is answered at once; no storm of them

    async def stop(self) -> list[Ended]:
        """Let the requests that run come to their end; all of them."""
        self._stop = True
        await asyncio.gather(*self._tasks)
        return self.ended
