"""Scores: in [0, 1], 1 is best, relative to the others, and the unknown never better than the known."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol.gateway.scorers import FACTORS, Scored, best_of, scores_of

LATENCY, PRICE, CARBON, QUALITY, QUEUE = range(len(FACTORS))


class Place(msgspec.Struct, frozen=True):
    """The figures that are scored, and nothing else."""

    total_ms: float = 100.0
    cost: float | None = 1.0
    carbon_g: float | None = 1.0
    quality: float | None = 0.5
    in_flight: int = 0
    parallel: int = 4


def scored(*places: Scored) -> list[tuple[float, ...]]:
    best = best_of(places)
    return [scores_of(one, best) for one in places]


FIGURE = st.sampled_from([0.0, 0.25, 1.0, 3.0, 1e9])
PLACES = st.lists(
    st.builds(
        Place, total_ms=FIGURE, cost=st.none() | FIGURE, carbon_g=st.none() | FIGURE,
        quality=st.none() | st.sampled_from([0.0, 0.5, 1.0]), in_flight=st.integers(0, 9), parallel=st.integers(1, 4),
    ),
    min_size=1, max_size=5,
)  # fmt: skip


@given(PLACES)
def test_scores_are_shares_of_the_best(places: list[Place]) -> None:
    found = scored(*places)
    assert all(0 <= score <= 1 for scores in found for score in scores)
    assert max(scores[LATENCY] for scores in found) == 1
    for factor, name in ((PRICE, "cost"), (CARBON, "carbon_g"), (QUALITY, "quality")):
        known = [getattr(one, name) is not None for one in places]
        assert all(scores[factor] == 0 for scores, knows in zip(found, known, strict=True) if not knows)
        if any(known) and factor is not QUALITY:
            assert max(scores[factor] for scores in found) == 1


@given(PLACES, st.integers(0, 4), st.integers(0, 4))
def test_a_better_figure_never_scores_lower(places: list[Place], one: int, other: int) -> None:
    found = scored(*places)
    a, b = one % len(places), other % len(places)
    for factor, name, sign in (
        (LATENCY, "total_ms", 1), (PRICE, "cost", 1), (CARBON, "carbon_g", 1), (QUALITY, "quality", -1),
    ):  # fmt: skip
        ours, theirs = getattr(places[a], name), getattr(places[b], name)
        if ours is not None and theirs is not None and sign * ours < sign * theirs:
            assert found[a][factor] >= found[b][factor]


@pytest.mark.parametrize(
    ("factor", "name", "better", "worse", "expected"),
    [
        (LATENCY, "total_ms", 50.0, 200.0, 0.25),
        (PRICE, "cost", 1.0, 2.0, 0.5),
        (PRICE, "cost", 0.0, 2.0, 0.0),
        (CARBON, "carbon_g", 1.0, 4.0, 0.25),
        (QUALITY, "quality", 0.8, 0.2, 0.25),
    ],
)
def test_a_score_is_the_ratio_to_the_best(
    factor: int, name: str, better: float, worse: float, expected: float
) -> None:
    first, second = scored(Place(**{name: better}), Place(**{name: worse}))  # type: ignore[arg-type]
    assert first[factor] == 1
    assert second[factor] == pytest.approx(expected)
    equal = [1.0 if place == factor else scores for place, scores in enumerate(first)]
    assert list(first) == equal


def test_quality_that_is_nought_or_unknown_everywhere_scores_nothing() -> None:
    assert [scores[QUALITY] for scores in scored(Place(quality=0.0), Place(quality=None))] == [0, 0]


@pytest.mark.parametrize(("in_flight", "expected"), [(0, 1.0), (3, 1.0), (4, 4 / 5), (7, 0.5), (39, 0.1)])
def test_a_queue_scores_the_share_of_a_slot_that_one_more_would_get(in_flight: int, expected: float) -> None:
    [scores] = scored(Place(in_flight=in_flight, parallel=4))
    assert scores[QUEUE] == pytest.approx(expected)
