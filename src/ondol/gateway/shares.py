"""What a site wants of a fleet's budgets, what it keeps, and what it gives back.  Pure.

A site asks early, at half of its last block, so that requests do not wait; it says about once a minute what it has
spent; and it gives back what it is not going to use soon, all of it where the fleet has little left.
"""

from __future__ import annotations

from typing import Final

import msgspec

from ondol.gateway.budget_state import Grant, Position
from ondol.units import NS_PER_S

REPORT_NS: Final = 60 * NS_PER_S
"""How often the hub hears what was spent, and what is not needed comes back."""
RENEW_NS: Final = 600 * NS_PER_S
"""How often a quiet site asks at least, half a term if that is shorter: so it hears that little is left."""
_AHEAD: Final = 10
"""Hold what so many minutes like the last ones will use."""
_AHEAD_SCARCE: Final = 2
_STANDING: Final = 1000
"""A site that spends nothing still holds a thousandth of the amount: with that it serves when it is cut off."""
_SCARCE: Final = 10
"""Less than a tenth left: nobody keeps what he does not use."""
_TERM_MAX_S: Final = 86_400.0


class Step(msgspec.Struct, frozen=True):
    """A call to make: how much more to ask for, the smallest part that helps, and what to keep beyond the used.

    `keep` None gives nothing back.
    """

    want: int
    least: int = 0
    keep: int | None = None


class Holding:
    """What the site holds of one budget in one period.  Mutable; the runner owns it.

    `until_ns`, `told_ns` and `renew_ns` are monotonic; `until_ns` 0 is a term that is over.  `era` is the hub's in
    which it was said last what is held.
    """

    __slots__ = (
        "block", "era", "granted", "left", "mark", "number", "recent", "refused_ns", "renew_ns", "reported", "told_ns",
        "until_hub_ns", "until_ns",
    )  # fmt: skip

    def __init__(
        self, *, number: int = 0, granted: int = 0, until_ns: int = 0, until_hub_ns: int = 0, used: int = 0
    ) -> None:
        self.number = number
        self.granted = granted
        self.block = 0
        self.era = 0
        self.until_ns = until_ns
        self.until_hub_ns = until_hub_ns
        self.left: int | None = None
        self.told_ns = 0
        self.renew_ns = 0
        self.refused_ns = 0
        self.reported = -1
        self.mark = used
        self.recent = 0

    def grant(self) -> Grant:
        """As the budgets see it."""
        return Grant(self.granted, self.granted - self.block // 2, self.until_ns, self.left, self.told_ns)

    def minute(self, used: int) -> None:
        """Note the end of a minute: what a minute uses, falling by half in each quiet one."""
        self.recent = max(used - self.mark, self.recent // 2)
        self.mark = used

    def told(self, *, granted: int, left: int | None, used: int, term_s: float, sent_ns: int) -> None:
        """Take the hub's answer.  The term counts from when the site asked, which is never too late."""
        term_s = min(max(term_s, 0.0), _TERM_MAX_S)
        self.block = max(granted - used, 0)
        self.granted = granted
        self.left = left
        self.reported = used
        self.told_ns = sent_ns
        self.until_ns = sent_ns + int(term_s * NS_PER_S)
        self.renew_ns = sent_ns + min(int(term_s * NS_PER_S / 2), RENEW_NS)


def standing(amount: int) -> int:
    """What an idle site holds."""
    return max(amount // _STANDING, 1)


def keeps(position: Position, holding: Holding) -> int:
    """What is worth keeping beyond the used."""
    if not position.now:
        return 0
    if holding.left is not None and holding.left * _SCARCE < position.amount:
        return holding.recent * _AHEAD_SCARCE
    return max(holding.recent * _AHEAD, standing(position.amount))


def next_step(
    position: Position, holding: Holding, *, missing: int, least: int, wished: bool, now_ns: int
) -> Step | None:
    """The call that is due for this budget and period, or None.

    `missing` is what all waiting requests need beyond the grant, `least` what the smallest of them does.
    """
    open_ = max(holding.granted - position.used, 0)
    ahead = keeps(position, holding)
    block = max(ahead, 2 * holding.block, standing(position.amount)) if position.now else 0
    if least > 0:
        spare = open_ if now_ns >= holding.until_ns else 0  # a renewed term makes that usable again
        return Step(missing - spare + block if missing > spare else 0, max(least - spare, 0))
    first, heard_ns = holding.reported < 0, holding.told_ns
    changed = position.used != holding.reported
    if not position.hard:
        due = position.used > 0 if first else changed and now_ns >= heard_ns + REPORT_NS
        return Step(0) if due else None
    if first and position.now:
        return Step(max(block - open_, 0))
    quiet = now_ns < min(heard_ns + REPORT_NS, holding.renew_ns) and not first
    if wished and not (quiet and holding.left == 0):
        return Step(block)
    if quiet:
        return None
    if open_ > 2 * ahead:
        return Step(0, keep=ahead)
    return Step(0) if changed or (position.now and now_ns >= holding.renew_ns) else None
