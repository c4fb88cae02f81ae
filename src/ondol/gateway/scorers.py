"""Scores in [0, 1], 1 is best, each relative to the other candidates of the same request.

Relative scores need no tuned scale: a place that is twice as slow as the fastest scores 0.5 on latency,
whatever the model.  Filter, score and pick follow the endpoint picker of the Gateway API inference
extension (proposal 0845).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

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


def lower_is_better(values: Sequence[float | None]) -> list[float]:
    """The best value over each; unknown scores 0, and nothing scores better than free."""
    known = [value for value in values if value is not None]
    best = min(known, default=0.0)
    return [0.0 if v is None else 1.0 if v <= best else best / v for v in values]


def higher_is_better(values: Sequence[float | None]) -> list[float]:
    """Each value over the best; unknown scores 0."""
    best = max((value for value in values if value is not None), default=0.0)
    return [0.0 if value is None or best <= 0 else value / best for value in values]


def queue_room(in_flight: int, parallel: int) -> float:
    """1 while a slot is free, then the share of a slot that one more request would get."""
    return 1.0 if in_flight < parallel else parallel / (in_flight + 1)
