"""Scores in [0, 1], 1 is best, each relative to the other candidates of the same request.

Relative scores need no tuned scale: a place that is twice as slow as the fastest scores 0.5 on latency,
whatever the model.  Filter, score and pick follow the endpoint picker of the Gateway API inference
extension (proposal 0845).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from ondol.core.inference import Objective

FACTORS: Final = ("latency", "price", "carbon", "quality", "queue")

WEIGHTS: Final[dict[str, tuple[float, ...]]] = {
    Objective.FAST: (0.75, 0.05, 0.03, 0.07, 0.10),
    Objective.CHEAP: (0.08, 0.80, 0.03, 0.05, 0.04),
    Objective.GREEN: (0.08, 0.03, 0.80, 0.05, 0.04),
    Objective.BEST: (0.07, 0.03, 0.02, 0.85, 0.03),
    Objective.PRIVATE: (0.75, 0.05, 0.03, 0.07, 0.10),
}
"""Weights of FACTORS by objective; each row sums to 1.  The named factor outweighs the others together."""


class Scored(Protocol):
    """What is scored of a candidate; None means unknown."""

    @property
    def total_ms(self) -> float:
        """Expected time of the whole answer."""
        ...

    @property
    def cost(self) -> float | None:
        """Expected cost."""
        ...

    @property
    def carbon_g(self) -> float | None:
        """Expected carbon."""
        ...

    @property
    def quality(self) -> float | None:
        """Prior of its quality, in [0, 1]."""
        ...

    @property
    def in_flight(self) -> int:
        """Requests there now."""
        ...

    @property
    def parallel(self) -> int:
        """Requests that it runs at once."""
        ...


Best = tuple[float, float | None, float | None, float]
"""The least time, cost and carbon, and the most quality, among the candidates of one request."""


def best_of(candidates: Sequence[Scored]) -> Best:
    """What each candidate is measured against."""
    costs = [one.cost for one in candidates if one.cost is not None]
    carbons = [one.carbon_g for one in candidates if one.carbon_g is not None]
    qualities = [one.quality for one in candidates if one.quality is not None]
    return (
        min([one.total_ms for one in candidates]),
        min(costs) if costs else None,
        min(carbons) if carbons else None,
        max(qualities) if qualities else 0.0,
    )


def scores_of(one: Scored, best: Best) -> tuple[float, float, float, float, float]:
    """The scores of FACTORS: the best over its own value, and for quality its own over the best.

    Unknown scores 0.  The queue scores 1 while a slot is free, then the share of a slot that one more
    request would get.
    """
    total, cost, carbon, quality = one.total_ms, one.cost, one.carbon_g, one.quality
    least, cheapest, greenest, finest = best
    return (
        least / total if total > least else 1.0,
        0.0 if cost is None or cheapest is None else cheapest / cost if cost > cheapest else 1.0,
        0.0 if carbon is None or greenest is None else greenest / carbon if carbon > greenest else 1.0,
        0.0 if quality is None or finest <= 0 else quality / finest,
        1.0 if one.in_flight < one.parallel else one.parallel / (one.in_flight + 1),
    )
