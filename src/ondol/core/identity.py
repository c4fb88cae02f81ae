"""Who asks: API keys as they are kept, and the principal that a good key makes.

A key reads `ondol_<id>_<secret><crc>`: a prefix that scanners know, an id to find the record by, 256
random bits, and a CRC-32 of all before it, in base 62, so that a typing error is seen without a look-up
(the form of GitHub's tokens).  At rest there is only HMAC-SHA-256(pepper, secret).
"""

from __future__ import annotations

import msgspec

from ondol.core.inference import DataClass


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """One key as it is kept; the secret itself is nowhere.

    `kind` is `user` (asks), `admin` (administers, and asks) or `peer` (another site of ours, which may
    say on whose behalf it asks).  Times are wall-clock nanoseconds.  `routes` empty means all.  `fleet` marks a key
    that was made at the hub: its HMAC is under the fleet's pepper, and it cannot be revoked here.
    """

    id: str
    mac: bytes
    tenant: str
    team: str
    kind: str = "user"
    name: str = ""
    routes: tuple[str, ...] = ()
    created_ns: int = 0
    expires_ns: int | None = None
    revoked_ns: int | None = None
    requests_per_min: int | None = None
    tokens_per_min: int | None = None
    fleet: bool = False


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """The request of another site that this one answers: what it cost is booked here, once."""

    site: str
    request_id: str
    attempt: int
    hops: tuple[str, ...] = ()


class Principal(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks, as far as we have proof.  A failed check never makes one."""

    key_id: str
    tenant: str
    team: str
    kind: str = "user"
    routes: tuple[str, ...] = ()
    requests_per_min: int | None = None
    tokens_per_min: int | None = None
    origin: Origin | None = None


class Hints(msgspec.Struct, frozen=True, kw_only=True):
    """What the caller wishes, from the `x-ondol-*` request headers; None where it says nothing.

    `trace` is its `traceparent` (W3C Trace Context), which goes on to sites of ours; empty where there is none.
    """

    data_class: DataClass | None = None
    objective: str | None = None
    max_latency_ms: int | None = None
    max_cost: str | None = None
    tags: tuple[tuple[str, str], ...] = ()
    no_cache: bool = False
    trace: str = ""
