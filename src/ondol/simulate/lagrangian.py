"""A lower bound for long traces: the optimum's rules priced instead of kept (see `optimum`)."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from ondol.simulate.bound_terms import Floats, Terms
from ondol.simulate.fleet import Limits

LATE_SHARE: Final = 0.01
_SPANS: Final = (1, 4, 16, 64, 256)
_STEPS: Final = 300


def lagrangian(terms: Terms, limits: Limits, late_max: int) -> float:
    """A lower bound in USD for a trace of any length; some 300 passes over requests x places.

    Spans of 1, 4, 16, 64 and 256 times the limit on the whole, and all of the trace; each request is in one of each.
    """
    needs = _Needs(terms, limits)
    cheapest = np.where(np.isfinite(terms.cost), terms.cost, np.inf).min(axis=1)
    costs = np.where(terms.in_time, terms.cost, np.inf)
    prices = np.zeros(needs.count)
    late_price, best = 0.0, -np.inf
    # One late request more would save at most this; the step is scaled to it.
    scale = float(np.median(cheapest)) or 1e-9
    stale, factor = 0, 1.0
    top = prices.copy(), late_price
    for _ in range(_STEPS):
        priced = costs + needs.charge(prices)
        place = np.argmin(priced, axis=1)
        least = priced[np.arange(len(place)), place]
        late = cheapest + late_price < least
        value = float(np.where(late, cheapest + late_price, least).sum())
        value -= float(prices @ needs.room) + late_price * late_max
        if value > best + 1e-12 * abs(best if np.isfinite(best) else 1.0):
            best, top, stale = value, (prices.copy(), late_price), 0
        else:
            stale += 1
            if stale >= 8:
                factor, stale = factor / 2, 0
                prices, late_price = top[0].copy(), top[1]
                continue
        slope = needs.used(place, ~late) - needs.room
        late_slope = float(late.sum()) - late_max
        relative = slope / needs.room
        prices = np.maximum(prices + factor * scale * needs.per_ms * relative, 0.0)
        late_price = max(late_price + factor * scale * late_slope / max(len(place) * LATE_SHARE, 1.0), 0.0)
    return best


class _Needs:
    """Which spans each request's reading and work fall into, and what the spans hold; owned by `lagrangian`."""

    def __init__(self, terms: Terms, limits: Limits) -> None:
        self.size, self.places = terms.cost.shape
        self._can, self._start = terms.in_time, terms.start
        self._parts: list[tuple[np.ndarray[Any, Any], Floats]] = []
        self._rooms: list[Floats] = []
        self._per_ms: list[Floats] = []
        self.count = 0
        for need, end, limit in (
            (terms.reading, terms.first, limits.first_token_ms), (terms.work, terms.last, limits.total_ms),
        ):  # fmt: skip
            need = np.where(self._can, need, 0.0)
            begin, finish = (
                float(terms.start[self._can].min(initial=0.0)),
                float(end[self._can].max(initial=1.0)),
            )
            for times in _SPANS:
                if limit * times < finish - begin:
                    self._add(need, end, begin, limit * times)
            self._add(need, end, begin, finish - begin + 1.0)
        self.room = np.concatenate(self._rooms)
        self.per_ms = np.concatenate(self._per_ms)

    def _add(self, need: Floats, end: Floats, begin: float, length: float) -> None:
        """Spans of one length, one after the other: each holds the time from its first start to its last deadline."""
        bins = np.clip(((self._start - begin) // length).astype(int), 0, None)
        bins[~self._can] = 0
        count = int(bins.max()) + 1
        room = np.full((self.places, count), length)
        for place in range(self.places):
            mine = self._can[:, place]
            first, final = np.full(count, np.inf), np.full(count, -np.inf)
            np.minimum.at(first, bins[mine, place], self._start[mine, place])
            np.maximum.at(final, bins[mine, place], end[mine, place])
            used = final > first
            room[place, used] = final[used] - first[used]
        self._parts.append((bins + np.arange(self.places) * count + self.count, need))
        self._rooms.append(room.ravel())
        typical = float(need[self._can].mean()) if self._can.any() else 1.0
        self._per_ms.append(np.full(room.size, 1 / max(typical, 1e-9)))
        self.count += room.size

    def charge(self, prices: Floats) -> Floats:
        """What the prices make each request pay at each place."""
        total = np.zeros((self.size, self.places))
        for spans, need in self._parts:
            total += prices[spans] * need
        return total

    def used(self, place: np.ndarray[Any, Any], counted: np.ndarray[Any, Any]) -> Floats:
        """How much of each span an assignment uses."""
        rows = np.flatnonzero(counted)
        total = np.zeros(self.count)
        for spans, need in self._parts:
            np.add.at(total, spans[rows, place[rows]], need[rows, place[rows]])
        return total
