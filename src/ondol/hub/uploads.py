"""Operators' models over HTTP, below `/v1/hub/models/`; who asks has shown the admin key before.

    POST begin                    the manifest, unsigned -> which chunks are still to be sent
    POST {digest}/chunks/{index}  the bytes of one chunk
    POST {digest}/publish         {"name", "replace"}: sign the manifest and offer the model
    DELETE {name}                 offer it no longer

A body is at most one chunk, so memory is bounded whatever the model's size; each step may be done again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Protocol

import msgspec

from ondol.core import chunks
from ondol.core.chunks import Artifact, Span
from ondol.core.dsse import Envelope
from ondol.errors import InvalidRequest, NotFound, TooLarge
from ondol.hub import artifacts, audit
from ondol.hub.service import Hub

PREFIX: Final = "/v1/hub/models/"
BODY_S: Final = 120.0
"""How long a chunk may take: a MiB at 9 kB/s."""
_JSON: Final = [("content-type", "application/json"), ("cache-control", "no-store")]


class UploadStore(Protocol):
    """Where uploads are put together.  Calls block, and raise OndolError."""

    def begin(self, artifact: Artifact) -> Sequence[Span]:
        """What is still to be sent."""
        ...

    def expected(self, digest: str, index: int) -> int:
        """The bytes of a chunk."""
        ...

    def take(self, digest: str, index: int, data: bytes) -> None:
        """Keep a chunk that is the one that the manifest names."""
        ...

    def artifact(self, digest: str) -> Artifact:
        """The manifest of an upload that was begun, or of a file that is here."""
        ...

    def finish(self, digest: str, envelope: Envelope) -> None:
        """Verify the whole and make it a model."""
        ...


class Publish(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `publish` takes.  With `replace` the name moves from another model."""

    name: str
    replace: bool = False


class HubUploads:
    """The handlers."""

    def __init__(self, store: UploadStore, hub: Hub, in_thread: Callable[..., Awaitable[Any]]) -> None:
        """`in_thread` runs a blocking function with its arguments outside the event loop."""
        self._store = store
        self._hub = hub
        self._in_thread = in_thread

    async def answer(self, method: str, path: str, headers: Any, proto: Any) -> None:
        """Serve one request below `PREFIX`.

        Raises:
            OndolError: it asks for what is not there, or sends what is refused.
        """
        rest = path.removeprefix(PREFIX)
        parts = rest.split("/")
        match (method, parts):
            case ("POST", ["begin"]):
                artifact = chunks.decode(await _body(headers, proto, chunks.MANIFEST_BYTES_MAX))
                artifacts.check_name(artifact.name)
                spans = await self._in_thread(self._store.begin, artifact)
                answer: Any = {"missing": [[one.first, one.last] for one in spans]}
            case ("POST", [digest, "chunks", index]) if (
                index.isascii() and index.isdigit() and len(index) < 7
            ):
                size = await self._in_thread(self._store.expected, digest, int(index))
                data = await _body(headers, proto, size)
                await self._in_thread(self._store.take, digest, int(index), data)
                answer = {"chunk": int(index)}
            case ("POST", [digest, "publish"]):
                answer = await self._publish(digest, await _body(headers, proto, 64 * 1024))
            case ("DELETE", _):
                answer = await self._withdraw(rest)
            case _:
                raise NotFound(
                    f"{method} {path[:100]} does not exist; there are POST begin, {{digest}}/chunks/{{index}}, "
                    "{digest}/publish, and DELETE {name}"
                )
        proto.response_bytes(200, _JSON, msgspec.json.encode(answer))

    async def _publish(self, digest: str, body: bytes) -> dict[str, Any]:
        hub = self._hub
        try:
            wanted = msgspec.json.decode(body, type=Publish)
        except msgspec.MsgspecError as error:
            raise InvalidRequest(f"publish: expected name and replace: {error}") from error
        artifacts.check_name(wanted.name)
        found = await self._in_thread(self._store.artifact, digest)
        artifact = msgspec.structs.replace(found, name=wanted.name)
        envelope = chunks.sign(hub.authority.private, artifact)
        await self._in_thread(self._store.finish, digest, envelope)
        now_ns = hub.clock.wall_ns()

        def work(tx: Any) -> None:
            artifacts.publish(tx, envelope, hub.authority.keys, now_ns=now_ns, replace=wanted.replace)
            audit.note(tx, now_ns, "model published", wanted.name, digest)

        await hub.database.write(work)
        return {"name": wanted.name, "digest": digest, "size": artifact.size, "format": artifact.format}

    async def _withdraw(self, name: str) -> dict[str, Any]:
        now_ns = self._hub.clock.wall_ns()

        def work(tx: Any) -> str:
            digest = artifacts.withdraw(tx, name)
            audit.note(tx, now_ns, "model withdrawn", name, digest)
            return digest

        return {"name": name, "digest": await self._hub.database.write(work), "withdrawn": True}


async def _body(headers: Any, proto: Any, limit: int) -> bytes:
    """The whole body, of a stated length within the bound, in time."""
    length = headers.get("content-length")
    if length is None or not length.isdecimal():
        raise InvalidRequest("a body of a stated length was expected: send Content-Length")
    if int(length) > limit:
        raise TooLarge(f"the body has {length[:20]} bytes; allowed: at most {limit}")
    async with asyncio.timeout(BODY_S):
        whole: bytes = await proto()
    if len(whole) != int(length):
        raise InvalidRequest(f"the body broke off after {len(whole)} of {length} bytes")
    return whole
