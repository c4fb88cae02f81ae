"""Model files over HTTP: what `wire/artifacts.py` decided, sent with bounded memory.

The server itself copies a file's bytes to the socket; none of them pass through Python.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from ondol.errors import InvalidRequest, NotFound
from ondol.hub.uploads import PREFIX, HubUploads
from ondol.wire.artifacts import PREFIX as ARTIFACTS
from ondol.wire.artifacts import ArtifactFiles, Served, parse_path, send, serve_artifact, serve_manifest

T = TypeVar("T")
InThread = Callable[..., Awaitable[Any]]
"""Runs a blocking function with its arguments outside the event loop."""


class HubFiles:
    """Answers `/v1/artifacts/{digest}` and `/data` for sites that were let in, and operators' uploads."""

    def __init__(self, files: ArtifactFiles, in_thread: InThread, uploads: HubUploads | None = None) -> None:
        """Take where the files are, and who takes uploads."""
        self._files = files
        self._in_thread = in_thread
        self._uploads = uploads

    async def answer(self, method: str, path: str, headers: Any, proto: Any) -> None:
        """Serve one GET or HEAD of an artifact, or one call of an upload.

        Raises:
            NotFound, InvalidRequest: no artifact's path, or another method.
        """
        if path.startswith(PREFIX) and method == "GET":
            # An operator who exports a generation reads the models with the admin key.
            path = ARTIFACTS + path.removeprefix(PREFIX)
        elif self._uploads is not None and path.startswith(PREFIX):
            await self._uploads.answer(method, path, headers, proto)
            return
        asked = parse_path(path)
        if asked is None:
            raise NotFound(f"{path[:120]} names no artifact; expected /v1/artifacts/sha256:…, or …/data")
        if method not in ("GET", "HEAD"):
            raise InvalidRequest(f"{path[:120]} takes GET, found {method}")
        digest, data = asked
        served: Served = await (
            self._in_thread(serve_artifact, self._files, digest, headers.get("range"))
            if data
            else self._in_thread(serve_manifest, self._files, digest)
        )
        send(served, method, proto)
