"""Policies side by side on one workload, with the optimum that they are measured against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import numpy as np

from ondol.simulate.fleet import Limits
from ondol.simulate.lagrangian import LATE_SHARE
from ondol.simulate.optimum import Optimum, optimum
from ondol.simulate.outcome import Outcome, Times, outcome, times_of
from ondol.simulate.policies import POLICIES, Fixed
from ondol.simulate.workload import Workload
from ondol.simulate.world import run

OPTIMUM: Final = "optimum"
NAMES: Final = (*POLICIES, OPTIMUM)
_POINTS: Final = 101

Progress = Callable[[str, int], None]
"""Called with the policy that runs and how many requests have come in."""


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """The outcomes in the order asked for; quantiles of first token and whole (0 to 100 %), by policy."""

    outcomes: tuple[Outcome, ...]
    first_ms: dict[str, list[float]]
    total_ms: dict[str, list[float]]
    limits: Limits
    method: str | None


def compare(workload: Workload, names: Sequence[str], progress: Progress | None = None) -> Compared:
    """Run the policies, and measure each against the optimum."""
    limits = workload.fleet.setting.limits
    best = optimum(workload, limits)
    found: list[Outcome] = []
    first: dict[str, list[float]] = {}
    total: dict[str, list[float]] = {}
    for name in names:
        if name == OPTIMUM:
            found.append(_ideal(workload, best, limits))
            continue
        policy = POLICIES[name](workload, limits)
        seen = None if progress is None else _told(progress, name)
        result = run(workload, policy, seen)
        times = times_of(workload, result)
        first[name], total[name] = _quantiles(times)
        found.append(_measured(outcome(name, workload, result, limits), best))
    return Compared(
        outcomes=tuple(found), first_ms=first, total_ms=total, limits=limits,
        method=None if best is None else best.method,
    )  # fmt: skip


def _told(progress: Progress, name: str) -> Callable[[int], None]:
    return lambda count: progress(name, count)


def _measured(one: Outcome, best: Optimum | None) -> Outcome:
    if best is None or one.cost_usd is None or best.bound_usd <= 0:
        return one
    return msgspec.structs.replace(one, gap_to_optimum=one.cost_usd / best.bound_usd - 1)


def _ideal(workload: Workload, best: Optimum | None, limits: Limits) -> Outcome:
    """The optimum's row: its cost is the proven bound, its times those of its plan where that keeps the limits."""
    blank = Outcome(
        policy=OPTIMUM, requests=len(workload), ttft_ms_p50=None, ttft_ms_p95=None, total_ms_mean=None,
        total_ms_p95=None, cost_usd=None if best is None else best.bound_usd, carbon_g=None, hit_rate=None,
        violations=None, gap_to_optimum=None if best is None else 0.0,
    )  # fmt: skip
    if best is None or best.plan is None:
        return blank
    played = outcome(OPTIMUM, workload, run(workload, Fixed(workload, best.plan)), limits)
    if (played.violations or 0) > len(workload) * LATE_SHARE:
        return blank
    return msgspec.structs.replace(played, cost_usd=best.bound_usd, gap_to_optimum=0.0)


def _quantiles(times: Times) -> tuple[list[float], list[float]]:
    points = np.linspace(0, 1, _POINTS)
    both = []
    for values in (times.first, times.total):
        seen = values[np.isfinite(values)]
        both.append(np.quantile(seen, points).tolist() if seen.size else [])
    return both[0], both[1]
