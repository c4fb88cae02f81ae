"""How sensitive a request is: the strictest of what the caller says and what the route demands."""

from __future__ import annotations

from ondol.core.catalog import RouteDoc
from ondol.core.identity import Hints
from ondol.core.inference import DataClass


def classify(hints: Hints, route: RouteDoc) -> DataClass:
    """The data class of a request.

    Unlabelled is `internal`.  The caller's label replaces that, and never goes below what the route demands.
    """
    said = hints.data_class or DataClass.INTERNAL
    floor = route.data_class
    return floor if floor is not None and floor.rank > said.rank else said
