"""Money is exact, and a reservation is never too small."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol.core.money import Money, Price, converted, money
from ondol.units import CURRENCY_SCALE

RATES = st.integers(0, 10**12)
TOKENS = st.integers(0, 10**7)


@pytest.mark.parametrize(
    ("value", "currency", "text"),
    [
        ("0.0000124", "USD", "0.0000124 USD"),
        ("0", "USD", "0 USD"),
        ("100", "KRW", "100 KRW"),
        ("0.000001", "KRW", "0.000001 KRW"),
        ("-1.50", "EUR", "-1.5 EUR"),
        ("12345678901234567890.123456789", "USD", "12345678901234567890.123456789 USD"),
    ],
)
def test_text_is_plain_decimal_without_loss(value: str, currency: str, text: str) -> None:
    assert str(money(value, currency)) == text


def test_half_a_unit_rounds_to_even() -> None:
    assert money("0.0000000005", "USD").amount == 0
    assert money("0.0000000015", "USD").amount == 2


def test_a_currency_without_scale_is_refused() -> None:
    with pytest.raises(KeyError):
        money("1", "XXX")


@given(amount=st.integers(-(2**100), 2**100), currency=st.sampled_from(sorted(CURRENCY_SCALE)))
def test_decimal_is_exact(amount: int, currency: str) -> None:
    with_scale = Decimal(f"{amount}E-{CURRENCY_SCALE[currency]}")
    assert Decimal(str(Money(amount, currency)).split()[0]) == with_scale


@given(
    rates=st.tuples(RATES, RATES, st.none() | RATES, st.none() | RATES, RATES),
    input_tokens=TOKENS,
    output_tokens=TOKENS,
    cached=st.integers(0, 2 * 10**7),
    reasoning=st.integers(0, 2 * 10**7),
)
def test_the_worst_case_covers_every_split(
    rates: tuple[int, int, int | None, int | None, int],
    input_tokens: int,
    output_tokens: int,
    cached: int,
    reasoning: int,
) -> None:
    price = Price(
        id="p@1", currency="USD", input=rates[0], output=rates[1],
        cached=rates[2], reasoning=rates[3], request=rates[4],
    )  # fmt: skip

    cost = price.cost(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cached_tokens=cached,
        reasoning_tokens=reasoning,
    )

    assert price.request <= cost.amount
    assert cost <= price.worst(input_tokens=input_tokens, output_tokens=output_tokens)


@given(first=TOKENS, second=TOKENS, rate=RATES)
def test_a_cost_is_rounded_up_by_less_than_one_unit(first: int, second: int, rate: int) -> None:
    price = Price(id="p@1", currency="USD", input=rate, output=rate)

    cost = price.cost(input_tokens=first, output_tokens=second)

    exact = Decimal((first + second) * rate) / 1_000_000
    assert exact <= cost.amount < exact + 1


def test_a_known_answer_costs_what_the_vendor_says() -> None:
    price = Price(
        id="gpt-4o-mini@1", currency="USD", input=150_000_000, output=600_000_000, cached=75_000_000
    )

    cost = price.cost(input_tokens=1_000, output_tokens=500, cached_tokens=200)

    assert str(cost) == "0.000435 USD"


def test_a_converted_price_names_its_rate_and_is_rounded_up() -> None:
    price = Price(id="p@1", currency="USD", input=150_000_000, output=600_000_001, request=1)

    won = converted(price, "KRW", Decimal("1400.5"), "bank@2026-01-15")

    assert (won.id, won.currency) == ("p@1*bank@2026-01-15=1400.5", "KRW")
    assert (won.input, won.output, won.request) == (210_075_000, 840_300_002, 2)
