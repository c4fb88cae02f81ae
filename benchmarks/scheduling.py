"""What one scheduling decision takes, by the number of endpoints: p50 and p99 in µs.

    python -m benchmarks.scheduling

Endpoints with random figures, all able to serve; every objective in turn.
"""

from __future__ import annotations

import random
import sys
import time

from ondol.core.inference import DataClass, Objective, Task
from ondol.gateway.schedule import Candidate, Wish, schedule

TIMES = 3000
GOAL_US = {64: 150.0}


def candidates(count: int, dice: random.Random) -> list[Candidate]:
    """Endpoints that could all answer."""
    return [
        Candidate(
            name=f"p{number}", site="here", local=True, task=Task.CHAT, capabilities=frozenset(), context_tokens=1000,
            parallel=4, queue=4, in_flight=dice.randrange(6), ttft_ms=dice.uniform(5, 500),
            total_ms=dice.uniform(20, 900), cost=dice.random(), carbon_g=dice.random(), quality=dice.random(),
        )
        for number in range(count)
    ]  # fmt: skip


def measured(count: int) -> tuple[float, float]:
    """The 50th and 99th percentile of one decision among so many, in µs."""
    dice, taken = random.Random(1), []
    objectives = list(Objective)
    fleets = [candidates(count, dice) for _ in range(30)]
    for number in range(TIMES):
        able = fleets[number % len(fleets)]
        wish = Wish(
            task=Task.CHAT, needs=frozenset(), tokens_max=200, prompt_tokens=100,
            objective=objectives[number % len(objectives)], data_class=DataClass.INTERNAL, remaining_ms=1000.0,
        )  # fmt: skip
        began = time.perf_counter()
        schedule(wish, able)
        taken.append(1e6 * (time.perf_counter() - began))
    taken.sort()
    return taken[TIMES // 2], taken[int(TIMES * 0.99)]


def main() -> int:
    """Measure and print."""
    for count in (2, 8, 64):
        p50, p99 = measured(count)
        goal = GOAL_US.get(count)
        verdict = "" if goal is None else f" (goal ≤ {goal:.0f}: {'met' if p99 <= goal else 'missed'})"
        print(f"{count:3} endpoints: p50 {p50:.0f} µs, p99 {p99:.0f} µs{verdict}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
