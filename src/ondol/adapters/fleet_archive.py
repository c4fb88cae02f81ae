"""Reads and writes the file of `core.archive`: in one pass each, with no more than a block of a model in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Final

import msgspec

from ondol.adapters.fleet_models import FleetModels, fill
from ondol.core import archive, chunks
from ondol.core.archive import Entry, Index
from ondol.core.desired import Desired, assemble
from ondol.core.dsse import Envelope
from ondol.core.trust import Epoch, Trust, read_epoch
from ondol.errors import BadSignature, DigestMismatch, GenerationRefused, NotFound, StateError

_BLOCK: Final = 1024 * 1024


class Opened(msgspec.Struct, frozen=True, kw_only=True):
    """A file whose every byte was verified: what the site shall be, who is out, and where its models lie in it."""

    path: Path
    index: Index
    desired: Desired
    epoch_envelope: Envelope
    epoch: Epoch
    models: dict[str, tuple[Envelope, int]]


def write_archive(
    path: Path, index: Envelope, entries: Iterable[Entry], parts: Mapping[str, bytes],
    model: Callable[[str], Iterable[bytes]],
) -> int:  # fmt: skip
    """Write a file; its size.  `model` gives the bytes of a model by its digest.

    The file appears under its name only when it is whole.

    Raises:
        DigestMismatch: a model is not the one that the index names.
        StateError: it cannot be written.
    """
    fresh = path.with_name(f".{path.name}.part")
    raw = msgspec.json.encode(index)
    try:
        with fresh.open("wb") as file:
            file.write(archive.MAGIC + len(raw).to_bytes(4, "big") + raw)
            for entry in entries:
                blocks = model(f"sha256:{entry.sha256}") if entry.is_model else [parts[entry.name]]
                _copy(file, entry, blocks)
            size = file.tell()
        fresh.replace(path)
    except OSError as error:
        raise StateError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        fresh.unlink(missing_ok=True)
    return size


def _copy(file: IO[bytes], entry: Entry, blocks: Iterable[bytes]) -> None:
    hashed, size = hashlib.sha256(), 0
    for block in blocks:
        hashed.update(block)
        size += len(block)
        file.write(block)
    if (size, hashed.hexdigest()) != (entry.size, entry.sha256):
        raise DigestMismatch(f"found {size} bytes of {entry.name}, which are not those that the hub signed")


def open_archive(path: Path, trust: Trust, *, site: str, known: Desired | None) -> Opened:
    """Read and verify all of a file; nothing on this site changes.

    `known` is what the site runs: a lower generation is refused.  `trust.epoch` is the newest list that it knows.

    Raises:
        NotFound: the file cannot be read.
        BadSignature: something in it is not what the hub signed for this site, or it is cut off, or goes on.
        GenerationRefused: it is older than what the site has.
    """
    try:
        with path.open("rb") as file:
            index = _index(file, trust, site)
            least = 0 if known is None else known.manifest.generation
            if index.generation < least:
                raise GenerationRefused(
                    f"the file has generation {index.generation}, and this site runs {least} already; export again"
                )
            small, places = _verified(file, index)
    except OSError as error:
        raise NotFound(f"{path} cannot be read: {error.strerror or error}") from error
    desired = assemble(
        _envelope(small[archive.MANIFEST]), trust, site=site, known={}, least=least,
        sent=[data for name, data in small.items() if name.startswith("bodies/")],
    )  # fmt: skip
    if desired.manifest.generation != index.generation:
        raise BadSignature(
            f"archive: its manifest has generation {desired.manifest.generation}, its index {index.generation}"
        )
    epoch_envelope = _envelope(small[archive.EPOCH])
    models = {}
    for name, offset in places.items():
        digest = f"sha256:{name.removeprefix('models/')}"
        signed = _envelope(small[f"{name}.manifest"])
        chunks.read(signed, dict(trust.keys), digest=digest)
        models[digest] = (signed, offset)
    return Opened(
        path=path, index=index, desired=desired, epoch_envelope=epoch_envelope,
        epoch=read_epoch(epoch_envelope, trust), models=models,
    )  # fmt: skip


def take_models(opened: Opened, models: FleetModels, *, keep: Iterable[str] = ()) -> int:
    """Put the models of a file into the store, those that are not there; how many came.

    Raises:
        BadModelFile: one is no model that native code may see.
        StateError: no room, or the disk fails.
    """
    wanted = {*keep, *opened.models}
    came = 0
    for digest, (envelope, offset) in opened.models.items():
        artifact = chunks.unverified(envelope)
        if models.find(digest) is not None:
            models.keep_manifest(digest, envelope)
            continue
        models.make_room(artifact.size, keep=wanted)
        staged = models.stage(artifact, envelope)
        try:
            if staged.missing:
                fill(staged, _blocks(opened.path, offset, artifact.size))
            models.add_verified(staged, envelope)
        finally:
            staged.close()
        came += 1
    return came


def _index(file: IO[bytes], trust: Trust, site: str) -> Index:
    head = file.read(len(archive.MAGIC) + 4)
    if not head.startswith(archive.MAGIC) or len(head) < len(archive.MAGIC) + 4:
        raise BadSignature("archive: this is no file of `ondol export`")
    length = int.from_bytes(head[-4:], "big")
    if not 1 <= length <= archive.INDEX_BYTES_MAX:
        raise BadSignature(f"archive: an index of {length} bytes; at most {archive.INDEX_BYTES_MAX}")
    raw = file.read(length)
    if len(raw) < length:
        raise BadSignature("archive: the file is cut off within its index")
    return archive.read_index(raw, trust, site=site)


def _verified(file: IO[bytes], index: Index) -> tuple[dict[str, bytes], dict[str, int]]:
    """The small parts, and where each model begins; every byte hashed."""
    small: dict[str, bytes] = {}
    places: dict[str, int] = {}
    for entry in index.entries:
        begin = file.tell()
        hashed, left = hashlib.sha256(), entry.size
        kept: list[bytes] = []
        while left:
            block = file.read(min(left, _BLOCK))
            if not block:
                raise BadSignature(f"archive: the file is cut off within {entry.name}; copy it again")
            hashed.update(block)
            left -= len(block)
            if not entry.is_model:
                kept.append(block)
        if hashed.hexdigest() != entry.sha256:
            raise BadSignature(
                f"archive: {entry.name} is not the one that the hub signed; copy the file again"
            )
        if entry.is_model:
            places[entry.name] = begin
        else:
            small[entry.name] = b"".join(kept)
    if file.read(1):
        raise BadSignature("archive: the file goes on after its last part")
    return small, places


def _envelope(raw: bytes) -> Envelope:
    try:
        return msgspec.json.decode(raw, type=Envelope)
    except msgspec.MsgspecError as error:
        raise BadSignature(f"archive: a part is no signed statement ({str(error)[:100]})") from error


def _blocks(path: Path, offset: int, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(offset)
        while size:
            block = file.read(min(size, _BLOCK))
            if not block:
                raise StateError(f"{path} became shorter while it was read")
            size -= len(block)
            yield block
