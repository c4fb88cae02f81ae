"""Seeded worlds: the same code as in production, with every fault that we could think of."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.simulation.loop import run
from tests.simulation.world import World, clear

SHORT = 200
LONG = 20_000
STORMY_S = 25.0
BATCH = 25


def play(seed: int, place: Path) -> World:
    """One seed; whatever goes wrong names it, with the end of its story."""
    world = World(seed, place / f"seed-{seed}")
    try:
        run(world.run(STORMY_S), limit_s=2000)
    except BaseException as error:
        story = "\n".join(world.trace[-40:])
        raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}\n{story}") from error
    finally:
        clear(place / f"seed-{seed}")
    return world


@pytest.mark.parametrize("first", range(0, SHORT, BATCH))
def test_what_must_hold_holds(first: int, tmp_path: Path) -> None:
    for seed in range(first, first + BATCH):
        play(seed, tmp_path)


@pytest.mark.long
@pytest.mark.timeout(0)
@pytest.mark.parametrize("first", range(SHORT, LONG, 100))
def test_what_must_hold_holds_for_long(first: int, tmp_path: Path) -> None:
    for seed in range(first, first + 100):
        play(seed, tmp_path)


def test_a_seed_replays_whatever_the_order_of_hashes(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from tests.simulation.test_simulation import play;"
        "print(play(7, pathlib.Path(sys.argv[1])).fingerprint)"
    )
    found = set()
    for number in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / number)], capture_output=True, text=True, timeout=100, check=False,
            env=os.environ | {"PYTHONHASHSEED": number}, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found.add(done.stdout)
    assert len(found) == 1
