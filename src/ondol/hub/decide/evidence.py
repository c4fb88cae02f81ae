"""What a look of the judge rests on: the reports of the sites, cut to what was seen since the step began.  Pure.

A site's figures count from when its generation began.  So the counts of every site are kept when a step begins, and
taken off: what is compared was seen in the same time, on both sides.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final, Protocol

import msgspec

from ondol.hub.decide.judge import Baseline, Sample, baseline_of
from ondol.hub.decide.rollout import Facts
from ondol.hub.decide.verdicts import Against
from ondol.wire.sync import Figures, Report

_WHY: Final = 300


class Staged(Protocol):
    """What must be known of a rollout: its number, the order of its sites, and how many have it after each step."""

    @property
    def id(self) -> int:
        """The generation."""

    @property
    def sites(self) -> tuple[str, ...]:
        """In the order in which they get it."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many have it after each step."""

    @property
    def step(self) -> int:
        """The present step, from 0."""


class Before(msgspec.Struct, frozen=True, kw_only=True):
    """What a site had seen: the counts of `generation` when the step began, and what is usual there.

    `baseline` is of before the rollout; of before the last step, where that compares with sites that changed earlier.
    `unready` are the deployments that were not ready then.
    """

    generation: int = 0
    requests: int = 0
    errors: int = 0
    baseline: Baseline = Baseline()
    unready: tuple[str, ...] = ()


def facts_of(
    one: Staged, here: Collection[str], everybody: Mapping[str, Report], known: Mapping[str, Before]
) -> Facts:
    """What is known at a look: `here` are the sites that are not away, `known` is what was kept when the step began."""
    reports = {name: report for name, report in everybody.items() if name in here}
    turn, later = one.sites[: one.sizes[one.step]], one.sites[one.sizes[one.step] :]
    reached = [name for name in turn if name in reports and reports[name].generation >= one.id]
    refused = [
        f"{name}: {reports[name].refused[:_WHY]}"
        for name in turn
        if name in reports and reports[name].refused and reports[name].refused_generation == one.id
    ]
    against, new, old = _sides(one, reports, known, reached=reached, later=later)
    return Facts(
        reached=len(reached),
        away=sum(1 for name in turn if name not in here),
        refused=tuple(refused),
        not_ready=tuple([each for name in reached for each in _not_ready(name, reports[name], known)]),
        new=tuple(new),
        old=tuple(old),
        against=against,
    )


def _sides(
    one: Staged, reports: Mapping[str, Report], known: Mapping[str, Before], *, reached: Sequence[str],
    later: Sequence[str],
) -> tuple[Against, list[Sample], list[Sample]]:  # fmt: skip
    """With whom to compare: the old generation, else sites that changed earlier, else what was before."""
    new = [_since(name, _new(one, reports[name]), known) for name in reached]
    if later:
        old = [_since(name, _old(one, reports[name]), known) for name in later if name in reports]
        return "old", new, [each for each in old if each.requests]
    earlier = set(one.sites[: one.sizes[one.step - 1]] if one.step else ())
    if earlier:
        old = [each for each in new if each.site in earlier]
        return "earlier", [each for each in new if each.site not in earlier], old
    # Nobody else is left: the figures of the generation before, at the same sites, and what is usual by them.
    pairs = [(name, _old(one, reports[name])) for name in reached]
    usual = {
        name: Before() if figures is None else Before(baseline=_usual(figures)) for name, figures in pairs
    }
    old = [_since(name, figures, usual) for name, figures in pairs]
    return "before", [msgspec.structs.replace(each, baseline=usual[each.site].baseline) for each in new], old


def _new(one: Staged, report: Report) -> Figures | None:
    return next((each for each in reversed(report.figures) if each.generation >= one.id), None)


def _old(one: Staged, report: Report) -> Figures | None:
    return next((each for each in reversed(report.figures) if each.generation < one.id), None)


def _since(site: str, figures: Figures | None, known: Mapping[str, Before]) -> Sample:
    """What a site saw since the step began: its figures, less what they were then."""
    before = known.get(site, Before())
    if figures is None:
        return Sample(site=site, requests=0, errors=0, baseline=before.baseline)
    less = before
    if figures.generation != before.generation or figures.requests < before.requests:
        less = Before()  # counted from nothing: another generation, or the site's process began anew
    return Sample(
        site=site, requests=figures.requests - less.requests, errors=max(0, figures.errors - less.errors),
        latency_ms=_later(figures.latency_ms, figures.latency_at, less.requests),
        quality=_later(figures.quality, figures.quality_at, less.requests), baseline=before.baseline,
    )  # fmt: skip


def _later(values: tuple[float, ...], at: tuple[int, ...], after: int) -> tuple[float, ...]:
    """The values of requests after that number; all of them after none."""
    if not after:
        return values
    return tuple([value for value, number in zip(values, at, strict=False) if number > after])


def before_of(report: Report, kept: Before | None) -> Before:
    """What is kept of a site when a step begins: its counts of now; what is usual stays as it is in `kept`."""
    if not report.figures:
        return kept or Before(generation=report.generation, unready=_unready(report))
    last = report.figures[-1]
    return Before(
        generation=last.generation, requests=last.requests, errors=last.errors,
        baseline=_usual(last) if kept is None else kept.baseline,
        unready=_unready(report) if kept is None else kept.unready,
    )  # fmt: skip


def _usual(figures: Figures) -> Baseline:
    return baseline_of(figures.requests, figures.errors, figures.latency_ms, figures.quality)


def _unready(report: Report) -> tuple[str, ...]:
    return tuple([one.name for one in report.deployments if not one.ready])


def _not_ready(site: str, report: Report, known: Mapping[str, Before]) -> list[str]:
    before = known.get(site)
    if before is None:
        return []
    return [f"{name} at {site}" for name in _unready(report) if name not in before.unready]
