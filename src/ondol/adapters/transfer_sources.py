"""Where a site gets a model from: another site or the hub over HTTP, an object store, a folder.

Each gives the signed manifest of a file, and its bytes from any offset.  Nothing that comes from here is believed:
`model_transfer` checks the signature and every chunk.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import urlsplit

from ondol.adapters.model_sources import FetchFailed, is_loopback
from ondol.core.chunks import MANIFEST_BYTES_MAX
from ondol.errors import InvalidRequest
from ondol.net.connections import Http1Client
from ondol.net.http1 import Connection, DeadlinePassed, HttpFailure

CONNECT_S: Final = 10.0
SILENCE_S: Final = 20.0
LEAST_BYTES_PER_S: Final = 4096
"""A source slower than this is asked again from where it stopped, after the others."""
_ENVELOPE_BYTES_MAX: Final = 2 * MANIFEST_BYTES_MAX
_BLOCK: Final = 256 * 1024
_WHY: Final = {
    401: "it does not accept who we are",
    403: "we may not have it",
    404: "it has no such model",
    416: "it has another file of that name",
    429: "it limits our rate",
    503: "it is not ready",
}


class NotThere(FetchFailed):
    """This source has not got the file; asking it again at once is no use."""


class Source(Protocol):
    """One place that may have a model."""

    @property
    def name(self) -> str:
        """What an operator knows it by."""
        ...

    async def manifest(self, digest: str) -> bytes:
        """The signed manifest, as JSON.

        Raises:
            FetchFailed: it has none, or cannot be reached.
        """
        ...

    def data(self, digest: str, offset: int, length: int) -> AsyncGenerator[bytes, None]:
        """At most `length` bytes of the file from `offset`, in pieces of at most 1 MiB, as they come.

        Raises (from the iterator): as `manifest`, also in the middle.
        """
        ...

    async def close(self) -> None:
        """Close every connection."""
        ...


class HttpSource:
    """A hub or a site (`/v1/artifacts/…`), or with `objects` a place of plain files, as `publish --to` writes them.

    `authorization` makes the header's value for each request.  `bytes_per_s` is the cap that the caller will hold:
    a request's time limit allows for it.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str,
        tls: ssl.SSLContext | None = None,
        authorization: Callable[[], str] | None = None,
        objects: bool = False,
        bytes_per_s: int | None = None,
    ) -> None:
        """Connect to nothing yet.

        Raises:
            InvalidRequest: the address is neither https, nor http on this machine.
        """
        parts = urlsplit(url)
        host = parts.hostname
        if host is None or not (parts.scheme == "https" or (parts.scheme == "http" and is_loopback(host))):
            raise InvalidRequest(f"found {url[:100]!r}, expected https:// (or http:// on this machine)")
        if parts.username is not None or any(char <= " " or char > "~" for char in url):
            raise InvalidRequest(
                "found a user name, a blank or a character outside ASCII in a model's address"
            )
        self.name = name
        self._objects = objects
        self._authorization = authorization
        self._least = min(LEAST_BYTES_PER_S, bytes_per_s or LEAST_BYTES_PER_S)
        self._base = parts.path.rstrip("/")
        self._query = f"?{parts.query}" if parts.query else ""
        self._netloc = parts.netloc
        secure = parts.scheme == "https"
        self._client = Http1Client(
            host,
            parts.port or (443 if secure else 80),
            tls=(tls or ssl.create_default_context()) if secure else None,
            connect_timeout_s=CONNECT_S,
            read_timeout_s=SILENCE_S,
        )

    async def manifest(self, digest: str) -> bytes:
        """As `Source` says."""
        connection = await self._ask(self._path(digest, data=False), _ENVELOPE_BYTES_MAX)
        parts: list[bytes] = []
        size = 0
        try:
            if connection.status != 200:
                raise self._refused(connection)
            while (data := await connection.read()) is not None:
                size += len(data)
                if size > _ENVELOPE_BYTES_MAX:
                    raise FetchFailed(f"{self.name}: its manifest passes {_ENVELOPE_BYTES_MAX} bytes")
                parts.append(data)
        except (HttpFailure, DeadlinePassed) as error:
            raise self._broke(error) from error
        finally:
            self._client.release(connection)
        return b"".join(parts)

    async def data(self, digest: str, offset: int, length: int) -> AsyncGenerator[bytes, None]:
        """As `Source` says.  Leaving early closes the connection; a reader that waits slows the sender."""
        connection = await self._ask(
            self._path(digest, data=True), length, f"Range: bytes={offset}-{offset + length - 1}\r\n"
        )
        try:
            self._expect_range(connection, offset)
            left = length
            while left and (data := await connection.read()) is not None:
                yield data[:left]
                left -= min(left, len(data))
        except (HttpFailure, DeadlinePassed) as error:
            raise self._broke(error) from error
        finally:
            self._client.release(connection)

    async def close(self) -> None:
        """As `Source` says."""
        await self._client.close()

    def _path(self, digest: str, *, data: bool) -> str:
        if not self._objects:
            return f"{self._base}/v1/artifacts/{digest}{'/data' if data else ''}"
        return f"{self._base}/{digest.replace(':', '-')}{'.model' if data else '.manifest.json'}{self._query}"

    async def _ask(self, path: str, size: int, extra: str = "") -> Connection:
        who = "" if self._authorization is None else f"Authorization: {self._authorization()}\r\n"
        head = (
            f"GET {path} HTTP/1.1\r\nHost: {self._netloc}\r\nUser-Agent: ondol\r\nAccept-Encoding: identity\r\n"
            f"{who}{extra}\r\n"
        )
        if head.count("\n") != head.count("\r\n") or "\r\n\r\n" in head[:-4]:
            raise InvalidRequest("a header for a model's source holds a line break")
        deadline = asyncio.get_running_loop().time() + 60.0 + size / self._least
        try:
            return await self._client.send(head.encode("ascii"), b"", deadline)
        except (HttpFailure, DeadlinePassed) as error:
            raise self._broke(error) from error

    def _expect_range(self, connection: Connection, offset: int) -> None:
        if connection.header(b"content-encoding") not in (None, "", "identity"):
            raise FetchFailed(f"{self.name}: it answered compressed, which was not asked for")
        if connection.status == 200 and offset == 0:
            return
        if connection.status == 200:
            raise NotThere(f"{self.name}: it serves no ranges, so nothing can be resumed from it")
        if connection.status != 206:
            raise self._refused(connection)
        found = connection.header(b"content-range") or ""
        if not found.lower().startswith(f"bytes {offset}-"):
            raise FetchFailed(f"{self.name}: it sent the range {found[:60]!r}, asked for from {offset}")

    def _refused(self, connection: Connection) -> FetchFailed:
        status = connection.status
        if 300 <= status < 400:
            return NotThere(f"{self.name}: it redirects (HTTP {status}); give the address that it leads to")
        words = _WHY.get(status, "no answer that helps")
        kind = NotThere if 400 <= status < 500 and status not in (408, 429) else FetchFailed
        return kind(f"{self.name}: HTTP {status}, {words}")

    def _broke(self, error: Exception) -> FetchFailed:
        return FetchFailed(f"{self.name}: {str(error) or 'too slow'}")


class DirectorySource:
    """A folder that `ondol models publish --to` wrote: a mounted share, a stick that somebody carried."""

    def __init__(self, folder: Path, *, name: str = "") -> None:
        self.name = name or str(folder)
        self._folder = folder

    async def manifest(self, digest: str) -> bytes:
        """As `Source` says."""
        return await asyncio.to_thread(
            self._read, self._path(digest, ".manifest.json"), 0, _ENVELOPE_BYTES_MAX
        )

    async def data(self, digest: str, offset: int, length: int) -> AsyncGenerator[bytes, None]:
        """As `Source` says."""
        path = self._path(digest, ".model")
        while length:
            block = await asyncio.to_thread(self._read, path, offset, min(length, _BLOCK))
            if not block:
                raise FetchFailed(f"{self.name}: {path.name} ends at byte {offset}")
            yield block
            offset, length = offset + len(block), length - len(block)

    async def close(self) -> None:
        """As `Source` says; there is nothing to close."""

    def _path(self, digest: str, suffix: str) -> Path:
        return self._folder / f"{digest.replace(':', '-')}{suffix}"

    def _read(self, path: Path, offset: int, length: int) -> bytes:
        try:
            with path.open("rb") as file:
                file.seek(offset)
                return file.read(length)
        except FileNotFoundError as error:
            raise NotThere(f"{self.name}: it has no {path.name}") from error
        except OSError as error:
            raise FetchFailed(f"{self.name}: {error.strerror or error}") from error
