"""A site that dies altogether: how long its callers behind `ondol client-proxy` wait for a neighbour's answer."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.hubs import FLEET, Hub, fleet_of, member, running_hub, until
from tests.sites import Answer, Site, free_port

from benchmarks.contenders import ROOT
from benchmarks.fleet_figures import Figure, Say, Sizes, at_most, since
from benchmarks.processes import Process

TAKEOVER_S = 5.0
CALLERS = 8


class Proxy(Site):
    """`ondol client-proxy`, asked like a site."""

    def __init__(self, port: int, key: str) -> None:
        self.port, self.url, self.trusted, self._key = port, f"http://127.0.0.1:{port}", None, key

    @property
    def admin_key(self) -> str:
        """The key of every caller."""
        return self._key

    def state_of(self, url: str) -> str:
        """What it thinks of a site; empty while it does not answer."""
        with contextlib.suppress(OSError):
            found = self.call("GET", "/v1/ondol/proxy", key=None).json()["data"]
            return next(str(one["state"]) for one in found if one["url"] == url)
        return ""


@contextlib.contextmanager
def _proxied(place: Path, key: str, urls: list[str]) -> Iterator[Proxy]:
    port = free_port()
    words = [word for url in urls for word in ("--site", url)]
    command = [sys.executable, "-m", "ondol", "client-proxy", *words, "--listen", f"127.0.0.1:{port}"]
    process = Process(command, log=place / "proxy.log", cwd=ROOT)
    try:
        proxy = Proxy(port, key)
        until(lambda: proxy.state_of(urls[0]) == "ready", "the proxy is ready")
        yield proxy
    finally:
        process.end()


def takeover(place: Path, sizes: Sizes, say: Say) -> list[Figure]:
    """A site is frozen (it holds its connections, and answers nothing) again and again, with callers in the middle."""
    waited_s: list[float] = []
    failed = 0
    with (
        running_hub(place / "hub") as hub,
        member(hub, place / "shop-1", "shop-1") as home,
        member(hub, place / "shop-2", "shop-2") as other,
    ):
        key = _key(hub, place, [home, other])
        with _proxied(place, key, [home.url, other.url]) as proxy:
            for outage in range(sizes.outages):
                say(f"outage {outage + 1} of {sizes.outages}")
                until(lambda: proxy.chat().headers.get("x-ondol-site") == "shop-1", "shop-1 is preferred")
                os.kill(home.process.pid, signal.SIGSTOP)
                try:
                    with ThreadPoolExecutor(CALLERS) as pool:
                        answers = list(pool.map(lambda _: _timed(proxy), range(CALLERS)))
                finally:
                    os.kill(home.process.pid, signal.SIGCONT)
                good = [one for one in answers if one[1].headers.get("x-ondol-site") == "shop-2"]
                failed += len(answers) - len(good)
                waited_s += [seconds for seconds, _ in answers]
    worst = float("inf") if failed else max(waited_s)
    return [
        at_most(
            "a site falls silent with callers in the middle: a neighbour has answered all of them, worst", worst,
            TAKEOVER_S, goal="≤ 5 s",
            measured=f"{max(waited_s):.1f} s ({len(waited_s)} requests, {failed} failed)", failed=failed,
            asked=len(waited_s),
        )
    ]  # fmt: skip


def _key(hub: Hub, place: Path, sites: list[Site]) -> str:
    hub.apply(place / "fleet", FLEET)
    key: str = hub.client.post("keys", {"name": "tills"})["key"]
    for site in sites:
        until(lambda site=site: fleet_of(site)["generation"] == 1, "generation 1")  # type: ignore[misc]
        until(lambda site=site: site.chat(key=key).status == 200, "the key is known")  # type: ignore[misc]
    return key


def _timed(proxy: Proxy) -> tuple[float, Answer]:
    began = time.monotonic()
    answer = proxy.chat()
    return since(began), answer
