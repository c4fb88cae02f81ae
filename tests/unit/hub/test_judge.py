"""The judge: what it finds, what must not fool it, and how often it errs."""

from __future__ import annotations

from random import Random

import msgspec
import pytest
from tests.unit.hub.fleets import Scenario, judge_step, rates, samples

from ondol.core.catalog import Judge, RolloutDoc
from ondol.hub.decide.judge import Baseline, Sample, baseline_of, compare
from ondol.hub.decide.verdicts import Against, Verdict

RULES = Judge()
ONE_WINDOW = RolloutDoc(name="r", bake_s=600.0, judge=Judge(max_wait_s=600))


def verdict(one: Scenario, seed: int = 1, against: Against = "old", rules: Judge = RULES) -> Verdict:
    rng = Random(seed)
    new, old = samples(one, rng, is_new=True), samples(one, rng, is_new=False)
    return compare(rules, new, old, look=1, share=1.0, against=against)


def test_without_a_difference_it_goes_on_and_gives_all_numbers() -> None:
    found = verdict(Scenario())
    assert (found.outcome, found.reason) == ("continue", "fine")
    errors, latency = found.comparisons
    assert (errors.measure, latency.measure) == ("errors", "latency")
    assert (found.requests_new, found.requests_old, found.sites_new, found.sites_old) == (200, 2000, 1, 20)
    assert latency.u is not None
    assert 0.4 < latency.effect < 0.6
    assert latency.new > 10
    assert latency.ratio_new == pytest.approx(1, abs=0.2)
    assert errors.p_before is not None
    assert found.alpha == RULES.alpha / 2
    assert msgspec.json.decode(msgspec.json.encode(found), type=Verdict) == found


@pytest.mark.parametrize(
    ("change", "measure"),
    [
        ({"slower": 1.5}, "latency"),
        ({"errors_new": 0.1}, "errors"),
        ({"slower": 3.0, "errors_new": 0.5}, "errors"),
    ],
)
def test_what_is_worse_is_aborted_with_the_measure_that_proved_it(
    change: dict[str, float], measure: str
) -> None:
    found = verdict(Scenario(**change))  # type: ignore[arg-type]  # floats only
    assert (found.outcome, found.reason) == ("abort", "worse")
    assert [one for one in found.comparisons if one.worse][0].measure == measure


def test_what_is_better_is_no_reason_to_abort() -> None:
    assert verdict(Scenario(slower=0.5, errors=0.2, errors_new=0.0)).outcome == "continue"


def test_worse_quality_is_aborted_each_site_by_its_own_measure() -> None:
    rng = Random(3)

    def site(name: str, usual: float, now: float) -> Sample:
        before = [min(1.0, max(0.0, rng.gauss(usual, 0.05))) for _ in range(100)]
        scores = tuple([min(1.0, max(0.0, rng.gauss(now, 0.05))) for _ in range(100)])
        times = tuple([rng.lognormvariate(5, 0.3) for _ in range(100)])
        return Sample(
            site=name, requests=100, errors=0, latency_ms=times, quality=scores,
            baseline=baseline_of(100, 0, [rng.lognormvariate(5, 0.3) for _ in range(100)], before),
        )  # fmt: skip

    old = [site("a", 0.9, 0.9), site("b", 0.8, 0.8)]
    # The canary always scored less: that is how it is, and not what the generation did.
    fine = compare(RULES, [site("c", 0.5, 0.5)], old, look=1, share=1.0, against="old")
    worse = compare(RULES, [site("c", 0.9, 0.7)], old, look=1, share=1.0, against="old")
    assert worse.outcome == "abort"
    assert not any(one.worse for one in fine.comparisons)
    assert fine.comparisons[2].effect < RULES.min_effect < worse.comparisons[2].effect
    assert [one.measure for one in worse.comparisons if one.worse] == ["quality"]
    assert worse.alpha == RULES.alpha / 3


def test_simpsons_paradox_slow_machines_first_fool_nobody() -> None:
    slow = Scenario(slow_canaries=4.0)
    found = verdict(slow)
    latency = found.comparisons[1]
    assert latency.new > 2 * latency.old, "by the plain figures the new generation is far slower"
    assert found.outcome == "continue"
    # And the other way round: a regression on fast machines is found, though their figures are the best of all.
    hidden = verdict(Scenario(slow_canaries=0.25, slower=1.5))
    assert hidden.comparisons[1].new < hidden.comparisons[1].old
    assert hidden.outcome == "abort"


def test_a_site_that_always_failed_more_is_not_held_against_the_generation() -> None:
    rng = Random(1)
    old = samples(Scenario(), rng, is_new=False)
    new = samples(Scenario(errors=0.2, errors_new=0.2), rng, is_new=True)
    found = compare(RULES, new, old, look=1, share=1.0, against="old")
    errors = found.comparisons[0]
    assert errors.new > errors.old + 0.1
    assert errors.p < 1e-6
    assert errors.p_before is not None
    assert errors.p_before > 0.01
    assert found.outcome == "continue"


def test_errors_must_be_proved_against_the_same_sites_before_too() -> None:
    rng = Random(1)
    old = samples(Scenario(), rng, is_new=False)
    one = samples(Scenario(requests_new=60), rng, is_new=True)[0]
    few = msgspec.structs.replace(
        one, errors=10, baseline=msgspec.structs.replace(one.baseline, requests=60, errors=6)
    )
    errors = compare(RULES, [few], old, look=1, share=1.0, against="old").comparisons[0]
    assert errors.p < RULES.alpha / 2 < (errors.p_before or 0.0)
    assert errors.effect > RULES.error_rate_rise
    assert (errors.worse, errors.looks_worse) == (False, True)


def test_the_hour_changes_both_sides_and_decides_nothing() -> None:
    assert verdict(Scenario(hour=2.5)).outcome == "continue"
    assert verdict(Scenario(hour=2.5, slower=1.5)).outcome == "abort"


def test_where_all_have_changed_a_worse_time_is_no_proof_but_errors_are() -> None:
    slower = verdict(Scenario(slower=2.0), against="before")
    assert (slower.outcome, slower.reason) == ("inconclusive", "all_changed")
    assert verdict(Scenario(errors_new=0.2), against="before").outcome == "abort"


def test_too_few_is_inconclusive_on_either_side_and_without_a_known_site() -> None:
    assert verdict(Scenario(requests_new=30)).reason == "too_few"
    assert verdict(Scenario(requests_old=20, old_sites=2)).reason == "too_few"
    rng = Random(1)
    unknown = [
        msgspec.structs.replace(one, baseline=Baseline()) for one in samples(Scenario(), rng, is_new=True)
    ]
    old = samples(Scenario(), rng, is_new=False)
    assert compare(RULES, unknown, old, look=1, share=1.0, against="old").reason == "too_few"
    nobody = compare(RULES, [], [], look=1, share=1.0, against="old")
    assert (nobody.outcome, nobody.requests_new) == ("inconclusive", 0)


def test_errors_speak_also_where_nothing_was_answered_in_time() -> None:
    rng = Random(1)
    old = samples(Scenario(), rng, is_new=False)
    broken = [Sample(site="new", requests=60, errors=60, baseline=old[0].baseline)]
    assert compare(RULES, broken, old, look=1, share=0.1, against="old").outcome == "abort"


def test_quiet_sites_count_together() -> None:
    quiet = Scenario(new_sites=20, requests_new=200, known=30)
    assert all(one.requests == 10 for one in samples(quiet, Random(1), is_new=True))
    assert verdict(quiet).outcome == "continue"
    assert verdict(changed(quiet, slower=1.4)).outcome == "abort"


def changed(one: Scenario, **changes: float) -> Scenario:
    return Scenario(**{**vars(one), **changes})


def test_a_significant_trifle_aborts_nothing() -> None:
    big = Scenario(new_sites=40, old_sites=40, requests_new=8_000, requests_old=8_000, slower=1.06)
    found = verdict(big)
    latency = found.comparisons[1]
    assert latency.p < 0.01
    assert latency.effect < RULES.min_effect
    assert found.outcome == "continue"


def test_a_deployment_that_is_not_ready_holds_up_and_is_named() -> None:
    rng = Random(1)
    new, old = samples(Scenario(), rng, is_new=True), samples(Scenario(), rng, is_new=False)
    found = compare(RULES, new, old, look=1, share=1.0, against="old", not_ready=("qwen at shop-1",))
    assert (found.outcome, found.reason) == ("inconclusive", "not_ready")
    assert all("qwen at shop-1" in sentence for sentence in found.sentence())


@pytest.mark.parametrize(
    "scenario", [Scenario(), Scenario(slower=2), Scenario(requests_new=5), Scenario(errors_new=0.3)]
)
def test_every_verdict_is_a_sentence_in_both_languages_with_its_numbers(scenario: Scenario) -> None:
    found = verdict(scenario)
    english, korean = found.sentence()
    for sentence in (english, korean):
        assert str(found.requests_new) in sentence
        assert str(found.requests_old) in sentence
        assert sentence.endswith(".")
        assert "{" not in sentence
    assert any("가" <= letter <= "힣" for letter in korean)
    assert not any("가" <= letter <= "힣" for letter in english)


# How often it errs, over whole steps with all looks.  The figures of the long form stand in the guide.


@pytest.mark.parametrize("requests", [50, 200, 1000])
def test_short_it_seldom_aborts_what_did_not_change_and_finds_what_did(requests: int) -> None:
    nothing = rates(Scenario(requests_new=requests, doc=ONE_WINDOW), 60)
    assert nothing["abort"] <= 0.05
    if requests >= 200:
        assert rates(Scenario(requests_new=requests, slower=1.3, doc=ONE_WINDOW), 40)["abort"] >= 0.85
        assert rates(Scenario(requests_new=requests, errors_new=0.06, doc=ONE_WINDOW), 40)["abort"] >= 0.6


def test_short_what_moves_by_itself_is_told_from_what_changed() -> None:
    """A single site whose load differs by 20 % from day to day looks worse every few times; that is no proof."""
    assert rates(Scenario(local=0.2, doc=ONE_WINDOW), 60)["abort"] <= 0.05
    assert rates(Scenario(local=0.1, slower=1.3, new_sites=10, doc=ONE_WINDOW), 40)["abort"] >= 0.9


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_long_false_aborts_and_power() -> None:
    """Prints the table of the guide (`pytest -s --long`)."""
    runs = 1000
    print(
        f"\n{'requests of the new':>20} {'nothing changed':>16} {'+30 % latency':>14} {'+5 points errors':>17}"
    )
    for requests in (50, 100, 200, 400, 1000):
        base = {"requests_new": requests, "doc": ONE_WINDOW}
        null = rates(Scenario(**base), runs)["abort"]  # type: ignore[arg-type]
        slower = rates(Scenario(**base, slower=1.3), runs)["abort"]  # type: ignore[arg-type]
        failing = rates(Scenario(**base, errors_new=0.06), runs)["abort"]  # type: ignore[arg-type]
        print(f"{requests:>20} {null:>16.1%} {slower:>14.1%} {failing:>17.1%}")
        # alpha is 1 %; three binomial standard errors of 1,000 runs are 0.9 points.
        assert null <= RULES.alpha + 0.0095
        if requests >= 400:
            assert min(slower, failing) >= 0.95
    for local, sites in ((0.1, 1), (0.2, 1), (0.2, 10)):
        moved = rates(Scenario(local=local, new_sites=sites, doc=ONE_WINDOW), runs)["abort"]
        print(f"sites that move by {local:.0%}, {sites} of the new: {moved:.1%}")
        assert moved <= RULES.alpha + 0.0095


def test_the_same_seed_judges_the_same() -> None:
    assert judge_step(Scenario(local=0.1), 5) == judge_step(Scenario(local=0.1), 5)
