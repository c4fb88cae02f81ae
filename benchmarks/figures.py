"""The goals, and what a result says about each of them.  Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import msgspec

from benchmarks.measures import Added, Crowd, ratio
from benchmarks.results import Results

US = "ondol"


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the table.  `verdict` is met, missed by how much, or why there is none."""

    name: str
    goal: str
    measured: str
    verdict: str


def figures(results: Results, subject: str = US) -> list[Figure]:
    """The table of the goals, in their order."""
    return [
        *_throughput(results, subject),
        *_latency(results, subject),
        _cached(results, subject),
        *_first_token(results, subject),
        *_crowd(results, subject),
        _idle(results, subject),
        _startup(results),
    ]


def _at_least(value: float, goal: float) -> str:
    return "met" if value >= goal else f"missed by {(1 - value / goal) * 100:.0f} %"


def _at_most(value: float, goal: float) -> str:
    return "met" if value <= goal else f"missed by {(value / goal - 1) * 100:.0f} %"


def _absent(results: Results, name: str, goal: str, *needed: str) -> Figure:
    without = [one for one in needed if one in results.missing]
    verdict = f"{' and '.join(without)} did not run, see below" if without else "not measured in this run"
    return Figure(name=name, goal=goal, measured="–", verdict=verdict)


def _throughput(results: Results, subject: str) -> Iterator[Figure]:
    goals: tuple[tuple[str, str, float | None], ...] = (
        ("relay", "the bare relay", 0.4),
        ("nginx", "nginx", None),
        ("portkey", "Portkey", 4.0),
        ("litellm", "LiteLLM", 50.0),
    )
    mine = results.throughput.get(subject)
    for other, title, goal in goals:
        name = f"throughput, 32 connections, against {title}"
        wanted = "printed" if goal is None else f"≥ {goal:g} ×"
        theirs = results.throughput.get(other)
        if mine is None or theirs is None:
            yield _absent(results, name, wanted, subject, other)
            continue
        value = ratio(mine, theirs)
        per_s = f"{statistics.median(mine.per_s):,.0f} to {statistics.median(theirs.per_s):,.0f} /s"
        verdict = "–" if goal is None else _at_least(value, goal)
        if mine.refused or mine.broken:
            verdict += f" ({mine.refused} refused, {mine.broken} broken)"
        yield Figure(name=name, goal=wanted, measured=f"{value:.2f} × ({per_s})", verdict=verdict)


def _latency(results: Results, subject: str) -> Iterator[Figure]:
    added = results.latency.get(subject)
    for quantile, goal in (("p50", 0.8), ("p99", 3.0)):
        name, wanted = f"added latency, 1 connection, {quantile}", f"≤ {goal:g} ms"
        if added is None:
            yield _absent(results, name, wanted, subject)
            continue
        yield _added(name, added, quantile, goal)


def _added(name: str, added: Added, quantile: str, goal: float) -> Figure:
    value = (added.p50 if quantile == "p50" else added.p99) / 1000
    verdict = _at_most(value, goal) + (f" ({added.failed} failed)" if added.failed else "")
    return Figure(name=name, goal=f"≤ {goal:g} ms", measured=f"{value:.2f} ms", verdict=verdict)


def _cached(results: Results, subject: str) -> Figure:
    name, goal = "exact-cache hits, against a fixed answer of the same server", 0.2
    mine, fixed = results.cached.get(subject), results.cached.get("fixed")
    if mine is None or fixed is None:
        return _absent(results, name, f"≥ {goal:g} ×", subject, "fixed")
    value = ratio(mine, fixed)
    per_s = f"{statistics.median(mine.per_s):,.0f} to {statistics.median(fixed.per_s):,.0f} /s"
    return Figure(
        name=name, goal=f"≥ {goal:g} ×", measured=f"{value:.2f} × ({per_s})", verdict=_at_least(value, goal)
    )


def _first_token(results: Results, subject: str) -> Iterator[Figure]:
    added = results.first_token.get(subject)
    name = "stream: time to first token added, p50"
    if added is None:
        yield _absent(results, name, "≤ 1 ms", subject)
    else:
        yield _added(name, added, "p50", 1.0)
    name, goal = "stream: tokens held back until the next was sent", "0"
    if added is None:
        yield _absent(results, name, goal, subject)
    else:
        verdict = "met" if added.held_back == 0 else f"missed: {added.held_back}"
        yield Figure(name=name, goal=goal, measured=str(added.held_back), verdict=verdict)


def _crowd(results: Results, subject: str) -> Iterator[Figure]:
    crowd = results.crowds.get(subject)
    title = f"{crowd.streams:,} open streams" if crowd is not None else "2,000 open streams"
    names = ("broken", "tokens held back", "memory of each", "a control request's p99")
    goals = ("0", "0", "≤ 100 KiB", "≤ 50 ms")
    if crowd is None:
        for name, goal in zip(names, goals, strict=True):
            yield _absent(results, f"{title}: {name}", goal, subject)
        return
    seen = crowd.figures
    broken = sum(seen.broken.values())
    worst = max((times[1] for times in crowd.control.values()), default=0.0) / 1000
    share = f"{seen.held_back} of {seen.tokens:,}"
    measured = (str(broken), share, f"{crowd.kib_per_stream:.0f} KiB", _control(crowd))
    failed = f" ({crowd.control_failed} failed)" if crowd.control_failed else ""
    verdicts = (
        "met" if broken == 0 else f"missed: {seen.broken}",
        "met" if seen.held_back == 0 else f"missed: {seen.held_back}",
        _at_most(crowd.kib_per_stream, 100),
        _at_most(worst, 50) + failed,
    )
    for name, goal, text, verdict in zip(names, goals, measured, verdicts, strict=True):
        yield Figure(name=f"{title}: {name}", goal=goal, measured=text, verdict=verdict)


def _control(crowd: Crowd) -> str:
    return ", ".join(f"{name} {times[1] / 1000:.1f} ms" for name, times in crowd.control.items())


def _idle(results: Results, subject: str) -> Figure:
    name, goal = "memory of an idle gateway, children not counted", 120.0
    kib = results.idle_rss_kib.get(subject)
    if kib is None:
        return _absent(results, name, f"≤ {goal:g} MB", subject)
    value = kib * 1024 / 1e6
    return Figure(name=name, goal=f"≤ {goal:g} MB", measured=f"{value:.0f} MB", verdict=_at_most(value, goal))


def _startup(results: Results) -> Figure:
    name, goal = "from `ondol up` to the first answer, installed", 6.0
    if results.startup is None or not results.startup.fresh_s:
        return _absent(results, name, f"≤ {goal:g} s", "up")
    value = statistics.median(results.startup.fresh_s)
    again = statistics.median(results.startup.again_s) if results.startup.again_s else value
    return Figure(
        name=name,
        goal=f"≤ {goal:g} s",
        measured=f"{value:.1f} s in a new directory, {again:.1f} s again",
        verdict=_at_most(value, goal),
    )
