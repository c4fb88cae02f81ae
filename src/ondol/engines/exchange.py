"""One OpenAI-compatible server: a request goes out, an answer or one of our errors comes back.

Owns the mapping of everything that can go wrong on the way to `EngineUnavailable`, `EngineRejected`,
`EngineFailed` or `DeadlineExceeded`; knows nothing of keys, routes or who asks.  Invariant: no message
holds a body, a key or a path of the server; only a 4xx about the request itself is quoted, bounded.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator, Mapping
from email.utils import parsedate_to_datetime
from typing import Final
from urllib.parse import urlsplit

from ondol.core.inference import Chunk, Completion, Task
from ondol.core.ports import Clock
from ondol.errors import (
    ConfigError,
    DeadlineExceeded,
    EngineError,
    EngineFailed,
    EngineRejected,
    EngineUnavailable,
)
from ondol.net.connections import Http1Client
from ondol.net.http1 import Connection, DeadlinePassed, HttpFailure
from ondol.units import NS_PER_S
from ondol.wire.openai_answers import BadAnswer, read_chunk, read_completion, read_error
from ondol.wire.sse import EventTooLarge, SseDecoder

PATHS: Final = {
    Task.CHAT: "/chat/completions",
    Task.COMPLETION: "/completions",
    Task.EMBEDDING: "/embeddings",
}
ANSWER_BYTES_MAX: Final = 64 * 1024 * 1024
"""2,048 embeddings of 4,096 dimensions are about 100 MiB as text; 1,536 dimensions fit."""
EVENT_BYTES_MAX: Final = 8 * 1024 * 1024
_ERROR_BYTES_MAX: Final = 64 * 1024
_RETRY_AFTER_MAX_S: Final = 86_400.0
_REJECTED: Final = frozenset({400, 413, 415, 422})
"""Statuses that blame the request itself; every other failure is ours or the engine's to mend."""
_WHY: Final = {
    401: "it does not accept our key",
    402: "our account there has no credit or budget left",
    403: "our key may not do this there",
    404: "it knows no such path or model; check `url` and `upstream_model`",
    408: "it waited too long for the request",
    429: "it limits our rate",
    503: "it is overloaded or not ready",
}


class UpstreamRefused(EngineUnavailable):
    """The server answered with an HTTP status that another endpoint, key or moment may not give."""

    def __init__(self, message: str, *, status: int, retry_after_s: float | None = None) -> None:
        """Keep the status, by which keys are judged."""
        super().__init__(message, retry_after_s=retry_after_s)
        self.status = status


class Exchange:
    """Requests to one base URL over kept connections.

    Cancelling a call, or closing the iterator of a stream, closes its connection at once, which is how
    a server learns that nobody waits.  After `close` every call is unavailable.
    """

    def __init__(
        self,
        base_url: str,
        *,
        connect_timeout_s: float,
        read_timeout_s: float,
        clock: Clock,
        receipts: bool = False,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Take the address that the paths are appended to (`http://127.0.0.1:8000/v1`).

        `receipts` is true for a peer alone: from others the field `ondol` would be a forgery.  `tls`
        is for a certificate authority of our own; None trusts those of the machine.

        Raises:
            ConfigError: the address is no http or https URL, or holds credentials.
        """
        url = urlsplit(base_url)
        try:
            port = url.port
        except ValueError as error:
            raise ConfigError(f"url: the port in {url.netloc!r} is no number in 1..65535") from error
        if url.scheme not in {"http", "https"} or not url.hostname:
            raise ConfigError(f"url: found {base_url[:100]!r}; expected http://HOST[:PORT]/PATH or https://…")
        if url.username is not None or url.query or url.fragment:
            raise ConfigError(
                "url: no user, query or fragment may stand in it; keys come from `keys` (env or file)"
            )
        if any(char <= " " or char > "~" for char in base_url):
            raise ConfigError("url: found a blank or a character outside ASCII; percent-encode it")
        secure = url.scheme == "https"
        self._port = port or (443 if secure else 80)
        self.address = f"{url.hostname}:{self._port}"
        self._clock = clock
        self._receipts = receipts
        self._client = Http1Client(
            url.hostname,
            self._port,
            tls=(tls or ssl.create_default_context()) if secure else None,
            connect_timeout_s=connect_timeout_s,
            read_timeout_s=read_timeout_s,
        )
        base = url.path.rstrip("/")
        self._heads = {
            task: (
                f"POST {base}{path} HTTP/1.1\r\nHost: {url.netloc}\r\nUser-Agent: ondol\r\n"
                "Content-Type: application/json\r\nAccept-Encoding: identity\r\n"
            )
            for task, path in PATHS.items()
        }

    async def complete(
        self, task: Task, body: bytes, headers: Mapping[str, str], deadline_ns: int
    ) -> Completion:
        """The whole answer, of at most `ANSWER_BYTES_MAX`.  Raises: as `core.ports.Engine.complete`."""
        completion, _ = await self._complete(task, body, headers, deadline_ns, with_headers=False)
        return completion

    async def complete_with_headers(
        self, task: Task, body: bytes, headers: Mapping[str, str], deadline_ns: int
    ) -> tuple[Completion, dict[str, str]]:
        """As `complete`, with the reply's headers by lower-case name."""
        return await self._complete(task, body, headers, deadline_ns, with_headers=True)

    async def _complete(
        self, task: Task, body: bytes, headers: Mapping[str, str], deadline_ns: int, *, with_headers: bool
    ) -> tuple[Completion, dict[str, str]]:
        connection = None
        try:
            connection = await self._send(task, body, headers, deadline_ns)
            await self._expect(connection, task, "json")
            raw = await self._read_whole(connection)
            completion = read_completion(task, raw, receipts=self._receipts)
            return completion, connection.headers() if with_headers else {}
        except DeadlinePassed as error:
            raise self._too_late() from error
        except HttpFailure as error:
            raise EngineUnavailable(f"{self.address}: {error}") from error
        except BadAnswer as error:
            raise self._bad_answer(error) from error
        finally:
            if connection is not None:
                self._client.release(connection)

    async def stream(
        self, task: Task, body: bytes, headers: Mapping[str, str], deadline_ns: int
    ) -> AsyncGenerator[Chunk, None]:
        """The chunks as they come.  Raises: as `core.ports.Engine.stream`."""
        connection = None
        begun = ended = False
        try:
            connection = await self._send(task, body, headers, deadline_ns)
            await self._expect(connection, task, "event-stream")
            decoder = SseDecoder(max_event_bytes=EVENT_BYTES_MAX)
            read, receipts = connection.read, self._receipts
            finished = done = False
            while not done and (data := await read()) is not None:
                for payload in decoder.feed(data):
                    if payload == b"[DONE]":
                        done = True
                        break
                    chunk = read_chunk(payload, receipts=receipts)
                    finished = finished or chunk.finish
                    begun = True
                    yield chunk
            # A last [DONE] without its blank line is a known slip of servers, not a broken answer.
            if not done and (decoder.unfinished() or not finished) and decoder.feed(b"\n\n") != [b"[DONE]"]:
                raise HttpFailure("the stream ended early, without [DONE] or a finish reason")
            ended = True
        except DeadlinePassed as error:
            raise self._too_late() from error
        except (HttpFailure, EventTooLarge) as error:
            kind = EngineFailed if begun else EngineUnavailable
            raise kind(f"{self.address}: {error}") from error
        except BadAnswer as error:
            if begun:
                raise EngineFailed(f"{self.address}: {_blame(error)}") from error
            raise self._bad_answer(error) from error
        finally:
            if connection is not None:
                self._client.release(connection, ended=ended)

    async def close(self) -> None:
        """Close every connection with what runs on it.  Idempotent."""
        await self._client.close()

    async def _send(
        self, task: Task, body: bytes, headers: Mapping[str, str], deadline_ns: int
    ) -> Connection:
        remaining_ns = deadline_ns - self._clock.now_ns()
        if remaining_ns <= 0:
            raise DeadlinePassed
        extra = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        if extra.count("\n") != len(headers) or extra.count("\r") != len(headers):
            raise ValueError("a header holds a line break; values must be encoded before they come here")
        head = f"{self._heads[task]}{extra}Content-Length: {len(body)}\r\n\r\n".encode("ascii")
        deadline = asyncio.get_running_loop().time() + remaining_ns / NS_PER_S
        return await self._client.send(head, body, deadline)

    async def _expect(self, connection: Connection, task: Task, kind: str) -> None:
        """Pass only a 200 of the kind wanted (`json`, `event-stream`)."""
        status = connection.status
        if status != 200:
            raw = await self._read_some(connection)
            raise self._refusal(connection, status, raw)
        encoding = connection.header(b"content-encoding")
        if encoding not in {None, "", "identity"}:
            raise HttpFailure("it answered compressed, which was not asked for")
        found = (connection.header(b"content-type") or "").partition(";")[0].strip().lower()
        if kind in found or (not found and kind == "json"):
            return
        if kind == "event-stream" and found.endswith("json"):
            # Some servers say an error with 200 and without a stream.
            read_completion(task, await self._read_some(connection))
            raise HttpFailure("it answered a whole JSON where a stream was asked for")
        shown = found[:60] if found.isprintable() and found else "no content type"
        wanted = "application/json" if kind == "json" else "text/event-stream"
        raise HttpFailure(f"it answered {shown}, expected {wanted}")

    async def _read_whole(self, connection: Connection) -> bytes:
        first = await connection.read()
        if first is None:
            raise HttpFailure("it answered nothing")
        size = len(first)
        parts = [first]
        while (data := await connection.read()) is not None:
            size += len(data)
            if size > ANSWER_BYTES_MAX:
                raise HttpFailure(f"its answer passes {ANSWER_BYTES_MAX} bytes")
            parts.append(data)
        return first if len(parts) == 1 else b"".join(parts)

    async def _read_some(self, connection: Connection) -> bytes:
        """An error's body as far as it comes; the status is what counts."""
        raw = b""
        try:
            while len(raw) <= _ERROR_BYTES_MAX and (data := await connection.read()) is not None:
                raw += data
        except HttpFailure:
            return raw
        return raw

    def _refusal(self, connection: Connection, status: int, raw: bytes) -> EngineError:
        if status in _REJECTED:
            message, param, _ = read_error(status, raw)
            return EngineRejected(message, status=status, param=param)
        if 300 <= status < 400:
            return EngineUnavailable(
                f"{self.address}: it redirects (HTTP {status}), which is not followed; give its final `url`"
            )
        if status < 300:
            return EngineUnavailable(f"{self.address}: it answered HTTP {status}, expected 200")
        why = _WHY.get(status, "it failed" if status >= 500 else "it refuses")
        return UpstreamRefused(
            f"{self.address}: {why} (HTTP {status})",
            status=status,
            retry_after_s=self._retry_after_s(connection),
        )

    def _retry_after_s(self, connection: Connection) -> float | None:
        """Seconds until trying again may help.  Source: RFC 9110, 10.2.3: seconds or a date."""
        text = connection.header(b"retry-after")
        if text is None:
            return None
        if text.isascii() and text.replace(".", "", 1).isdecimal():
            return min(float(text[:20]), _RETRY_AFTER_MAX_S)
        try:
            moment_s = parsedate_to_datetime(text[:64]).timestamp()
        except (ValueError, TypeError, OverflowError):
            return None
        return min(max(moment_s - self._clock.wall_ns() / NS_PER_S, 0.0), _RETRY_AFTER_MAX_S)

    def _bad_answer(self, error: BadAnswer) -> EngineError:
        """An answer of 200 that is none, before anything went out."""
        if error.status in _REJECTED:
            return EngineRejected(error.message, status=error.status or 400, param=error.param)
        return EngineUnavailable(f"{self.address}: {_blame(error)}")

    def _too_late(self) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"{self.address} had not answered when the time of this request was used up; allow more time "
            "(the route's `timeout_s`, or x-ondol-max-latency-ms) or ask for less output"
        )


def _blame(error: BadAnswer) -> str:
    """What to say of a bad answer in public: our own finding, or the code of its own error."""
    if not error.said:
        return error.message
    code = error.code or ""
    plain = 0 < len(code) <= 64 and code.replace("_", "").replace(".", "").replace("-", "").isalnum()
    return f"it reported an error within its answer{f' ({code})' if plain and code.isascii() else ''}"
