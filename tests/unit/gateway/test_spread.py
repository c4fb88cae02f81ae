"""Quantiles of a window: they cover what they state, and say wide bounds where little was seen."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol.gateway.spread import WINDOW, Spread


def of(values: list[float]) -> Spread:
    made = Spread()
    for value in values:
        made.add(value)
    return made


def test_nothing_seen_says_nothing() -> None:
    assert Spread().quantile(0.9) is None
    assert Spread().band(0.9) is None
    assert Spread().mean is None


def test_a_short_window_is_stretched_and_a_long_one_is_read() -> None:
    assert of([1.0]).quantile(0.99) == 5.0
    assert of([float(n) for n in range(1, 100)]).quantile(0.99) == 99.0
    assert of([float(n) for n in range(1, 100)]).quantile(0.5) == 50.0
    assert of([2.0]).band(0.9) == pytest.approx((0.4, 10.0))
    assert of([1.0] * 99 + [50.0]).band(0.9) == (1.0, 1.0)
    assert of([float(n * n) for n in range(100)]).band(0.9) == (0.0, 90.0**2)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=2 * WINDOW))
def test_only_the_last_ones_count(values: list[float]) -> None:
    made = of(values)
    kept = sorted(values[-WINDOW:])
    assert len(made) == len(kept)
    median = made.quantile(0.5)
    assert median is not None
    assert median == kept[-(-(len(kept) + 1) // 2) - 1] if len(kept) > 1 else median >= kept[0]


@pytest.mark.parametrize("p", [0.5, 0.9, 0.95, 0.99])
def test_the_next_value_stays_below_as_often_as_stated(p: float) -> None:
    """Over many windows of exchangeable values; for n = 256 the coverage is within p .. p + 1/257."""
    rng = random.Random(7)
    made, below, tries = Spread(), 0, 40_000
    for n in range(tries + WINDOW):
        value = rng.lognormvariate(0, 1)
        bound = made.quantile(p)
        if n >= WINDOW:
            assert bound is not None
            below += value <= bound
        made.add(value)
    assert below / tries == pytest.approx(p, abs=0.01)
