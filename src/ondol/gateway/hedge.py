"""When a second endpoint is asked as well, because the first may miss the deadline.  Pure.

A request is at risk where the first endpoint's bound (its 95th percentile, by `predict.Bounds`) is beyond the deadline.
The second is asked as late as it can be and still make it with its own bound: most first ones have answered by then,
and nothing was paid twice.  ("The tail at scale", Dean and Barroso, CACM 2013, hedges after the 95th percentile; here
the deadline says when.)
"""

from __future__ import annotations

from typing import Final

MARGIN_MS: Final = 50.0
"""For what is done before the second is asked (a lease of a budget is written durably) and after it has answered."""


def hedge_after(first_ms: float, second_ms: float, remaining_ms: float) -> float | None:
    """Milliseconds after which to ask the second endpoint, or None where it should not be asked.

    `first_ms` and `second_ms` bound the time until something can be given to the caller: the first token of a stream,
    the end of a whole answer.
    """
    if first_ms <= remaining_ms:
        return None
    if second_ms <= remaining_ms:
        return max(remaining_ms - second_ms - MARGIN_MS, 0.0)
    # Both are likely too late: the one that is less so is asked at once.
    return 0.0 if second_ms < first_ms else None
