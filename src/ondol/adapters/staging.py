"""A model on its way: the bytes that are here, and which of its chunks are known to be good.

    models/.staging/<hex>/manifest.json    the signed manifest
    models/.staging/<hex>/data             the file, with holes where nothing has come yet
    models/.staging/<hex>/marks            one byte a chunk: 1 when its bytes are here and have its digest

Bytes are written before their mark, so a process that is killed loses at most the chunk that it was in.  A power cut
may lose bytes whose mark stayed: that is why `recheck` exists, and why the whole file is hashed before it is a model.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

import msgspec

from ondol.core import chunks
from ondol.core.chunks import Artifact
from ondol.core.dsse import Envelope
from ondol.errors import DigestMismatch, InvalidRequest, StateError

FOLDER: Final = ".staging"
_BLOCK: Final = 1024 * 1024


class Staged:
    """One artifact being put together.  Owned by one process, which holds a lock; all calls block."""

    def __init__(self, folder: Path, artifact: Artifact, envelope: Envelope | None) -> None:
        """Open what is there of it, or begin.

        Raises:
            StateError: another process fetches the same file now, or the disk cannot be written.
        """
        self.folder = folder
        self.artifact = artifact
        self._offsets = artifact.offsets()
        self._hash = hashlib.sha256()
        self._in_hash = 0
        self._current = -1
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._marks = self._open("marks")
            try:
                fcntl.flock(self._marks, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                self._marks.close()
                raise StateError(f"another process fetches {artifact.digest[:23]}… at this moment") from error
            if envelope is not None:
                self._write_manifest(envelope)
            self._data = self._open("data")
            os.ftruncate(self._data.fileno(), artifact.size)
            marks = os.pread(self._marks.fileno(), len(artifact.sizes), 0)
        except OSError as error:
            raise StateError(f"{folder} cannot be written: {error.strerror or error}") from error
        self.have = {index for index, mark in enumerate(marks) if mark == 1}
        self._whole = sum(artifact.sizes[index] for index in self.have)

    def _open(self, name: str) -> IO[bytes]:
        descriptor = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return os.fdopen(descriptor, "r+b", buffering=0)

    def _write_manifest(self, envelope: Envelope) -> None:
        # Another cut of the same file by another publisher: its marks say nothing about these chunks.
        path, raw = self.folder / "manifest.json", msgspec.json.encode(envelope)
        before = path.read_bytes() if path.exists() else None
        if before is not None and before != raw:
            old = _unsigned(before)
            if old is None or (old.sizes, old.digests) != (self.artifact.sizes, self.artifact.digests):
                os.ftruncate(self._marks.fileno(), 0)
        if before != raw:
            path.write_bytes(raw)

    @property
    def path(self) -> Path:
        """The file that is being filled."""
        return self.folder / "data"

    @property
    def done(self) -> int:
        """Bytes that are here, those of the chunk under way too."""
        return self._whole + self._in_hash

    @property
    def missing(self) -> list[int]:
        """The chunks that are not here."""
        return [index for index in range(len(self.artifact.sizes)) if index not in self.have]

    @property
    def resume(self) -> tuple[int, int]:
        """The chunk that was begun, and how many bytes of it are here; (-1, 0) where none was."""
        return (self._current, self._in_hash) if self._in_hash else (-1, 0)

    def feed(self, index: int, data: bytes) -> None:
        """The next bytes of a chunk, in order, none of the chunk after; the last of them judge it.

        Bytes of another chunk than before begin that one anew.

        Raises:
            DigestMismatch: it is whole and not the one that the manifest names; it is asked for again.
            StateError: the disk is full, or cannot be written.
        """
        if index != self._current:
            self._begin(index)
        size = self.artifact.sizes[index]
        if self._in_hash + len(data) > size:
            raise ValueError(f"{self._in_hash + len(data)} bytes for a chunk of {size}")
        self._write(data, self._offsets[index] + self._in_hash)
        self._hash.update(data)
        self._in_hash += len(data)
        if self._in_hash < size:
            return
        good = self._hash.digest() == self.artifact.chunk_digest(index)
        self._begin(-1)
        if not good:
            raise DigestMismatch(
                f"chunk {index} of {self.artifact.digest[:23]}… is not the one that the signed manifest names"
            )
        self._mark(index, good=True)

    def _begin(self, index: int) -> None:
        self._current = index
        self._hash = hashlib.sha256()
        self._in_hash = 0

    def _write(self, data: bytes, offset: int) -> None:
        view = memoryview(data)
        try:
            while view:
                written = os.pwrite(self._data.fileno(), view, offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            raise StateError(
                f"{self.folder.parent.parent} cannot be written: {error.strerror}; what came is kept"
            ) from error

    def _mark(self, index: int, *, good: bool) -> None:
        os.pwrite(self._marks.fileno(), b"\x01" if good else b"\x00", index)
        if good:
            self.have.add(index)
        else:
            self.have.discard(index)
        self._whole += self.artifact.sizes[index] * (1 if good else -1)

    def adopt(self, path: Path, other: Artifact) -> int:
        """Take chunks that another file on this disk has, each checked; the bytes that were taken.

        `other` says how that file is cut.  A file that is gone or was changed gives nothing.
        """
        taken = 0
        places = chunks.shared(self.artifact, other, self.missing)
        if not places:
            return 0
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            for index, offset in places.items():
                data = os.pread(file.fileno(), self.artifact.sizes[index], offset)
                with contextlib.suppress(DigestMismatch):
                    chunks.verify_chunk(self.artifact, index, data)
                    self._write(data, self._offsets[index])
                    self._mark(index, good=True)
                    taken += len(data)
        return taken

    def finish(self) -> None:
        """Write everything to the disk and hash the whole.

        Raises:
            DigestMismatch: it is not the file that the manifest names; chunks that do not hold are missing again.
            StateError: the disk fails.
        """
        try:
            os.fsync(self._data.fileno())
        except OSError as error:
            raise StateError(f"{self.folder} cannot be written: {error.strerror}") from error
        found = hash_file(self.path)
        if found == self.artifact.digest:
            return
        bad = self.recheck()
        if not bad:
            raise DigestMismatch(
                f"found {found}, expected {self.artifact.digest}: all chunks hold, so the manifest contradicts itself"
            )
        raise DigestMismatch(f"{bad} chunks of {self.artifact.digest[:23]}… were lost on this disk")

    def recheck(self) -> int:
        """Read every chunk that is marked as good again; how many were not."""
        bad = 0
        for index in sorted(self.have):
            data = os.pread(self._data.fileno(), self.artifact.sizes[index], self._offsets[index])
            try:
                chunks.verify_chunk(self.artifact, index, data)
            except DigestMismatch:
                self._mark(index, good=False)
                bad += 1
        return bad

    def close(self) -> None:
        """Keep what is here for the next time, and let others at it."""
        self._data.close()
        self._marks.close()

    def discard(self) -> None:
        """Remove all of it."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def hash_file(path: Path) -> str:
    """`sha256:<hex>` of a file; a second for some 1.5 GB."""
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            hashed.update(block)
    return f"sha256:{hashed.hexdigest()}"


def pieces(path: Path, sizes: tuple[int, ...]) -> Iterator[bytes]:
    """A file in those pieces.

    Raises:
        StateError: it is shorter.
    """
    with path.open("rb") as file:
        for size in sizes:
            data = file.read(size)
            if len(data) != size:
                raise StateError(f"{path} became shorter while it was read")
            yield data


def _unsigned(raw: bytes) -> Artifact | None:
    """The manifest inside an envelope that was verified when it was written."""
    try:
        envelope = msgspec.json.decode(raw, type=Envelope)
        return chunks.unverified(envelope)
    except (msgspec.MsgspecError, InvalidRequest):
        return None
