"""Run the benchmarks: every contender in its own process, in front of the same upstreams, in one go.

    python -m benchmarks.run                      all of it, some 5 minutes; writes benchmarks/results/
    python -m benchmarks.run --quick              a look at everything in about a minute; writes nothing
    python -m benchmarks.run --only throughput --only crowd

Parts: throughput, latency, cached, first-token, crowd, startup, stages.  Loads are bounded in time and
count, and go to 127.0.0.1 only.  Everything that is started here is ended here, by its process id.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import resource
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
from rich.console import Console
from rich.markdown import Markdown

from benchmarks import contenders, measures, nginx, wrk
from benchmarks.contenders import ROOT, Contender, Upstreams
from benchmarks.disk import fdatasync_us
from benchmarks.machine import machine
from benchmarks.ondol import start_instrumented, start_ondol
from benchmarks.processes import Process, StartFailed, free_port
from benchmarks.report import markdown
from benchmarks.results import Results, Stage, encode
from benchmarks.stages import Sums
from benchmarks.startup import startup
from benchmarks.target import Target

PARTS = ("throughput", "latency", "cached", "first-token", "crowd", "startup", "stages")
STARTS: dict[str, Callable[[Path, Upstreams], Contender]] = {
    "relay": contenders.start_relay,
    "relay-own": contenders.start_own_relay,
    "nginx": contenders.start_nginx,
    "ondol": start_ondol,
    "portkey": contenders.start_portkey,
    "litellm": contenders.start_litellm,
    "fixed": contenders.start_fixed,
}
CROWDS = ("relay", "relay-own", "nginx", "ondol")
"""Who gets the open streams: the others would need minutes for what these do in seconds."""
SETTLE_S = 2.0


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How much of each load."""

    seconds: float = 5.0
    rounds: int = 3
    samples: int = 1500
    slow_samples: int = 300
    token_samples: int = 100
    streams: int = 2000
    stream_seconds: float = 20.0
    startups: int = 3


QUICK = Settings(
    seconds=1.0, rounds=1, samples=100, slow_samples=30, token_samples=10, streams=100, stream_seconds=4.0,
    startups=1,
)  # fmt: skip
SLOW = ("litellm", "portkey")


class Bench:
    """One run: owns the contenders that are up, and the result as it grows."""

    def __init__(self, place: Path, settings: Settings, status: Callable[[str], None]) -> None:
        """`place` is a new directory on the disk of the repository."""
        self._place = place
        self._settings = settings
        self._say = status
        self._up: dict[str, Contender] = {}
        self.results = Results(
            date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            machine=machine(),
            settings={name: float(getattr(settings, name)) for name in settings.__struct_fields__},
        )

    @contextlib.contextmanager
    def upstreams(self) -> Iterator[Upstreams]:
        """The instant and the paced upstream, running."""
        ports = Upstreams(free_port(), free_port(), free_port())
        command = [sys.executable, "-m", "benchmarks.paced_upstream", "--port", str(ports.paced)]
        with (
            nginx.instant_upstream(self._place / "upstream", [ports.instant, ports.idle]) as instant,
            Process(command, log=self._place / "paced.log", cwd=ROOT) as paced,
        ):
            for process, port in ((instant, ports.instant), (paced, ports.paced)):
                target = Target(port=port)
                process.wait_until(lambda: contenders.answers(target), what="an upstream", timeout_s=15.0)  # noqa: B023
            yield ports

    def start(self, names: list[str], ports: Upstreams) -> None:
        """Start the contenders; who fails is noted with the reason and left out."""
        for name in names:
            self._say(f"starting {name}")
            try:
                contender = STARTS[name](self._place, ports)
            except StartFailed as error:
                self.results.missing[name] = " ".join(str(error).split())
                continue
            self._up[name] = contender
            if contender.version:
                self.results.versions[name] = contender.version
        time.sleep(SETTLE_S)
        self.results.idle_rss_kib = {name: one.process.rss_kib() for name, one in self._up.items()}

    def end(self) -> None:
        """End every contender."""
        for contender in self._up.values():
            contender.process.end()
        self._up.clear()

    def throughput(self) -> None:
        """32 connections, not streamed."""
        loaded = [(name, one, one.chat) for name, one in self._up.items() if name != "fixed"]
        self.results.throughput = measures.throughput(
            loaded, rounds=self._settings.rounds, seconds=self._settings.seconds, say=self._say
        )

    def cached(self) -> None:
        """Hits of the exact cache, beside the same server with a fixed answer."""
        loaded = [(name, one, one.cached or one.chat) for name, one in self._up.items()]
        loaded = [one for one in loaded if one[0] in ("ondol", "fixed")]
        self.results.cached = measures.throughput(
            loaded, rounds=self._settings.rounds, seconds=self._settings.seconds, say=self._say
        )

    def latency(self, ports: Upstreams) -> None:
        """What one connection pays."""
        for name, one in self._up.items():
            samples = self._settings.slow_samples if name in SLOW else self._settings.samples
            if name != "fixed":
                self.results.latency |= measures.added_latency(
                    [(name, one.chat)], Target(port=ports.instant), samples=samples, say=self._say
                )

    def first_token(self, ports: Upstreams) -> None:
        """What one stream pays before its first token."""
        direct = Target(port=ports.paced)
        for name, one in self._up.items():
            if one.stream is None:
                continue
            problem = contenders.stream_problem(one)
            if problem is not None:
                self.results.missing[f"{name}, streams"] = problem
                continue
            self.results.first_token |= measures.first_token(
                [(name, one.stream)], direct, samples=self._settings.token_samples, say=self._say
            )

    def crowd(self) -> None:
        """Many open streams through one process."""
        for name in CROWDS:
            one = self._up.get(name)
            if one is None or f"{name}, streams" in self.results.missing:
                continue
            self.results.crowds[name] = measures.crowd(
                one,
                streams=self._settings.streams,
                seconds=self._settings.stream_seconds,
                say=self._say,
            )

    def startup(self) -> None:
        """From `ondol up` to the first answer."""
        self._say("ondol up, to the first answer")
        try:
            self.results.startup = startup(self._place, self._settings.startups)
        except StartFailed as error:
            self.results.missing["up"] = " ".join(str(error).split())

    def disk(self) -> None:
        """What a durable write costs on this disk."""
        self._say("fdatasync")
        taken = fdatasync_us(self._place)
        self.results.fdatasync_us = {
            "p50": round(statistics.median(taken), 1),
            "p99": round(taken[int(len(taken) * 0.99)], 1),
        }

    def stages(self, ports: Upstreams) -> None:
        """Where the CPU time of a request goes, by stopwatches inside a gateway of its own."""
        self._say("CPU time of the stages")
        out = self._place / "stages.json"
        try:
            contender = start_instrumented(self._place, ports, out)
        except StartFailed as error:
            self.results.missing["stages"] = " ".join(str(error).split())
            return
        try:
            before = contender.process.cpu_us()
            load = wrk.load(contender.chat, connections=measures.CONNECTIONS, seconds=self._settings.seconds)
            whole_us = (contender.process.cpu_us() - before) / max(load.requests, 1)
        finally:
            contender.process.end()
        sums = msgspec.json.decode(out.read_bytes(), type=Sums)
        stages = [
            Stage(name=name, us=round(spent / sums.requests / 1000, 2))
            for name, spent in sums.spent_ns.items()
        ]
        whole_us -= sums.overhead_ns / sums.requests / 1000
        known_us = sum(stage.us for stage in stages)
        rest_us = round(whole_us - known_us, 2)
        stages.append(Stage(name="server, event loop, threads and the rest", us=rest_us))
        stages.append(Stage(name="the whole process", us=round(whole_us, 2)))
        self.results.stages = tuple(stages)
        if sums.unknown:
            self.results.missing["stages"] = "not found by name: " + ", ".join(sums.unknown)


def run(
    place: Path, settings: Settings, parts: list[str], names: list[str], say: Callable[[str], None]
) -> Results:
    """Do the parts with the contenders of `names`, all processes in `place`."""
    bench = Bench(place, settings, say)
    results = bench.results
    if "stages" in parts:
        bench.disk()
    if "startup" in parts and "ondol" in names:
        bench.startup()
    if not set(parts) - {"startup"}:
        return results
    with bench.upstreams() as ports:
        if "stages" in parts and "ondol" in names:
            bench.stages(ports)
        if not set(parts) - {"startup", "stages"}:
            return results
        try:
            bench.start(names, ports)
            if "first-token" in parts or "crowd" in parts:
                bench.first_token(ports)
            if "crowd" in parts:
                bench.crowd()
            if "latency" in parts:
                bench.latency(ports)
            if "throughput" in parts:
                bench.throughput()
            if "cached" in parts:
                bench.cached()
        finally:
            bench.end()
    return results


def show(results: Results, console: Console) -> None:
    """Print the tables."""
    console.print(Markdown(markdown(results)))


def main() -> int:
    """Read the command line, run, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", action="append", choices=PARTS, help="this part (may be given again)")
    parser.add_argument("--contender", action="append", choices=tuple(STARTS), help="only these")
    parser.add_argument("--seconds", type=float, help="of each load with wrk")
    parser.add_argument("--json", type=Path, help="where to write the raw result")
    parser.add_argument("--quick", action="store_true", help="a look in about a minute; numbers mean little")
    options = parser.parse_args()
    settings = QUICK if options.quick else Settings()
    if options.seconds is not None:
        settings = msgspec.structs.replace(settings, seconds=min(max(options.seconds, 1.0), 60.0))
    parts = options.only or list(PARTS)
    names = options.contender or list(STARTS)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` ends what was started
    console = Console()
    cache = ROOT / ".cache" / "bench"
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="run-") as place, console.status("starting") as status:
        results = run(Path(place), settings, parts, names, lambda text: status.update(text))
    show(results, console)
    whole = not (options.quick or options.only or options.contender)
    target = options.json or (_default_file(results) if whole else None)
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(encode(results))
        console.print(f"raw figures: {target}", markup=False)
    return 0


def _default_file(results: Results) -> Path:
    return ROOT / "benchmarks" / "results" / f"{results.date}-{os.cpu_count()}-cores.json"


if __name__ == "__main__":
    sys.exit(main())
