"""Time from the operating system, behind `core.ports.Clock`."""

from __future__ import annotations

import time


class SystemClock:
    """The clocks of this machine.  The wall clock may jump; the monotonic one never goes back."""

    __slots__ = ()

    # The functions themselves, without a frame of ours: a request reads the clock ten times.
    now_ns = staticmethod(time.monotonic_ns)
    wall_ns = staticmethod(time.time_ns)
