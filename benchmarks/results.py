"""The raw result of a run, as it is kept in `results/`."""

from __future__ import annotations

import msgspec

from benchmarks.measures import Added, Crowd, Throughput


class Startup(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds from `ondol up` in a new directory to the first answer, and again in the same one."""

    fresh_s: tuple[float, ...]
    again_s: tuple[float, ...]


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """CPU microseconds a request of one stage, inside a loaded gateway."""

    name: str
    us: float


class Results(msgspec.Struct, kw_only=True):
    """Everything that a run measured; what it could not is missing, with the reason in `missing`."""

    date: str
    machine: dict[str, str | int]
    settings: dict[str, float]
    versions: dict[str, str] = {}
    missing: dict[str, str] = {}
    throughput: dict[str, Throughput] = {}
    latency: dict[str, Added] = {}
    first_token: dict[str, Added] = {}
    cached: dict[str, Throughput] = {}
    crowds: dict[str, Crowd] = {}
    idle_rss_kib: dict[str, int] = {}
    startup: Startup | None = None
    stages: tuple[Stage, ...] = ()
    fdatasync_us: dict[str, float] = {}


def encode(results: Results) -> bytes:
    """Readable JSON."""
    return msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n"


def decode(data: bytes) -> Results:
    """The result of a file.

    Raises:
        msgspec.ValidationError: the file is not one of ours.
    """
    return msgspec.json.decode(data, type=Results)
