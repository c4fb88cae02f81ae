"""Which sites could answer a caller now, the nearest first.  Pure.

The site itself comes first, with a distance of nothing.  Of its neighbours those may take its callers over that are
in the same country (data stays where the law has it), whose document says `takeover: true`, that have an address and
answer, and that know the caller's key: a key of the fleet is known at every site that has a route for it, a key that
was made here is known here alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import msgspec

from ondol.core.catalog import SiteDoc


class Health(Protocol):
    """What is known of a neighbour."""

    ready: bool
    known: bool
    why: str

    @property
    def rtt_ms(self) -> float | None:
        """Milliseconds to it and back; None before it was heard."""
        ...


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """A site that can answer; `rtt_ms` is as far as it is from the site that was asked."""

    site: str
    address: str | None
    tier: str
    region: str
    country: str
    rtt_ms: float


class LeftOut(msgspec.Struct, frozen=True, kw_only=True):
    """A neighbour that cannot, or may not, and why."""

    site: str
    why: str


class Nearest(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of GET /v1/ondol/nearest."""

    site: str
    data: tuple[Place, ...]
    left_out: tuple[LeftOut, ...] = ()


def nearest(
    own: SiteDoc,
    problem: str | None,
    sites: Mapping[str, SiteDoc],
    health: Mapping[str, Health],
    *,
    known_only_here: bool,
) -> Nearest:
    """Those that can answer, by distance.  O(n log n) for n neighbours.

    `problem` is why the site itself cannot, None where it can.  `known_only_here`: the caller's key is this site's own.
    """
    places: list[Place] = []
    left_out: list[LeftOut] = []
    if problem is None:
        places.append(_place(own, 0.0))
    else:
        left_out.append(LeftOut(site=own.name, why=problem))
    for name in own.neighbours:
        site, seen = sites[name], health.get(name)
        why = _why_not(own, site, seen, known_only_here=known_only_here)
        if why is None and seen is not None and seen.rtt_ms is not None:
            places.append(_place(site, seen.rtt_ms))
        else:
            left_out.append(LeftOut(site=name, why=why or "it has not been heard yet"))
    places.sort(key=lambda place: (place.rtt_ms, place.site))
    return Nearest(site=own.name, data=tuple(places), left_out=tuple(left_out))


def _why_not(own: SiteDoc, site: SiteDoc, seen: Health | None, *, known_only_here: bool) -> str | None:
    if site.address is None:
        return "it has no `address` in its Site document"
    if not site.takeover:
        return "its Site document says `takeover: false`"
    if site.country != own.country:
        return f"it is in {site.country}, and callers of {own.name} stay in {own.country}"
    if known_only_here:
        return f"this key was made at {own.name} and is known there alone; make one with `ondol keys create --fleet`"
    if seen is None or not seen.known:
        return "it has not been heard yet"
    return None if seen.ready else f"it does not answer: {seen.why}"


def _place(site: SiteDoc, rtt_ms: float) -> Place:
    return Place(
        site=site.name, address=site.address, tier=site.tier, region=site.region, country=site.country,
        rtt_ms=round(rtt_ms, 3),
    )  # fmt: skip
