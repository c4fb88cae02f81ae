"""How far this site's clock is from its hub's, from what passes between them anyway.  Pure.

Each exchange gives one sample: the hub's time lies between our sending and our receiving (Cristian 1989), so the
middle of the two is wrong by half of the round trip at most.  Samples are kept against the monotonic clock: when
somebody sets the wall clock, the offset is right again at once, without asking anybody.
"""

from __future__ import annotations

from collections import deque
from typing import Final, NamedTuple

from ondol.core.ports import Clock
from ondol.units import NS_PER_S

SAMPLES: Final = 16
OFF_NS: Final = 5 * NS_PER_S
"""Past this the site is told that its clock is wrong."""
DRIFT_PPM: Final = 100
"""What two quartz clocks drift apart at most, and with it how a sample ages: 9 s in a day."""


class Sample(NamedTuple):
    """The hub's time at a moment of our monotonic clock; `error_ns` bounds it at that moment."""

    mono_ns: int
    hub_ns: int
    error_ns: int

    def bound_ns(self, mono_ns: int) -> int:
        """What it may be wrong by at another moment."""
        return self.error_ns + abs(mono_ns - self.mono_ns) * DRIFT_PPM // 1_000_000


class ClockOffset:
    """Bounded; owned by one session."""

    def __init__(self, clock: Clock) -> None:
        """Nothing was measured yet."""
        self._clock = clock
        self._samples: deque[Sample] = deque(maxlen=SAMPLES)

    def seen(self, *, sent_ns: int, received_ns: int, hub_ns: int) -> None:
        """One exchange, by our monotonic clock at both ends.

        What contradicts it goes: the hub's clock was set, or this machine slept, which stops its monotonic clock.
        """
        new = Sample((sent_ns + received_ns) // 2, hub_ns, max(0, received_ns - sent_ns) // 2 + 1)
        fitting = [one for one in self._samples if _agree(one, new)]
        self._samples = deque([*fitting, new], maxlen=SAMPLES)

    def best(self) -> Sample | None:
        """The sample that bounds the hub's time best now; None before the first."""
        now_ns = self._clock.now_ns()
        return min(self._samples, key=lambda one: one.bound_ns(now_ns), default=None)

    def hub_ns(self) -> int | None:
        """The hub's wall clock now; None before it was heard."""
        best = self.best()
        return None if best is None else best.hub_ns + self._clock.now_ns() - best.mono_ns

    @property
    def ns(self) -> int | None:
        """Our wall clock less the hub's, now; None before it was measured."""
        hub_ns = self.hub_ns()
        return None if hub_ns is None else self._clock.wall_ns() - hub_ns

    @property
    def error_ns(self) -> int | None:
        """What `ns` may be wrong by."""
        best = self.best()
        return None if best is None else best.bound_ns(self._clock.now_ns())

    def sentence(self) -> str | None:
        """What an operator should know, or None where the clock is fine."""
        offset_ns, error_ns = self.ns, self.error_ns
        if offset_ns is None or error_ns is None or abs(offset_ns) - error_ns <= OFF_NS:
            return None
        word = "ahead of" if offset_ns > 0 else "behind"
        return (
            f"the clock of this site is {abs(offset_ns) / NS_PER_S:.0f} s {word} the hub's; set it (is NTP running?). "
            "Records carry the difference."
        )


def _agree(old: Sample, new: Sample) -> bool:
    passed_ns = new.mono_ns - old.mono_ns
    return abs(old.hub_ns + passed_ns - new.hub_ns) <= old.bound_ns(new.mono_ns) + new.error_ns
