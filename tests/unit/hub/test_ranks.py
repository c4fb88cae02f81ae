"""The tests of the judge against published tables, against counting, and against SciPy 1.16 (its figures, not itself)."""

from __future__ import annotations

import itertools
import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol.hub.decide.ranks import exact_tail, fisher, mann_whitney


@pytest.mark.parametrize(
    ("n", "m", "critical"),
    [
        # Critical values of U, one-sided 0.025 (two-sided 0.05), as in the usual tables of the test.
        (4, 4, 0), (5, 5, 2), (6, 6, 5), (7, 7, 8), (8, 8, 13), (10, 10, 23), (12, 12, 37), (15, 15, 64),
        (20, 20, 127), (5, 10, 8), (8, 15, 29), (10, 20, 55), (3, 5, 0), (4, 10, 5),
    ],
)  # fmt: skip
def test_exact_probabilities_give_the_critical_values_of_the_tables(n: int, m: int, critical: int) -> None:
    # The tables give the largest small U; the distribution is symmetric, so its mirror image is n*m - U.
    assert exact_tail(n * m - critical, n, m) <= 0.025 < exact_tail(n * m - critical - 1, n, m)


def test_the_example_of_male_and_female_ages_at_diagnosis() -> None:
    # A textbook example that SciPy's manual uses too: U 17, exact one-sided p 1/18.
    found = mann_whitney([19, 22, 16, 29, 24], [20, 11, 17, 12])
    assert (found.u, found.a) == (17, 0.85)
    assert found.p == pytest.approx(7 / 126)


def test_ties_and_larger_samples_agree_with_scipy() -> None:
    tied = mann_whitney([1, 1, 2, 2, 2, 3, 4, 4, 5, 5, 5, 6], [1, 2, 2, 3, 3, 3, 3, 4, 2, 1])
    assert tied.u == 78.5
    assert tied.p == pytest.approx(0.11273140444271645, rel=1e-9)
    rng = Random(7)
    x = [round(rng.lognormvariate(0, 0.5), 2) for _ in range(60)]
    y = [round(rng.lognormvariate(0.2, 0.5), 2) for _ in range(80)]
    assert mann_whitney(y, x).u == 3339.5
    assert mann_whitney(y, x).p == pytest.approx(3.8394628408820774e-05, rel=1e-9)
    assert mann_whitney(x, y).p == pytest.approx(0.9999622759242837, rel=1e-9)


def test_exact_tail_is_what_counting_every_order_finds() -> None:
    for n, m in ((1, 1), (2, 3), (4, 3), (5, 4)):
        found = [sum(a > b for a in own for b in set(range(n + m)) - set(own)) for own in itertools.combinations(range(n + m), n)]  # fmt: skip
        for u in range(n * m + 1):
            assert exact_tail(u, n, m) == pytest.approx(sum(each >= u for each in found) / len(found))


values = st.lists(st.integers(0, 8).map(float), min_size=1, max_size=30)


@given(values, values)
def test_the_effect_is_the_share_of_pairs_and_both_sides_add_up(x: list[float], y: list[float]) -> None:
    found, other = mann_whitney(x, y), mann_whitney(y, x)
    pairs = sum((a > b) + 0.5 * (a == b) for a in x for b in y)
    assert found.u == pytest.approx(pairs)
    assert found.a + other.a == pytest.approx(1)
    assert 0 <= found.p <= 1
    assert mann_whitney(x, y, more_variance=0.01).p >= min(found.p, 0.5) - 1e-12


def test_values_that_are_all_the_same_say_nothing() -> None:
    assert mann_whitney([3.0] * 50, [3.0] * 60) == (1500.0, 0.5, 1.0)


@pytest.mark.parametrize(
    ("table", "p"),
    [
        # Fisher's tea: three of four cups right is 17/70; then SciPy's figures.
        ((3, 4, 1, 4), 17 / 70), ((4, 4, 0, 4), 1 / 70), ((6, 100, 1, 100), 0.059202690531925534),
        ((20, 400, 4, 4000), 7.206976886597178e-18), ((0, 50, 3, 50), 1.0),
        ((12, 50, 40, 1000), 1.7665255936476612e-06), ((5000, 100_000, 300_000, 9_000_000), 2.361988047828985e-163),
    ],
)  # fmt: skip
def test_fisher(table: tuple[int, int, int, int], p: float) -> None:
    assert fisher(*table) == pytest.approx(p, rel=1e-7)


@given(st.integers(0, 12), st.integers(1, 12), st.integers(0, 12), st.integers(1, 12))
def test_fisher_is_what_the_sum_of_the_distribution_is(a: int, n: int, b: int, m: int) -> None:
    a, b = min(a, n), min(b, m)
    both = a + b
    ways = [math.comb(n, k) * math.comb(m, both - k) for k in range(a, min(n, both) + 1) if both - k <= m]
    assert fisher(a, n, b, m) == pytest.approx(sum(ways) / math.comb(n + m, both), abs=1e-12)
