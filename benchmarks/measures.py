"""The measurements.  Each takes running contenders and gives raw figures; `figures` judges them."""

from __future__ import annotations

import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from benchmarks import wrk
from benchmarks.contenders import Contender
from benchmarks.open_streams import StreamFigures, StreamJob
from benchmarks.probe import Job, Samples, probe
from benchmarks.target import Target

ROOT = Path(__file__).resolve().parent.parent
CONNECTIONS = 32
Say = Callable[[str], None]


class Throughput(msgspec.Struct, kw_only=True):
    """Requests a second a round, CPU microseconds a request, and what went wrong."""

    per_s: list[float] = []
    cpu_us: list[float] = []
    p50_us: list[int] = []
    p99_us: list[int] = []
    refused: int = 0
    broken: int = 0


class Added(msgspec.Struct, frozen=True, kw_only=True):
    """Microseconds through a gateway and direct, in the same moments."""

    through_p50: float
    through_p99: float
    direct_p50: float
    direct_p99: float
    samples: int
    failed: int
    held_back: int = 0

    @property
    def p50(self) -> float:
        """Added at the median."""
        return self.through_p50 - self.direct_p50

    @property
    def p99(self) -> float:
        """The difference of the two 99th percentiles."""
        return self.through_p99 - self.direct_p99


class Crowd(msgspec.Struct, kw_only=True):
    """Many open streams through one process, and control requests beside them (microseconds)."""

    streams: int
    figures: StreamFigures
    rss_before_kib: int
    rss_peak_kib: int
    control: dict[str, list[float]]
    control_failed: int

    @property
    def kib_per_stream(self) -> float:
        """The rise of resident memory a stream."""
        return (self.rss_peak_kib - self.rss_before_kib) / self.streams


def throughput(
    contenders: Sequence[tuple[str, Contender, Target]], *, rounds: int, seconds: float, say: Say
) -> dict[str, Throughput]:
    """32 connections, the contenders in turn: A B C, A B C."""
    results = {name: Throughput() for name, _, _ in contenders}
    for turn in range(rounds):
        for name, contender, target in contenders:
            say(f"throughput, round {turn + 1} of {rounds}: {name}")
            wrk.load(target, connections=CONNECTIONS, seconds=1.0)  # warm up
            before = contender.process.cpu_us()
            load = wrk.load(target, connections=CONNECTIONS, seconds=seconds)
            spent = contender.process.cpu_us() - before
            result = results[name]
            result.per_s.append(round(load.per_s, 1))
            result.cpu_us.append(round(spent / max(load.requests, 1), 1))
            result.p50_us.append(load.p50_us)
            result.p99_us.append(load.p99_us)
            result.refused += load.refused
            result.broken += load.broken
    return results


def ratio(mine: Throughput, other: Throughput) -> float:
    """How many times as many requests as `other`: the median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(mine.per_s, other.per_s, strict=True) if b)


def added_latency(
    contenders: Sequence[tuple[str, Target]], direct: Target, *, samples: int, say: Say
) -> dict[str, Added]:
    """One connection, not streamed: through the gateway and direct, turn by turn."""
    results = {}
    for name, target in contenders:
        say(f"added latency: {name}")
        job = Job(kind="latency", targets=(target, direct), samples=samples, warm_up=max(20, samples // 10))
        results[name] = _added(probe(job))
    return results


def first_token(
    contenders: Sequence[tuple[str, Target]], direct: Target, *, samples: int, say: Say
) -> dict[str, Added]:
    """One stream at a time: the time to the first token through the gateway and direct."""
    results = {}
    rate = 100.0
    for name, target in contenders:
        say(f"first token: {name}")
        prompt = f"rate={rate:g} tokens=4"
        targets = (target, direct)
        job = Job(kind="first_token", targets=targets, prompt=prompt, samples=samples, warm_up=5)
        results[name] = _added(probe(job), interval_ns=1e9 / rate)
    return results


def _added(pair: list[Samples], interval_ns: float = 0.0) -> Added:
    through, direct = pair
    held_back = sum(delay > interval_ns for delay in through.delays) if interval_ns else 0
    return Added(
        through_p50=_at(through.times, 0.5) / 1000,
        through_p99=_at(through.times, 0.99) / 1000,
        direct_p50=_at(direct.times, 0.5) / 1000,
        direct_p99=_at(direct.times, 0.99) / 1000,
        samples=len(through.times),
        failed=through.failed + direct.failed,
        held_back=held_back,
    )


def crowd(contender: Contender, *, streams: int, seconds: float, say: Say) -> Crowd:
    """`streams` open streams of 5 tokens a second for `seconds` after the last has opened."""
    assert contender.stream is not None
    say(f"{streams} open streams: {contender.name}")
    rate, opened_per_s = 5.0, 400.0
    tokens = round(rate * (streams / opened_per_s + seconds))
    job = StreamJob(
        target=contender.stream, streams=streams, rate=rate, tokens=tokens, opened_per_s=opened_per_s
    )
    small = msgspec.structs.replace(job, streams=min(20, streams), tokens=3)
    _open_streams(small)  # warm up: what the first streams allocate is not the price of a stream
    named = {"healthz": contender.health, "cached request": contender.cached}
    targets = {name: target for name, target in named.items() if target is not None}
    before = peak = contender.process.rss_kib()
    box: list[StreamFigures] = []
    worker = threading.Thread(target=lambda: box.append(_open_streams(job)))
    worker.start()
    time.sleep(streams / opened_per_s + 1.0)
    beside: list[Samples] = []
    job_beside = Job(kind="control", targets=tuple(targets.values()), seconds=max(seconds - 3.0, 1.0))
    control = threading.Thread(target=lambda: beside.extend(probe(job_beside)))
    if targets:
        control.start()
    while worker.is_alive():
        peak = max(peak, contender.process.rss_kib())
        worker.join(0.25)
    if targets:
        control.join()
    if not box:
        raise RuntimeError("the client of the open streams failed; its error is above")
    return Crowd(
        streams=streams,
        figures=box[0],
        rss_before_kib=before,
        rss_peak_kib=peak,
        control={
            name: [round(_at(one.times, q) / 1000, 1) for q in (0.5, 0.99, 1.0)]
            for name, one in zip(targets, beside, strict=False)
        },
        control_failed=sum(one.failed for one in beside),
    )


def _open_streams(job: StreamJob) -> StreamFigures:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.open_streams"],
        input=msgspec.json.encode(job),
        capture_output=True,
        cwd=ROOT,
        timeout=600,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"open streams: {done.stderr.decode(errors='replace').strip()[-400:]}")
    return msgspec.json.decode(done.stdout, type=StreamFigures)


def _at(values: list[int], quantile: float) -> int:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))] if ordered else 0
