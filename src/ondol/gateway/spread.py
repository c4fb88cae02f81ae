"""How far what is seen strays from what was expected: quantiles of a sliding window.

The window holds the last 256 ratios seen / expected.  A quantile is an order statistic of it, taken so that the next
value stays below with at least the stated probability while values are exchangeable:

    q(p) = the k-th smallest of n,  k = ceil((n + 1) p)

(split conformal prediction; Vovk, Gammerman, Shafer, "Algorithmic Learning in a Random World", 2005, section 2.)
Where k > n the window is too short to say: then the largest one is stretched by 1 + 4/n.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from math import ceil
from typing import Final

WINDOW: Final = 256


class Spread:
    """The last ratios, in order of arrival and of size.  `add` is O(log n) and a move of 2 KiB; `quantile` O(1)."""

    __slots__ = ("_by_age", "_by_size", "_sum")

    def __init__(self) -> None:
        """Know nothing."""
        self._by_age: deque[float] = deque()
        self._by_size: list[float] = []
        self._sum = 0.0

    def __len__(self) -> int:
        return len(self._by_size)

    def add(self, ratio: float) -> None:
        """Take one ratio, which must be finite; the oldest of a full window leaves."""
        if len(self._by_age) == WINDOW:
            oldest = self._by_age.popleft()
            self._sum -= oldest
            del self._by_size[bisect_left(self._by_size, oldest)]
        self._by_age.append(ratio)
        self._sum += ratio
        insort(self._by_size, ratio)

    @property
    def mean(self) -> float | None:
        """The mean of the window; None where nothing was seen."""
        return max(self._sum / len(self._by_age), self._by_size[0]) if self._by_age else None

    def quantile(self, p: float) -> float | None:
        """What the next ratio stays below with probability `p`, in (0, 1); None where nothing was seen."""
        n = len(self._by_size)
        if n == 0:
            return None
        rank = ceil((n + 1) * p)
        return self._by_size[rank - 1] if rank <= n else self._by_size[-1] * (1 + 4 / n)

    def band(self, p: float) -> tuple[float, float] | None:
        """The shortest band that held the share `p` of the window; None where nothing was seen.  25 µs.

        Shorter than from quantile to quantile where values are skewed, and not too wide where many are equal.  A
        window that is too short to say is stretched on both sides by 1 + 4/n.
        """
        values = self._by_size
        n = len(values)
        if n == 0:
            return None
        inside = ceil((n + 1) * p)
        if inside > n:
            return values[0] / (1 + 4 / n), values[-1] * (1 + 4 / n)
        widths = [values[i + inside - 1] - values[i] for i in range(n - inside + 1)]
        first = widths.index(min(widths))
        return values[first], values[first + inside - 1]
