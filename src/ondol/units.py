"""Units of what is counted.  Every amount is an integer; the unit is in the name or the type."""

from __future__ import annotations

from typing import Final, NewType

Nanoseconds = NewType("Nanoseconds", int)
Microjoules = NewType("Microjoules", int)
Nanograms = NewType("Nanograms", int)

NS_PER_S: Final = 1_000_000_000
NS_PER_MS: Final = 1_000_000
NS_PER_US: Final = 1_000
UJ_PER_J: Final = 1_000_000
NG_PER_G: Final = 1_000_000_000
UJ_PER_KWH: Final = 3_600_000_000_000

CURRENCY_SCALE: Final[dict[str, int]] = {"USD": 9, "EUR": 9, "KRW": 6, "JPY": 6}
"""Decimal places kept per currency: ten tokens of a cheap model cost less than a micro-dollar."""
