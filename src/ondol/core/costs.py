"""What it cost, by whom: usage records folded into rows.  Pure; reads nothing.

The rules, so that the union of the ledgers of several sites counts everything once:

- A request is a record without `origin`: the one at the site that the client called.  The other side of
  a peer request has `origin` set; it is counted as `for_peers`, never as a request.
- Tokens are those of requests, so a peer's share of the same answer is not added again.
- Cost, energy and carbon are taken from every record, where they were booked.  What a peer booked for us
  is only a reference in our record and is left out.
- By `site`, a request and its tokens belong to the site that answered, money and energy to the site that
  booked them.  By anything else, to the value in the record.
- By `tag`, a record counts under each of its tags (`k=v`), so the rows can add up to more than the total.
- Currencies are never added: a key has one row for each.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, tzinfo
from typing import Final

import msgspec

from ondol.core.money import Money
from ondol.core.usage import UsageRecord
from ondol.units import NG_PER_G, NS_PER_S, UJ_PER_J

GROUPINGS: Final = ("team", "route", "site", "tag", "day", "model", "key")

NO_TAG: Final = ""
"""The key of records that have no tag (or not the one asked for)."""


class CostRow(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `ondol costs`.

    `cost` is exact decimal text.  `energy_j` and `carbon_g` are None where nothing is known;
    `unmeasured` counts the records of which some energy is unknown, `unpriced` those of which some
    tokens have no price, so that a sum is never taken for more than it is.
    """

    key: str
    requests: int
    input_tokens: int
    output_tokens: int
    cost: str
    currency: str
    energy_j: float | None
    carbon_g: float | None
    unpriced: int = 0
    unmeasured: int = 0
    cache_hits: int = 0
    for_peers: int = 0


class Sums:
    """The sums of one row while they grow.  What is added to them, in Python integers, is never rounded."""

    __slots__ = (
        "cache_hits", "carbon_ng", "cost", "energy_uj", "for_peers", "input_tokens",
        "output_tokens", "requests", "unmeasured", "unpriced",
    )  # fmt: skip

    def __init__(self) -> None:
        self.requests = self.for_peers = self.cache_hits = 0
        self.input_tokens = self.output_tokens = 0
        self.cost = self.unpriced = self.unmeasured = 0
        self.energy_uj: int | None = None
        self.carbon_ng: int | None = None

    def add_request(self, record: UsageRecord) -> None:
        """Count a record as a request with its tokens, or as one that was answered for a peer."""
        if record.origin is not None:
            self.for_peers += 1
            return
        self.requests += 1
        self.input_tokens += record.usage.input_tokens
        self.output_tokens += record.usage.output_tokens
        self.cache_hits += record.cache in _HITS

    def add_booked(self, record: UsageRecord) -> None:
        """Add the money, energy and carbon that the record's site booked."""
        self.cost += record.cost
        self.unpriced += record.unpriced
        energy_uj, carbon_ng, unmeasured = own_energy(record)
        self.unmeasured += unmeasured
        if energy_uj is not None:
            self.energy_uj = energy_uj + (self.energy_uj or 0)
        if carbon_ng is not None:
            self.carbon_ng = carbon_ng + (self.carbon_ng or 0)

    def merge(self, other: Sums) -> None:
        """Add other sums to these."""
        self.merge_requests(other)
        self.merge_booked(other)

    def merge_requests(self, other: Sums) -> None:
        """Add what `add_request` had counted in the other."""
        self.requests += other.requests
        self.for_peers += other.for_peers
        self.cache_hits += other.cache_hits
        self.input_tokens += other.input_tokens
        self.output_tokens += other.output_tokens

    def merge_booked(self, other: Sums) -> None:
        """Add what `add_booked` had added to the other."""
        self.cost += other.cost
        self.unpriced += other.unpriced
        self.unmeasured += other.unmeasured
        if other.energy_uj is not None:
            self.energy_uj = other.energy_uj + (self.energy_uj or 0)
        if other.carbon_ng is not None:
            self.carbon_ng = other.carbon_ng + (self.carbon_ng or 0)

    def row(self, key: str, currency: str) -> CostRow:
        """The line that is shown."""
        return CostRow(
            key=key,
            requests=self.requests,
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            cost=str(Money(self.cost, currency)).partition(" ")[0],
            currency=currency,
            energy_j=None if self.energy_uj is None else self.energy_uj / UJ_PER_J,
            carbon_g=None if self.carbon_ng is None else self.carbon_ng / NG_PER_G,
            unpriced=self.unpriced,
            unmeasured=self.unmeasured,
            cache_hits=self.cache_hits,
            for_peers=self.for_peers,
        )


_FIELDS: Final = {"team": "team", "route": "route", "site": "site", "model": "model", "key": "key_id"}
_HITS: Final = frozenset({"exact", "semantic", "fixed"})


def fold(records: Iterable[UsageRecord], *, by: str, zone: tzinfo = UTC) -> list[CostRow]:
    """The rows, sorted by key and currency; memory grows with the rows, not with the records.

    `by` is one of GROUPINGS, or `tag:NAME` for the values of one tag.  Days are those of `zone`.

    Raises:
        ValueError: no such grouping.
    """
    if by not in GROUPINGS and not (by.startswith("tag:") and len(by) > len("tag:")):
        raise ValueError(f"found {by!r}; rows can be made by {', '.join(GROUPINGS)} or tag:NAME.")
    sums: dict[tuple[str, str], Sums] = {}
    for record in records:
        booked = _keys(record, by, zone)
        answered = [record.answered_by or record.site] if by == "site" and record.origin is None else booked
        for key in answered:
            sums.setdefault((key, record.currency), Sums()).add_request(record)
        for key in booked:
            sums.setdefault((key, record.currency), Sums()).add_booked(record)
    return [sums[place].row(*place) for place in sorted(sums)]


def _keys(record: UsageRecord, by: str, zone: tzinfo) -> list[str]:
    field = _FIELDS.get(by)
    if field is not None:
        return [getattr(record, field)]
    if by == "day":
        return [datetime.fromtimestamp(record.time_ns // NS_PER_S, zone).date().isoformat()]
    if by == "tag":
        return [f"{name}={value}" for name, value in record.tags] or [NO_TAG]
    wanted = by.removeprefix("tag:")
    return [value for name, value in record.tags if name == wanted] or [NO_TAG]


def own_energy(record: UsageRecord) -> tuple[int | None, int | None, bool]:
    """Energy and carbon that this site booked, and whether some of it is unknown."""
    if not record.attempts:
        return record.energy_uj, record.carbon_ng, False
    energy_uj: int | None = None
    carbon_ng: int | None = None
    unmeasured = False
    for attempt in record.attempts:
        if attempt.peer_request is not None:
            continue
        if attempt.energy_uj is not None:
            energy_uj = attempt.energy_uj + (energy_uj or 0)
        elif attempt.usage.output_tokens or attempt.usage.input_tokens:
            unmeasured = True
        if attempt.carbon_ng is not None:
            carbon_ng = attempt.carbon_ng + (carbon_ng or 0)
    return energy_uj, carbon_ng, unmeasured
