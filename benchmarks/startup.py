"""From `ondol up` to the first answer, as a newcomer sees it."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from benchmarks.ondol import program
from benchmarks.processes import Process, free_port
from benchmarks.raw_http import Connection
from benchmarks.results import Startup
from benchmarks.target import Target

LIMIT_S = 120.0


class Edge(msgspec.Struct):
    """Where the edge listens."""

    url: str


class Up(msgspec.Struct):
    """The part of `up.json` that is needed to ask."""

    edge: Edge
    api_key: str


def startup(place: Path, times: int) -> Startup:
    """Seconds, `times` in a directory of its own, each followed by one more start in the same directory."""
    fresh, again = [], []
    for _ in range(times):
        with tempfile.TemporaryDirectory(dir=place) as name:
            directory = Path(name) / "installation"
            fresh.append(round(_once(directory, Path(name) / "first.log"), 2))
            again.append(round(_once(directory, Path(name) / "second.log"), 2))
    return Startup(fresh_s=tuple(fresh), again_s=tuple(again))


def _once(directory: Path, log: Path) -> float:
    command = [*program(), "up", "--dir", str(directory), "--no-tour", "--port", str(free_port())]
    found = directory / "up.json"
    found.unlink(missing_ok=True)  # one that an earlier run left would end the wait too early
    start = time.monotonic()
    with Process(command, log=log) as process:
        process.wait_until(found.exists, what="ondol up", timeout_s=LIMIT_S)
        up = msgspec.json.decode(found.read_bytes(), type=Up)
        target = Target(
            port=urlsplit(up.edge.url).port or 80,
            model="assistant",
            headers=(("authorization", f"Bearer {up.api_key}"),),
        )
        question = msgspec.json.encode(
            {
                "model": target.model,
                "messages": [{"role": "user", "content": "What is the capital of France?"}],
                "max_tokens": 8,
            }
        )
        process.wait_until(lambda: _answered(target, question), what="the first answer", timeout_s=LIMIT_S)
        return time.monotonic() - start


def _answered(target: Target, question: bytes) -> bool:
    try:
        with Connection(target.port) as connection:
            return connection.exchange(target.request(body=question)).status == 200
    except OSError:
        return False
