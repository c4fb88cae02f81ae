"""What a route has learnt of its own semantic hits, and the score from which on they may be served.

Two parts.  `Learner` turns features into a probability that the cached answer is right, and learns from every
outcome.  It is only a ranking: the promise does not rest on it.  `Evidence` counts outcomes by bands of that score
and finds from which score on the share of wrong answers is below `max_error` with the confidence asked.

Outcomes of what is not served are all seen, since the model answers there anyway; of what is served only the checked
share.  So each band's share of the traffic and its share of wrong answers are counted apart, and the share of wrong
answers among all hits is a weighted sum of counts.  Its upper confidence limit: Fay and Feuer (Statistics in Medicine
16, 1997), which is the exact Poisson limit where all weights are equal.  Scores are tried from the highest down, from
two starts that share the error probability, each until the first that fails (fixed-sequence testing, as in
Angelopoulos et al., «Learn then Test», 2021), so that trying many costs no more than the starts.

That rests on outcomes of before holding for those to come.  Against a change of the traffic stands an alarm on the
checked hits alone, a random sample of what would be served: when it rings, all counts are forgotten and nothing is
served until there is new evidence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul
from typing import Final

BANDS: Final = 16
STEP: Final = 0.5
_FIRST: Final = -0.5
"""Bands of the score (log-odds that the answer is right): up to 0, 0 to 0.5, .. 7 and above."""
_STARTS: Final = (13, 7)
_KEEP_OUTCOMES: Final = 1 - 1 / 3000
_KEEP_TRAFFIC: Final = 1 - 1 / 2000
_EVERY: Final = 8
_ALARM: Final = 1000.0
"""Where hits are just as wrong as promised, a false alarm comes after 1,000 checks on average, or later."""


class Learner:
    """Logistic regression, updated one outcome at a time with its whole covariance (a Kalman step).

    Cost: some 100 µs an outcome with 14 features.
    """

    def __init__(self, prior: Sequence[float], spread: float = 1.0, keep: float = 0.9998) -> None:
        """Begin at `prior`, each weight uncertain by `spread`; `keep` is how slowly old outcomes fade."""
        size = len(prior)
        self.weights = list(prior)
        self._limit = spread * spread
        self._cov = [[self._limit if row == col else 0.0 for col in range(size)] for row in range(size)]
        self._keep = keep
        self.outcomes = 0

    def score(self, features: Sequence[float]) -> float:
        """The log-odds that the answer is right, drawn to 0 by what is not known of the weights."""
        mean: float = sum(map(mul, self.weights, features))
        spread = self._times(features)
        variance = sum(map(mul, spread, features))
        return mean / math.sqrt(1 + math.pi * variance / 8)

    def learn(self, features: Sequence[float], right: bool) -> None:
        """Take in one outcome."""
        score = max(-30.0, min(30.0, self.score(features)))
        chance = 1 / (1 + math.exp(-score))
        spread = self._times(features)
        variance = sum(map(mul, spread, features))
        scale = 1 / (1 / max(chance * (1 - chance), 1e-4) + variance)
        for row, gain in zip(self._cov, spread, strict=True):
            step = gain * scale
            row[:] = [value - step * other for value, other in zip(row, spread, strict=True)]
        error = (1.0 if right else 0.0) - chance
        moved = self._times(features)
        self.weights = [weight + move * error for weight, move in zip(self.weights, moved, strict=True)]
        self.outcomes += 1
        if self.outcomes % 64 == 0:
            self._fade()

    def _times(self, features: Sequence[float]) -> list[float]:
        return [sum(map(mul, row, features)) for row in self._cov]

    def _fade(self) -> None:
        grow = self._keep**-64
        if all(row[at] * grow <= self._limit for at, row in enumerate(self._cov)):
            self._cov = [[value * grow for value in row] for row in self._cov]


class Evidence:
    """From which score on hits may be served, and the alarm that stops them."""

    def __init__(self, max_error: float, confidence: float) -> None:
        """Promise at most `max_error` wrong hits a hit served, with `confidence`; both in (0, 1)."""
        self.max_error = max_error
        self.confidence = confidence
        self.bound = 1.0
        self.alarms = 0
        self._suspicion = 0.0
        self._forget()

    def _forget(self) -> None:
        self._traffic = [0.0] * BANDS
        self._seen = [0.0] * BANDS
        self._wrong = [0.0] * BANDS
        self._news = 0
        self._from: int | None = None

    @property
    def threshold(self) -> float | None:
        """The log-odds from which on hits are served; None where nothing is."""
        return None if self._from is None else _FIRST + STEP * self._from

    @property
    def outcomes(self) -> float:
        """How many outcomes the counts hold, the old ones faded."""
        return sum(self._seen)

    def promise(self, max_error: float, confidence: float) -> None:
        """Another promise from now on, on the same counts."""
        if (max_error, confidence) != (self.max_error, self.confidence):
            self.max_error, self.confidence = max_error, confidence
            self._weigh()

    def serves(self, score: float) -> bool:
        """Whether a hit of this score may be served."""
        return self._from is not None and band(score) >= self._from

    def saw(self, score: float) -> None:
        """Count one candidate, whatever becomes of it."""
        self._traffic[:] = [count * _KEEP_TRAFFIC for count in self._traffic]
        self._traffic[band(score)] += 1

    def learn(self, score: float, right: bool, *, checked: bool = False) -> None:
        """Take in the outcome of one candidate; `checked` where it would have been served."""
        at = band(score)
        self._seen[at] = self._seen[at] * _KEEP_OUTCOMES + 1
        self._wrong[at] = self._wrong[at] * _KEEP_OUTCOMES + (not right)
        self._news += 1
        if checked and self._alarmed(right):
            self.alarms += 1
            self._suspicion = 0.0
            self._forget()
        if self._news >= _EVERY or not right:
            self._news = 0
            self._weigh()

    def _alarmed(self, right: bool) -> bool:
        """Shiryaev and Roberts' test of «twice `max_error`» against `max_error`, on a random sample of the hits."""
        limit = self.max_error
        self._suspicion = (self._suspicion + 1) * ((1 - 2 * limit) / (1 - limit) if right else 2.0)
        return self._suspicion >= _ALARM

    def _weigh(self) -> None:
        self._from = self._lowest()
        self.bound = 1.0 if self._from is None else self._limit(self._from)

    @property
    def _missed(self) -> float:
        return (1 - self.confidence) / len(_STARTS)

    def _lowest(self) -> int | None:
        found = None
        for start in _STARTS:
            at = start
            while at >= 0 and self._passes(at):
                found = at if found is None else min(at, found)
                at -= 1
        return found

    def _passes(self, lowest: int) -> bool:
        shape, scale = self._gamma(lowest)
        return scale > 0 and gamma_above(shape, self.max_error / scale) <= self._missed

    def _limit(self, lowest: int) -> float:
        shape, scale = self._gamma(lowest)
        low, high = 0.0, 1.0
        for _ in range(20):
            middle = (low + high) / 2
            if gamma_above(shape, middle / scale) <= self._missed:
                high = middle
            else:
                low = middle
        return high

    def _gamma(self, lowest: int) -> tuple[float, float]:
        """Shape and scale of the gamma distribution whose quantile is the upper limit from band `lowest` on."""
        total = sum(self._traffic[lowest:])
        if not total:
            return 1.0, 0.0
        mean = spread = most = 0.0
        for traffic, seen, wrong in zip(
            self._traffic[lowest:], self._seen[lowest:], self._wrong[lowest:], strict=True
        ):
            if traffic:
                weight = traffic / total / max(seen, 0.5)
                mean += weight * wrong
                spread += weight * weight * wrong
                most = max(most, weight)
        mean, spread = mean + most, spread + most * most
        return mean * mean / spread, spread / mean


def band(score: float) -> int:
    """Which band a score falls in."""
    return max(0, min(BANDS - 1, math.floor((score - _FIRST) / STEP)))


def gamma_above(shape: float, x: float) -> float:
    """The chance that a gamma variable of this shape (scale 1) is above `x`.  Series and continued fraction."""
    if x <= 0:
        return 1.0
    front = math.exp(shape * math.log(x) - x - math.lgamma(shape))
    if x < shape + 1:
        term = total = 1 / shape
        step = shape
        while term > total * 1e-12:
            step += 1
            term *= x / step
            total += term
        return max(0.0, 1 - front * total)
    # Lentz's method.
    b = x + 1 - shape
    c = 1e300
    d = 1 / b
    value = d
    for step in range(1, 1000):
        a = -step * (step - shape)
        b += 2
        d = 1 / (a * d + b or 1e-300)
        c = b + a / c or 1e-300
        value *= c * d
        if abs(c * d - 1) < 1e-12:
            break
    return front * value
