"""A client of its own process for what wrk cannot see: small latencies, first tokens, control requests.

It reads one job as JSON on standard input and writes the figures as JSON.  A sample through a gateway is
followed by one that goes direct, so that both see the same machine.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from benchmarks.raw_http import Connection
from benchmarks.target import Target

STAMP = re.compile(rb'"content": ?"(\d{6,}) ')


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure.

    `kind` is latency (targets[0] through, targets[1] direct), first_token (the same, streamed), or control
    (each target in turn every `interval_s` for `seconds`).
    """

    kind: str
    targets: tuple[Target, ...]
    prompt: str = ""
    samples: int = 0
    warm_up: int = 0
    seconds: float = 0.0
    interval_s: float = 0.02


class Samples(msgspec.Struct, kw_only=True):
    """Nanoseconds, one a sample.  `delays` are per token of a stream, sent to received."""

    times: list[int] = []
    delays: list[int] = []
    failed: int = 0


def probe(job: Job) -> list[Samples]:
    """Run a job in a process of its own; one result a target.

    Raises:
        RuntimeError: the client failed; the message has its last lines.
    """
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.probe"],
        input=msgspec.json.encode(job),
        capture_output=True,
        cwd=Path(__file__).parent.parent,
        timeout=600,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the probe failed: {done.stderr.decode(errors='replace').strip()[-400:]}")
    return msgspec.json.decode(done.stdout, type=list[Samples])


def measure_latency(job: Job) -> list[Samples]:
    """The time from the first byte sent to the last received, on one kept-alive connection a target."""
    results = [Samples() for _ in job.targets]
    requests = [target.request() for target in job.targets]
    connections = [Connection(target.port) for target in job.targets]
    for index in range(job.warm_up + job.samples):
        for result, request, connection in zip(results, requests, connections, strict=True):
            start = time.perf_counter_ns()
            reply = connection.exchange(request)
            taken = time.perf_counter_ns() - start
            if reply.status != 200:
                result.failed += 1
            elif index >= job.warm_up:
                result.times.append(taken)
    for connection in connections:
        connection.close()
    return results


def measure_first_token(job: Job) -> list[Samples]:
    """The time from sending to the first token, on a fresh connection that is already open; token delays."""
    results = [Samples() for _ in job.targets]
    requests = [target.request(job.prompt, stream=True) for target in job.targets]
    for index in range(job.warm_up + job.samples):
        for result, request, target in zip(results, requests, job.targets, strict=True):
            scratch = Samples() if index < job.warm_up else result
            _one_stream(target, request, scratch)
    return results


def _one_stream(target: Target, request: bytes, result: Samples) -> None:
    seen = b""
    first_ns: int | None = None
    with Connection(target.port) as connection:
        start = time.monotonic_ns()
        for now_ns, data in connection.pieces(request):
            seen += data
            stamps = STAMP.findall(seen)
            if stamps:
                if first_ns is None:
                    first_ns = now_ns - start
                result.delays.extend(now_ns - int(stamp) for stamp in stamps)
                seen = seen[seen.rfind(stamps[-1]) + len(stamps[-1]) :]
    if first_ns is None or b"[DONE]" not in seen:
        result.failed += 1
    else:
        result.times.append(first_ns)


def measure_control(job: Job) -> list[Samples]:
    """The time of small requests at a steady beat, while something else loads the server."""
    results = [Samples() for _ in job.targets]
    requests = [target.request() for target in job.targets]
    connections = [Connection(target.port) for target in job.targets]
    end_ns = time.perf_counter_ns() + int(job.seconds * 1e9)
    turn = 0
    while time.perf_counter_ns() < end_ns:
        which = turn % len(job.targets)
        turn += 1
        start = time.perf_counter_ns()
        reply = connections[which].exchange(requests[which])
        results[which].times.append(time.perf_counter_ns() - start)
        results[which].failed += reply.status != 200
        time.sleep(job.interval_s)
    for connection in connections:
        connection.close()
    return results


KINDS = {"latency": measure_latency, "first_token": measure_first_token, "control": measure_control}


if __name__ == "__main__":
    asked = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    sys.stdout.buffer.write(msgspec.json.encode(KINDS[asked.kind](asked)))
