"""The exact cache: the same request of the same tenant gets the same answer again.

The key is a hash over everything that can change the answer, the tenant first, so that one tenant's
answers cannot be found by another.  Bounded in bytes.  Pure state: time is an argument, nothing is stored
outside this process.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Any, Final

import msgspec

from ondol.core.inference import Capability, DataClass, InferenceRequest, Usage
from ondol.core.money import Money
from ondol.core.route_terms import CachePolicy

IGNORED_FIELDS: Final = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "stream",
        "stream_options",
        "user",
    }
)
"""Fields of OpenAI's requests that say who asks, how it is billed or how it is sent, not what to answer."""

BODY_BYTES_MAX: Final = 1024 * 1024
"""A larger request is not looked up: hashing it would hold the loop for milliseconds."""

_ENCODER: Final = msgspec.json.Encoder(order="deterministic")
_ENTRY_OVERHEAD: Final = 1024
"""Bytes of an entry beside its text: two structs, key, slot and index, measured at 0.7 to 0.9 KiB."""
_OBJECT_OVERHEAD: Final = 41
"""CPython's header of a bytes object (33) and its place in a tuple (8)."""


def cache_key(
    *,
    tenant: str,
    route: str,
    task: str,
    body: dict[str, Any],
    stream: bool,
    include_usage: bool,
    generation: str,
    objective: str = "",
) -> bytes:
    """SHA-256 over what decides the answer, in canonical JSON (sorted keys).

    `generation` is the digest of the catalogue: a changed catalogue finds nothing of before.  `objective`
    belongs to it, since `best` must not get the answer of `cheap`.  Cost grows with the body.
    """
    if not IGNORED_FIELDS.isdisjoint(body):
        body = {name: value for name, value in body.items() if name not in IGNORED_FIELDS}
    parts = (tenant, route, task, objective, stream, include_usage, generation, body)
    return hashlib.sha256(_ENCODER.encode(parts)).digest()


def cacheable(
    request: InferenceRequest, policy: CachePolicy | None, data_class: DataClass, *, body_bytes: int = 0
) -> str | None:
    """None when the answer may be kept and given again, else why not, as a code.

    `off` (no policy), `restricted` (such content is never kept), `too_large`, `temperature` (hotter than
    the route allows; OpenAI's default is 1), `audio_out`, `web_search` (the answer depends on the day),
    `tool_results` (the conversation holds what a tool said at one moment: it hardly comes twice, and an
    agent that asks again wants a new step).  Tools that are only offered do not forbid it, nor does `n`.
    """
    if policy is None:
        return "off"
    if data_class is DataClass.RESTRICTED:
        return "restricted"
    if body_bytes > BODY_BYTES_MAX:
        return "too_large"
    needs = request.needs
    if needs:
        if Capability.AUDIO_OUT in needs:
            return "audio_out"
        if Capability.WEB_SEARCH in needs:
            return "web_search"
    temperature = request.body.get("temperature")
    if (1.0 if temperature is None else temperature) > policy.max_temperature and "input" not in request.body:
        return "temperature"
    return "tool_results" if _has_tool_results(request.body.get("messages")) else None


def _has_tool_results(messages: Any) -> bool:
    if not isinstance(messages, list):
        return False
    return any(isinstance(one, dict) and one.get("role") in ("tool", "function") for one in messages)


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One answer as it went out: `body`, or for a stream its `chunks`, with what the first one took.

    `cost` (None where unpriced), `energy_uj` and `carbon_ng` are what a hit saves.
    """

    tenant: str
    generation: str
    body: bytes = b""
    chunks: tuple[bytes, ...] = ()
    usage: Usage | None = None
    model: str = ""
    deployment: str = ""
    cost: Money | None = None
    energy_uj: int | None = None
    carbon_ng: int | None = None

    def size(self) -> int:
        """Bytes that it takes in memory, a little overestimated.  O(chunks)."""
        chunks = sum(map(len, self.chunks)) + _OBJECT_OVERHEAD * len(self.chunks)
        return _ENTRY_OVERHEAD + len(self.body) + chunks


class CacheStats(msgspec.Struct, frozen=True):
    """Counts since the start, and what is held now."""

    hits: int
    misses: int
    evictions: int
    expired: int
    entries: int
    bytes: int
    bytes_max: int


class _Slot:
    __slots__ = ("entry", "expires_ns", "size")

    def __init__(self, entry: Entry, expires_ns: int, size: int) -> None:
        self.entry = entry
        self.expires_ns = expires_ns
        self.size = size


class ExactCache:
    """Answers by key, the least recently used given up first; owns all of them."""

    def __init__(self, max_bytes: int) -> None:
        """Hold at most `max_bytes`; 0 holds nothing."""
        self._max_bytes = max_bytes
        self._slots: OrderedDict[bytes, _Slot] = OrderedDict()
        self._bytes = 0
        self._hits = self._misses = self._evictions = self._expired = 0

    def get(self, key: bytes, now_ns: int) -> Entry | None:
        """The answer, or None when there is none or it is too old."""
        slot = self._slots.get(key)
        if slot is None:
            self._misses += 1
            return None
        if now_ns >= slot.expires_ns:
            self._remove(key)
            self._expired += 1
            self._misses += 1
            return None
        self._slots.move_to_end(key)
        self._hits += 1
        return slot.entry

    def put(self, key: bytes, entry: Entry, ttl_ns: int, now_ns: int) -> bool:
        """Keep an answer for `ttl_ns`; False when it is larger than an eighth of the bound.

        The eighth keeps one huge answer from driving out everything else.
        """
        size = entry.size()
        if size > self._max_bytes // 8:
            return False
        if key in self._slots:
            self._remove(key)
        while self._bytes + size > self._max_bytes:
            self._bytes -= self._slots.popitem(last=False)[1].size
            self._evictions += 1
        self._slots[key] = _Slot(entry, now_ns + ttl_ns, size)
        self._bytes += size
        return True

    def drop_tenant(self, tenant: str) -> int:
        """Forget a tenant's answers; how many there were.  O(entries)."""
        return self._drop([key for key, slot in self._slots.items() if slot.entry.tenant == tenant])

    def purge(self, generation: str) -> int:
        """Forget what was not made under `generation`; how many there were.  O(entries)."""
        return self._drop([key for key, slot in self._slots.items() if slot.entry.generation != generation])

    def expire(self, now_ns: int) -> int:
        """Forget what is too old, so that content does not outlive its time; how many.  O(entries)."""
        count = self._drop([key for key, slot in self._slots.items() if now_ns >= slot.expires_ns])
        self._expired += count
        return count

    def stats(self) -> CacheStats:
        """Counts since the start, and what is held now."""
        return CacheStats(
            self._hits,
            self._misses,
            self._evictions,
            self._expired,
            len(self._slots),
            self._bytes,
            self._max_bytes,
        )

    def _remove(self, key: bytes) -> None:
        self._bytes -= self._slots.pop(key).size

    def _drop(self, keys: list[bytes]) -> int:
        for key in keys:
            self._remove(key)
        return len(keys)
