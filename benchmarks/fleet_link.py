"""The line between site and hub: silently dead, away at the start, and back with a backlog behind it."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from pathlib import Path

import msgspec
from tests.hubs import FLEET, Hub, fleet_of, join, member, running_hub, start_site, until, write_site
from tests.sites import Site

from benchmarks.fleet_figures import Figure, Say, Sizes, at_least, at_most, p99, since
from benchmarks.fleet_ledger import fill
from benchmarks.frozen_line import FrozenLine
from benchmarks.raw_http import Connection
from benchmarks.target import Target
from ondol.adapters.site_identity import read_membership, write_membership

BETWEEN_S = 0.003
"""Between two requests of the client that is watched: it shall load the site, not fill it."""
LIMIT_S = 180.0


def _through(folder: Path, hub: Hub, line: FrozenLine) -> int:
    """A site that has joined and knows the hub by the line's address; its port."""
    port = write_site(folder, "shop-1")
    join(folder, hub.invite("shop-1"))
    data = folder / "data"
    url = f"https://127.0.0.1:{line.port}"
    write_membership(data, msgspec.structs.replace(read_membership(data), hub_urls=(url,)))
    return port


def silence(place: Path, sizes: Sizes, say: Say) -> list[Figure]:
    """A line that swallows everything and resets nothing."""
    with running_hub(place / "hub") as hub, FrozenLine(hub.port) as line:
        folder = place / "shop-1"
        site = start_site(folder, _through(folder, hub, line))
        try:
            until(lambda: fleet_of(site)["state"] == "joined", "it joins")
            until(lambda: hub.site("shop-1")["state"] == "current", "the hub sees it")
            say("the line is silent")
            line.frozen = True
            began = time.monotonic()
            until(lambda: fleet_of(site)["state"] == "away", "the site notices", limit_s=90)
            noticed_s = since(began)
            until(lambda: hub.site("shop-1")["state"] == "stale", "the hub shows it as stale", limit_s=120)
            stale_s = since(began)
            say("the hub must go on saying so")
            wrong = looks = 0
            while since(began) < stale_s + sizes.stale_watch_s:
                wrong += hub.site("shop-1")["state"] == "current"
                looks += 1
                time.sleep(0.1)
        finally:
            site.stop()
    return [
        at_most(
            "a link that is silently dead: noticed by the site", noticed_s, 15, goal="≤ 15 s",
            measured=f"{noticed_s:.1f} s",
        ),
        at_most("… shown by the hub as stale", stale_s, 60, goal="≤ 60 s", measured=f"{stale_s:.1f} s"),
        at_most(
            "… shown as current after that", wrong, 0, goal="never",
            measured=f"{wrong} of {looks} looks in {sizes.stale_watch_s:g} s", looks=looks,
        ),
    ]  # fmt: skip


def boot(place: Path, sizes: Sizes, say: Say) -> list[Figure]:
    """A site starts while its hub cannot be reached; it must also answer by the desired state on its disk."""
    took = []
    with running_hub(place / "hub") as hub:
        with member(hub, place / "shop-1", "shop-1") as site:
            hub.apply(place / "fleet", FLEET)
            until(lambda: fleet_of(site)["generation"] == 1, "generation 1")
        hub.stop()
        for number in range(sizes.boots):
            say(f"boot {number + 1} of {sizes.boots}")
            began = time.monotonic()
            again = start_site(place / "shop-1", site.port)
            try:
                until(lambda: again.call("GET", "/readyz", key=None).status == 200, "it is ready")  # noqa: B023
                took.append(since(began))
                assert again.chat("hello").status == 200, "it is ready, but its route does not answer"
            finally:
                again.stop()
    worst, typical = max(took), statistics.median(took)
    return [
        at_most(
            "site boot with the WAN down, to ready", worst, 3, goal="≤ 3 s",
            measured=f"{worst:.2f} s at most, {typical:.2f} s in the median of {len(took)}", median_s=typical,
        )
    ]  # fmt: skip


def drain(place: Path, sizes: Sizes, say: Say) -> list[Figure]:
    """A backlog that the real ledger wrote while the line was cut; then the line is mended under a hub that runs."""
    with running_hub(place / "hub") as hub, FrozenLine(hub.port) as line:
        folder = place / "shop-1"
        port = _through(folder, hub, line)
        say("writing the backlog")
        asyncio.run(fill(folder / "data", sizes.backlog))
        line.cut()
        site = start_site(folder, port)
        try:
            say(f"the hub is away for {sizes.away_s:g} s")
            time.sleep(sizes.away_s)
            assert _received(hub) == 0, "records arrived over a line that was cut"
            say("draining")
            line.mend()
            began = time.monotonic()
            first_s = 0.0
            while (records := _received(hub)) < sizes.backlog:
                first_s = first_s or (since(began) if records else 0.0)
                assert since(began) < LIMIT_S, f"{records} of {sizes.backlog} records after {LIMIT_S:g} s"
            took_s = since(began)
            first_s = first_s or took_s
        finally:
            site.stop()
    rate = sizes.backlog / took_s
    return [
        at_most(
            "first record at the hub after the line is back", first_s, 1, goal="≤ 1 s", measured=f"{first_s:.2f} s",
            away_s=sizes.away_s,
        ),
        at_least(
            f"drain of {sizes.backlog:,} records into the hub's durable store", rate, 10_000, goal="≥ 10,000 records/s",
            measured=f"{rate:,.0f} records/s, from the moment the line was back ({took_s:.2f} s)", took_s=took_s,
        ),
    ]  # fmt: skip


def _received(hub: Hub) -> int:
    return sum(one["records"] for one in hub.client.get("usage")["received"])


def beside(place: Path, sizes: Sizes, say: Say) -> list[Figure]:
    """Requests while a large backlog drains and while the line is cut, in turns; then again with the hub made polite.

    A hub in the field has cores of its own.  Here it takes those of the site, so the second figure gives the hub the
    lowest priority: what is left is nearer to what the site itself does to its callers.
    """
    with running_hub(place / "hub") as hub, FrozenLine(hub.port) as line:
        folder = place / "shop-1"
        port = _through(folder, hub, line)
        site = start_site(folder, port)
        try:
            hub.apply(place / "fleet", FLEET)
            until(lambda: fleet_of(site)["generation"] == 1, "generation 1")
        finally:
            site.stop()
        line.cut()
        say(f"writing {2 * sizes.large_backlog:,} records")
        asyncio.run(fill(folder / "data", 2 * sizes.large_backlog))
        site = start_site(folder, port)
        try:
            figures = [_turns(site, line, sizes, say, "hub on the same two cores")]
            _make_polite(hub)
            figures.append(_turns(site, line, sizes, say, "hub at the lowest priority"))
        finally:
            site.stop()
    return figures


def _turns(site: Site, line: FrozenLine, sizes: Sizes, say: Say, where: str) -> Figure:
    calm: list[float] = []
    busy: list[float] = []
    sent = 0
    target = Target(
        port=site.port, model="assistant", headers=(("authorization", f"Bearer {site.admin_key}"),)
    )
    with Connection(site.port) as connection:
        for turn in range(sizes.windows):
            say(f"{where}: turn {turn + 1} of {sizes.windows}")
            line.cut()
            until(lambda: fleet_of(site)["state"] == "away", "it is cut off")
            calm += _requests(connection, target, sizes.window_s)
            before = fleet_of(site)["acknowledged"]
            line.mend()
            until(lambda: fleet_of(site)["acknowledged"] > before, "it drains")  # noqa: B023
            busy += _requests(connection, target, sizes.window_s)
            fleet = fleet_of(site)
            sent += fleet["acknowledged"] - before
            assert fleet["acknowledged"] < fleet["records"] - 50, (
                "the backlog ended before the measurement did"
            )
    line.cut()
    calm_ms, busy_ms = 1000 * p99(calm), 1000 * p99(busy)
    ratio = busy_ms / calm_ms
    rate = sent / (sizes.windows * sizes.window_s)
    return at_most(
        f"requests' p99 while a backlog drains, {where}", ratio, 1.2, goal="≤ 1.2 × the p99 without it",
        measured=f"{ratio:.2f} × ({calm_ms:.1f} to {busy_ms:.1f} ms, {len(busy)} requests, some {rate:,.0f} records/s)",
        calm_ms=calm_ms, busy_ms=busy_ms, calm_p50_ms=1000 * statistics.median(calm),
        busy_p50_ms=1000 * statistics.median(busy), records_s=rate,
    )  # fmt: skip


def _requests(connection: Connection, target: Target, seconds: float) -> list[float]:
    taken = []
    began = time.monotonic()
    while since(began) < seconds:
        time.sleep(BETWEEN_S)
        sent = time.monotonic()
        assert connection.exchange(target.request()).status == 200
        taken.append(since(sent))
    return taken


def _make_polite(hub: Hub) -> None:
    for thread in Path(f"/proc/{hub.process.pid}/task").iterdir():
        os.setpriority(os.PRIO_PROCESS, int(thread.name), 19)
