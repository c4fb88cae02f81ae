"""How much of a budget a site gets.  Pure.

The one invariant: what all sites together hold of a budget in a period never passes its amount.  (A site that was
charged more than it had reserved says so; then what is held may pass the amount, and nobody gets more.)

Sizes adapt.  A site gets a share of what is left, larger where it does more of the spending, so that a busy shop
rarely asks and a quiet one holds little.  As every grant is a part of what is left, they become small towards the
end, and the last units go to whoever has a request waiting.
"""

from __future__ import annotations

from datetime import UTC
from typing import Final

import msgspec

from ondol.core.periods import PeriodKind, period
from ondol.units import NS_PER_S

TERM_S: Final = 3600.0
"""How long a site may use a grant without having been heard: a stolen site spends no longer than this."""
_SITES_LEAST: Final = 4
"""Reckon with so many sites at least: the first one to ask must not get half of the budget."""
_LARGEST: Final = 10
"""No share is more than a tenth of the amount: so much is out of reach at most when one site is cut off."""
_SMALLEST: Final = 1000
"""Nor less than a thousandth, while that is there: else the end of a period is a storm of small calls."""
_CLOCK_SLACK_S: Final = 36 * 3600


class Holder(msgspec.Struct, frozen=True):
    """What one site holds of a budget in one period, and what of it is spent; scaled units."""

    site: str
    granted: int
    spent: int


def left_of(amount: int, holders: tuple[Holder, ...]) -> int:
    """What nobody holds; zero where more is held than there is (a lowered amount)."""
    return max(amount - sum(one.granted for one in holders), 0)


def grant(amount: int, holders: tuple[Holder, ...], site: str, *, want: int, least: int) -> int:
    """How much more `site` gets, between 0 and what is left.  O(holders).

    `want` is what it would like.  `least` > 0 says that a request waits which needs so much: it gets that, or
    nothing where not even that is left, so that a smaller request elsewhere still can.
    """
    left = left_of(amount, holders)
    if want <= 0 or left < least or left == 0:
        return 0
    size = _share(amount, left, holders, site)
    if least > 0:
        size = max(size, (left + 1) // 2)
    return min(left, max(least, min(want, size)))


def _share(amount: int, left: int, holders: tuple[Holder, ...], site: str) -> int:
    others = sum(1 for one in holders if one.site != site)
    even = left // (2 * max(others + 1, _SITES_LEAST))
    total = sum(one.spent for one in holders)
    mine = sum(one.spent for one in holders if one.site == site)
    busy = left * mine // (2 * total) if total > 0 else 0
    size = min(max(even, busy), amount // _LARGEST)
    return min(max(size, amount // _SMALLEST, 1), left)


def plausible(key: str, kind: PeriodKind, now_ns: int) -> bool:
    """Whether a period with this key may be going on somewhere: so no site invents a period with a fresh budget.

    Generous by a day and a half, for time zones, for asking ahead, and for a clock that is off.
    """
    near = range(-_CLOCK_SLACK_S, _CLOCK_SLACK_S + 1, _CLOCK_SLACK_S // 3)
    return any(key == period(now_ns + s * NS_PER_S, kind, UTC).key for s in near)
