"""What may come in at all, before anybody asks who sends it.

The HTTP server frames messages; this module refuses what is well framed and still means two things to
two readers: a second Host, a path with a second root, a header that a proxy spells differently.  It also
bounds what is big, deep or slow.  Pure: it is handed times and counts, and returns reasons.

What the server (granian, hyper) has done before us, and what follows from it; the integration test of 40
awkward messages holds all of this:

- The path is percent-decoded once and the query is cut off, so `%2f` arrives as `/`: routing and
  authorisation see the same decoded path, and nothing decodes again.  What is still encoded was encoded
  twice, and is refused.
- An absolute-form target (and CONNECT) shows as an authority; an origin-form one has none.
- Content-Length beside Transfer-Encoding is dropped, chunked wins, and the connection closes.
- A header whose value is not visible ASCII is missing from the items but present in the names.
- A body that breaks off ends like a whole one, but with a second empty chunk: see `BodyMeter`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from ondol.core.catalog import Limits
from ondol.units import NS_PER_S

METHODS: Final = frozenset({"GET", "HEAD", "POST", "DELETE", "OPTIONS"})
JSON_BRACKETS_MAX: Final = 100_000
"""Far above any honest request (2,048 arrays of tokens need 2,049), and checked in 25 ms at worst."""

_ONCE: Final = frozenset(
    {
        "accept-encoding", "authorization", "connection", "content-encoding", "content-length",
        "content-type", "expect", "host", "idempotency-key", "origin", "transfer-encoding", "upgrade",
    }
)  # fmt: skip
"""Headers that we act on: twice, or hidden from us, each would mean two things."""
_OWN: Final = "x-ondol-"
_HEADER_EXTRA: Final = 4  # ": " and the end of line
_TWICE_ENCODED: Final = ("%2f", "%5c", "%00", "%2e")
_KEEP: Final = b'"[]{}'
_DROP: Final = bytes(byte for byte in range(256) if byte not in _KEEP)
_SQUARE: Final = bytes.maketrans(b"{}", b"[]")


class Refusal(msgspec.Struct, frozen=True):
    """Why a message stops here: the HTTP status, a stable code, a sentence without any of its content."""

    status: int
    code: str
    message: str


class HeadGuard:
    """The check of a request's head.  `allowed_hosts` are `name`, `name:port`, `[::1]` or `[::1]:port`.

    A name without a port is allowed with every port.  Case does not matter, nor a dot at the end.
    """

    def __init__(self, allowed_hosts: Iterable[str], limits: Limits) -> None:
        self._hosts = frozenset(_plain_host(host) for host in allowed_hosts)
        self._header_count = limits.header_count
        self._header_bytes = limits.header_bytes

    def check(
        self,
        method: str,
        path: str,
        authority: str | None,
        headers: Sequence[tuple[str, str]],
        names: Sequence[str] | None = None,
    ) -> Refusal | None:
        """None for a head that means one thing, else the reason to refuse it.  Some 2 microseconds.

        `headers` and `path` are as the server gives them: names in lower case, the path decoded once and
        without its query.  `names` are all header names, those with a hidden value too.
        """
        if authority is not None:
            return Refusal(400, "absolute_target", "the target must be a path (/v1/...), not a whole URL")
        if method not in METHODS:
            return _bad_method(method)
        if problem := _path_problem(path):
            return Refusal(400, "bad_path", problem)
        found = dict(headers)
        seen = "".join(found if names is None else names)
        if len(headers) > self._header_count:
            return Refusal(
                431, "too_many_headers", f"{len(headers)} headers; at most {self._header_count} are taken"
            )
        size = len(seen) + len("".join(found.values())) + _HEADER_EXTRA * len(headers)
        if size > self._header_bytes:
            return Refusal(
                431, "headers_too_large", f"{size} bytes of headers; at most {self._header_bytes} are taken"
            )
        if "_" in seen:
            return Refusal(
                400, "bad_header", "a header name has an underscore, which proxies read as a hyphen"
            )
        if len(found) != len(headers) and (refusal := _twice(headers)):
            return refusal
        if names is not None and len(names) != len(found) and (refusal := _hidden(names, found)):
            return refusal
        return self._fields(found)

    def _fields(self, found: dict[str, str]) -> Refusal | None:
        host = found.get("host")
        if host is None:
            return Refusal(400, "no_host", "the Host header is missing")
        if host not in self._hosts and not self._is_allowed(host):
            return Refusal(
                421,
                "unknown_host",
                "this gateway does not answer for that Host; add it to `hosts` of the Gateway document",
            )
        # A server may ignore an upgrade that it does not want.  Java's client offers h2c with its first
        # request on clear text, so that one is ignored; whoever asks for another protocol means it.
        if found.get("upgrade", "h2c").lower() != "h2c":
            return Refusal(400, "no_upgrade", "this gateway speaks no protocol but HTTP")
        if found.get("transfer-encoding", "chunked").lower() != "chunked":
            return Refusal(501, "transfer_encoding", "the only transfer coding that is understood is chunked")
        if found.get("content-encoding", "identity").lower() not in ("identity", ""):
            return Refusal(415, "content_encoding", "send the body uncompressed, without Content-Encoding")
        if found.get("expect", "100-continue").lower() != "100-continue":
            return Refusal(417, "expectation", "the only expectation that is met is 100-continue")
        return None

    def _is_allowed(self, host: str) -> bool:
        plain = _plain_host(host)
        if plain in self._hosts:
            return True
        name, colon, port = plain.rpartition(":")
        return bool(colon) and port.isascii() and port.isdigit() and name in self._hosts


def _plain_host(host: str) -> str:
    lower = host.lower()
    name, colon, port = lower.rpartition(":")
    if colon and not port.endswith("]"):
        return f"{name.removesuffix('.')}:{port}"
    return lower.removesuffix(".")


def _bad_method(method: str) -> Refusal:
    if method.upper() in METHODS:
        return Refusal(400, "bad_method", "HTTP methods are written in capitals")
    return Refusal(405, "method_not_allowed", f"the methods served are {', '.join(sorted(METHODS))}")


def _path_problem(path: str) -> str | None:
    if not path.startswith("/"):
        return "the path must begin with /"
    if "//" in path:
        return "the path has // in it; write a single /"
    if "\\" in path or not path.isprintable() or "\ufffd" in path:
        return "the path has a backslash, a control character or broken UTF-8 in it"
    if "/." in path and ("/.." in path or "/./" in path or path.endswith("/.")):
        return "the path has a dot segment; write it out"
    if "%" in path:
        lower = path.lower()
        for escape in _TWICE_ENCODED:
            if escape in lower:
                return f"the path has {escape} in it after decoding; encode it once"
    return None


def _twice(headers: Sequence[tuple[str, str]]) -> Refusal | None:
    counts = Counter(name for name, _ in headers)
    for name, count in counts.items():
        if count > 1 and (name in _ONCE or name.startswith(_OWN)):
            return Refusal(400, "duplicate_header", f"the header {name} came {count} times; send it once")
    return None


def _hidden(names: Sequence[str], found: dict[str, str]) -> Refusal | None:
    for name in names:
        if name not in found and (name in _ONCE or name.startswith(_OWN)):
            return Refusal(
                400,
                "bad_header",
                f"the value of the header {name} is not plain ASCII; percent-encode what is not",
            )
    return None


def allowed_hosts(listen: str, more: Iterable[str] = ()) -> frozenset[str]:
    """The hosts that a gateway answers for: its own address, this machine's names on it, and `more`."""
    _, _, port = listen.rpartition(":")
    own = (listen, f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}")
    return frozenset(_plain_host(host) for host in (*own, *more))


def json_depth_ok(raw: bytes, limit: int) -> bool:
    """Whether unparsed JSON nests at most `limit` deep and has at most JSON_BRACKETS_MAX brackets.

    Exact for well-formed JSON; for broken JSON it may say no early, and never yes to what is too deep.
    Two counts over the bytes as a rule; text with more opening brackets than `limit` costs a few passes.
    """
    opening = raw.count(b"[") + raw.count(b"{")
    if opening <= limit:
        return True
    if b"\\" in raw:  # pairs first, so that a backslash that is itself escaped escapes no quote
        raw = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    outside = b"".join(raw.translate(_SQUARE, _DROP).split(b'"')[::2])
    if outside.count(b"[") > JSON_BRACKETS_MAX:
        return False
    for depth in range(limit + 1):
        inner = outside.replace(b"[]", b"")  # takes off exactly the innermost level
        if len(inner) == len(outside):
            return depth + outside.count(b"[") <= limit
        outside = inner
    return False


class BodyMeter:
    """Whether a body stays within its size and comes fast enough; one a request, owned by its reader.

    Feed it every chunk that the server gives, empty ones too, then ask `finish`.  The body must be there
    after `body_grace_s`, or later by one second for each `body_bytes_per_s` that have come.
    """

    __slots__ = ("_declared", "_empty", "_grace_ns", "_limit", "_rate", "_started_ns", "received")

    def __init__(self, limits: Limits, started_ns: int, content_length: str | None) -> None:
        self._limit = limits.body_bytes
        self._rate = limits.body_bytes_per_s
        self._grace_ns = int(limits.body_grace_s * NS_PER_S)
        self._started_ns = started_ns
        self._declared = None if content_length is None else int(content_length)
        self._empty = 0
        self.received = 0

    def begin(self) -> Refusal | None:
        """Refuse at once what says itself that it is too large, without reading any of it."""
        if self._declared is not None and self._declared > self._limit:
            return self._too_large(self._declared)
        return None

    def feed(self, chunk: bytes) -> Refusal | None:
        """Count a chunk."""
        if not chunk:
            self._empty += 1
            return None
        self.received += len(chunk)
        return self._too_large(self.received) if self.received > self._limit else None

    def patience_ns(self, now_ns: int, size: int | None = None) -> int:
        """How long to wait from `now_ns` for the next chunk, or for a whole body of `size`.

        0 or less means that time is up.
        """
        earned = (self.received if size is None else size) * NS_PER_S // self._rate
        return self._started_ns + self._grace_ns + earned - now_ns

    def too_slow(self) -> Refusal:
        """The refusal for a body whose time is up."""
        return Refusal(
            408,
            "body_too_slow",
            f"the body came slower than {self._rate} bytes a second; {self.received} came",
        )

    def finish(self) -> Refusal | None:
        """Refuse a body that broke off.

        The server ends a broken body as it ends a whole one, save that it gives an empty chunk for the
        failure and another for the end.  A declared length that was not reached shows it as well.
        """
        if self._empty > 1 or (self._declared is not None and self.received != self._declared):
            return Refusal(
                400, "body_broken", f"the body broke off or was framed wrongly after {self.received} bytes"
            )
        return None

    def _too_large(self, size: int) -> Refusal:
        return Refusal(413, "request_too_large", f"{size} bytes of body; at most {self._limit} are taken")


class AddressGate:
    """How many requests each client address has running; mutable, owned by the app, on one loop."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._running: dict[str, int] = {}

    def enter(self, client: str) -> Refusal | None:
        """Count a request of `client` (`address:port`), or refuse it; a refused one must not leave."""
        address = client.rpartition(":")[0]
        running = self._running.get(address, 0)
        if running >= self._limit:
            return Refusal(
                429,
                "too_many_at_once",
                f"{running} requests of this address are running; wait for one to end",
            )
        self._running[address] = running + 1
        return None

    def leave(self, client: str) -> None:
        """Count a request's end, whatever its outcome."""
        address = client.rpartition(":")[0]
        left = self._running[address] - 1
        if left:
            self._running[address] = left
        else:
            del self._running[address]
