"""A result as Markdown, for the README.

python -m benchmarks.report benchmarks/results/FILE.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.figures import figures
from benchmarks.results import Results, decode

ORDER = ("fixed", "nginx", "relay", "relay-own", "ondol", "portkey", "litellm")


def markdown(results: Results) -> str:
    """The goals, all contenders side by side, and where the time goes."""
    parts = (_heading, _goals, _contenders, _crowds, _costs, _missing)
    return "\n".join([line for part in parts for line in part(results)])


def _heading(results: Results) -> Iterator[str]:
    machine = results.machine
    rounds, seconds = results.settings["rounds"], results.settings["seconds"]
    yield (
        f"Measured {results.date} on {machine['cpu']}, {machine['cores']} cores that load, gateway and "
        f"upstream share; Linux {machine['kernel']}, Python {machine['python']}. "
        f"Medians of {rounds:g} rounds of {seconds:g} s, contenders in turn; ratios within a round."
    )
    yield ""


def _goals(results: Results) -> Iterator[str]:
    yield "| figure | goal | measured | verdict |"
    yield "|---|---|---|---|"
    for figure in figures(results):
        yield f"| {figure.name} | {figure.goal} | {figure.measured} | {figure.verdict} |"
    yield ""


def _contenders(results: Results) -> Iterator[str]:
    yield (
        "| contender | requests/s (least–most) | CPU µs a request | added p50 / p99 ms "
        "| first token added p50 ms | idle MB |"
    )
    yield "|---|---|---|---|---|---|"
    for name in ORDER:
        load = results.throughput.get(name) or results.cached.get(name)
        if load is None:
            continue
        per_s = f"{statistics.median(load.per_s):,.0f} ({min(load.per_s):,.0f}–{max(load.per_s):,.0f})"
        latency, token = results.latency.get(name), results.first_token.get(name)
        added = f"{latency.p50 / 1000:.2f} / {latency.p99 / 1000:.2f}" if latency else "–"
        first = f"{token.p50 / 1000:.2f}" if token else "–"
        idle = results.idle_rss_kib.get(name)
        memory = f"{idle * 1024 / 1e6:.0f}" if idle else "–"
        title = f"{name} {results.versions.get(name, '')}".strip()
        cpu = f"{statistics.median(load.cpu_us):.0f}"
        yield f"| {title} | {per_s} | {cpu} | {added} | {first} | {memory} |"
    yield ""


def _crowds(results: Results) -> Iterator[str]:
    if results.crowds:
        yield "| open streams | broken | KiB each | token delay p50 / p99 / most ms | control p99 ms |"
        yield "|---|---|---|---|---|"
    for name, crowd in sorted(results.crowds.items()):
        seen = crowd.figures
        delays = " / ".join(f"{ns / 1e6:.1f}" for ns in (seen.delay_p50, seen.delay_p99, seen.delay_max))
        control = ", ".join(f"{what} {times[1] / 1000:.1f}" for what, times in crowd.control.items())
        broken = sum(seen.broken.values())
        first = f"| {name}, {crowd.streams:,} | {broken} | {crowd.kib_per_stream:.0f} "
        yield first + f"| {delays} | {control or '–'} |"
    yield ""


def _costs(results: Results) -> Iterator[str]:
    if results.stages:
        yield "| stage | CPU µs a request |"
        yield "|---|---|"
        for stage in results.stages:
            yield f"| {stage.name} | {stage.us:.1f} |"
        yield ""
    if results.fdatasync_us:
        sync = results.fdatasync_us
        yield f"fdatasync of 4 KiB where the ledger is: p50 {sync['p50']:.0f} µs, p99 {sync['p99']:.0f} µs."
        yield ""


def _missing(results: Results) -> Iterator[str]:
    for name, reason in results.missing.items():
        yield f"- Left out: {name}: {reason}"
    yield ""


def main() -> None:
    """Print the table of a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    sys.stdout.write(markdown(decode(options.file.read_bytes())))


if __name__ == "__main__":
    main()
