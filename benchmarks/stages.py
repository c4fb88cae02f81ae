"""CPU microseconds of each stage, inside a real gateway process under a real load.

    python -m benchmarks.stages --config site.yaml --out FILE

runs `ondol run site` with a stopwatch of thread CPU time around each stage, and writes the sums when it
ends.  The stopwatch's own cost is measured and taken off.  A stage is found by its name; one that has been
renamed is said so instead of being left out in silence.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import statistics
import sys
import time
import types
from collections.abc import Callable, Coroutine, Generator
from pathlib import Path
from typing import Any

import msgspec

AROUND = "app and pipeline, between the stages"
"""Measured with all that they call on the event loop, which is then taken off."""
APART = ("engine: connection events", "ledger: commit, in its thread, a record")
"""Not called by the application: the event loop and another thread do."""
STAGES: tuple[tuple[str, str, str], ...] = (
    (AROUND, "ondol.gateway.app", "App.__rsgi__"),
    ("guard: head", "ondol.wire.guard", "HeadGuard.check"),
    ("guard: JSON depth", "ondol.wire.guard", "json_depth_ok"),
    ("authenticate", "ondol.gateway.identity", "Authenticator.principal"),
    ("parse the request", "ondol.wire.openai", "parse_request"),
    ("parse the hints", "ondol.gateway.hints", "parse_hints"),
    ("classify", "ondol.gateway.classify", "classify"),
    ("admit: limits of key and team", "ondol.gateway.policy", "admit"),
    ("schedule: snapshots of the endpoints", "ondol.gateway.endpoints", "Endpoint.candidate"),
    ("schedule: what the budget can pay", "ondol.gateway.budget", "Budgets.can_afford"),
    ("schedule: filter, score, pick", "ondol.gateway.schedule", "schedule"),
    ("reserve", "ondol.gateway.budget", "Budgets.reserve"),
    ("engine: the coroutine that asks", "ondol.engines.upstream", "UpstreamEngine.complete"),
    ("engine: connection events", "ondol.net.http1", "Connection.data_received"),
    ("meter: the attempt, and what it teaches", "ondol.gateway.endpoints", "Running.end"),
    ("meter: sums", "ondol.gateway.meter", "totals"),
    ("meter: the record", "ondol.gateway.meter", "record_of"),
    ("meter: settle the budget", "ondol.gateway.budget", "Budgets.settle"),
    ("meter: correct the limits", "ondol.gateway.quota", "Quotas.correct"),
    ("metrics", "ondol.adapters.observe", "Metrics.finished"),
    ("ledger: encode and queue", "ondol.adapters.ledger", "SqliteLedger._enqueue"),
    ("ledger: commit, in its thread, a record", "ondol.adapters.ledger_writer", "LedgerWriter._commit"),
    ("reply: where it ran", "ondol.gateway.reply", "place_headers"),
    ("reply: what it took", "ondol.gateway.reply", "took_headers"),
    ("reply: rate limits", "ondol.gateway.quota", "rate_headers"),
)
"""Label, the module that defines it, and its name there."""
COUNTED = "authenticate"
"""Called once a request: what all sums are divided by."""


class Sums(msgspec.Struct, frozen=True, kw_only=True):
    """What an instrumented process measured, in nanoseconds; `overhead_ns` is what measuring took."""

    requests: int
    spent_ns: dict[str, int]
    overhead_ns: int
    unknown: tuple[str, ...]


class Stopwatch:
    """Adds up the thread CPU time of a function."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.calls = 0
        self.steps = 0
        self.spent_ns = 0

    @property
    def readings(self) -> int:
        """How often the clock was read twice."""
        return self.steps or self.calls

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed; of a coroutine every step is, and what it waits for is not."""
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def stepped(*arguments: Any, **named: Any) -> Any:
                self.calls += 1
                return await self._steps(function(*arguments, **named))

            return stepped

        @functools.wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.thread_time_ns()
            try:
                return function(*arguments, **named)
            finally:
                self.spent_ns += time.thread_time_ns() - start
                self.calls += 1

        return timed

    @types.coroutine
    def _steps(self, work: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
        step, value = work.send, None
        while True:
            start = time.thread_time_ns()
            try:
                awaited = step(value)
            except StopIteration as end:
                return end.value
            finally:
                self.spent_ns += time.thread_time_ns() - start
                self.steps += 1
            try:
                step, value = work.send, (yield awaited)
            except BaseException as error:
                step, value = work.throw, error


def instrument() -> tuple[dict[str, Stopwatch], tuple[str, ...]]:
    """Put a stopwatch around every stage that is there; the others' labels come second."""
    importlib.import_module("ondol.gateway.supervisor")  # so that every module which uses a stage is loaded
    ours = [module for name, module in sys.modules.items() if name.startswith("ondol.")]
    watches: dict[str, Stopwatch] = {}
    unknown = []
    for label, module_name, name in STAGES:
        owner: Any = importlib.import_module(module_name)
        *path, last = name.split(".")
        for part in path:
            owner = getattr(owner, part, None)
        function = getattr(owner, last, None)
        if function is None:
            unknown.append(f"{label} ({module_name}.{name})")
            continue
        watches[label] = Stopwatch()
        timed = watches[label].around(function)
        # A function is called by the name that its users imported, a method by that of its class.
        for holder in (owner,) if path else ours:
            if getattr(holder, last, None) is function:
                setattr(holder, last, timed)
    return watches, tuple(unknown)


def own_cost_ns() -> tuple[float, float]:
    """What a stopwatch around nothing reads, and what it takes in all, a call: medians."""
    read, taken = [], []
    for _ in range(20):
        watch = Stopwatch()
        nothing = watch.around(lambda: None)
        start = time.thread_time_ns()
        for _ in range(500):
            nothing()
        taken.append((time.thread_time_ns() - start) / watch.calls)
        read.append(watch.spent_ns / watch.calls)
    return statistics.median(read), statistics.median(taken)


def summed(watches: dict[str, Stopwatch], unknown: tuple[str, ...], cost: tuple[float, float]) -> Sums:
    """The sums without what the stopwatches cost, and `AROUND` without what it calls."""
    read, taken = cost
    spent = {label: watch.spent_ns - watch.readings * read for label, watch in watches.items()}
    if AROUND in spent:
        for label, watch in watches.items():
            if label not in (AROUND, *APART):
                spent[AROUND] -= spent[label] + watch.readings * taken
    return Sums(
        requests=watches[COUNTED].calls,
        spent_ns={label: max(0, round(ns)) for label, ns in spent.items()},
        overhead_ns=round(sum(watch.readings for watch in watches.values()) * taken),
        unknown=unknown,
    )


def main() -> None:
    """Run the instrumented gateway until it is told to stop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    cost = own_cost_ns()
    watches, unknown = instrument()
    sys.argv = ["ondol", "run", "site", "--config", str(options.config)]
    entry = importlib.import_module("ondol.cli").main
    try:
        entry()
    finally:
        options.out.write_bytes(msgspec.json.encode(summed(watches, unknown, cost)))


if __name__ == "__main__":
    main()
