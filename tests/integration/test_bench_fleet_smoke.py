"""The fleet's benchmarks run, on tiny counts, with real hubs and sites.  No time is judged here, only counts."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from benchmarks import fleet
from benchmarks.contenders import ROOT
from benchmarks.fleet_figures import QUICK, Figure, Report, Sizes, at_least, at_most, markdown, p99

CHEAP = ("killed", "refused", "drain", "models", "ledger", "crowd", "boot")


def test_the_cheap_parts_run_and_keep_what_they_measured(tmp_path: Path) -> None:
    kept = tmp_path / "fleet.json"
    words = [word for part in CHEAP for word in ("--only", part)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.fleet", "--quick", *words, "--json", str(kept)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = msgspec.json.decode(kept.read_bytes(), type=Report)
    assert report.failed == {}
    assert report.sizes == QUICK
    assert len(report.figures) == 11
    assert done.stdout.startswith(markdown(report.figures))
    assert "Traceback" not in done.stderr
    by_name = {one.name: one for one in report.figures}
    killed = next(one for name, one in by_name.items() if name.startswith("kill -9"))
    assert killed.raw["value"] == 0
    assert killed.raw["requests"] > 0
    refused = next(one for name, one in by_name.items() if "connecting is refused" in name)
    assert refused.raw["tried"] > 0
    assert refused.raw["failed"] == 0
    model = next(one for name, one in by_name.items() if name.startswith("model of"))
    assert model.raw["wire"] >= model.raw["size"]
    assert any(f"{QUICK.sites} simulated sites" in name for name in by_name)


def test_a_part_that_fails_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = at_most("good", 1, 2, goal="≤ 2", measured="1")

    def broken(place: Path, sizes: Sizes, say: object) -> list[Figure]:
        raise ValueError("the disk is gone")

    monkeypatch.setattr(fleet, "PARTS", {"first": broken, "second": lambda *_: [good]})
    report = fleet.run(tmp_path, QUICK, ["first", "second"], lambda _: None)
    assert report.failed == {"first": "ValueError: the disk is gone"}
    assert report.figures == [good]


def test_a_verdict_says_by_how_much() -> None:
    def most(value: float, bound: float) -> str:
        return at_most("n", value, bound, goal="g", measured="m").verdict

    def least(value: float, bound: float) -> str:
        return at_least("n", value, bound, goal="g", measured="m").verdict

    assert (most(3, 3), least(3, 3)) == ("met", "met")
    assert (most(4.5, 3), most(2, 0)) == ("missed by 50%", "missed by 2")
    assert most(math.inf, 3) == "missed: not seen"
    assert least(0.75, 1) == "missed by 25%"


def test_the_99th_percentile_is_one_of_the_values() -> None:
    assert p99([5.0]) == 5.0
    assert p99([float(value) for value in range(100)]) == 98.0
    assert p99([float(value) for value in range(200, 0, -1)]) == 198.0
