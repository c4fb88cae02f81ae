"""Is the new generation worse than the old one?  Pure: samples in, a verdict with all its numbers out.

**At the same time.**  Both generations are seen in the same window, on different sites: what changes with the hour
changes both.

**Each site by its own measure.**  Sites differ (a slow machine, a long line), and the first to change may be the slow
ones (Simpson's paradox).  So every latency is divided by the median that its own site had before the rollout, and
the mean before is taken off every score of quality.  What is left is pooled, so that quiet sites count together.
All values of a site share what is uncertain about the site, and that adds to the variance of A (below): a site that
gives the share w of a side's values adds w² times the larger of two variances.

- The median of m values is itself uncertain.  A divisor that is off by d moves A by d times the integral of f², where
  f is the density of the log-latency; the variance of a median is 1 / (4 m f(median)²).  For a symmetric density with
  one peak the integral is at most f(median), so 1 / (4 m) is a bound, whatever the spread.
- A site moves by itself: its load, its neighbours.  How much, is seen at the sites that did not change: the variance
  of their A against each other, less what chance gives (1 / (12 n) for n values), where there are five of them.

**Latency and quality**: Mann-Whitney U, one-sided, and the probability A of being worse.  Both must speak: p below
alpha, and A at least `min_effect`, so that a significant trifle aborts nothing.
**Errors**: Fisher's exact test against the others at the same time and, where enough was seen before, against the
same sites before.  Both must be significant (an intersection-union test, Berger 1982, needs no correction for that),
and the rate must have risen by `error_rate_rise` on both: a site that always failed more is not held against it.

**How often it may look.**  Looking again and again finds something in the end.  The looks are fixed beforehand, each
may spend its share of `alpha`, and the tests of a look share that (Bonferroni): the shares add up to `alpha` a step,
however much the looks depend on each other (`hub.decide.rollout.looks`).

Where nobody is left to compare with at the same time, the same sites before are; then a worse latency aborts nothing,
because it may be the hour: the verdict is inconclusive, and says so.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from statistics import fmean, median, variance
from typing import Final, NamedTuple

import msgspec

from ondol.core.catalog import Judge
from ondol.hub.decide.ranks import fisher, mann_whitney
from ondol.hub.decide.verdicts import Against, Comparison, Measure, Outcome, Reason, Verdict

SAMPLE_MAX: Final = 200
"""A site's report holds no more values than this; so a measure needs no more than these on a side."""
BASELINE_LEAST: Final = 20
"""Values from which what is usual at a site is known well enough to divide by it."""
_VALUES_MAX: Final = 20_000
"""Values a side that are compared; more sites send fewer each.  Keeps a look below some 50 ms."""
_VALUES_SHARE: Final = 0.8
_SITES_LEAST: Final = 5
_TINY_MS: Final = 0.001


class Baseline(msgspec.Struct, frozen=True, kw_only=True):
    """What was usual at a site before: counts, the median latency in ms and the mean quality, of so many values."""

    requests: int = 0
    errors: int = 0
    latency_ms: float | None = None
    latencies: int = 0
    quality: float | None = None
    qualities: int = 0


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """What one site saw under one generation in the window, and what was usual there before."""

    site: str
    requests: int
    errors: int
    latency_ms: tuple[float, ...] = ()
    quality: tuple[float, ...] = ()
    baseline: Baseline = Baseline()


class _SiteValues(NamedTuple):
    """One site: its values as measured, the same by its own measure (larger is worse), of how many that was made."""

    raw: Sequence[float]
    own: Sequence[float]
    known: int


def baseline_of(
    requests: int, errors: int, latency_ms: Sequence[float], quality: Sequence[float]
) -> Baseline:
    """What is usual at a site, from what it saw."""
    return Baseline(
        requests=requests, errors=errors,
        latency_ms=max(median(latency_ms), _TINY_MS) if latency_ms else None, latencies=len(latency_ms),
        quality=fmean(quality) if quality else None, qualities=len(quality),
    )  # fmt: skip


def compare(
    judge: Judge, new: Sequence[Sample], old: Sequence[Sample], *, look: int, share: float, against: Against,
    not_ready: tuple[str, ...] = (),
) -> Verdict:  # fmt: skip
    """The verdict of one look, which may spend `share` of the judge's alpha."""
    measures: list[Measure] = ["latency"]
    if any(one.quality for one in new) and any(one.quality for one in old):
        measures.append("quality")
    alpha = judge.alpha * share / (len(measures) + 1)
    found = [_errors(judge, new, old, alpha)]
    found += [_ranked(measure, judge, new, old, alpha=alpha) for measure in measures]
    outcome, reason = _outcome(judge, found, against, not_ready)
    return Verdict(
        outcome=outcome, reason=reason, look=look, alpha=alpha, min_requests=judge.min_requests, against=against,
        sites_new=len(new), sites_old=len(old), requests_new=found[0].n_new, requests_old=found[0].n_old,
        comparisons=tuple(found), not_ready=not_ready,
    )  # fmt: skip


def _outcome(
    judge: Judge, found: Sequence[Comparison], against: Against, not_ready: tuple[str, ...]
) -> tuple[Outcome, Reason]:
    worse = [one for one in found if one.worse]
    if any(against != "before" or one.measure == "errors" for one in worse):
        return "abort", "worse"
    if not_ready:
        return "inconclusive", "not_ready"
    if worse:
        return "inconclusive", "all_changed"
    if not all(_enough(judge, one) for one in found):
        return "inconclusive", "too_few"
    if any(one.looks_worse for one in found):
        return "inconclusive", "looks_worse"
    return "continue", "fine"


def _enough(judge: Judge, one: Comparison) -> bool:
    least = judge.min_requests if one.measure == "errors" else _least(judge)
    return min(one.n_new, one.n_old) >= least or one.measure == "quality"


def _errors(judge: Judge, new: Sequence[Sample], old: Sequence[Sample], alpha: float) -> Comparison:
    failed, n = sum(one.errors for one in new), sum(one.requests for one in new)
    failed_old, m = sum(one.errors for one in old), sum(one.requests for one in old)
    failed_before = sum(one.baseline.errors for one in new)
    n_before = sum(one.baseline.requests for one in new)
    p = fisher(failed, n, failed_old, m) if n and m else 1.0
    rate, rate_old = failed / n if n else 0.0, failed_old / m if m else 0.0
    rise, p_before = rate - rate_old, None
    if n_before >= judge.min_requests and n:
        p_before = fisher(failed, n, failed_before, n_before)
        rise = min(rise, rate - failed_before / n_before)
    is_much = rise >= max(judge.error_rate_rise, 1e-9) and min(n, m) >= judge.min_requests
    return Comparison(
        measure="errors", n_new=n, n_old=m, new=rate, old=rate_old, effect=rise, p=p, p_before=p_before,
        worse=is_much and max(p, p_before or 0.0) <= alpha, looks_worse=is_much,
    )  # fmt: skip


def _ranked(
    measure: Measure, judge: Judge, new: Sequence[Sample], old: Sequence[Sample], *, alpha: float
) -> Comparison:
    by_site = _latencies if measure == "latency" else _qualities
    ours, theirs = _thinned(by_site(new)), _thinned(by_site(old))
    x, y = [v for one in ours for v in one.own], [v for one in theirs for v in one.own]
    if not x or not y:
        return Comparison(measure=measure, n_new=len(x), n_old=len(y), new=0.0, old=0.0, effect=0.5, p=1.0)
    moves = _moves(theirs, sorted(y))
    found = mann_whitney(x, y, more_variance=_doubt(ours, moves) + _doubt(theirs, moves))
    is_much = found.a >= judge.min_effect and min(len(x), len(y)) >= _least(judge)
    typical = median if measure == "latency" else fmean
    return Comparison(
        measure=measure, n_new=len(x), n_old=len(y), new=typical([v for one in ours for v in one.raw]),
        old=typical([v for one in theirs for v in one.raw]), effect=found.a, p=found.p, u=found.u,
        ratio_new=typical(x), ratio_old=typical(y), worse=is_much and found.p <= alpha, looks_worse=is_much,
    )  # fmt: skip


def _least(judge: Judge) -> int:
    """How many values a measure needs on each side: a little less than requests, because what fails takes no time."""
    return math.ceil(_VALUES_SHARE * min(judge.min_requests, SAMPLE_MAX))


def _latencies(samples: Sequence[Sample]) -> list[_SiteValues]:
    found = []
    for one in samples:
        usual = one.baseline.latency_ms
        if usual is not None and one.latency_ms and one.baseline.latencies >= BASELINE_LEAST:
            own = [value / usual for value in one.latency_ms]
            found.append(_SiteValues(one.latency_ms, own, one.baseline.latencies))
    return found


def _qualities(samples: Sequence[Sample]) -> list[_SiteValues]:
    found = []
    for one in samples:
        usual = one.baseline.quality
        if usual is not None and one.quality and one.baseline.qualities >= BASELINE_LEAST:
            found.append(
                _SiteValues(one.quality, [usual - value for value in one.quality], one.baseline.qualities)
            )
    return found


def _thinned(sites: Sequence[_SiteValues]) -> list[_SiteValues]:
    """Fewer values of each where there are very many sites; which ones does not matter, the samples are random."""
    most = max(10, _VALUES_MAX // max(1, len(sites)))
    return [_SiteValues(one.raw[:most], one.own[:most], one.known) for one in sites]


def _moves(sites: Sequence[_SiteValues], everything: Sequence[float]) -> float:
    """The variance, on the scale of A, by which sites that did not change move by themselves; 0 where it is unknown."""
    if len(sites) < _SITES_LEAST:
        return 0.0
    total = len(everything)
    places = [
        fmean([(bisect_left(everything, v) + bisect_right(everything, v)) / 2 for v in one.own]) / total
        for one in sites
    ]
    by_chance = fmean([1 / (12 * len(one.own)) for one in sites])
    # A variance of few sites is itself uncertain: Student's distribution is wider by this factor.
    wider = (len(sites) - 1) / (len(sites) - 3)
    return max(0.0, variance(places) - by_chance) * wider


def _doubt(sites: Sequence[_SiteValues], moves: float) -> float:
    total = sum(len(one.own) for one in sites)
    return sum((len(one.own) / total) ** 2 * max(1 / (4 * one.known), moves) for one in sites)
