"""The two tests of the judge, exact and one-sided, without a library of statistics.

- **Mann-Whitney U** (Mann & Whitney, Annals of Mathematical Statistics 18, 1947): are the values of one sample larger?
  The normal approximation is corrected for ties and for continuity; small samples without ties are counted exactly,
  by the recurrence of that paper.  The effect is the probability that a value of the one is larger than a value of
  the other, ties counted half: the common language effect size, A of Vargha & Delaney (2000).
- **Fisher's exact test** (Fisher 1935): does one side fail more often?  A tail of the hypergeometric distribution.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from typing import Final, NamedTuple

EXACT_MAX: Final = 20
"""Up to this many values on each side, without ties, every order is counted: some 10 ms at the most."""
_NEGLIGIBLE: Final = 1e-17


class Ranked(NamedTuple):
    """U of the first sample, the probability `a` that one of its values is larger, and the one-sided `p`."""

    u: float
    a: float
    p: float


def mann_whitney(x: Sequence[float], y: Sequence[float], *, more_variance: float = 0.0) -> Ranked:
    """Are the values of `x` larger than those of `y`?  O((n + m) log n).

    `more_variance` is added to the variance of `a`: doubt that the values share, as from a common divisor.  Where no
    two values differ, nothing can be said (p 1); both samples must have a value.
    """
    n, m = len(x), len(y)
    other = sorted(y)
    u = sum(bisect_left(other, value) + bisect_right(other, value) for value in x) / 2
    counts = Counter(x)
    counts.update(y)
    tied = [count for count in counts.values() if count > 1]
    total = n + m
    ties = sum(count**3 - count for count in tied) / (total * (total - 1)) if tied else 0.0
    variance = (total + 1 - ties) / (12 * n * m)
    if variance <= 1e-12:
        return Ranked(u, u / (n * m), 1.0)
    z = (u / (n * m) - 0.5 - 0.5 / (n * m)) / math.sqrt(variance + more_variance)
    p = 0.5 * math.erfc(z / math.sqrt(2))
    if not tied and max(n, m) <= EXACT_MAX:
        exact = exact_tail(round(u), n, m)
        p = max(exact, p) if more_variance else exact
    return Ranked(u, u / (n * m), p)


def exact_tail(u: int, n: int, m: int) -> float:
    """P(U >= u) for samples of n and m values without ties, where both are from the same distribution."""
    ways = [1] + [0] * (n * m)
    # The numbers of orders are the coefficients of the Gaussian binomial: times 1 - q^(m+i), then by 1 - q^i.
    for i in range(1, n + 1):
        for at in range(n * m, m + i - 1, -1):
            ways[at] -= ways[at - m - i]
        for at in range(i, n * m + 1):
            ways[at] += ways[at - i]
    return sum(ways[max(u, 0) :]) / math.comb(n + m, n)


def fisher(failed: int, n: int, failed_other: int, m: int) -> float:
    """One-sided p that `failed` of n, and not fewer, happen beside `failed_other` of m by chance alone.

    O(failed) at most; it ends where what is left does not count any more.
    """
    both = failed + failed_other
    low, high = max(0, both - m), min(n, both)
    if failed <= low:
        return 1.0
    if failed <= (both + 1) * (n + 1) // (n + m + 2):  # at or below the mode: the other tail is the short one
        return min(1.0, max(0.0, 1.0 - _tail(failed - 1, low, -1, (n, m, both))))
    return min(1.0, _tail(failed, high, 1, (n, m, both)))


def _tail(first: int, last: int, by: int, table: tuple[int, int, int]) -> float:
    """The sum of the hypergeometric distribution from `first` to `last`, walking away from its mode."""
    n, m, both = table
    term = math.exp(_log_choose(n, first) + _log_choose(m, both - first) - _log_choose(n + m, both))
    total, at = term, first
    while at != last and term > _NEGLIGIBLE * total:
        if by > 0:
            term *= (n - at) * (both - at) / ((at + 1) * (m - both + at + 1))
        else:
            term *= at * (m - both + at) / ((n - at + 1) * (both - at + 1))
        at += by
        total += term
    return total


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
