"""When each site was heard last, and whether it hung up: one replica's memory.  Pure; times are monotonic."""

from __future__ import annotations

from typing import Final

from ondol.hub.sessions import LIVE_S
from ondol.units import NS_PER_S
from ondol.wire.sync import STALE_S

WRITE_EVERY_S: Final = 5.0
"""How often it is also written, so that other replicas know."""
NEVER_NS: Final = 1 << 62


class Liveness:
    """Bounded by the sites of the fleet."""

    def __init__(self) -> None:
        """Nobody was heard yet."""
        self._heard: dict[str, int] = {}
        self._written: dict[str, int] = {}
        self._watching: dict[str, str] = {}
        self._hung_up: set[tuple[str, str]] = set()

    def due(self, site: str, now_ns: int) -> bool:
        """Whether that a site is heard should be written, too."""
        return now_ns - self._written.get(site, -1 << 62) >= WRITE_EVERY_S * NS_PER_S

    def heard(self, site: str, now_ns: int, *, written: bool = False) -> None:
        """The process that speaks for the site spoke."""
        self._heard[site] = now_ns
        if written:
            self._written[site] = now_ns

    def watching(self, site: str, instance: str) -> None:
        """A process of the site opened its watch."""
        self._watching[site] = instance
        self._hung_up.discard((site, instance))

    def hung_up(self, site: str, instance: str) -> None:
        """It closed it, or its connection broke."""
        if self._watching.get(site) == instance:
            del self._watching[site]
        self._hung_up = {one for one in self._hung_up if one[0] != site} | {(site, instance)}

    def live(self, site: str, instance: str, now_ns: int, heard_ago_ns: int) -> bool:
        """Whether that process may still be there.  `heard_ago_ns` is what the database says of the site."""
        if (site, instance) in self._hung_up:
            return False
        return self.ago_ns(site, now_ns, heard_ago_ns) < LIVE_S * NS_PER_S

    def ago_ns(self, site: str, now_ns: int, heard_ago_ns: int) -> int:
        """How long ago the site was heard, here or by another replica.

        What the database says is by wall clocks: if it lies in the future, a clock was set back, and it says nothing.
        """
        here = self._heard.get(site)
        if heard_ago_ns < -LIVE_S * NS_PER_S:
            return NEVER_NS if here is None else now_ns - here
        elsewhere = max(0, heard_ago_ns)
        return elsewhere if here is None else min(now_ns - here, elsewhere)

    def stale(self, site: str, now_ns: int, heard_ago_ns: int) -> bool:
        """Whether what it said last may no longer be shown as how it is."""
        return self.ago_ns(site, now_ns, heard_ago_ns) > STALE_S * NS_PER_S
