"""A site's ledger in memory, and the ranges that it would send: for tests of what takes them."""

from __future__ import annotations

from collections.abc import Sequence

from ondol.core import dsse
from ondol.core.usage import GENESIS, UsageRecord, encode_record, link
from ondol.wire import sync

DAY_NS = 86_400_000_000_000
START_NS = 1_800_000_000_000_000_000


def record(site: str, gateway: str, number: int, **fields: object) -> UsageRecord:
    """A record like most: what is not told follows from its number."""
    known: dict[str, object] = {
        "request_id": f"{gateway}-{number}", "time_ns": START_NS + number * 60_000_000_000, "site": site,
        "gateway": gateway, "tenant": "default", "team": f"team{number % 3}", "key_id": f"key{number % 4}",
        "route": "assistant", "task": "chat", "outcome": "completed", "status": 200, "model": "helper",
        "answered_by": site, "cost": number, "currency": "USD",
    }  # fmt: skip
    return UsageRecord(**{**known, **fields})  # type: ignore[arg-type]  # tests name real fields


class SiteLedger:
    """One gateway's ledger with the site's key.  `rows[n]` has number n + 1."""

    def __init__(self, site: str, gateway: str = "", private: bytes | None = None) -> None:
        self.site = site
        self.gateway = gateway or f"gateway-of-{site}"
        self.private = private or dsse.new_private_key()
        self.key = dsse.public_key(self.private)
        self.records: list[UsageRecord] = []
        self.rows: list[bytes] = []
        self.hashes: list[bytes] = [GENESIS]

    def write(self, records: Sequence[UsageRecord]) -> None:
        for one in records:
            self.records.append(one)
            self.rows.append(encode_record(one))
            self.hashes.append(link(self.hashes[-1], len(self.rows), self.rows[-1]))

    def fill(self, count: int, **fields: object) -> SiteLedger:
        first = len(self.rows) + 1
        self.write([record(self.site, self.gateway, n, **fields) for n in range(first, first + count)])
        return self

    def range(self, first: int, last: int) -> sync.Range:
        return sync.Range(
            instance="instance", gateway=self.gateway, first=first, previous=self.hashes[first - 1],
            rows=tuple(self.rows[first - 1 : last]), head=self.head(last),
        )  # fmt: skip

    def head(self, last: int, **changed: object) -> dsse.Envelope:
        fields: dict[str, object] = {
            "site": self.site, "gateway": self.gateway, "seq": last, "hash": self.hashes[last],
        }  # fmt: skip
        head = sync.Head(**{**fields, **changed})  # type: ignore[arg-type]  # tests name real fields
        return dsse.sign(self.private, sync.HEAD_TYPE, sync.encode(head))
