"""What this machine draws and what its electricity emits: RAPL counters, CPU coefficients, grid figures.

The figures are package data (`ondol/data/*.json`), each with source and year: a newer year is a change
of data, not of code.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib.resources import files
from pathlib import Path
from typing import Final

import msgspec

from ondol.core.catalog import Grid, Power
from ondol.core.energy import CpuPower
from ondol.errors import ConfigError

POWERCAP: Final = Path("/sys/class/powercap")
CPUINFO: Final = Path("/proc/cpuinfo")


class _Architecture(msgspec.Struct, frozen=True):
    name: str
    watts_min: float
    watts_max: float
    source: str


class _X86(msgspec.Struct, frozen=True):
    vendor: str
    family: int
    models: tuple[int, ...]
    steppings: tuple[int, int] | None
    architecture: str
    exact: bool


class _Arm(msgspec.Struct, frozen=True):
    implementer: str
    part: str
    architecture: str
    exact: bool


class _CpuFile(msgspec.Struct, frozen=True):
    architectures: tuple[_Architecture, ...]
    x86: tuple[_X86, ...]
    arm: tuple[_Arm, ...]


class _GridFile(msgspec.Struct, frozen=True):
    zones: tuple[Grid, ...]


def cpu_power(stated: Power | None = None, *, cpuinfo: Path = CPUINFO) -> CpuPower:
    """Watts of one virtual CPU here: what the site's file states, else by the processor's architecture.

    The method names the architecture; `~` before it says that the nearest older one stands in, and
    `unknown` that the mean of all does (an ordinary case on ARM boards and desktops).
    """
    if stated is not None:
        return CpuPower(
            watts_min=stated.watts_min_per_cpu,
            watts_max=stated.watts_max_per_cpu,
            method="model:stated-cpu",
            source=stated.source,
        )
    table = msgspec.json.decode((files("ondol") / "data" / "cpu_power.json").read_bytes(), type=_CpuFile)
    try:
        text = cpuinfo.read_text("utf-8", "replace")
    except OSError:
        text = ""
    name, exact = _architecture(text, table)
    found = next(each for each in table.architectures if each.name == name)
    return CpuPower(
        watts_min=found.watts_min,
        watts_max=found.watts_max,
        method=f"model:ccf-cpu({'' if exact else '~'}{name})",
        source=found.source,
    )


def grids(zones: Collection[str]) -> dict[str, Grid]:
    """The figures of the zones asked for; a zone without figures is missing, never guessed.

    `WORLD` is there to be named on purpose; nothing falls back to it.
    """
    return {zone: grid for zone, grid in _all_grids().items() if zone in zones}


def grid_zones() -> list[str]:
    """Every zone that has figures, sorted, for messages that say what is allowed."""
    return sorted(_all_grids())


class RaplMeter:
    """Energy of the processor packages since the last look, from the kernel's RAPL counters.

    Reading needs root on most systems (the counters leak timing), so `open` often gives None.
    """

    def __init__(self, counters: dict[Path, int]) -> None:
        """Start from counters whose wrap-around points are known; use `open`."""
        self._wraps_at = counters
        self._last = {path: _counter(path) for path in counters}

    @classmethod
    def open(cls, root: Path = POWERCAP) -> RaplMeter | None:
        """A meter over all packages (not their sub-domains, which are parts of them), or None."""
        counters = {}
        for zone in sorted(root.glob("*-rapl:*")) if root.is_dir() else ():
            if zone.name.count(":") != 1:
                continue
            try:
                if not (zone / "name").read_text("ascii").startswith("package"):
                    continue  # psys is the whole board and would count the packages twice
                _counter(zone / "energy_uj")
                counters[zone / "energy_uj"] = _counter(zone / "max_energy_range_uj")
            except (OSError, ValueError):
                return None  # half of the packages would be half of the truth
        return cls(counters) if counters else None

    def delta_uj(self) -> int:
        """Microjoules of all packages since the last call (or since `open`).

        A counter wraps at most once between calls: at 200 W that is after more than 20 minutes.

        Raises:
            OSError, ValueError: a counter cannot be read any more.
        """
        total = 0
        for path, wraps_at in self._wraps_at.items():
            now = _counter(path)
            step = now - self._last[path]
            total += step if step >= 0 else step + wraps_at
            self._last[path] = now
        return total


def _counter(path: Path) -> int:
    return int(path.read_text("ascii"))


def _all_grids() -> dict[str, Grid]:
    data = (files("ondol") / "data" / "grid.json").read_bytes()
    try:
        zones = msgspec.json.decode(data, type=_GridFile).zones
    except msgspec.DecodeError as error:
        raise ConfigError(f"ondol/data/grid.json: {error}") from error
    return {grid.zone: grid for grid in zones}


def _architecture(cpuinfo: str, table: _CpuFile) -> tuple[str, bool]:
    first: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            first.setdefault(name.strip(), value.strip())
    for arm in table.arm:
        if (first.get("CPU implementer"), first.get("CPU part")) == (arm.implementer, arm.part):
            return arm.architecture, arm.exact
    try:
        family, model = int(first.get("cpu family", "")), int(first.get("model", ""))
        stepping = int(first.get("stepping", "0"))
    except ValueError:
        return "unknown", True
    for x86 in table.x86:
        if (x86.vendor, x86.family) != (first.get("vendor_id"), family) or model not in x86.models:
            continue
        if x86.steppings is None or x86.steppings[0] <= stepping <= x86.steppings[1]:
            return x86.architecture, x86.exact
    return "unknown", True
