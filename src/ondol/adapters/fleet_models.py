"""The models of a fleet on this disk: how each is cut, who signed it, what is on its way, and what must go.

    models/.manifests/<hex>.json   the signed manifest of a file that came from, or goes to, a fleet
    models/.manifests/<hex>.cut    how a file without one is cut, so that its chunks can be used again
    models/.staging/<hex>/         see `staging`

The time of a file's last use is its modification time: its bytes never change, so nothing else needs it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Final

import msgspec

from ondol.adapters.artifacts import ModelStore
from ondol.adapters.staging import FOLDER, Staged, pieces
from ondol.core import chunks
from ondol.core.chunks import Artifact, is_digest
from ondol.core.dsse import Envelope
from ondol.errors import BadModelFile, DigestMismatch, InvalidRequest, NotFound, StateError
from ondol.wire.sniff import ModelFile, read_model

RESERVE_BYTES: Final = 64 * 1024 * 1024
"""Left free for the ledger on the same disk, whatever the models want."""


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """A file in the store.  `used_ns` is when it was last made use of, in wall-clock nanoseconds."""

    digest: str
    path: Path
    size: int
    used_ns: int


class FleetModels:
    """The store in one folder, as a fleet sees it.  All calls block; use them outside the event loop."""

    def __init__(
        self, directory: Path, *, most_bytes: int | None = None, free: Callable[[Path], int] | None = None
    ) -> None:
        """`most_bytes` bounds all models together.  `free` says how many bytes the disk has left."""
        self.directory = directory
        self.store = ModelStore(directory)
        self.most_bytes = most_bytes
        self._free = free if free is not None else _free
        self._manifests = directory / ".manifests"

    # -- what is here

    def held(self) -> list[Held]:
        """Every file of the store, the one used longest ago first."""
        found = []
        for path in self.directory.glob("sha256-*.*"):
            digest = path.stem.replace("-", ":", 1)
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if is_digest(digest):
                    found.append(
                        Held(digest=digest, path=path, size=status.st_size, used_ns=status.st_mtime_ns)
                    )
        return sorted(found, key=lambda one: (one.used_ns, one.digest))

    def find(self, digest: str) -> tuple[str, int] | None:
        """Path and size of a file, None where it is not here (or the text is no digest)."""
        path = self.store.find(digest) if is_digest(digest) else None
        return None if path is None else (str(path), path.stat().st_size)

    def used(self, digest: str) -> None:
        """Note that a file is in use now."""
        path = self.store.find(digest)
        if path is not None:
            with contextlib.suppress(OSError):
                os.utime(path)

    def manifest(self, digest: str) -> bytes | None:
        """The signed manifest of a file that is here whole, as it is served to others."""
        if self.find(digest) is None:
            return None
        with contextlib.suppress(FileNotFoundError):
            return self._manifest_path(digest).read_bytes()
        return None

    def staged(self) -> dict[str, tuple[int, int]]:
        """What was begun and is not whole: bytes here (of whole chunks) and bytes in all, by digest."""
        found = {}
        for digest, folder in self._parts().items():
            artifact = self.begun(digest)
            if artifact is None:
                continue
            with contextlib.suppress(OSError):
                marks = (folder / "marks").read_bytes()
                done = sum(size for size, mark in zip(artifact.sizes, marks, strict=False) if mark == 1)
                found[artifact.digest] = (done, artifact.size)
        return found

    def begun(self, digest: str) -> Artifact | None:
        """The manifest of a file that is on its way, None where none is."""
        if not is_digest(digest):
            return None
        with contextlib.suppress(OSError, msgspec.MsgspecError, InvalidRequest):
            raw = (self.staging(digest) / "manifest.json").read_bytes()
            return chunks.unverified(msgspec.json.decode(raw, type=Envelope))
        return None

    # -- what comes in

    def stage(self, artifact: Artifact, envelope: Envelope | None) -> Staged:
        """Begin, or go on with, putting a file together; chunks that other files here have are taken at once.

        Raises:
            StateError: somebody else does that now, or the disk cannot be written.
        """
        staged = Staged(self.staging(artifact.digest), artifact, envelope)
        if staged.missing:
            for one in self.held():
                staged.adopt(one.path, self.cut_of(one))
                if not staged.missing:
                    break
        return staged

    def add_verified(self, staged: Staged, envelope: Envelope | None, *, name: str = "") -> Held:
        """Make what was put together a model of the store, once its whole digest and its header hold.

        The name in the manifest is no name of this store; `name` gives it one.

        Raises:
            DigestMismatch: it is not the file that the manifest names; what does not hold is missing again.
            BadModelFile: it is no model that native code may see; nothing of it is kept.
            StateError: the store cannot be written, or its disk is full.
        """
        artifact = staged.artifact
        staged.finish()
        try:
            found = read_file(staged.path)
            if found.format != artifact.format:
                raise BadModelFile(f"found {found.format}, and its manifest says {artifact.format}")
        except BadModelFile:
            staged.discard()
            raise
        try:
            if envelope is not None:
                self.keep_manifest(artifact.digest, envelope)
            path = self.store.take(staged.path, artifact.digest, f".{artifact.format}", name)
            os.utime(path)
        except OSError as error:
            raise StateError(
                f"{self.directory} cannot be written: {error.strerror or error}; what came is kept"
            ) from error
        staged.discard()
        status = path.stat()
        return Held(digest=artifact.digest, path=path, size=status.st_size, used_ns=status.st_mtime_ns)

    def keep_manifest(self, digest: str, envelope: Envelope) -> None:
        """Keep a signed manifest beside its file."""
        self._manifests.mkdir(parents=True, exist_ok=True)
        _replace(self._manifest_path(digest), msgspec.json.encode(envelope))

    def cut_of(self, one: Held) -> Artifact:
        """How a file here is cut: as its manifest says, else as it would be, which is kept for the next time."""
        hexes = one.digest.partition(":")[2]
        with contextlib.suppress(OSError, msgspec.MsgspecError, InvalidRequest):
            raw = self._manifest_path(one.digest).read_bytes()
            return chunks.unverified(msgspec.json.decode(raw, type=Envelope))
        beside = self._manifests / f"{hexes}.cut"
        with contextlib.suppress(OSError, InvalidRequest):
            return chunks.decode(beside.read_bytes())
        artifact = describe(one.path)
        self._manifests.mkdir(parents=True, exist_ok=True)
        _replace(beside, msgspec.json.encode(artifact))
        return artifact

    # -- what goes

    def make_room(self, size: int, *, keep: Collection[str]) -> list[str]:
        """Remove files that nobody in `keep` wants, oldest use first, until `size` more bytes fit; what went.

        Parts of files that are on their way count, and go first where nobody wants them.

        Raises:
            StateError: it does not fit even then; nothing was removed.
        """
        parts = {digest: path for digest, path in self._parts().items() if digest not in keep}
        held = self.held()
        used = sum(one.size for one in held) + sum(_size_on_disk(path) for path in self._parts().values())
        room = self._room(used)
        loose = [one for one in held if one.digest not in keep]
        most = room + sum(one.size for one in loose) + sum(_size_on_disk(path) for path in parts.values())
        if size > most:
            raise StateError(
                f"{size / 1e6:.0f} MB of model do not fit: {max(most, 0) / 1e6:.0f} MB are left for it beside the "
                f"models that are wanted here ({self._bound()}); raise `disk_bytes` of the Site's `transfer`, or "
                "free the disk"
            )
        gone = []
        for digest, path in parts.items():
            if size > room:
                room += _size_on_disk(path)
                shutil.rmtree(path, ignore_errors=True)
                gone.append(digest)
        for one in loose:
            if size <= room:
                break
            self.remove(one.digest)
            room += one.size
            gone.append(one.digest)
        return gone

    def remove(self, digest: str) -> None:
        """Take a file away, with its manifest and its names."""
        self.store.forget(digest)
        hexes = digest.partition(":")[2]
        for name in (f"{hexes}.json", f"{hexes}.cut"):
            (self._manifests / name).unlink(missing_ok=True)

    def _room(self, used: int) -> int:
        free = self._free(self.directory) - RESERVE_BYTES
        return free if self.most_bytes is None else min(free, self.most_bytes - used)

    def _bound(self) -> str:
        return (
            "the disk is nearly full"
            if self.most_bytes is None
            else f"at most {self.most_bytes / 1e6:.0f} MB"
        )

    def _parts(self) -> dict[str, Path]:
        return {f"sha256:{path.name}": path for path in (self.directory / FOLDER).glob("*")}

    def staging(self, digest: str) -> Path:
        """The folder in which a file is put together."""
        return self.directory / FOLDER / digest.partition(":")[2]

    def _manifest_path(self, digest: str) -> Path:
        return self._manifests / f"{digest.partition(':')[2]}.json"


def read_file(path: Path) -> ModelFile:
    """Decide a file's format and read its header, before any native code sees it.

    Raises:
        BadModelFile: as `wire.sniff.read_model`.
        NotFound: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            descriptor = file.fileno()
            size = os.fstat(descriptor).st_size
            return read_model(lambda offset, count: os.pread(descriptor, count, offset), size)
    except OSError as error:
        raise NotFound(f"the file {path} cannot be read: {error.strerror or error}") from error


def describe(
    path: Path, name: str = "", progress: Callable[[int, int | None], None] | None = None
) -> Artifact:
    """The manifest of a file: its format by content, cut where its tensors begin.  Reads it once.

    Raises:
        BadModelFile: it is no model that native code may see.
        NotFound: it cannot be read.
    """
    found = read_file(path)
    size = path.stat().st_size
    sizes = chunks.cut(size, found.starts)
    whole = hashlib.sha256()
    digests = []
    done = 0
    for data in pieces(path, sizes):
        whole.update(data)
        digests.append(hashlib.sha256(data).digest())
        done += len(data)
        if progress is not None:
            progress(done, size)
    return chunks.describe(
        digest=f"sha256:{whole.hexdigest()}", format_=found.format, sizes=sizes, digests=digests, name=name
    )


def fill(staged: Staged, data: Iterable[bytes]) -> None:
    """Put a whole file into what is staged, from its first byte on.

    Raises:
        DigestMismatch: it is another file.
    """
    index, room = 0, staged.artifact.sizes[0]
    for block in data:
        view = memoryview(block)
        while view:
            if index == len(staged.artifact.sizes):
                raise DigestMismatch(f"found more bytes than the {staged.artifact.size} of its manifest")
            part, view = view[:room], view[room:]
            staged.feed(index, bytes(part))
            room -= len(part)
            if room == 0:
                index += 1
                room = staged.artifact.sizes[index] if index < len(staged.artifact.sizes) else 0


def _size_on_disk(folder: Path) -> int:
    size = 0
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            size += path.stat().st_blocks * 512
    return size


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _replace(path: Path, data: bytes) -> None:
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    with fresh.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
