"""Time from the operating system, behind `core.ports.Clock`."""

from __future__ import annotations

import time


class SystemClock:
    """The clocks of this machine.  The wall clock may jump; the monotonic one never goes back."""

    __slots__ = ()

    def now_ns(self) -> int:
        """Nanoseconds since some point in the past; only differences mean something."""
        return time.monotonic_ns()

    def wall_ns(self) -> int:
        """Nanoseconds since 1970-01-01 UTC."""
        return time.time_ns()
