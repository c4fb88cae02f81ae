"""`GET /v1/artifacts/{digest}` and `/data`: what hub and sites answer alike, as values.  No I/O: the app sends.

The manifest is JSON, a signed envelope.  The data is the file, whole or one range of it; it never changes under its
digest, so caches may keep it for good.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

import msgspec

from ondol.core.chunks import is_digest

PREFIX: Final = "/v1/artifacts/"
MANIFEST_TYPE: Final = "application/vnd.ondol.artifact.v1+json"
DATA_TYPE: Final = "application/octet-stream"
_DIGITS_MAX: Final = 18
_GOOD: Final = "private, max-age=31536000, immutable"


class ArtifactFiles(Protocol):
    """Where the files are.  Calls block for as long as a look at a folder takes."""

    def find(self, digest: str) -> tuple[str, int] | None:
        """Path and size of a whole, verified file; None where it is not here."""
        ...

    def manifest(self, digest: str) -> bytes | None:
        """The signed manifest as JSON, None where there is none."""
        ...


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """What to answer: `body`, or `length` bytes of the file `path` from `offset` on.

    A HEAD gets the status and headers alone.
    """

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    path: str | None = None
    offset: int = 0
    length: int = 0


def parse_path(path: str) -> tuple[str, bool] | None:
    """The digest that a path names, and whether its data is wanted; None for every other path."""
    if not path.startswith(PREFIX):
        return None
    digest, slash, rest = path[len(PREFIX) :].partition("/")
    if not is_digest(digest) or (slash and rest != "data"):
        return None
    return digest, bool(slash)


def serve_manifest(files: ArtifactFiles, digest: str) -> Served:
    """The signed manifest, or 404."""
    found = files.manifest(digest) if is_digest(digest) else None
    if found is None:
        return _missing(digest)
    return Served(
        status=200, headers=(("content-type", MANIFEST_TYPE), ("cache-control", _GOOD)), body=found,
        length=len(found),
    )  # fmt: skip


def serve_artifact(files: ArtifactFiles, digest: str, range_header: str | None) -> Served:
    """The file, or the one range of it that is asked for: 200, 206, 404 or 416.

    A header in another unit than bytes is passed over, as RFC 9110 wishes (section 14.2); several ranges at once are
    refused, since no client of ours asks for them.
    """
    found = files.find(digest) if is_digest(digest) else None
    if found is None or files.manifest(digest) is None:
        return _missing(digest)
    path, size = found
    headers = (
        ("content-type", DATA_TYPE), ("accept-ranges", "bytes"), ("etag", f'"{digest}"'), ("cache-control", _GOOD),
    )  # fmt: skip
    span = parse_range(range_header, size)
    if span is None:
        return Served(status=200, headers=(*headers, ("content-length", str(size))), path=path, length=size)
    offset, length = span
    if length <= 0:
        return Served(
            status=416,
            headers=(("content-range", f"bytes */{size}"), ("content-type", "application/json")),
            body=_error("range_not_satisfiable", f"expected one range within {size} bytes"),
        )
    extra = (
        ("content-range", f"bytes {offset}-{offset + length - 1}/{size}"), ("content-length", str(length)),
    )  # fmt: skip
    return Served(status=206, headers=(*headers, *extra), path=path, offset=offset, length=length)


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """Offset and length of a `Range` header; None for the whole file, a length of 0 for what cannot be served."""
    if header is None:
        return None
    unit, _, ranges = header.strip().partition("=")
    if unit.strip().lower() != "bytes":
        return None
    first, dash, last = ranges.strip().partition("-")
    wrong = (0, 0)
    if not dash or "," in ranges or not (first or last) or not (_number(first) and _number(last)):
        return wrong
    if not first:
        length = min(int(last), size)
        return (size - length, length) if length else wrong
    begin = int(first)
    end = min(int(last), size - 1) if last else size - 1
    return (begin, end - begin + 1) if begin <= end else wrong


def _number(text: str) -> bool:
    return not text or (text.isascii() and text.isdigit() and len(text) <= _DIGITS_MAX)


def _missing(digest: str) -> Served:
    words = f"there is no artifact {digest[:80]} here; `ondol models list` shows what there is"
    return Served(
        status=404, headers=(("content-type", "application/json"),), body=_error("not_found", words)
    )


def _error(code: str, message: str) -> bytes:
    return msgspec.json.encode({"error": {"code": code, "message": message, "type": "request_error"}})


def send(served: Served, method: str, proto: Any) -> None:
    """Answer with what was decided, through the server's protocol object (RSGI): it copies the file itself."""
    head = list(served.headers)
    if method == "HEAD":
        proto.response_empty(served.status, head)
    elif served.path is None:
        proto.response_bytes(served.status, head, served.body)
    else:
        # The server writes the length itself.
        head = [one for one in head if one[0] != "content-length"]
        proto.response_file_range(
            served.status, head, served.path, served.offset, served.offset + served.length
        )
