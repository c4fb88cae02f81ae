"""Parsers of what the kernel says, on made-up trees, and the shipped figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from ondol.adapters.power import RaplMeter, cpu_power, grid_zones, grids
from ondol.core.catalog import Power

MILAN = "vendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: x\nstepping\t: 1\n"


def _package(root: Path, zone: str, name: str, energy_uj: int, wraps_at: int = 1_000) -> Path:
    folder = root / zone
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    (folder / "max_energy_range_uj").write_text(f"{wraps_at}\n")
    return folder / "energy_uj"


def test_packages_are_added_and_their_parts_are_not(tmp_path: Path) -> None:
    first = _package(tmp_path, "intel-rapl:0", "package-0", 100)
    second = _package(tmp_path, "intel-rapl:1", "package-1", 200)
    _package(tmp_path, "intel-rapl:0:0", "core", 50)
    psys = _package(tmp_path, "intel-rapl:2", "psys", 900)
    meter = RaplMeter.open(tmp_path)
    assert meter is not None

    first.write_text("130\n")
    second.write_text("205\n")
    psys.write_text("950\n")

    assert meter.delta_uj() == 35
    assert meter.delta_uj() == 0


def test_a_counter_that_wraps_goes_on(tmp_path: Path) -> None:
    counter = _package(tmp_path, "intel-rapl:0", "package-0", 990)
    meter = RaplMeter.open(tmp_path)
    assert meter is not None

    counter.write_text("15\n")

    assert meter.delta_uj() == 25


def test_without_counters_there_is_no_meter(tmp_path: Path) -> None:
    assert RaplMeter.open(tmp_path / "missing") is None
    assert RaplMeter.open(tmp_path) is None


def test_a_counter_that_is_no_number_makes_no_half_meter(tmp_path: Path) -> None:
    _package(tmp_path, "intel-rapl:0", "package-0", 1)
    _package(tmp_path, "intel-rapl:1", "package-1", 1).write_text("?\n")

    assert RaplMeter.open(tmp_path) is None


@pytest.mark.parametrize(
    ("cpuinfo", "method", "watts_max"),
    [
        (MILAN, "model:ccf-cpu(EPYC 3rd Gen)", 2.0193),
        (MILAN.replace(": 1\nmodel name", ": 17\nmodel name"), "model:ccf-cpu(~EPYC 3rd Gen)", 2.0193),
        (
            "vendor_id: GenuineIntel\ncpu family: 6\nmodel: 85\nstepping: 4\n",
            "model:ccf-cpu(Skylake)",
            4.1934,
        ),
        (
            "vendor_id: GenuineIntel\ncpu family: 6\nmodel: 85\nstepping: 7\n",
            "model:ccf-cpu(Cascade Lake)",
            3.9673,
        ),
        ("CPU implementer\t: 0x41\nCPU part\t: 0xd0c\n", "model:ccf-cpu(Graviton2)", 1.693),
        ("", "model:ccf-cpu(unknown)", 4.3694),
        ("model: many\n", "model:ccf-cpu(unknown)", 4.3694),
    ],
)
def test_the_processor_names_its_coefficients(
    tmp_path: Path, cpuinfo: str, method: str, watts_max: float
) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(cpuinfo)

    found = cpu_power(cpuinfo=file)

    assert (found.method, found.watts_max) == (method, watts_max)
    assert found.source


def test_what_the_site_states_wins(tmp_path: Path) -> None:
    stated = Power(watts_min_per_cpu=1.0, watts_max_per_cpu=3.0, source="meter, 2026-01")

    found = cpu_power(stated, cpuinfo=tmp_path / "missing")

    assert (found.method, found.watts_max, found.source) == ("model:stated-cpu", 3.0, "meter, 2026-01")


def test_every_zone_has_a_plausible_figure_with_year_and_source() -> None:
    zones = grid_zones()

    assert {"KR", "JP-TK", "SG", "FR", "DE", "SE", "FI", "US", "US-MIDA-PJM", "WORLD"} <= set(zones)
    for zone, grid in grids(zones).items():
        assert grid.zone == zone
        assert 0 < grid.grams_per_kwh < 1_500
        assert 2020 <= grid.year <= 2030
        assert str(grid.year) in grid.source


def test_a_zone_without_figures_is_missing_and_nothing_stands_in_for_it() -> None:
    assert set(grids(["KR", "MARS"])) == {"KR"}
