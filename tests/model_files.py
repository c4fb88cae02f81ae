"""Small model files that are whole, and a server of ranges that cuts, lies and dawdles on request."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from ondol.adapters.fleet_models import describe
from ondol.core import chunks, dsse
from ondol.core.chunks import Artifact
from ondol.core.dsse import Envelope

PRIVATE = bytes(range(32))
PUBLIC = dsse.public_key(PRIVATE)
KEYS = {dsse.key_id(PUBLIC): PUBLIC}


def noise(size: int, seed: int = 0) -> bytes:
    """Bytes that look random and are the same every time."""
    return hashlib.shake_128(seed.to_bytes(8, "little")).digest(size)


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf(tensors: dict[str, bytes], name: str = "tiny") -> bytes:
    """A GGUF file of tensors of bytes, each a multiple of 32 long."""
    entries = [
        _text("general.architecture") + struct.pack("<I", 8) + _text("llama"),
        _text("general.name") + struct.pack("<I", 8) + _text(name),
    ]
    infos, offset = [], 0
    for one, data in tensors.items():
        infos.append(_text(one) + struct.pack("<IQIQ", 1, len(data), 24, offset))
        offset += len(data)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(entries)) + b"".join(entries) + b"".join(infos)
    return head + bytes(-len(head) % 32) + b"".join(tensors.values())


def model(megabytes: float = 3, seed: int = 0, name: str = "tiny") -> bytes:
    """A GGUF file of some tensors of 640 KiB, which differ by their seed."""
    size = 640 * 1024
    count = max(1, round(megabytes * 1024 * 1024 / size))
    return gguf({f"t{n}": noise(size, seed * 10_000 + n) for n in range(count)}, name)


def signed(path: Path, name: str = "tiny") -> tuple[Artifact, Envelope]:
    """The manifest of a file, signed by the key of the tests."""
    artifact = describe(path, name)
    return artifact, chunks.sign(PRIVATE, artifact)


@dataclass
class RangeServer:
    """Serves artifacts as a hub does.  `cut_after` are the bytes of a body after which each answer is cut off."""

    files: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, bytes] = field(default_factory=dict)
    cut_after: list[int] = field(default_factory=list)
    spoil: Callable[[int, bytes], bytes] | None = None
    ranges: bool = True
    sent: int = 0
    body_sent: int = 0
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    port: int = 0

    def offer(self, path: Path, envelope: Envelope, artifact: Artifact) -> None:
        """Serve a file with its manifest."""
        self.files[artifact.digest] = path.read_bytes()
        self.manifests[artifact.digest] = msgspec.json.encode(envelope)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        """Listen; the address."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield f"http://127.0.0.1:{self.port}"
        finally:
            server.close()
            await server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        lines = head.split("\r\n")
        headers = {one.partition(":")[0].lower(): one.partition(":")[2].strip() for one in lines[1:]}
        path = lines[0].split(" ")[1]
        self.asked.append((path, headers.get("range")))
        digest = path.removeprefix("/v1/artifacts/").removesuffix("/data")
        body = (self.files if path.endswith("/data") else self.manifests).get(digest)
        if body is None:
            return await self._say(writer, b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        if not path.endswith("/data"):
            head_out = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
            return await self._say(writer, head_out + body)
        first, last, line = 0, len(body) - 1, "200 OK"
        if self.ranges and "range" in headers:
            begin, _, end = headers["range"].removeprefix("bytes=").partition("-")
            first, last, line = int(begin), int(end), "206 Partial Content"
        data = body[first : last + 1]
        if self.spoil is not None:
            data = self.spoil(first, data)
        await self._say(
            writer,
            f"HTTP/1.1 {line}\r\nContent-Length: {len(data)}\r\n"
            f"Content-Range: bytes {first}-{last}/{len(body)}\r\n\r\n".encode(),
        )
        limit = self.cut_after.pop(0) if self.cut_after else len(data)
        for at in range(0, min(limit, len(data)), 64 * 1024):
            part = data[at : min(at + 64 * 1024, limit)]
            await self._say(writer, part)
            self.body_sent += len(part)
        if limit < len(data):
            # All of it is on the wire, then the line goes.
            writer.transport.abort() if limit == 0 else writer.close()
            return False
        return True

    async def _say(self, writer: asyncio.StreamWriter, data: bytes) -> bool:
        writer.write(data)
        await writer.drain()
        self.sent += len(data)
        return True
