"""How long answers are, by the length of what was asked: quantiles of the last ones alike.

Prompts are put into bins, two an octave (0, 1, 2, 3, 4, 6, 8, 12, 16 ... tokens), since short questions and long
documents are answered differently.  Each bin keeps its last 256 lengths; one that has seen fewer than 20 borrows from
all of them.  The quantiles are conformal (`spread`), so a stated 90 % holds for whatever the lengths are like, as long
as the next ones are like the last.
"""

from __future__ import annotations

from typing import Final

import msgspec

from ondol.gateway.spread import Spread

BIN_SEEN_MIN: Final = 20
_BINS: Final = 48
"""The last holds everything from 8 million tokens on."""


class LengthBounds(msgspec.Struct, frozen=True):
    """Output tokens of one answer: the mean, the middle, and what it stays within with nine chances of ten."""

    mean: float
    middle: float
    low: float
    high: float


class Lengths:
    """The lengths that one endpoint gave.  At most some 300 KiB."""

    __slots__ = ("_all", "_bins")

    def __init__(self) -> None:
        """Know nothing."""
        self._all = Spread()
        self._bins: dict[int, Spread] = {}

    def add(self, prompt_tokens: int, output_tokens: int) -> None:
        """Learn from one answer; a few microseconds."""
        length = float(output_tokens)
        self._all.add(length)
        self._bins.setdefault(_bin(prompt_tokens), Spread()).add(length)

    @property
    def seen(self) -> int:
        """How many answers, as far as they are remembered."""
        return len(self._all)

    def mean(self, prompt_tokens: int) -> float | None:
        """The mean of answers to prompts alike; None where none was seen."""
        return self._of(prompt_tokens).mean

    def bounds(self, prompt_tokens: int) -> LengthBounds | None:
        """The mean and a band that the next length is in with a chance of 90 %; None where none was seen."""
        seen = self._of(prompt_tokens)
        mean, middle, band = seen.mean, seen.quantile(0.5), seen.band(0.9)
        if mean is None or middle is None or band is None:
            return None
        return LengthBounds(mean, middle, *band)

    def _of(self, prompt_tokens: int) -> Spread:
        alike = self._bins.get(_bin(prompt_tokens))
        return alike if alike is not None and len(alike) >= BIN_SEEN_MIN else self._all


def _bin(tokens: int) -> int:
    """Two an octave: twice the exponent, and one more from 1.5 times the power of two on."""
    if tokens < 2:
        return max(tokens, 0)
    exponent = tokens.bit_length() - 1
    return min(2 * exponent + (tokens >> (exponent - 1) & 1), _BINS - 1)
