"""Which endpoint has read the beginning of a conversation already, and how much of it is spared there.

An engine keeps what it has read of a prompt (its KV cache) for a while, so the next turn of a conversation is quicker
where the last one was.  This remembers, for each conversation as far as it went, where that was; `schedule` then sees a
shorter prompt at that endpoint, so a conversation stays while that pays and moves when it does not.

A conversation is known by a hash of its messages and its tenant, never by content, and no tenant meets another's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, Final

import msgspec

from ondol.units import NS_PER_S

KEPT: Final = 16_384
"""Conversations; each takes some 200 bytes."""
HALF_LIFE_NS: Final = 300 * NS_PER_S
"""After five minutes half of the caches are taken to have forgotten: vendors keep a prefix for 5 to 10 minutes."""
_MESSAGES_MAX: Final = 256
_ENCODER: Final = msgspec.json.Encoder(order="deterministic")


def prefixes(tenant: str, messages: Sequence[Any]) -> tuple[bytes, ...]:
    """A hash of the conversation after each of its messages, the shortest first; 1 to 2 µs a message."""
    running = blake2b(tenant.encode(), digest_size=16)
    found = []
    for message in messages[:_MESSAGES_MAX]:
        running.update(_ENCODER.encode(message))
        found.append(running.copy().digest())
    return tuple(found)


class Affinity:
    """Where conversations were; owned by the pipeline.  Bounded: the least recently used is forgotten."""

    def __init__(self) -> None:
        """Know none."""
        self._seen: OrderedDict[bytes, tuple[str, int, int]] = OrderedDict()

    def put(self, conversation: bytes, endpoint: str, tokens: int, now_ns: int) -> None:
        """A conversation up to here, of `tokens`, was read at an endpoint."""
        self._seen[conversation] = (endpoint, tokens, now_ns)
        self._seen.move_to_end(conversation)
        if len(self._seen) > KEPT:
            self._seen.popitem(last=False)

    def find(self, conversation: Sequence[bytes], now_ns: int) -> tuple[str, int] | None:
        """The endpoint that read the longest known part of it, and how many tokens are likely spared there."""
        for prefix in reversed(conversation):
            seen = self._seen.get(prefix)
            if seen is not None:
                endpoint, tokens, at_ns = seen
                return endpoint, int(tokens * 0.5 ** ((now_ns - at_ns) / HALF_LIFE_NS))
        return None
