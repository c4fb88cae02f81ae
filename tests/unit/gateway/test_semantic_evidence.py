"""The evidence: no hit before there is enough, never more wrong ones than promised."""

from __future__ import annotations

import math
import random

import pytest

from ondol.gateway.semantic_evidence import Evidence, Learner, gamma_above


def test_nothing_is_served_before_there_is_evidence() -> None:
    evidence = Evidence(0.05, 0.95)
    assert not evidence.serves(99.0)
    for _ in range(60):
        evidence.saw(8.0)
        evidence.learn(8.0, True)
    # The exact limit for 0 wrong of 60 at half of 0.05 is 0.061.
    assert not evidence.serves(8.0)
    for _ in range(60):
        evidence.saw(8.0)
        evidence.learn(8.0, True)
    assert evidence.serves(8.0)
    assert evidence.bound <= 0.05


def test_without_bands_the_limit_is_the_exact_one_of_poisson() -> None:
    evidence = Evidence(0.05, 0.95)
    for _ in range(200):
        evidence.saw(8.0)
        evidence.learn(8.0, True)
    # Fading leaves a little less than 200 outcomes.
    assert evidence.bound == pytest.approx(math.log(2 / 0.05) / evidence.outcomes, rel=1e-3)


@pytest.mark.parametrize("max_error", [0.05, 0.02])
@pytest.mark.parametrize("seed", range(6))
def test_of_what_is_served_fewer_are_wrong_than_promised(seed: int, max_error: float) -> None:
    """Scores that say nothing of the truth they claim: right with a chance that grows slowly with the score."""
    dice = random.Random(seed)
    evidence = Evidence(max_error, 0.95)
    hits = wrong = 0
    for _ in range(12_000):
        score = dice.uniform(-1, 8)
        right = dice.random() < 1 - 0.6 * math.exp(-0.7 * max(score, 0))
        evidence.saw(score)
        if evidence.serves(score) and dice.random() >= 0.05:
            hits += 1
            wrong += not right
        else:
            evidence.learn(score, right, checked=evidence.serves(score))
    assert hits > 500
    assert wrong <= max_error * hits


@pytest.mark.parametrize("seed", range(4))
def test_where_every_score_is_too_wrong_next_to_nothing_is_served(seed: int) -> None:
    dice = random.Random(seed)
    evidence = Evidence(0.05, 0.95)
    hits = 0
    for _ in range(5000):
        score = dice.uniform(-1, 8)
        evidence.saw(score)
        if evidence.serves(score) and dice.random() >= 0.05:
            hits += 1
        else:
            evidence.learn(score, dice.random() < 0.9, checked=evidence.serves(score))
    assert hits < 100


def test_a_change_of_the_traffic_rings_the_alarm_and_stops_the_hits() -> None:
    dice = random.Random(3)
    evidence = Evidence(0.05, 0.95)
    for _ in range(2000):
        evidence.saw(7.5)
        evidence.learn(7.5, True)
    assert evidence.serves(7.5)
    served = 0
    for _ in range(20_000):
        evidence.saw(7.5)
        if not evidence.serves(7.5):
            break
        if dice.random() < 0.05:
            evidence.learn(7.5, dice.random() < 0.5, checked=True)
        else:
            served += 1
    assert not evidence.serves(7.5)
    assert served < 1500


def test_a_stricter_promise_holds_at_once() -> None:
    evidence = Evidence(0.05, 0.95)
    for _ in range(150):
        evidence.saw(8.0)
        evidence.learn(8.0, True)
    assert evidence.serves(8.0)
    evidence.promise(0.01, 0.95)
    assert not evidence.serves(8.0)


def test_the_learner_finds_what_tells_right_from_wrong() -> None:
    dice = random.Random(1)
    learner = Learner((0.0, 0.0, 0.0))
    for _ in range(1500):
        x, noise = dice.gauss(0, 1), dice.gauss(0, 1)
        learner.learn((1.0, x, noise), dice.random() < 1 / (1 + math.exp(-3 * x)))
    assert learner.score((1.0, 2.0, 0.0)) > 3
    assert learner.score((1.0, -2.0, 0.0)) < -3
    assert abs(learner.weights[2]) < 0.4


@pytest.mark.parametrize(("shape", "x"), [(1.0, 0.5), (1.0, 8.0), (4.0, 2.0), (4.0, 9.0), (30.0, 45.0)])
def test_the_gamma_tail_is_that_of_a_poisson_count(shape: float, x: float) -> None:
    exact = sum(math.exp(-x) * x**k / math.factorial(k) for k in range(int(shape)))
    assert gamma_above(shape, x) == pytest.approx(exact, rel=1e-9)
