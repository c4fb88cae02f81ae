"""Circuit breakers, one an endpoint, and the budget for retries.

A breaker is closed (all requests pass), open (none pass, for a while) or half-open (one probe at a time
passes).  It knows outcomes, not errors: `ok`, `unavailable`, `failed`, `deadline`, `rejected`, `cancelled`,
as the attempts of a usage record name them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

import msgspec

from ondol.units import NS_PER_S

State = Literal["closed", "open", "half-open"]

_SLOTS: Final = 10
_COOL_NS_MAX: Final = 3600 * NS_PER_S
"""An endpoint may ask for an hour of rest at most: a wrong `Retry-After` must not switch it off for days."""


class BreakerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """When a breaker opens and for how long.

    It opens after `failures_in_a_row`, or when of at least `count_min` outcomes within `window_ns` the
    share `failure_ratio` failed.  It stays open `open_ns`, doubled for each failed probe up to
    `open_ns_max`, spread by plus or minus `jitter` so that gateways do not probe in step.  A probe
    that nobody reported within `probe_ns` is taken for lost.
    """

    failures_in_a_row: int = 5
    failure_ratio: float = 0.5
    count_min: int = 20
    window_ns: int = 30 * NS_PER_S
    open_ns: int = 1 * NS_PER_S
    open_ns_max: int = 60 * NS_PER_S
    jitter: float = 0.2
    probe_ns: int = 120 * NS_PER_S


class Breaker:
    """One endpoint's breaker.  `random` gives floats in [0, 1); handed in, so that runs can be repeated."""

    def __init__(self, random: Callable[[], float], settings: BreakerSettings | None = None) -> None:
        """Start closed."""
        self._random = random
        self._settings = settings or BreakerSettings()
        self._window = _Window(self._settings.window_ns)
        self._in_a_row = 0
        self._trips = 0
        self._open_until_ns: int | None = None
        self._why = ""
        self._ticket = 0
        self._probe_since_ns: int | None = None

    def state(self, now_ns: int) -> State:
        """Closed, open, or half-open (the rest is over, and no probe has succeeded yet)."""
        if self._open_until_ns is None:
            return "closed"
        return "open" if now_ns < self._open_until_ns else "half-open"

    def allows(self, now_ns: int) -> bool:
        """Whether `begin` would give a ticket now.  Changes nothing: for filtering."""
        if self._open_until_ns is None:
            return True
        if now_ns < self._open_until_ns:
            return False
        return self._probe_since_ns is None or now_ns - self._probe_since_ns >= self._settings.probe_ns

    def begin(self, now_ns: int) -> int | None:
        """A ticket for one attempt, to be handed to `record` whatever happens; None when it must not run.

        When half-open, the ticket is the one probe.
        """
        if not self.allows(now_ns):
            return None
        if self._open_until_ns is not None:
            self._ticket += 1
            self._probe_since_ns = now_ns
        return self._ticket

    def record(
        self,
        ticket: int,
        outcome: str,
        now_ns: int,
        *,
        began: bool = False,
        retry_after_s: float | None = None,
    ) -> None:
        """Count the outcome of an attempt.

        `began` says that a first byte had come: then a passed deadline says nothing about health.
        `rejected` and `cancelled` do not count either; a probe that ends so only makes room for the next.
        An outcome from before the last change of state counts no more, but `retry_after_s` always holds:
        the endpoint rests at least that long (an hour at most).
        """
        if retry_after_s is not None and retry_after_s > 0:
            self._cool(now_ns, retry_after_s)
        if ticket != self._ticket:
            return
        failed = outcome in ("unavailable", "failed") or (outcome == "deadline" and not began)
        if self._open_until_ns is not None:
            self._end_probe(outcome, failed, now_ns)
        elif failed:
            self._window.add(now_ns, good=0, bad=1)
            self._in_a_row += 1
            self._trip_if_due(now_ns)
        elif outcome == "ok":
            self._window.add(now_ns, good=1, bad=0)
            self._in_a_row = 0

    def state_sentence(self, now_ns: int) -> str:
        """What a person reads in the status."""
        state = self.state(now_ns)
        if state == "closed":
            return "takes requests"
        if state == "open":
            assert self._open_until_ns is not None
            return f"rests for another {(self._open_until_ns - now_ns) / NS_PER_S:.1f} s: {self._why}"
        if self.allows(now_ns):
            return f"waits for one probe: {self._why}"
        return f"one probe is under way: {self._why}"

    def _trip_if_due(self, now_ns: int) -> None:
        settings = self._settings
        if self._in_a_row >= settings.failures_in_a_row:
            self._open(now_ns, f"{self._in_a_row} failures in a row")
            return
        good, bad = self._window.sums(now_ns)
        if good + bad >= settings.count_min and bad >= settings.failure_ratio * (good + bad):
            self._open(now_ns, f"{bad} of the last {good + bad} requests failed")

    def _open(self, now_ns: int, why: str) -> None:
        settings = self._settings
        # 2^30 s is past every bound: the exponent is cut so that the number stays small.
        rest = min(settings.open_ns << min(self._trips, 30), settings.open_ns_max)
        spread = 1 + settings.jitter * (2 * self._random() - 1)
        until = now_ns + int(rest * spread)
        self._open_until_ns = max(until, self._open_until_ns or 0)
        self._trips += 1
        self._why = why
        self._probe_since_ns = None
        self._ticket += 1

    def _cool(self, now_ns: int, retry_after_s: float) -> None:
        until = now_ns + min(int(retry_after_s * NS_PER_S), _COOL_NS_MAX)
        if self._open_until_ns is None:
            self._ticket += 1
        elif until <= self._open_until_ns:
            return
        self._open_until_ns = until
        self._why = f"it asked for {retry_after_s:g} s of rest"
        self._probe_since_ns = None

    def _end_probe(self, outcome: str, failed: bool, now_ns: int) -> None:
        self._probe_since_ns = None
        if failed:
            self._open(now_ns, f"the last probe ended as {outcome}")
        elif outcome == "ok" and self.state(now_ns) == "half-open":
            self._open_until_ns = None
            self._in_a_row = 0
            self._trips = 0
            self._window = _Window(self._settings.window_ns)
            self._ticket += 1


class RetryBudget:
    """Retries as a share of recent requests, so that a failing fleet is not stormed by its own callers."""

    def __init__(self, *, percent: int = 20, floor: int = 10, window_ns: int = 10 * NS_PER_S) -> None:
        """Allow `percent` of the requests of `window_ns`, plus `floor`."""
        self._percent = percent
        self._floor = floor
        self._window = _Window(window_ns)

    def request(self, now_ns: int) -> None:
        """Count a request's first attempt."""
        self._window.add(now_ns, good=1, bad=0)

    def has(self, now_ns: int) -> bool:
        """Whether one more retry may be made now."""
        requests, retries = self._window.sums(now_ns)
        return (retries - self._floor) * 100 < requests * self._percent

    def take(self, now_ns: int) -> bool:
        """Whether one more retry may be made now; if so, it is counted."""
        if not self.has(now_ns):
            return False
        self._window.add(now_ns, good=0, bad=1)
        return True


class _Window:
    """Two counts over a sliding window, in ten slots: constant memory, and exact to a tenth."""

    __slots__ = ("_bad", "_good", "_slot", "_slot_ns")

    def __init__(self, window_ns: int) -> None:
        self._slot_ns = max(window_ns // _SLOTS, 1)
        self._slot = 0
        self._good = [0] * _SLOTS
        self._bad = [0] * _SLOTS

    def add(self, now_ns: int, *, good: int, bad: int) -> None:
        self._advance(now_ns)
        self._good[self._slot % _SLOTS] += good
        self._bad[self._slot % _SLOTS] += bad

    def sums(self, now_ns: int) -> tuple[int, int]:
        self._advance(now_ns)
        return sum(self._good), sum(self._bad)

    def _advance(self, now_ns: int) -> None:
        slot = now_ns // self._slot_ns
        for passed in range(max(self._slot + 1, slot - _SLOTS + 1), slot + 1):
            self._good[passed % _SLOTS] = self._bad[passed % _SLOTS] = 0
        self._slot = max(self._slot, slot)
