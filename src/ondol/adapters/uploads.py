"""Models that operators send to the hub, chunk by chunk: each is checked as it comes, and a cut costs one chunk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ondol.adapters.fleet_models import FleetModels, describe, fill
from ondol.adapters.staging import Staged, pieces
from ondol.core import chunks
from ondol.core.chunks import Artifact, Span
from ondol.core.dsse import Envelope
from ondol.errors import DigestMismatch, InvalidRequest, NotFound

SignArtifact = Callable[[Artifact], Envelope]


class Uploads:
    """Takes uploads into one store.  All calls block; several at once for one file are refused by its lock."""

    def __init__(self, models: FleetModels) -> None:
        self._models = models

    def begin(self, artifact: Artifact) -> list[Span]:
        """What of a file is still to be sent; chunks that other files in the store have are taken at once.

        Raises:
            InvalidRequest: the manifest is none.
            StateError: no room, or another upload of the same file runs.
        """
        chunks.checked(artifact)
        if self._models.find(artifact.digest) is not None:
            return []
        staged = self._models.stage(artifact, chunks.unsigned(artifact))
        try:
            everything = [one.digest for one in self._models.held()]
            self._models.make_room(artifact.size - staged.done, keep={*everything, artifact.digest})
            return chunks.plan(artifact, staged.have)
        finally:
            staged.close()

    def expected(self, digest: str, index: int) -> int:
        """How many bytes the body of this chunk must have.

        Raises:
            NotFound: no such upload was begun, or it has no such chunk.
        """
        artifact = self._artifact(digest)
        if not 0 <= index < len(artifact.sizes):
            raise NotFound(f"found chunk {index}, expected 0 to {len(artifact.sizes) - 1}")
        return artifact.sizes[index]

    def take(self, digest: str, index: int, data: bytes) -> None:
        """Keep one whole chunk.

        Raises:
            InvalidRequest: it is not the one that the manifest names.
            NotFound, StateError: as above.
        """
        staged = self._open(digest)
        try:
            if index not in staged.have:
                if len(data) != staged.artifact.sizes[index]:
                    raise InvalidRequest(
                        f"found {len(data)} bytes, expected {staged.artifact.sizes[index]} of chunk {index}"
                    )
                staged.feed(index, data)
        except DigestMismatch as error:
            raise InvalidRequest(error.message) from error
        finally:
            staged.close()

    def artifact(self, digest: str) -> Artifact:
        """The manifest of an upload that was begun, or of a file that is in the store.

        Raises:
            NotFound: neither.
        """
        held = next((one for one in self._models.held() if one.digest == digest), None)
        return self._models.cut_of(held) if held is not None else self._artifact(digest)

    def finish(self, digest: str, envelope: Envelope) -> None:
        """Make the upload a model of the store: its digest and its header hold.  The second time it changes nothing.

        Raises:
            InvalidRequest: chunks are missing, or it is another format than it says.
            BadModelFile: it is no model that native code may see; nothing of it is kept.
            StateError: the disk fails.
        """
        if self._models.find(digest) is not None:
            self._models.keep_manifest(digest, envelope)
            return
        staged = self._open(digest)
        try:
            if staged.missing:
                raise InvalidRequest(f"{len(staged.missing)} chunks of {digest[:23]}… were not sent yet")
            self._models.add_verified(staged, envelope)
        finally:
            staged.close()

    def _artifact(self, digest: str) -> Artifact:
        found = self._models.begun(digest)
        if found is None:
            raise NotFound(f"no upload of {digest[:80]} was begun; POST its manifest to /v1/hub/models/begin")
        return found

    def _open(self, digest: str) -> Staged:
        return Staged(self._models.staging(digest), self._artifact(digest), None)


def add_local(
    models: FleetModels, path: Path, name: str, sign: SignArtifact, *, artifact: Artifact | None = None
) -> tuple[Artifact, Envelope]:
    """Copy a file of this machine into the store, with its manifest signed by `sign`.

    Raises:
        BadModelFile, NotFound, StateError: as `fleet_models.describe` and `add_verified`.
    """
    found = artifact if artifact is not None else describe(path, name)
    envelope = sign(found)
    if models.find(found.digest) is not None:
        models.keep_manifest(found.digest, envelope)
        return found, envelope
    everything = [one.digest for one in models.held()]
    models.make_room(found.size, keep={*everything, found.digest})
    staged = models.stage(found, envelope)
    try:
        if staged.missing:
            fill(staged, pieces(path, found.sizes))
        models.add_verified(staged, envelope)
    finally:
        staged.close()
    return found, envelope
