"""The cloud goes away while an edge prefers it: by its death, by refusing, and by silence."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from tests.hubs import FLEET, fleet_of, member, running_hub, until
from tests.sites import Site

from benchmarks.contenders import ROOT, answers
from benchmarks.fleet_figures import Figure, Say, Sizes, at_most, p99, since
from benchmarks.fleet_load import Ended, Load, ask
from benchmarks.frozen_line import FrozenLine
from benchmarks.processes import Process, free_port
from benchmarks.target import Target

CLOUD = """
---
kind: Site
name: cloud
tier: cloud
region: us
country: US
grid_zone: US-NW-PACW
---
kind: Deployment
name: helper-cloud
site: cloud
model: helper
engine: upstream
url: http://127.0.0.1:{port}/v1
quality: 0.9
price: list
---
kind: Route
name: both
deployments: [helper-fake, helper-cloud]
objective: best
"""
AWAY_MS = 300.0


class Cloud:
    """A server of paced answers that can be killed and started again on its port."""

    def __init__(self, folder: Path) -> None:
        """Start it."""
        self.port = free_port()
        self._log = folder / "cloud.log"
        self.start()

    def start(self) -> None:
        """Start it and wait until it answers."""
        self._process = Process(
            [sys.executable, "-m", "benchmarks.paced_upstream", "--port", str(self.port)],
            log=self._log,
            cwd=ROOT,
        )
        target = Target(port=self.port)
        self._process.wait_until(lambda: answers(target), what="the cloud", timeout_s=15)

    def kill(self) -> None:
        """`kill -9`; returns when it is gone."""
        os.kill(self._process.pid, signal.SIGKILL)
        self.end()

    def end(self) -> None:
        """End it if it runs."""
        self._process.end()


@contextlib.contextmanager
def _edge(place: Path, port: int) -> Iterator[Site]:
    """A site of a fleet whose route `both` prefers the cloud at `port`."""
    text = FLEET.replace("sites: {names: [shop-*]}", "site: shop-1") + CLOUD.replace("{port}", str(port))
    with running_hub(place / "hub") as hub, member(hub, place / "shop-1", "shop-1") as site:
        hub.apply(place / "fleet", text)
        until(lambda: fleet_of(site)["generation"] == 1, "generation 1")
        _prefers_cloud(site)
        yield site


def _prefers_cloud(site: Site) -> None:
    """Wait until the cloud answers: else nothing that is measured after it would be a failover."""
    until(
        lambda: (
            site.chat("rate=50 tokens=1", model="both").headers.get("x-ondol-deployment") == "helper-cloud"
        ),
        "the cloud answers",
    )


def _target(site: Site, model: str) -> Target:
    return Target(port=site.port, model=model, headers=(("authorization", f"Bearer {site.admin_key}"),))


def killed(place: Path, sizes: Sizes, say: Say) -> list[Figure]:
    """`kill -9` of the cloud under load: streams of a second, and answers in one piece that take two."""
    cloud = Cloud(place)
    try:
        with _edge(place, cloud.port) as site:
            say("kill -9 under load")
            mixed = asyncio.run(_kill_under_load(site, cloud, sizes))
            say("kill -9 while many wait")
            cloud.start()
            _prefers_cloud(site)
            waiting = asyncio.run(_kill_while_waiting(site, cloud, sizes))
    finally:
        cloud.end()
    streams = [one for one in mixed if one.stream]
    failed = sum(one.failed for one in mixed)
    begun = sum(one.broken for one in streams)
    silent = sum(one.broken and not one.said_error for one in streams)
    lost = sum(one.failed for one in waiting)
    return [
        at_most(
            "kill -9 of the cloud under load: failed requests of those without a byte sent", failed, 0, goal="0",
            measured=f"{failed} of {len(mixed) - begun:,}", requests=len(mixed), began_streams=begun,
        ),
        at_most(
            "… streams already begun that end without an error event", silent, 0, goal="0",
            measured=f"{silent}; {begun} ended with one, and are counted", broken_streams=begun,
        ),
        at_most(
            f"… with {sizes.waiting} requests that waited for answers of {sizes.slow_s:g} s: failed", lost, 0, goal="0",
            measured=f"{lost} of {len(waiting)}", requests=len(waiting),
        ),
    ]  # fmt: skip


async def _kill_under_load(site: Site, cloud: Cloud, sizes: Sizes) -> list[Ended]:
    target = _target(site, "both")
    loads = [
        Load(target, clients=sizes.clients, prompt="rate=50 tokens=50", stream=True),
        Load(target, clients=sizes.clients, prompt="wait=2", stream=False),
    ]
    await asyncio.sleep(sizes.load_s)
    seen = {one.deployment for load in loads for one in load.ended}
    assert "helper-cloud" in seen, f"the load went to {seen}, not to the cloud"
    await asyncio.to_thread(cloud.kill)
    await asyncio.sleep(sizes.load_s)
    return [one for load in loads for one in await load.stop()]


async def _kill_while_waiting(site: Site, cloud: Cloud, sizes: Sizes) -> list[Ended]:
    """Long answers in one piece: at the moment of the death nobody has a byte, and all must be answered locally."""
    load = Load(_target(site, "both"), clients=sizes.waiting, prompt=f"wait={sizes.slow_s:g}", stream=False)
    await asyncio.sleep(1.5 * sizes.slow_s)
    await asyncio.to_thread(cloud.kill)
    await asyncio.sleep(1)
    return await load.stop()


def refused(place: Path, sizes: Sizes, say: Say) -> list[Figure]:
    """The cloud dies again and again; each time the first requests try it, are refused, and go to the local model.

    Turn by turn with the same question on a route that is local alone.
    """
    cloud = Cloud(place)
    added_ms: list[float] = []
    tried = failures = 0
    try:
        with _edge(place, cloud.port) as site:
            for outage in range(sizes.outages):
                say(f"outage {outage + 1} of {sizes.outages}")
                _prefers_cloud(site)
                cloud.kill()
                for number in range(8):
                    local_ms, _ = _timed(site, "assistant", f"{outage}-{number}")
                    over_ms, answer = _timed(site, "both", f"{outage}-{number}")
                    failures += answer.status != 200
                    attempts = site.record(answer.headers["x-ondol-request-id"])["attempts"]
                    if len(attempts) > 1:
                        tried += 1
                        added_ms.append(over_ms - local_ms)
                cloud.start()
    finally:
        cloud.end()
    assert added_ms, "no request tried the cloud after its death"
    worst = float("inf") if failures else p99(added_ms)
    return [
        at_most(
            "added time to the first local answer where connecting is refused, p99", worst, AWAY_MS, goal="≤ 300 ms",
            measured=f"{worst:.1f} ms ({tried} requests that tried the cloud first, {failures} failed)",
            tried=tried, failed=failures,
        )
    ]  # fmt: skip


def _timed(site: Site, model: str, text: str) -> tuple[float, _Answer]:
    began = time.monotonic()
    answer = site.chat(text, model=model)
    return 1000 * since(began), _Answer(status=answer.status, headers=answer.headers)


class _Answer(msgspec.Struct, frozen=True):
    status: int
    headers: dict[str, str]


def vanished(place: Path, sizes: Sizes, say: Say) -> list[Figure]:
    """The way to the cloud swallows every byte, on open and on new connections; nothing is reset."""
    cloud = Cloud(place)
    try:
        with FrozenLine(cloud.port) as line, _edge(place, line.port) as site:
            say("learning the first token's time")
            calm, local, silent = asyncio.run(_swallowed(site, line, sizes, say))
    finally:
        cloud.end()
    learnt_ms = p99([1000 * (one.first_s - one.began_s) for one in calm])
    local_ms = p99([1000 * (one.first_s - one.began_s) for one in local])
    bound_ms = learnt_ms + AWAY_MS
    came = [1000 * (one.first_s - one.began_s) - local_ms for one in silent if one.good]
    worst = p99(came) if len(came) == len(silent) else float("inf")
    found = f"{worst:,.0f} ms" if came else "no answer"
    return [
        at_most(
            "added time to the first local answer where packets vanish, p99", worst, bound_ms,
            goal=f"≤ learnt p99 first token + 300 ms, here {bound_ms:.0f} ms",
            measured=f"{found} ({len(came)} of {len(silent)} answered within {sizes.vanish_s:g} s)",
            learnt_ms=learnt_ms, local_ms=local_ms, answered=len(came), asked=len(silent),
        )
    ]  # fmt: skip


async def _swallowed(
    site: Site, line: FrozenLine, sizes: Sizes, say: Say
) -> tuple[list[Ended], list[Ended], list[Ended]]:
    both, alone = _target(site, "both"), _target(site, "assistant")
    calm = [await ask(both, "rate=100 tokens=2", stream=True, limit_s=20) for _ in range(sizes.learnt)]
    assert all(one.good for one in calm), "a stream failed before anything was broken"
    local = [await ask(alone, "rate=100 tokens=2", stream=True, limit_s=20) for _ in range(sizes.learnt)]
    say(f"packets vanish, {sizes.vanish_s:g} s at most")
    line.frozen = True
    asked = (ask(both, f"rate=100 tokens=2 n={n}", stream=True, limit_s=sizes.vanish_s) for n in range(4))
    return calm, local, list(await asyncio.gather(*asked))
