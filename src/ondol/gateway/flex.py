"""Work that can wait: how long a `service_tier: "flex"` request is held before it is begun.  Pure.

It takes no place in a queue: it waits until an endpoint has a free slot, and for the hours that its route names as
cheap or green, as long as there is time to answer before its deadline.  When that runs out it is begun all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import tzinfo
from typing import Any, Final

from ondol.core.pace import opens_in_s
from ondol.core.route_terms import Flex

TIER: Final = "flex"
LOOK_S: Final = 0.5
"""How often a request that waits for a slot looks for one."""
LOOK_HOURS_S: Final = 60.0
"""How often one that waits for its hours looks at the clock, which may be set."""


def is_flex(body: Mapping[str, Any], tags: tuple[tuple[str, str], ...]) -> bool:
    """Whether a request may wait: OpenAI's `service_tier`, or a tag of that name."""
    return body.get("service_tier") == TIER or ("service_tier", TIER) in tags


def hold_s(
    flex: Flex | None, *, wall_ns: int, zone: tzinfo, remaining_ms: float, needs_ms: float, slot: bool
) -> float:
    """Seconds to wait before looking again; 0 where the request is begun now.

    `remaining_ms` is what is left until the deadline, `needs_ms` what its answer is expected to take, `slot` whether an
    endpoint could begin at once.
    """
    spare_s = (remaining_ms - needs_ms) / 1000
    if spare_s <= 0:
        return 0.0
    closed_s = 0 if flex is None else opens_in_s(flex.hours, wall_ns, zone)
    if closed_s > spare_s:
        closed_s = 0  # they do not begin in time: waiting for them would be for nothing
    if closed_s > 0:
        return min(closed_s, LOOK_HOURS_S, spare_s)
    return 0.0 if slot else min(LOOK_S, spare_s)
