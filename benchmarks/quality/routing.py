"""Cost of our online routing over the clairvoyant optimum, on public traces and the three worked fleets.

    python -m benchmarks.quality.routing --data DIR [--json] [--load 0.35] [--windows 5] [--seed 1]

Each trace is stretched in time so that its mean work is `--load` of what the fleet's own engines can do (the factor is
printed), and comes in by all doors of the fleet, evenly.  Windows of 200 requests are measured each from idle engines,
with gateways that have learnt from the 1,000 requests before the first window and from the windows since, against a
mixed-integer programme (HiGHS, 0.5 %; its proven bound counts).  The whole trace is measured from gateways that know
nothing, against the lower bound of `ondol.simulate.optimum`.  Limits are the fleet's; a policy is held when at least
99 % of its requests are within both.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.quality.traces import traces
from ondol.cli.simulation_fleet import fleet_model
from ondol.simulate.bound_terms import terms_of
from ondol.simulate.fleet import FleetModel, Limits
from ondol.simulate.lagrangian import LATE_SHARE, lagrangian
from ondol.simulate.optimum import windowed
from ondol.simulate.outcome import outcome
from ondol.simulate.policies import POLICIES, Ours
from ondol.simulate.stages import Gateway
from ondol.simulate.trace import Trace, TraceError
from ondol.simulate.workload import lay
from ondol.simulate.world import run

FLEETS = Path(__file__).resolve().parent.parent.parent / "examples/fleets"
NAMES = ("retail", "telecom", "global")
WINDOW = 200
WARM = 1_000
GOAL = 0.05


def main() -> int:
    """Measure and print; 0 also where data is absent."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--load", type=float, default=0.35)
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    fleets = {name: fleet_model(FLEETS / name) for name in NAMES}
    rows: list[dict[str, Any]] = []
    for name, trace in traces(args.data, args.seed):
        if isinstance(trace, str):
            print(f"{name}: skipped, {trace}", file=sys.stderr)
            continue
        for fleet_name, fleet in fleets.items():
            row = {"trace": name, "fleet": fleet_name, **measured(trace, fleet, args)}
            rows.append(row)
            if not args.json:
                _print(row, first=len(rows) == 1)
    if args.json:
        print(json.dumps(rows, indent=2))
    return 0


def measured(trace: Trace, fleet: FleetModel, args: argparse.Namespace) -> dict[str, Any]:
    """One row: the windows against the optimum, the whole against the bound."""
    try:
        stretched, factor = _stretched(trace, fleet, args.load, args.seed)
    except TraceError as error:
        return {"skipped": error.message}
    limits = fleet.setting.limits
    return {
        "requests": len(trace), "stretch": factor, "load": args.load,
        "windows": _windows(stretched, fleet, limits, args), "whole": _whole(stretched, fleet, limits, args.seed),
    }  # fmt: skip


def _stretched(trace: Trace, fleet: FleetModel, load: float, seed: int) -> tuple[Trace, float]:
    """The trace with times scaled so that its mean work is `load` of the fleet's own engines, and the factor."""
    terms = terms_of(lay(trace, fleet, seed=seed), fleet.setting.limits)
    own = np.array([not place.service.elastic for place in fleet.places])
    need = np.where(terms.in_time, np.maximum(terms.reading, terms.work), np.nan)[:, own]
    fits = ~np.isnan(need).all(axis=1)
    busy_ms = float(np.nanmean(need[fits], axis=1).sum()) / own.sum()
    span_ms = (trace.times[-1] - trace.times[0]) * 1000
    factor = busy_ms / span_ms / load
    return msgspec.structs.replace(trace, times=[time * factor for time in trace.times]), factor


def _windows(trace: Trace, fleet: FleetModel, limits: Limits, args: argparse.Namespace) -> dict[str, Any]:
    gateways: dict[str, Gateway] = {}
    warm = lay(trace.part(0, WARM), fleet, seed=args.seed)
    run(warm, Ours(warm, limits, gateways=gateways))
    cost = dict.fromkeys(POLICIES, 0.0)
    missed = dict.fromkeys(POLICIES, 0)
    bound = 0.0
    starts = np.linspace(WARM, len(trace) - WINDOW, args.windows).astype(int).tolist()
    for start in starts:
        work = lay(trace.part(start, start + WINDOW), fleet, seed=args.seed)
        bound += windowed(work, terms_of(work, limits), int(WINDOW * LATE_SHARE)).bound_usd
        for name, make in POLICIES.items():
            policy = Ours(work, limits, gateways=gateways) if name == "ours" else make(work, limits)
            one = outcome(name, work, run(work, policy), limits)
            cost[name] += one.cost_usd or 0.0
            missed[name] += one.violations or 0
    return {
        name: _figures(cost[name] / bound - 1, missed[name] / (WINDOW * len(starts))) for name in POLICIES
    }


def _whole(trace: Trace, fleet: FleetModel, limits: Limits, seed: int) -> dict[str, Any]:
    work = lay(trace, fleet, seed=seed)
    bound = lagrangian(terms_of(work, limits), limits, int(len(trace) * LATE_SHARE))
    found = {}
    for name, make in POLICIES.items():
        one = outcome(name, work, run(work, make(work, limits)), limits)
        found[name] = _figures((one.cost_usd or 0.0) / bound - 1, (one.violations or 0) / len(trace))
    return found


def _figures(gap: float, missed: float) -> dict[str, Any]:
    return {"gap": round(gap, 4), "within": round(1 - missed, 4), "held": missed <= LATE_SHARE}


def _print(row: dict[str, Any], *, first: bool) -> None:
    if first:
        print(
            "cost over the optimum (windows of 200) and over the lower bound (whole trace); ! not within the limits"
        )
        print(
            f"{'trace':11} {'fleet':8} {'stretch':>7} {'part':8}"
            + "".join(f"{name:>13}" for name in POLICIES)
        )
    if "skipped" in row:
        print(f"{row['trace']:11} {row['fleet']:8} skipped: {row['skipped']}")
        return
    for part in ("windows", "whole"):
        cells = "".join(
            f"{one['gap'] * 100:>11.1f}%{' ' if one['held'] else '!'}" for one in row[part].values()
        )
        ours = row[part]["ours"]
        verdict = (
            ""
            if part == "whole"
            else "  goal met"
            if ours["gap"] <= GOAL and ours["held"]
            else "  goal missed"
        )
        print(
            f"{row['trace']:11} {row['fleet']:8} {row['stretch']:7.2f} {part:8}{cells}{verdict}", flush=True
        )


if __name__ == "__main__":
    sys.exit(main())
