r"""A whole generation of one site as one file: what it must hold, in what order, and who signed that.

    "ondol archive 1\\n"   LEN (4 bytes, big-endian)   the index: a signed envelope, JSON   the parts, one after another

The index names every part with its size and SHA-256.  So nothing in the file is a path, nothing is compressed, and
a byte that the hub did not sign is seen before it is used.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from ondol.core import dsse
from ondol.core.chunks import ARTIFACT_BYTES_MAX, MANIFEST_BYTES_MAX
from ondol.core.dsse import Envelope
from ondol.core.trust import Trust
from ondol.errors import BadSignature, InvalidRequest

ARCHIVE_TYPE: Final = dsse.TYPE_PREFIX + "archive.v1"
MAGIC: Final = b"ondol archive 1\n"
INDEX_BYTES_MAX: Final = 8 * 1024 * 1024
ENTRIES_MAX: Final = 20_000
SMALL_BYTES_MAX: Final = 2 * MANIFEST_BYTES_MAX
"""A part that is no model; they are held in memory."""
SMALL_BYTES_ALL: Final = 128 * 1024 * 1024
MANIFEST: Final = "manifest"
EPOCH: Final = "epoch"
_NAME: Final = re.compile(r"manifest|epoch|bodies/[0-9a-f]{64}|models/[0-9a-f]{64}(\.manifest)?")


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One part: `manifest`, `epoch`, `bodies/<hex>`, `models/<hex>.manifest` or `models/<hex>`; SHA-256 in hex."""

    name: str
    size: int
    sha256: str

    @property
    def is_model(self) -> bool:
        """Whether it is the data of a model, which may be large."""
        return self.name.startswith("models/") and not self.name.endswith(".manifest")


class Index(msgspec.Struct, frozen=True, kw_only=True):
    """What a file holds, and for whom."""

    fleet: str
    site: str
    generation: int
    issued_ns: int
    entries: tuple[Entry, ...]


def entry_of(name: str, data: bytes) -> Entry:
    """The entry of a part that is at hand."""
    return Entry(name, len(data), hashlib.sha256(data).hexdigest())


def sign_index(private: bytes, index: Index) -> Envelope:
    """The hub signs what a file holds.

    Raises:
        InvalidRequest: it would be more than a site takes.
    """
    problem = _problem(index.entries)
    if problem:
        raise InvalidRequest(f"archive: {problem}")
    return dsse.sign(private, ARCHIVE_TYPE, msgspec.json.encode(index))


def read_index(raw: bytes, trust: Trust, *, site: str) -> Index:
    """The index of a file, if the hub of this fleet signed it for this site.

    Raises:
        BadSignature: it did not, or the index is none that can be worked with.
    """
    try:
        envelope = msgspec.json.decode(raw, type=Envelope)
        index = msgspec.json.decode(dsse.verify(envelope, ARCHIVE_TYPE, trust.keys), type=Index)
    except msgspec.MsgspecError as error:
        raise BadSignature(f"archive: its index is none ({str(error)[:120]})") from error
    if (index.fleet, index.site) != (trust.fleet, site):
        raise BadSignature(
            f"archive: it is for site {index.site[:64]!r} of fleet {index.fleet[:64]!r}; expected {site!r} of "
            f"{trust.fleet!r}"
        )
    problem = _problem(index.entries)
    if problem:
        raise BadSignature(f"archive: {problem}")
    return index


def _problem(entries: Sequence[Entry]) -> str:
    if not 2 <= len(entries) <= ENTRIES_MAX:
        return f"found {len(entries)} parts, expected 2 to {ENTRIES_MAX}"
    names = [one.name for one in entries]
    strange = next((name for name in names if not _NAME.fullmatch(name)), None)
    if strange is not None:
        return f"found a part named {strange[:80]!r}, which is none of ours"
    if len(set(names)) != len(names) or not {MANIFEST, EPOCH} <= set(names):
        return "a part stands twice, or the manifest or the list of who is out is missing"
    for one in entries:
        most = ARTIFACT_BYTES_MAX if one.is_model else SMALL_BYTES_MAX
        if not 0 <= one.size <= most or len(one.sha256) != 64:
            return f"found {one.size} bytes of {one.name}, expected at most {most}, with their SHA-256"
        if one.is_model and f"{one.name}.manifest" not in names:
            return f"{one.name} comes without its manifest"
        if one.is_model and one.name.removeprefix("models/") != one.sha256:
            return f"{one.name} has another digest than its name"
    small = sum(one.size for one in entries if not one.is_model)
    if small > SMALL_BYTES_ALL:
        return f"found {small} bytes beside the models, expected at most {SMALL_BYTES_ALL}"
    return ""


def small_parts(
    manifest: Envelope, epoch: Envelope, bodies: Mapping[str, bytes], models: Mapping[str, bytes]
) -> dict[str, bytes]:
    """The parts that are no models, by name, in a file's order; `models` maps digests to signed manifests."""
    parts = {MANIFEST: msgspec.json.encode(manifest), EPOCH: msgspec.json.encode(epoch)}
    parts |= {f"bodies/{digest}": body for digest, body in bodies.items()}
    parts |= {f"models/{digest.partition(':')[2]}.manifest": raw for digest, raw in models.items()}
    return parts
