"""Load without streams: wrk with one thread, a fixed number of connections and a bounded time."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import msgspec

from benchmarks.processes import StartFailed
from benchmarks.target import Target

SCRIPT = Path(__file__).with_name("post.lua")


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What one run of wrk saw.  `refused` are answers of 4xx and 5xx, `broken` are socket errors."""

    requests: int
    duration_us: int
    refused: int
    broken: int
    p50_us: int
    p99_us: int

    @property
    def per_s(self) -> float:
        """Good answers a second."""
        return max(self.requests - self.refused, 0) * 1e6 / self.duration_us if self.duration_us else 0.0


def load(target: Target, *, connections: int, seconds: float) -> Load:
    """Load `target` and return the figures.

    Raises:
        StartFailed: wrk is missing, or gave no figures.
    """
    program = shutil.which("wrk")
    if program is None:
        raise StartFailed("wrk is not installed (Debian and Ubuntu: apt-get install wrk)")
    with tempfile.NamedTemporaryFile(suffix=".json") as body:
        body.write(target.body())
        body.flush()
        headers = "\n".join(f"{name}: {value}" for name, value in target.headers)
        done = subprocess.run(
            [program, "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "10s"]
            + ["-s", str(SCRIPT), target.url],
            env={"BENCH_BODY": body.name, "BENCH_HEADERS": headers},
            capture_output=True,
            text=True,
            timeout=seconds + 30,
            check=False,
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise StartFailed(f"wrk gave no figures: {(done.stderr or done.stdout).strip()[-300:]}")
    return msgspec.json.decode(lines[-1], type=Load)
