"""How many requests a second the simulator plays: four endpoints, one policy, one core.

    python -m benchmarks.simulator [--requests 200000] [--json]

Seeded Poisson traffic at 12 requests a second on a shop, its neighbour, a regional machine and a vendor; processor time
of the run alone, the trace and the workload made before.
"""

from __future__ import annotations

import argparse
import json
import sys
from time import process_time

from ondol.core.catalog import DeploymentDoc, ModelDoc, RouteDoc, SiteDoc
from ondol.core.fields import Tier
from ondol.core.fleet import Fleet
from ondol.core.inference import Objective
from ondol.core.money import Price
from ondol.simulate.fleet import FleetModel, Known, Setting, model_of
from ondol.simulate.generate import Law, made
from ondol.simulate.policies import POLICIES
from ondol.simulate.service import Service
from ondol.simulate.workload import lay
from ondol.simulate.world import run

GOAL = 20_000
PLACES: tuple[tuple[str, Tier, float, int], ...] = (
    ("shop", "edge", 0, 10), ("neighbour", "edge", 5, 20), ("region", "pop", 15, 50), ("vendor", "cloud", 40, 150),
)  # fmt: skip
"""Name, tier, RTT in ms, and USD a thousand million tokens."""


def four() -> FleetModel:
    """The fleet of four endpoints."""
    service = Service(
        prefill_tokens_per_s=8000, step_ms=15, step_ms_per_sequence=0.3, decode_while_prefill=0.5, slots=64,
        source="a round figure",
    )  # fmt: skip
    elastic = Service(
        prefill_tokens_per_s=40_000, step_ms=12, elastic=True, overhead_ms=300, source="a round figure"
    )
    sites = {
        name: SiteDoc(name=name, tier=tier, region="kr", country="KR", grid_zone="KR", rtt_ms=rtt)
        for name, tier, rtt, _ in PLACES
    }
    deployments = {
        f"on-{name}": DeploymentDoc(
            name=f"on-{name}", site=name, model="m", engine="upstream", url=f"https://{name}.test/v1", price=name,
            parallel=None if tier == "cloud" else 64,
        )
        for name, tier, _, _ in PLACES
    }  # fmt: skip
    prices = {
        name: Price(id=name, currency="USD", input=rate * 10**6, output=rate * 4 * 10**6)
        for name, _, _, rate in PLACES
    }
    services = {f"on-{name}": elastic if tier == "cloud" else service for name, tier, _, _ in PLACES}
    route = RouteDoc(name="ask", deployments=tuple(deployments), objective=Objective.CHEAP)
    return model_of(
        Fleet(sites=sites, models={"m": ModelDoc(name="m")}, deployments=deployments, routes={"ask": route}),
        Known(prices=prices, exchange={}, grids={"KR": 400.0}),
        Setting(services=services, entries=("shop",)),
    )


def main() -> int:
    """Measure each policy and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    work = lay(made(Law(requests=args.requests, rate=12.0), 1), four())
    found = {}
    for name, make in POLICIES.items():
        policy = make(work, work.fleet.setting.limits)
        began = process_time()
        run(work, policy)
        found[name] = round(args.requests / (process_time() - began))
        if not args.json:
            print(f"{name:12} {found[name]:>9,} requests/s")
    if args.json:
        print(json.dumps({"requests": args.requests, "goal": GOAL, "requests_per_s": found}))
    else:
        print(f"ours: goal {GOAL:,} requests/s {'met' if found['ours'] >= GOAL else 'missed'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
