"""Made-up fleets under a rollout: what each site's requests were like, so that it is known what the judge must find."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from ondol.core.catalog import Judge, RolloutDoc
from ondol.hub.decide.judge import Sample, baseline_of, compare
from ondol.hub.decide.rollout import looks
from ondol.hub.decide.verdicts import Verdict


@dataclass
class Scenario:
    """`requests` of every look's end at each side, in all; a site's speed differs by `hardware` (log sd).

    `local` is how much a site's latency moves by itself between before and now (log sd): its load, its neighbours.
    """

    new_sites: int = 1
    old_sites: int = 20
    requests_new: int = 200
    requests_old: int = 2_000
    spread: float = 0.4
    hardware: float = 0.5
    slower: float = 1.0
    errors: float = 0.01
    errors_new: float = 0.01
    hour: float = 1.0
    local: float = 0.0
    known: int = 200
    slow_canaries: float = 1.0
    doc: RolloutDoc = field(default_factory=lambda: RolloutDoc(name="r", bake_s=600.0, judge=Judge()))


def samples(one: Scenario, rng: Random, *, is_new: bool) -> list[Sample]:
    """What the sites of one side saw by the end of the step, and before it."""
    found = []
    count = one.new_sites if is_new else one.old_sites
    each = (one.requests_new if is_new else one.requests_old) // count
    for at in range(count):
        usual = 200.0 * rng.lognormvariate(0, one.hardware) * (one.slow_canaries if is_new else 1.0)
        now = usual * one.hour * rng.lognormvariate(0, one.local) * (one.slower if is_new else 1.0)
        rate = one.errors_new if is_new else one.errors
        failed = sum(rng.random() < rate for _ in range(each))
        before = [usual * rng.lognormvariate(0, one.spread) for _ in range(one.known)]
        failed_before = sum(rng.random() < one.errors for _ in range(10 * one.known))
        found.append(
            Sample(
                site=f"{'new' if is_new else 'old'}-{at}", requests=each, errors=failed,
                latency_ms=tuple([now * rng.lognormvariate(0, one.spread) for _ in range(each - failed)]),
                baseline=baseline_of(10 * one.known, failed_before, before, ()),
            )
        )  # fmt: skip
    return found


def _part(sample: Sample, share: float) -> Sample:
    """The same site at an earlier look: its first requests.  Errors fall evenly over them."""
    requests = int(sample.requests * share)
    errors = round(sample.errors * share)
    return Sample(
        site=sample.site, requests=requests, errors=errors,
        latency_ms=sample.latency_ms[: requests - errors][:200], baseline=sample.baseline,
    )  # fmt: skip


def judge_step(one: Scenario, seed: int) -> Verdict:
    """A whole step under the fixed looks: the first look that decides, else the last.  All requests come evenly."""
    rng = Random(seed)
    new, old = samples(one, rng, is_new=True), samples(one, rng, is_new=False)
    plan = looks(one.doc)
    for number, look in enumerate(plan, 1):
        share = look.after_s / plan[-1].after_s
        verdict = compare(
            one.doc.judge, [_part(each, share) for each in new], [_part(each, share) for each in old], look=number,
            share=look.share, against="old",
        )  # fmt: skip
        if verdict.outcome == "abort" or (verdict.outcome == "continue" and look.baked):
            break
    return verdict


def rates(one: Scenario, runs: int) -> dict[str, float]:
    """How often each outcome is the end of the step."""
    outcomes = [judge_step(one, seed).outcome for seed in range(runs)]
    return {name: outcomes.count(name) / runs for name in ("continue", "abort", "inconclusive")}
