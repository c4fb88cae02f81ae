"""Answers kept by `Idempotency-Key`, so that a request that is sent again is not done again.

Pure state: it says what to do, the caller waits and replies.  Bounded in bytes and in time.  The one
invariant: under one key of one caller no second request runs while the first does, or while its outcome
is remembered.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, Generic, TypeVar

import msgspec

from ondol.errors import Conflict, InvalidRequest, Overloaded
from ondol.units import NS_PER_S

KEY_LENGTH_MAX: Final = 255
DEFAULT_TTL_NS: Final = 24 * 3600 * NS_PER_S

_SLOT_OVERHEAD: Final = 1024
"""Bytes of a remembered request beside its answer: key, hash, slot and index, overestimated."""
_OBJECT_OVERHEAD: Final = 41
"""CPython's header of a bytes object (33) and its place in a tuple (8)."""

Waiter = TypeVar("Waiter")


class KeptAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """An answer as it went out: `body`, or for a stream its `chunks`."""

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    chunks: tuple[bytes, ...] = ()

    def size(self) -> int:
        """Bytes that it takes in memory, about.  O(chunks)."""
        headers = sum(len(name) + len(value) + 160 for name, value in self.headers)
        return headers + len(self.body) + sum(map(len, self.chunks)) + _OBJECT_OVERHEAD * len(self.chunks)


class Slot(Generic[Waiter]):
    """One remembered request.  Opaque: the caller hands it back to `finish` or `abandon`."""

    __slots__ = ("answer", "done", "expires_ns", "name", "request_hash", "size", "waiter")

    def __init__(self, name: tuple[str, str], request_hash: bytes, waiter: Waiter, expires_ns: int) -> None:
        """Begin as running."""
        self.name = name
        self.request_hash = request_hash
        self.waiter = waiter
        self.expires_ns = expires_ns
        self.size = _SLOT_OVERHEAD + 4 * len(name[1])
        self.done = False
        self.answer: KeptAnswer | None = None


class Started(msgspec.Struct, Generic[Waiter], frozen=True):
    """Nobody has asked this before: do it, then `finish` or `abandon` the slot."""

    slot: Slot[Waiter]


class Running(msgspec.Struct, Generic[Waiter], frozen=True):
    """The same request is being done: wait on its waiter, then `begin` again."""

    waiter: Waiter


class Done(msgspec.Struct, frozen=True):
    """The same request was done: this is its answer."""

    answer: KeptAnswer


class IdempotencyStore(Generic[Waiter]):
    """Requests by (key id, Idempotency-Key); owns them.  The oldest finished are given up first."""

    def __init__(self, max_bytes: int, *, ttl_ns: int = DEFAULT_TTL_NS) -> None:
        """Hold at most `max_bytes`, each for `ttl_ns` from its beginning."""
        self._max_bytes = max_bytes
        self._ttl_ns = ttl_ns
        self._running: dict[tuple[str, str], Slot[Waiter]] = {}
        self._finished: OrderedDict[tuple[str, str], Slot[Waiter]] = OrderedDict()
        self._bytes = 0

    @property
    def bytes_held(self) -> int:
        """Bytes of all that is remembered now, about."""
        return self._bytes

    def __len__(self) -> int:
        """How many requests are remembered, running or finished."""
        return len(self._running) + len(self._finished)

    def begin(
        self, key_id: str, key: str, request_hash: bytes, now_ns: int, waiter: Waiter
    ) -> Started[Waiter] | Running[Waiter] | Done:
        """What to do with a request; `waiter` is kept only when it is `Started`.

        Raises:
            InvalidRequest: the key is empty, too long, or has other than printable ASCII characters.
            Conflict: the key was used for another request, or its answer was too large to keep.
            Overloaded: so many requests with keys are running that not one more can be remembered.
        """
        if not 0 < len(key) <= KEY_LENGTH_MAX or not (key.isascii() and key.isprintable()):
            raise InvalidRequest(
                f"Idempotency-Key has {len(key)} characters; expected 1 to {KEY_LENGTH_MAX} printable "
                "ASCII characters, such as a UUID.",
                param="Idempotency-Key",
            )
        name = (key_id, key)
        slot = self._running.get(name) or self._finished.get(name)
        if slot is not None and slot.done and now_ns >= slot.expires_ns:
            self._forget(slot)
            slot = None
        if slot is not None:
            return self._seen_before(slot, request_hash)
        slot = Slot(name, request_hash, waiter, now_ns + self._ttl_ns)
        if not self._make_room(slot.size):
            raise Overloaded(
                f"{len(self._running)} requests with an Idempotency-Key are running, which is all that can "
                "be remembered. Try again in a moment, or without the header.",
                retry_after_s=1.0,
            )
        self._running[name] = slot
        self._bytes += slot.size
        return Started(slot)

    def finish(self, slot: Slot[Waiter], answer: KeptAnswer) -> Waiter:
        """Keep the answer; the waiter to wake.

        An answer larger than an eighth of the bound is not kept, but that the request was done is: the same
        key gets a conflict then, never a second run.
        """
        self._leave_running(slot)
        slot.done = True
        size = answer.size()
        if slot.size + size <= self._max_bytes // 8 and self._make_room(slot.size + size):
            slot.answer = answer
            slot.size += size
        if self._make_room(slot.size):
            self._finished[slot.name] = slot
            self._bytes += slot.size
        return slot.waiter

    def abandon(self, slot: Slot[Waiter]) -> Waiter:
        """Forget a request that failed, so that it may be tried again; the waiter to wake."""
        self._leave_running(slot)
        return slot.waiter

    def expire(self, now_ns: int) -> int:
        """Forget the finished ones that are too old; how many.  O(finished)."""
        old = [slot for slot in self._finished.values() if now_ns >= slot.expires_ns]
        for slot in old:
            self._forget(slot)
        return len(old)

    def _seen_before(self, slot: Slot[Waiter], request_hash: bytes) -> Running[Waiter] | Done:
        if slot.request_hash != request_hash:
            raise Conflict(
                "This Idempotency-Key was used for a different request. Use a new key for a new request.",
                param="Idempotency-Key",
            )
        if not slot.done:
            return Running(slot.waiter)
        if slot.answer is None:
            raise Conflict(
                "The request with this Idempotency-Key was done, but its answer was too large to keep. "
                "Use a new key to ask again.",
                param="Idempotency-Key",
            )
        return Done(slot.answer)

    def _make_room(self, size: int) -> bool:
        while self._bytes + size > self._max_bytes:
            if not self._finished:
                return False
            self._forget(next(iter(self._finished.values())))
        return True

    def _forget(self, slot: Slot[Waiter]) -> None:
        del self._finished[slot.name]
        self._bytes -= slot.size

    def _leave_running(self, slot: Slot[Waiter]) -> None:
        assert self._running.get(slot.name) is slot, "a slot is finished or abandoned once"
        del self._running[slot.name]
        self._bytes -= slot.size
