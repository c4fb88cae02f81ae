"""Rollouts with real processes: a hub, four shops, requests all the while, a generation that is slow."""

from __future__ import annotations

import contextlib
import io
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.hubs import Hub, fleet_of, member, running_hub, until
from tests.sites import Site

from ondol.cli.rollouts import show_list, show_one

FLEET = """
kind: Model
name: helper
task: chat
---
kind: Deployment
name: helper-fake
sites: {names: [shop-*]}
model: helper
engine: fake
fake: {text: "hello", first_token_ms: 40, token_ms: 1, output_tokens: 2}
---
kind: Route
name: assistant
deployments: [helper-fake]
---
kind: Rollout
name: careful
steps: ["1", "50%", "100%"]
bake_s: 60
judge: {min_requests: 40, max_wait_s: 180}
"""
SLOW = FLEET.replace("first_token_ms: 40", "first_token_ms: 90")
PAUSE_S = 0.15


class Callers:
    """One client a shop, which asks all the while from a thread of its own."""

    def __init__(self, shops: list[Site]) -> None:
        self.statuses: list[int] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(shop,)) for shop in shops]

    def _ask(self, shop: Site) -> None:
        number = 0
        while not self._over.wait(PAUSE_S):
            number += 1
            self.statuses.append(shop.chat(f"question {number}").status)

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


@contextlib.contextmanager
def four_shops(tmp_path: Path) -> Iterator[tuple[Hub, list[Site]]]:
    with contextlib.ExitStack() as stack:
        hub = stack.enter_context(running_hub(tmp_path / "hub"))
        shops = [
            stack.enter_context(member(hub, tmp_path / name, name))
            for name in (f"shop-{n}" for n in range(4))
        ]
        hub.apply(tmp_path / "fleet", FLEET)
        until(lambda: all(fleet_of(shop)["generation"] == 1 for shop in shops), "all run generation 1")
        yield hub, shops


def rollout(hub: Hub) -> dict[str, Any]:
    found: dict[str, Any] = hub.client.get("rollouts")["data"][0]
    return found


@pytest.mark.timeout(240)
def test_a_slow_generation_is_found_on_one_shop_and_taken_back(tmp_path: Path) -> None:
    with four_shops(tmp_path) as (hub, shops), Callers(shops) as callers:
        until(lambda: len(callers.statuses) > 4 * 60, "each shop has answered some sixty")
        time.sleep(12)  # one report of every site later the hub knows what is usual
        answer = hub.apply(tmp_path / "fleet", SLOW)
        assert (answer["generation"], answer["rollout"]) == (2, 2)
        until(lambda: rollout(hub)["state"] != "running", "the judge has seen enough", limit_s=120)
        found = rollout(hub)
        assert (found["state"], found["back"]) == ("aborted", 3)
        until(lambda: all(fleet_of(shop)["generation"] == 3 for shop in shops), "all run generation 3")
        runs = [[event["number"] for event in shop.events("generation")] for shop in shops]
        assert set(callers.statuses) == {200}, "no caller saw anything of it"
    verdict = [event["action"]["verdict"] for event in found["events"] if event["action"]][-1]
    latency = next(one for one in verdict["comparisons"] if one["measure"] == "latency")
    assert latency["worse"]
    assert latency["ratio_new"] > 1.5 > latency["ratio_old"]
    assert verdict["against"] == "old"
    assert verdict["requests_new"] >= 40
    assert sorted(runs) == [["1", "2", "3"]] + [["1", "3"]] * 3, "one shop had it, the others never"
    shown = io.StringIO()
    screen = Console(file=shown, width=100, highlight=False)
    show_list(screen, [found])
    for lang in ("en", "ko"):
        show_one(screen, found, lang=lang, now_ns=found["ended_ns"])
    if "ONDOL_SHOW" in os.environ:
        print(shown.getvalue())
    text = " ".join(shown.getvalue().split())
    assert "aborted, brought back" not in text
    assert "brought back as generation 3" in text
    assert f"{latency['p']:.2g}" in text
    assert "나빠졌습니다" in text
