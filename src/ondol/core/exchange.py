"""Money of one currency in another: exact ratios between scaled units, rounded up once."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

from ondol.core.money import Money
from ondol.units import CURRENCY_SCALE

Exchange = Mapping[tuple[str, str], str]
"""(from, to) -> what one unit of `from` costs in `to`, as decimal text."""

Rates = dict[tuple[str, str], tuple[int, int]]
"""(from, to) -> numerator and denominator, from scaled units to scaled units."""


def rates(exchange: Exchange) -> Rates:
    """The ratios of an exchange table; a rate that is given only the other way round is inverted.

    Raises:
        KeyError: a currency has no scale.
    """
    ratios: Rates = {}
    for (source, target), text in exchange.items():
        scaled = Fraction(text) * Fraction(10) ** (CURRENCY_SCALE[target] - CURRENCY_SCALE[source])
        if scaled > 0:
            ratios[source, target] = scaled.numerator, scaled.denominator
            if (target, source) not in exchange:
                ratios[target, source] = scaled.denominator, scaled.numerator
    return ratios


def converted(value: Money | None, currency: str, ratios: Rates) -> int | None:
    """Scaled units of `currency`, rounded up; None without a price or without a rate."""
    if value is None:
        return None
    if value.currency == currency:
        return value.amount
    ratio = ratios.get((value.currency, currency))
    return None if ratio is None else -(-value.amount * ratio[0] // ratio[1])
