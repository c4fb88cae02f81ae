"""The data class of a request: labels replace the default, and nothing goes below the route's."""

from __future__ import annotations

import itertools

import pytest

from ondol.core.catalog import RouteDoc
from ondol.core.identity import Hints
from ondol.core.inference import DataClass
from ondol.gateway.classify import classify

CASES = list(itertools.product([None, *DataClass], [None, *DataClass]))


@pytest.mark.parametrize(("said", "floor"), CASES)
def test_the_strictest_of_label_and_route_counts(said: DataClass | None, floor: DataClass | None) -> None:
    found = classify(Hints(data_class=said), RouteDoc(name="r", deployments=("d",), data_class=floor))
    candidates = [said or DataClass.INTERNAL] + ([] if floor is None else [floor])
    order = [DataClass.PUBLIC, DataClass.INTERNAL, DataClass.CONFIDENTIAL, DataClass.RESTRICTED]
    assert found is max(candidates, key=order.index)


def test_unlabelled_is_internal_also_on_a_public_route() -> None:
    route = RouteDoc(name="r", deployments=("d",), data_class=DataClass.PUBLIC)
    assert classify(Hints(), route) is DataClass.INTERNAL
    assert classify(Hints(data_class=DataClass.PUBLIC), route) is DataClass.PUBLIC
