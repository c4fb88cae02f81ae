"""Money as integers at a scale per currency, and the prices it is computed from.

USD is kept in 10^-9, KRW in 10^-6 (see `units.CURRENCY_SCALE`).  Sums are Python integers, so they
never overflow and never round.  An unknown price is None (`unpriced`), never zero.
"""

from __future__ import annotations

from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Context, Decimal
from typing import Final

import msgspec

from ondol.units import CURRENCY_SCALE

_EXACT: Final = Context(prec=200)
"""The default context rounds past 28 digits, silently; the sums of a big company have more."""


class Money(msgspec.Struct, frozen=True, order=True):
    """`amount` in units of 10^-scale of `currency`."""

    amount: int
    currency: str

    def decimal(self) -> Decimal:
        """The amount in whole units of the currency, exactly."""
        return Decimal(self.amount).scaleb(-CURRENCY_SCALE[self.currency], _EXACT)

    def __str__(self) -> str:
        """Plain decimal and ISO currency, as in the header `x-ondol-cost`: `0.0000124 USD`."""
        scale = CURRENCY_SCALE[self.currency]
        digits = str(abs(self.amount)).rjust(scale + 1, "0")
        sign = "-" if self.amount < 0 else ""
        fraction = digits[-scale:].rstrip("0")
        return f"{sign}{digits[:-scale]}{'.' if fraction else ''}{fraction} {self.currency}"


def money(value: Decimal | str | int, currency: str) -> Money:
    """The amount of `value` whole units of `currency`, rounded half-even at the currency's scale.

    Raises:
        KeyError: the currency has no scale.
    """
    scaled = Decimal(value).scaleb(CURRENCY_SCALE[currency], _EXACT)
    return Money(int(scaled.to_integral_value(ROUND_HALF_EVEN, _EXACT)), currency)


class Price(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine's tokens cost.  Rates are scaled currency units per million tokens.

    `id` names the version (`gpt-4o-mini@2026-01-15`): a usage record points to it, never copies it.
    `cached` falls back to `input`, `reasoning` to `output`, where the vendor does not tell them apart.
    """

    id: str
    currency: str
    input: int
    output: int
    cached: int | None = None
    reasoning: int | None = None
    request: int = 0
    source: str = ""
    date: str = ""

    def cost(
        self, *, input_tokens: int, output_tokens: int, cached_tokens: int = 0, reasoning_tokens: int = 0
    ) -> Money:
        """The cost of one answer.  One division, rounded up, so a reservation is never too small.

        Where an engine reports more cached (or reasoning) tokens than tokens, all of them count as such,
        so that a cost is never negative.
        """
        cached_tokens = min(cached_tokens, input_tokens)
        reasoning_tokens = min(reasoning_tokens, output_tokens)
        cached_rate = self.input if self.cached is None else self.cached
        reasoning_rate = self.output if self.reasoning is None else self.reasoning
        numerator = (
            (input_tokens - cached_tokens) * self.input
            + cached_tokens * cached_rate
            + (output_tokens - reasoning_tokens) * self.output
            + reasoning_tokens * reasoning_rate
        )
        return Money(-(-numerator // 1_000_000) + self.request, self.currency)

    def worst(self, *, input_tokens: int, output_tokens: int) -> Money:
        """The most that an answer of this size can cost, whatever part is cached or reasoning."""
        dearest_in = max(self.input, self.cached or 0)
        dearest_out = max(self.output, self.reasoning or 0)
        numerator = input_tokens * dearest_in + output_tokens * dearest_out
        return Money(-(-numerator // 1_000_000) + self.request, self.currency)


def converted(price: Price, currency: str, rate: Decimal, rate_id: str) -> Price:
    """The price in another currency: one unit of its own costs `rate` of `currency`, rounded up.

    The id keeps the rate's name and value, so that a record still points to all that made its cost.
    """
    shift = CURRENCY_SCALE[currency] - CURRENCY_SCALE[price.currency]

    def up(value: int) -> int:
        return int((Decimal(value) * rate).scaleb(shift).to_integral_value(ROUND_CEILING))

    return msgspec.structs.replace(
        price,
        id=f"{price.id}*{rate_id}={rate}",
        currency=currency,
        input=up(price.input),
        output=up(price.output),
        cached=None if price.cached is None else up(price.cached),
        reasoning=None if price.reasoning is None else up(price.reasoning),
        request=up(price.request),
    )
