"""Artifacts in pieces: what a model file is made of, which pieces are missing, and what to ask for.

A file is cut **where its tensors begin**, and a tensor of more than a chunk every chunk's length from there on.  So
a new version of a model whose header grew, or one tensor of which was quantised anew, shares the chunks of all
tensors that stayed the same, wherever in the file they stand now.  Measured on a model of 98 MB whose `ffn_down`
tensors were quantised anew: 27 % is sent, against 100 % with fixed cuts (all that follows a change of length is lost)
and 62 % with a rolling hash, which costs a pass over every byte besides.

A manifest names the whole by its SHA-256 and every chunk by its own.  The hub signs it, and a site believes no
byte that it does not name.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Collection, Iterable, Sequence
from typing import Final, Literal

import msgspec

from ondol.core import dsse
from ondol.core.dsse import Envelope
from ondol.errors import BadSignature, DigestMismatch, InvalidRequest

ARTIFACT_TYPE: Final = dsse.TYPE_PREFIX + "artifact.v1"
CHUNK_BYTES: Final = 1024 * 1024
CHUNKS_MAX: Final = 65_536
"""A manifest stays below 5 MB: 2 MiB of digests and as many sizes."""
MANIFEST_BYTES_MAX: Final = 8 * 1024 * 1024
ARTIFACT_BYTES_MAX: Final = 512 * 1024**3
RANGE_BYTES_MAX: Final = 64 * 1024 * 1024
_HASH: Final = 32
_HEX: Final = frozenset("0123456789abcdef")

Format = Literal["gguf", "onnx", "safetensors"]


class Artifact(msgspec.Struct, frozen=True, kw_only=True):
    """The manifest of one file.

    `digest` reads `sha256:<hex>` and names the whole.  `sizes` are the bytes of each chunk, in order; `digests` the
    SHA-256 of each, 32 bytes after 32 bytes.  `name` is what its publisher calls it, and names nothing on disk.
    """

    digest: str
    size: int
    format: Format
    sizes: tuple[int, ...]
    digests: bytes
    name: str = ""

    def chunk_digest(self, index: int) -> bytes:
        """The 32 bytes that name a chunk."""
        return self.digests[index * _HASH : (index + 1) * _HASH]

    def offsets(self) -> list[int]:
        """Where each chunk begins, and at the end the size of the file."""
        found, position = [0], 0
        for size in self.sizes:
            position += size
            found.append(position)
        return found


class Span(msgspec.Struct, frozen=True):
    """Chunks `first` … `last` (included), which are `length` bytes at `offset`: one request."""

    first: int
    last: int
    offset: int
    length: int


def is_digest(text: str) -> bool:
    """Whether a text reads `sha256:` and 64 hex digits in lower case."""
    return len(text) == 71 and text.startswith("sha256:") and _HEX.issuperset(text[7:])


def chunk_bytes(size: int) -> int:
    """The length of a chunk in a file of that size: 1 MiB, doubled until a manifest can name them all.

    Half of the chunks that a manifest may name are left for the cuts at tensors.
    """
    length = CHUNK_BYTES
    while size // length > CHUNKS_MAX // 2:
        length *= 2
    return length


def cut(size: int, starts: Iterable[int] = ()) -> tuple[int, ...]:
    """The sizes of the chunks of a file of `size` bytes whose tensors begin at `starts`, ascending.

    A tensor of less than a quarter of a chunk begins none of its own: it goes with its neighbours, else a file of
    many small tensors would have a manifest of its own size.
    """
    if size <= 0:
        raise InvalidRequest(f"found a file of {size} bytes, expected at least 1")
    length = chunk_bytes(size)
    least = length // 4
    edges = [0]
    inner = sorted({one for one in starts if 0 < one < size})
    for start, end in zip(inner, [*inner[1:], size], strict=False):
        # A big tensor is cut off on both sides, so that its chunks are the same in every file that has it.
        if end - start >= least:
            edges.extend(one for one in (start, end) if edges[-1] < one < size)
    sizes: list[int] = []
    for start, end in zip(edges, [*edges[1:], size], strict=True):
        whole, rest = divmod(end - start, length)
        sizes.extend([length] * whole)
        if rest:
            sizes.append(rest)
    return tuple(sizes)


def checked(artifact: Artifact) -> Artifact:
    """The manifest, if it is one that can be worked with.

    Raises:
        InvalidRequest: its digest, sizes or digests contradict each other, or pass a bound.
    """
    count = len(artifact.sizes)
    if not is_digest(artifact.digest):
        raise InvalidRequest(
            f"artifact: found the digest {artifact.digest[:80]!r}, expected sha256: and 64 hex digits"
        )
    if not 1 <= artifact.size <= ARTIFACT_BYTES_MAX:
        raise InvalidRequest(f"artifact: found {artifact.size} bytes, expected 1 to {ARTIFACT_BYTES_MAX}")
    if not 1 <= count <= CHUNKS_MAX or len(artifact.digests) != count * _HASH:
        raise InvalidRequest(
            f"artifact: found {count} chunks and {len(artifact.digests)} bytes of digests, expected 1 to "
            f"{CHUNKS_MAX} chunks of {_HASH} bytes each"
        )
    largest = 2 * chunk_bytes(artifact.size)
    if min(artifact.sizes) < 1 or max(artifact.sizes) > largest or sum(artifact.sizes) != artifact.size:
        raise InvalidRequest(
            f"artifact: its chunks have {sum(artifact.sizes)} bytes, the largest {max(artifact.sizes)}; "
            f"expected {artifact.size} in all and at most {largest} each"
        )
    if len(artifact.name) > 128:
        raise InvalidRequest(
            f"artifact: found a name of {len(artifact.name)} characters, expected at most 128"
        )
    return artifact


def decode(payload: bytes) -> Artifact:
    """The manifest of some JSON.

    Raises:
        InvalidRequest: it is none.
    """
    if len(payload) > MANIFEST_BYTES_MAX:
        raise InvalidRequest(f"artifact: a manifest of {len(payload)} bytes; at most {MANIFEST_BYTES_MAX}")
    try:
        return checked(msgspec.json.decode(payload, type=Artifact))
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"artifact: not a manifest ({error})") from error


def sign(private: bytes, artifact: Artifact) -> Envelope:
    """The hub signs that this file, of these pieces, is one of its fleet's."""
    return dsse.sign(private, ARTIFACT_TYPE, msgspec.json.encode(artifact))


def read(envelope: Envelope, keys: dict[str, bytes], *, digest: str) -> Artifact:
    """The manifest of the file that `digest` names, if one of these keys signed it.

    Raises:
        BadSignature: nobody whom we trust signed it, it is broken, or it is of another file.
    """
    payload = dsse.verify(envelope, ARTIFACT_TYPE, keys)
    try:
        artifact = decode(payload)
    except InvalidRequest as error:
        raise BadSignature(error.message) from error
    if artifact.digest != digest:
        raise BadSignature(f"artifact: the manifest is of {artifact.digest[:23]}…; expected {digest[:23]}…")
    return artifact


def unsigned(artifact: Artifact) -> Envelope:
    """A manifest in the form of a signed one that nobody has signed: no site believes it."""
    payload = base64.b64encode(msgspec.json.encode(artifact)).decode()
    return Envelope(payload_type=ARTIFACT_TYPE, payload=payload, signatures=())


def unverified(envelope: Envelope) -> Artifact:
    """What a manifest says, whoever signed it: for looking at one, and for files that were verified before.

    Raises:
        InvalidRequest: it is none.
    """
    try:
        return decode(base64.b64decode(envelope.payload, validate=True))
    except ValueError as error:
        raise InvalidRequest("artifact: its base64 is broken") from error


def plan(artifact: Artifact, have: Collection[int], *, most: int = RANGE_BYTES_MAX) -> list[Span]:
    """What to ask for: the missing chunks, neighbours in one span of at most `most` bytes (or one chunk)."""
    spans: list[Span] = []
    offset = 0
    for index, size in enumerate(artifact.sizes):
        if index not in have:
            last = spans[-1] if spans else None
            if last is not None and last.last == index - 1 and last.length + size <= most:
                spans[-1] = Span(last.first, index, last.offset, last.length + size)
            else:
                spans.append(Span(index, index, offset, size))
        offset += size
    return spans


def shared(artifact: Artifact, other: Artifact, missing: Collection[int]) -> dict[int, int]:
    """Which of the missing chunks another file holds: our index to where it begins there."""
    at: dict[bytes, tuple[int, int]] = {}
    for index, offset in enumerate(other.offsets()[:-1]):
        at.setdefault(other.chunk_digest(index), (offset, other.sizes[index]))
    found = {}
    for index in missing:
        place = at.get(artifact.chunk_digest(index))
        if place is not None and place[1] == artifact.sizes[index]:
            found[index] = place[0]
    return found


def verify_chunk(artifact: Artifact, index: int, data: bytes | bytearray | memoryview) -> None:
    """Believe a chunk, or not; 1 ms a MiB.

    Raises:
        DigestMismatch: it is not the one that the manifest names.
    """
    if len(data) != artifact.sizes[index] or hashlib.sha256(data).digest() != artifact.chunk_digest(index):
        raise DigestMismatch(
            f"chunk {index} of {artifact.digest[:23]}… is not the one that the signed manifest names"
        )


def describe(
    *, digest: str, format_: Format, sizes: Sequence[int], digests: Sequence[bytes], name: str = ""
) -> Artifact:
    """The manifest of a file that was read in those pieces.

    Raises:
        InvalidRequest: as `checked`.
    """
    return checked(
        Artifact(
            digest=digest, size=sum(sizes), format=format_, sizes=tuple(sizes), digests=b"".join(digests), name=name,
        )
    )  # fmt: skip
