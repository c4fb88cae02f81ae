"""The figures of a fleet: drain, dead links, boots without a network, models over a bad line, a thousand sites.

    python -m benchmarks.fleet                 all of it, some seven minutes; prints a table, writes benchmarks/results/
    python -m benchmarks.fleet --quick         a look at everything; its numbers mean little; writes nothing
    python -m benchmarks.fleet --only drain    one part (may be given again)
    python -m benchmarks.fleet --json FILE     where to write the raw figures

Real hubs and real sites, each its own process on 127.0.0.1; what a thousand sites do is done by one process over real
TLS connections.  Everything that is started here is ended here.
"""

from __future__ import annotations

import argparse
import datetime
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.markdown import Markdown

from benchmarks import fleet_crowd, fleet_failover, fleet_ledger, fleet_link, fleet_takeover
from benchmarks.contenders import ROOT
from benchmarks.fleet_figures import QUICK, Figure, Report, Say, Sizes, markdown, new_folder
from benchmarks.machine import machine

PARTS: dict[str, Callable[[Path, Sizes, Say], list[Figure]]] = {
    "killed": fleet_failover.killed, "refused": fleet_failover.refused, "vanished": fleet_failover.vanished,
    "takeover": fleet_takeover.takeover, "silence": fleet_link.silence, "drain": fleet_link.drain,
    "beside": fleet_link.beside, "models": fleet_crowd.models,
    "ledger": fleet_ledger.ledger, "crowd": fleet_crowd.crowd, "boot": fleet_link.boot,
}  # fmt: skip


def run(place: Path, sizes: Sizes, parts: Sequence[str], say: Say) -> Report:
    """Do the parts, each in a new folder below `place`; one that fails is noted, and the rest goes on."""
    report = Report(
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"), machine=machine(), sizes=sizes,
        load_before=os.getloadavg()[0],
    )  # fmt: skip
    for name in parts:
        say(name)

        def step(text: str, name: str = name) -> None:
            say(f"{name}: {text}")

        try:
            report.figures += PARTS[name](new_folder(place, name), sizes, step)
        except Exception as error:  # whatever it was: the other figures shall not be lost with it
            report.failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[-400:]}"
    return report


def main() -> int:
    """Read the command line, run, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--only", action="append", choices=tuple(PARTS), help="this part (may be given again)"
    )
    parser.add_argument("--json", type=Path, help="where to write the raw figures")
    parser.add_argument("--quick", action="store_true", help="a look at everything; numbers mean little")
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a thousand sites have two connections each
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` ends what was started
    console = Console()
    cache = ROOT / ".cache" / "bench"
    cache.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=cache, prefix="fleet-") as place,
        console.status("starting") as status,
    ):
        report = run(
            Path(place), QUICK if options.quick else Sizes(), options.only or list(PARTS), status.update
        )
    show(report, console)
    target = options.json or (None if options.quick or options.only else _default_file(report))
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
        console.print(f"raw figures: {target}", markup=False)
    return 1 if report.failed else 0


def show(report: Report, console: Console) -> None:
    """Print the table: drawn on a terminal, as Markdown into a file or a pipe."""
    table = markdown(report.figures)
    if console.is_terminal:
        console.print(Markdown(table))
    else:
        print(table)
    for name, why in report.failed.items():
        console.print(f"{name} gave no figures: {why}", markup=False, soft_wrap=True)


def _default_file(report: Report) -> Path:
    return ROOT / "benchmarks" / "results" / f"{report.date}-{os.cpu_count()}-cores-fleet.json"


if __name__ == "__main__":
    sys.exit(main())
