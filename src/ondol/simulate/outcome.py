"""What a run comes to: times, cost, carbon, hits and violations, over all requests."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from ondol.simulate.fleet import FleetModel, Limits, Place, usd_rates
from ondol.simulate.workload import Workload
from ondol.simulate.world import CACHED, REFUSED, Run

Floats = np.ndarray[Any, np.dtype[np.float64]]
_J_PER_KWH = 3.6e6
_MS_PER_HOUR = 3_600_000


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """One policy's figures.  Times are as the caller sees them, over the requests that were answered; None is unknown.

    `hit_rate` is the share answered from the exact cache, `prefix_hit_rate` that of prompt blocks held by engines.
    `violations` counts requests that were refused, or later than the limits on first token or whole.
    `gap_to_optimum` is cost over the optimum's (or its stated lower bound) less one.
    """

    policy: str
    requests: int
    ttft_ms_p50: float | None
    ttft_ms_p95: float | None
    total_ms_mean: float | None
    total_ms_p95: float | None
    cost_usd: float | None
    carbon_g: float | None
    hit_rate: float | None
    violations: int | None
    gap_to_optimum: float | None = None
    prefix_hit_rate: float | None = None
    network_ms_p50: float | None = None
    refused: int | None = None
    places: dict[str, int] = {}


class Times(msgspec.Struct, frozen=True):
    """Milliseconds by request, as the caller sees them: infinite where refused."""

    first: Floats
    total: Floats
    network: Floats


def times_of(workload: Workload, run: Run) -> Times:
    """First token, whole answer, and the share of both that is the network's."""
    arrived, access = np.array(workload.times), np.array(workload.access_ms)
    taken = np.array(run.option)
    prompts = np.array(workload.trace.prompts, dtype=float)
    network = access.copy()
    options = workload.fleet.options
    if options:
        rtt = np.array([option.rtt_ms for option in options])
        per_token = np.array([option.ms_per_token for option in options])
        served = taken >= 0
        network[served] += rtt[taken[served]] + prompts[served] * per_token[taken[served]]
    return Times(np.array(run.first) - arrived + access, np.array(run.end) - arrived + access, network)


def outcome(name: str, workload: Workload, run: Run, limits: Limits) -> Outcome:
    """The figures of a run."""
    times, taken = times_of(workload, run), np.array(run.option)
    answered = taken != REFUSED
    first, total = times.first[answered], times.total[answered]
    late = (times.first > limits.first_token_ms) | (times.total > limits.total_ms)
    cacheable = workload.trace.contents is not None and any(door.route.cache for door in workload.fleet.doors)
    return Outcome(
        policy=name, requests=len(workload), ttft_ms_p50=_quantile(first, 0.5), ttft_ms_p95=_quantile(first, 0.95),
        total_ms_mean=float(total.mean()) if total.size else None, total_ms_p95=_quantile(total, 0.95),
        cost_usd=_sum(costs_of(workload, run)), carbon_g=_sum(carbon_of(workload, run)),
        hit_rate=float((taken == CACHED).mean()) if cacheable else None, violations=int(late.sum()),
        prefix_hit_rate=run.hits / run.looked if run.looked else None,
        network_ms_p50=_quantile(times.network[answered], 0.5), refused=int((~answered).sum()),
        places=_places(workload, taken),
    )  # fmt: skip


def costs_of(workload: Workload, run: Run) -> Floats:
    """USD by request; NaN where a place has no price, 0 where nothing was computed."""
    options, taken = workload.fleet.options, np.array(run.option)
    served = taken >= 0
    rates = np.array(
        [_rates(option.usd_per_token, workload.fleet.places[option.place]) for option in options]
    )
    mine = rates.reshape(-1, 4)[taken[served]]
    prompts = np.array(workload.trace.prompts, dtype=float)[served]
    outputs = np.array(workload.trace.outputs, dtype=float)[served]
    cached = np.array(run.cached, dtype=float)[served]
    costs = np.zeros(len(workload))
    costs[served] = mine[:, 0] + (prompts - cached) * mine[:, 1] + cached * mine[:, 2] + outputs * mine[:, 3]
    return costs


def _rates(moved: float, place: Place) -> tuple[float, float, float, float]:
    """A request, a prompt token, a cached one, an output token, each with its way."""
    if place.usd is None:
        return (np.nan,) * 4
    request, given, cached, written = usd_rates(place.usd)
    return request, given + moved, cached + moved, written + moved


def carbon_of(workload: Workload, run: Run) -> Floats:
    """Grams of CO2-equivalent by request; NaN where energy or grid is unknown."""
    fleet, taken = workload.fleet, np.array(run.option)
    grams = np.zeros(len(workload))
    outputs, arrived = np.array(workload.trace.outputs, dtype=float), np.array(workload.times)
    place_of = np.array([option.place for option in fleet.options], dtype=int)
    places = np.full(len(workload), -1)
    places[taken >= 0] = place_of[taken[taken >= 0]]
    took = np.array(run.end) - arrived
    for number, place in enumerate(fleet.places):
        here = places == number
        if not here.any():
            continue
        if place.hours is None or (place.joules_per_token is None and place.watts is None):
            grams[here] = np.nan
            continue
        if place.joules_per_token is not None:
            joules = place.joules_per_token * outputs[here]
        else:
            joules = (place.watts or 0.0) * run.busy_ms[number] / 1000 * took[here] / took[here].sum()
        hours = np.array(place.hours)
        grams[here] = joules * hours[(arrived[here] // _MS_PER_HOUR).astype(int) % len(hours)] / _J_PER_KWH
    return grams


def _places(workload: Workload, taken: np.ndarray[Any, Any]) -> dict[str, int]:
    """How many requests each place served."""
    counts: dict[str, int] = {}
    numbers, amounts = np.unique(taken[taken >= 0], return_counts=True)
    for number, amount in zip(numbers.tolist(), amounts.tolist(), strict=True):
        name = _name(workload.fleet, number)
        counts[name] = counts.get(name, 0) + amount
    return dict(sorted(counts.items()))


def _name(fleet: FleetModel, option: int) -> str:
    return fleet.places[fleet.options[option].place].name


def _sum(values: Floats) -> float | None:
    total = float(values.sum())
    return None if np.isnan(total) else total


def _quantile(values: Floats, q: float) -> float | None:
    return float(np.quantile(values, q)) if values.size else None
