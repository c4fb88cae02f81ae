"""A small OpenAI-compatible server over a real socket, good by default, bad on request.

`say(...)` queues what the next requests get; afterwards they are answered well again.  It notes what it
was asked and whether a client hung up, and never mends what a behaviour breaks.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from ondol.core.inference import InferenceRequest, Task
from ondol.engines.fake_answers import chunks_of, compose, embed, whole_of

MODEL = "real-model-1"
_TASKS = {
    "/v1/chat/completions": Task.CHAT,
    "/v1/completions": Task.COMPLETION,
    "/v1/embeddings": Task.EMBEDDING,
}


@dataclass
class Asked:
    """One request as it came."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    raw: bytes = b""


@dataclass
class Reply:
    """The answering side of one request."""

    asked: Asked
    writer: asyncio.StreamWriter
    server: FaultServer
    keep: bool = field(default=True)

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def head(self, line: str = "200 OK", kind: str = "application/json", **headers: str) -> None:
        lines = [f"HTTP/1.1 {line}", f"content-type: {kind}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        await self.send("\r\n".join(lines).encode() + b"\r\n\r\n")

    async def whole(self, body: bytes, line: str = "200 OK", **headers: str) -> None:
        await self.head(line, content_length=str(len(body)), **headers)
        await self.send(body)

    async def stream_head(self) -> None:
        await self.head(kind="text/event-stream; charset=utf-8", transfer_encoding="chunked")

    async def piece(self, data: bytes) -> None:
        """One chunk of a chunked body."""
        await self.send(b"%x\r\n%b\r\n" % (len(data), data))

    async def event(self, payload: bytes) -> None:
        await self.piece(b"data: " + payload + b"\n\n")

    async def end(self) -> None:
        await self.send(b"0\r\n\r\n")

    def reset(self) -> None:
        """Close with a TCP reset, as a crashed process or a firewall does."""
        self.keep = False
        self.writer.transport.abort()


Behaviour = Callable[[Reply], Awaitable[None]]


class FaultServer:
    """`async with FaultServer() as server: … server.url`."""

    def __init__(
        self, *, site: str | None = None, token_s: float = 0.0, tls: ssl.SSLContext | None = None
    ) -> None:
        """With a `site` it also speaks as a site of ours; `token_s` paces its streams."""
        self._tls = tls
        self.site = site
        self.token_s = token_s
        self.asked: list[Asked] = []
        self.connections = 0
        self.hung_up = asyncio.Event()
        self.arrived = asyncio.Event()
        self.keys: frozenset[str] | None = None
        self._queue: deque[Behaviour] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> FaultServer:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self._tls)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._server.wait_closed()

    @property
    def port(self) -> int:
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    @property
    def url(self) -> str:
        return f"{'http' if self._tls is None else 'https'}://127.0.0.1:{self.port}/v1"

    def say(self, *behaviours: Behaviour) -> None:
        """Queue what the next requests get, in order."""
        self._queue.extend(behaviours)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.connections += 1
        try:
            while await self._answer_one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _answer_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        raw = await reader.readexactly(int(headers.get("content-length", "0")))
        asked = Asked(first.split(" ")[1], headers, json.loads(raw or b"{}"), raw)
        self.asked.append(asked)
        self.arrived.set()
        reply = Reply(asked, writer, self)
        behaviour = self._queue.popleft() if self._queue else good
        work = asyncio.ensure_future(behaviour(reply))
        watch = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            if watch.done() and not work.done():
                self.hung_up.set()
                reply.keep = False
        finally:
            for task in (work, watch):
                task.cancel()
            await asyncio.wait({work, watch})
        if not work.cancelled() and isinstance(work.exception(), ConnectionError):
            self.hung_up.set()
            return False
        if not work.cancelled():
            work.result()
        return reply.keep


async def good(reply: Reply) -> None:
    """A right answer, whole or streamed, as OpenAI gives it."""
    asked, server = reply.asked, reply.server
    if server.keys is not None and asked.headers.get("authorization", "")[7:] not in server.keys:
        await reply.whole(_error("Incorrect API key provided: sk-***abcd"), "401 Unauthorized")
        return
    task = _TASKS[asked.path]
    ours: dict[str, str] = {}
    if server.site is not None and "x-ondol-origin" in asked.headers:
        ours = {
            "x-ondol-site": server.site,
            "x-ondol-request-id": "req-peer-1",
            "x-ondol-model": MODEL,
            "x-ondol-deployment": "helper-there",
            "x-ondol-cost": "0.0000124 USD",
            "x-ondol-energy-j": "1.5",
            "x-ondol-carbon-g": "0.0002",
            "x-ondol-cache": "miss",
        }
    if task is Task.EMBEDDING:
        await reply.whole(embed(asked.body, MODEL)[0], **ours)
        return
    count = asked.body.get("n") or 1
    request = InferenceRequest(task=task, route="", body=asked.body, n=count)
    limit = asked.body.get("max_completion_tokens") or asked.body.get("max_tokens") or 1000
    answer = compose(request, MODEL, max_output_tokens=limit, text=None, output_tokens=None)
    if not asked.body.get("stream"):
        await reply.whole(whole_of(answer), **ours)
        return
    await reply.stream_head()
    for data, _, _ in chunks_of(answer):
        await reply.event(data)
        if server.token_s:
            await asyncio.sleep(server.token_s)
    last = json.loads(answer.usage_chunk())
    if ours:
        last["ondol"] = {name[8:].replace("-", "_"): value for name, value in ours.items()}
    await reply.event(json.dumps(last).encode())
    await reply.event(b"[DONE]")
    await reply.end()


async def hang(reply: Reply) -> None:
    """Take the request and never answer."""
    await asyncio.sleep(3600)


async def reset_before(reply: Reply) -> None:
    """Reset the connection without a byte of an answer."""
    reply.reset()


async def close_before(reply: Reply) -> None:
    """Close the connection without a byte of an answer."""
    reply.keep = False


async def not_http(reply: Reply) -> None:
    """Answer in another protocol."""
    reply.keep = False
    await reply.send(b"SSH-2.0-OpenSSH_9.2p1\r\n")


async def endless_headers(reply: Reply) -> None:
    """Send header lines for ever."""
    await reply.send(b"HTTP/1.1 200 OK\r\n")
    while True:
        await reply.send(b"x-more: " + b"y" * 4000 + b"\r\n")


def raw(data: bytes, *, kind: str = "application/json", status: str = "200 OK", **headers: str) -> Behaviour:
    """Answer these bytes, whole, with the right length."""

    async def behaviour(reply: Reply) -> None:
        await reply.head(status, kind, content_length=str(len(data)), **headers)
        await reply.send(data)

    return behaviour


def status(line: str, message: str = "no", **headers: str) -> Behaviour:
    """Answer an error in OpenAI's form (`429 Too Many Requests`)."""
    return raw(_error(message), status=line, **headers)


def short(data: bytes, *, promised: int) -> Behaviour:
    """Promise more bytes than are sent, then close."""

    async def behaviour(reply: Reply) -> None:
        reply.keep = False
        await reply.head(content_length=str(promised))
        await reply.send(data)

    return behaviour


def long(data: bytes, extra: bytes) -> Behaviour:
    """Send more bytes than promised."""

    async def behaviour(reply: Reply) -> None:
        await reply.send(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(data)
            + data
            + extra
        )

    return behaviour


def stream(*pieces: bytes, after: str = "end", pause_s: float = 0.0) -> Behaviour:
    """Stream these bytes as they are; then `end`, `close` (no last chunk), `reset` or `hang`."""

    async def behaviour(reply: Reply) -> None:
        await reply.stream_head()
        for piece in pieces:
            await reply.piece(piece)
            if pause_s:
                await asyncio.sleep(pause_s)
        if after == "end":
            await reply.end()
        elif after == "close":
            reply.keep = False
        elif after == "reset":
            # The reset must not overtake what was sent.
            await asyncio.sleep(0.05)
            reply.reset()
        else:
            await asyncio.sleep(3600)

    return behaviour


def drip(data: bytes, *, every_s: float) -> Behaviour:
    """Stream these bytes one by one, over and over, without an end."""

    async def behaviour(reply: Reply) -> None:
        await reply.stream_head()
        while True:
            for at in range(len(data)):
                await reply.piece(data[at : at + 1])
                await asyncio.sleep(every_s)

    return behaviour


def chunk(text: str = "warm", **more: Any) -> bytes:
    """One chat chunk as an event."""
    return b"data: " + _chunk_json(text, **more) + b"\n\n"


def _chunk_json(text: str, *, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text} if text else {}, "finish_reason": finish}
    return json.dumps(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": MODEL,
            "choices": [choice],
        }
    ).encode()


def _error(message: str) -> bytes:
    return json.dumps(
        {"error": {"message": message, "type": "server_error", "param": None, "code": "some_code"}}
    ).encode()
