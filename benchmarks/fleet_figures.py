"""A figure of the fleet's benchmark: what was measured, what was wanted, and how far apart the two are."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

Say = Callable[[str], None]


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """How much of each part; times in seconds."""

    load_s: float = 6.0
    clients: int = 24
    waiting: int = 64
    slow_s: float = 8.0
    outages: int = 12
    learnt: int = 100
    vanish_s: float = 75.0
    stale_watch_s: float = 20.0
    backlog: int = 30_000
    away_s: float = 20.0
    windows: int = 6
    window_s: float = 1.5
    large_backlog: int = 250_000
    model_mb: float = 90.0
    cuts: int = 50
    ledger_s: float = 4.0
    sites: int = 1_000
    boots: int = 5


QUICK = Sizes(
    load_s=1.5, clients=4, waiting=6, slow_s=1.0, outages=1, learnt=5, vanish_s=2.0, stale_watch_s=1.0,
    backlog=2_000, away_s=0.5, windows=1, window_s=0.5, large_backlog=20_000, model_mb=4.0, cuts=4, ledger_s=0.3,
    sites=20, boots=1,
)  # fmt: skip


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the table.  `raw` are the numbers behind it, in the units that their names say."""

    name: str
    goal: str
    measured: str
    verdict: str
    raw: dict[str, float] = {}


class Report(msgspec.Struct, kw_only=True):
    """All that a run measured.  `failed` says why a part gave no figures."""

    date: str
    machine: dict[str, str | int]
    sizes: Sizes
    load_before: float
    figures: list[Figure] = []
    failed: dict[str, str] = {}


def at_most(name: str, value: float, bound: float, *, goal: str, measured: str, **raw: float) -> Figure:
    """A figure whose value shall not pass `bound`."""
    if value <= bound:
        verdict = "met"
    elif not math.isfinite(value):
        verdict = "missed: not seen"
    elif bound > 0:
        verdict = f"missed by {value / bound - 1:.0%}"
    else:
        verdict = f"missed by {value:g}"
    return Figure(name=name, goal=goal, measured=measured, verdict=verdict, raw={"value": value, **raw})


def at_least(name: str, value: float, bound: float, *, goal: str, measured: str, **raw: float) -> Figure:
    """A figure whose value shall reach `bound`, which is above 0."""
    verdict = "met" if value >= bound else f"missed by {1 - value / bound:.0%}"
    return Figure(name=name, goal=goal, measured=measured, verdict=verdict, raw={"value": value, **raw})


def p99(values: Sequence[float]) -> float:
    """The 99th percentile by nearest rank; of fewer than 100 values that is the largest."""
    return sorted(values)[math.ceil(0.99 * len(values)) - 1]


def markdown(figures: Sequence[Figure]) -> str:
    """The table, as it stands in the README."""
    lines = ["| figure | goal | measured | verdict |", "|---|---|---|---|"]
    lines += [f"| {one.name} | {one.goal} | {one.measured} | {one.verdict} |" for one in figures]
    return "\n".join(lines)


def new_folder(place: Path, name: str) -> Path:
    """A folder of its own for one part."""
    folder = place / name
    folder.mkdir()
    return folder


def since(began: float) -> float:
    """Seconds since a `time.monotonic()`."""
    return time.monotonic() - began
