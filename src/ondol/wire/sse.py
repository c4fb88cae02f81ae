"""Server-sent events: bytes in, payloads out; no I/O.

Owns the framing only (WHATWG HTML, section 9.2.6) and knows nothing of JSON.  Invariant: however the
bytes are cut, the same stream gives the same payloads.  Comments and the fields `event`, `id` and
`retry` are dropped: no engine says anything in them that its data does not.
"""

from __future__ import annotations

from typing import Final

DONE: Final = b"data: [DONE]\n\n"
MAX_EVENT_BYTES: Final = 8 * 1024 * 1024
"""Far above any chunk seen (a base64 picture is the largest), far below what hurts."""

_BOM: Final = b"\xef\xbb\xbf"


class EventTooLarge(ValueError):
    """An event passes its bound; the stream cannot go on."""


class SseDecoder:
    """Cuts a stream into the payloads of its events.  One decoder a stream.

    Lines may end in LF, CRLF or CR, mixed.  Time is linear in the bytes fed, however they are cut.
    """

    __slots__ = ("_begun", "_broken", "_max", "_skip_lf", "_tail")

    def __init__(self, *, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        """Take the most bytes that one event may have, field names included."""
        self._max = max_event_bytes
        self._tail = bytearray()
        self._skip_lf = False
        self._begun = False
        self._broken = False

    def feed(self, data: bytes) -> list[bytes]:
        """The payloads that `data` completes, each the joined `data` fields of one event.

        Raises:
            EventTooLarge: an event passes `max_event_bytes`.  Events before it are given first; from
                then on every call raises.
        """
        if self._broken:
            raise EventTooLarge(_too_large(self._max))
        if self._skip_lf or not self._begun or b"\r" in data:
            data = self._normalise(data)
        tail = self._tail
        if tail:
            searched = len(tail) - 1
            tail += data
            if tail.find(b"\n\n", searched) < 0:
                return self._stop([]) if len(tail) > self._max else []
            data = bytes(tail)
            tail.clear()
        blocks = data.split(b"\n\n")
        rest = blocks.pop()
        if rest:
            tail += rest
        payloads: list[bytes] = []
        for block in blocks:
            if len(block) > self._max:
                return self._stop(payloads)
            # Nearly every event is one line of this form; the rest takes the careful way.
            if block.startswith(b"data: ") and b"\n" not in block:
                payloads.append(block[6:])
            elif (payload := _payload(block)) is not None:
                payloads.append(payload)
        return self._stop(payloads) if len(rest) > self._max else payloads

    def unfinished(self) -> bool:
        """Whether bytes of an event are held that no blank line has ended."""
        return self._broken or any(line and not line.startswith(b":") for line in self._tail.split(b"\n"))

    def _stop(self, payloads: list[bytes]) -> list[bytes]:
        """Give what came before the event that is too large; the next call raises, or this one."""
        self._broken = True
        if not payloads:
            raise EventTooLarge(_too_large(self._max))
        return payloads

    def _normalise(self, data: bytes) -> bytes:
        """Drop a byte order mark at the very start, and turn CRLF and CR into LF."""
        if not self._begun:
            if self._tail:
                data = bytes(self._tail) + data
                self._tail.clear()
            if len(data) < len(_BOM) and _BOM.startswith(data):
                self._tail += data
                return b""
            self._begun = True
            data = data.removeprefix(_BOM)
        if not data:
            return data
        if self._skip_lf:
            # The CR before was an end of line already; this LF is its second half.
            self._skip_lf = False
            data = data.removeprefix(b"\n")
        if b"\r" in data:
            self._skip_lf = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        return data


def encode(payload: bytes) -> bytes:
    """One event.  A payload of several lines becomes several `data` fields, which join again."""
    if b"\n" not in payload and b"\r" not in payload:
        return b"data: " + payload + b"\n\n"
    lines = payload.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    return b"".join(b"data: " + line + b"\n" for line in lines) + b"\n"


def _payload(block: bytes) -> bytes | None:
    """The joined `data` fields of a block of lines; None when it has none."""
    values = []
    for line in block.split(b"\n"):
        name, _, value = line.partition(b":")
        if name == b"data":
            values.append(value.removeprefix(b" "))
    return b"\n".join(values) if values else None


def _too_large(limit: int) -> str:
    return f"an event is larger than {limit} bytes; expected a blank line before that"
