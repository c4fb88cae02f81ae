"""What a rollout is judged by: how answers went under the present generation, and under the one before.  Pure.

Requests and errors are counted.  Of times and scores a random sample is kept that leans to the present: a new value
takes the place of a random old one, with a chance of 200 in the number seen, but never less than 200 in 1,000
(Aggarwal, VLDB 2006).  So a sample is of the last thousand requests or so, each with its number: the hub compares two
sites over the same time.  Some 1 µs a request.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ondol.core.usage import UsageRecord
from ondol.units import NS_PER_MS
from ondol.wire.sync import Figures

SAMPLE: Final = 200
MEMORY: Final = 1_000
"""Of about so many of the latest values a sample is made."""
_SERVER_FAULT: Final = 500


class _Values:
    """At most `SAMPLE` values, and of which request each is."""

    __slots__ = ("_random", "_seen", "at", "values")

    def __init__(self, random: Callable[[], float]) -> None:
        self._random = random
        self._seen = 0
        self.values: list[float] = []
        self.at: list[int] = []

    def add(self, value: float, number: int) -> None:
        self._seen += 1
        if self._seen <= SAMPLE:
            self.values.append(value)
            self.at.append(number)
            return
        place = int(self._random() * min(self._seen, MEMORY))
        if place < SAMPLE:
            self.values[place] = value
            self.at[place] = number


class _Counts:
    __slots__ = ("errors", "generation", "latency", "quality", "requests")

    def __init__(self, generation: int, random: Callable[[], float]) -> None:
        self.generation = generation
        self.requests = 0
        self.errors = 0
        self.latency = _Values(random)
        self.quality = _Values(random)

    def figures(self) -> Figures:
        return Figures(
            generation=self.generation, requests=self.requests, errors=self.errors,
            latency_ms=tuple([round(value, 3) for value in self.latency.values]), latency_at=tuple(self.latency.at),
            quality=tuple(self.quality.values), quality_at=tuple(self.quality.at),
        )  # fmt: skip


class GenerationFigures:
    """Of two generations; owned by the composition root."""

    def __init__(self, generation: int, random: Callable[[], float]) -> None:
        """Nothing was answered yet under `generation`; `random` gives numbers in [0, 1)."""
        self._random = random
        self._now = _Counts(generation, random)
        self._before: _Counts | None = None

    def begin(self, generation: int) -> None:
        """Another generation runs from now on; the same one again changes nothing."""
        if generation != self._now.generation:
            self._before, self._now = self._now, _Counts(generation, self._random)

    def add(self, record: UsageRecord, quality: float | None = None) -> None:
        """A request ended; `quality` in [0, 1] where something scored the answer.

        An error is what the site's own side failed at, or had no place to answer at (5xx).  Not counted are hits of
        the cache, which say nothing of the engines, clients that hung up, and refusals that the caller must mend
        (limits and budgets too).
        """
        outcome = record.outcome
        if outcome == "completed":
            if record.cache == "exact" or record.cache == "semantic":
                return
            now = self._now
            now.requests = number = now.requests + 1
            now.latency.add(
                (record.total_ns if record.ttft_ns is None else record.ttft_ns) / NS_PER_MS, number
            )
            if quality is not None:
                now.quality.add(quality, number)
        elif outcome == "failed" or (outcome == "refused" and record.status >= _SERVER_FAULT):
            self._now.requests += 1
            self._now.errors += 1

    def figures(self) -> tuple[Figures, ...]:
        """The generation before, then the present one; some 100 µs."""
        found = () if self._before is None else (self._before.figures(),)
        return (*found, self._now.figures())
