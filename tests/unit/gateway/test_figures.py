"""Figures of the generations: what counts, and that the sample is a fair one of the recent past."""

from __future__ import annotations

from random import Random
from statistics import fmean

import msgspec
import pytest

from ondol.core.usage import UsageRecord
from ondol.gateway.figures import MEMORY, SAMPLE, GenerationFigures
from ondol.units import NS_PER_MS

DONE = UsageRecord(
    request_id="r", time_ns=0, site="s", gateway="g", tenant="t", team="t", key_id="k", route="r", task="chat",
    outcome="completed", status=200, total_ns=900 * NS_PER_MS,
)  # fmt: skip


def took(ms: float) -> UsageRecord:
    return msgspec.structs.replace(DONE, total_ns=int(ms * NS_PER_MS))


@pytest.mark.parametrize(
    ("change", "requests", "errors", "times"),
    [
        ({}, 1, 0, (900.0,)),
        ({"ttft_ns": 80 * NS_PER_MS}, 1, 0, (80.0,)),
        ({"cache": "exact"}, 0, 0, ()),
        ({"cache": "miss"}, 1, 0, (900.0,)),
        ({"outcome": "failed", "status": 502}, 1, 1, ()),
        ({"outcome": "refused", "status": 503}, 1, 1, ()),
        ({"outcome": "refused", "status": 429}, 0, 0, ()),
        ({"outcome": "cancelled", "status": 499}, 0, 0, ()),
    ],
)
def test_what_counts(change: dict[str, object], requests: int, errors: int, times: tuple[float, ...]) -> None:
    figures = GenerationFigures(3, Random(1).random)
    figures.add(msgspec.structs.replace(DONE, **change))
    (found,) = figures.figures()
    assert (found.generation, found.requests, found.errors, found.latency_ms) == (3, requests, errors, times)
    assert found.latency_at == ((1,) if times else ())


def test_the_generation_before_is_kept_and_the_one_before_that_is_not() -> None:
    figures = GenerationFigures(1, Random(1).random)
    figures.add(DONE)
    figures.begin(1)
    assert figures.figures()[0].requests == 1, "the same generation again changes nothing"
    figures.begin(2)
    figures.add(DONE, quality=0.5)
    figures.add(DONE)
    before, now = figures.figures()
    assert [(one.generation, one.requests) for one in (before, now)] == [(1, 1), (2, 2)]
    assert (now.quality, now.quality_at) == ((0.5,), (1,))
    figures.begin(3)
    assert [one.generation for one in figures.figures()] == [2, 3]


def test_the_sample_is_bounded_numbered_and_of_the_recent_past() -> None:
    figures = GenerationFigures(1, Random(2).random)
    for number in range(1, 20_001):
        figures.add(took(number))
    (found,) = figures.figures()
    assert found.requests == 20_000
    assert len(found.latency_ms) == len(found.latency_at) == len(set(found.latency_at)) == SAMPLE
    assert all(ms == number for ms, number in zip(found.latency_ms, found.latency_at, strict=True))
    ages = [20_000 - number for number in found.latency_at]
    assert 0.7 * MEMORY < fmean(ages) < 1.4 * MEMORY


def test_below_its_memory_every_request_has_the_same_chance() -> None:
    shares = []
    for seed in range(40):
        figures = GenerationFigures(1, Random(seed).random)
        for number in range(1, MEMORY + 1):
            figures.add(took(number))
        shares.append(sum(number <= MEMORY // 2 for number in figures.figures()[0].latency_at) / SAMPLE)
    assert 0.47 < fmean(shares) < 0.53


def test_the_same_chance_gives_the_same_sample() -> None:
    def run() -> tuple[float, ...]:
        figures = GenerationFigures(1, Random(9).random)
        for number in range(3_000):
            figures.add(took(number))
        return figures.figures()[0].latency_ms

    assert run() == run()
