"""The figures of a fleet: drain, dead links, boots without a network, models over a bad line, a thousand sites.

    python -m benchmarks.fleet                 all of it, some three minutes; prints a table
    python -m benchmarks.fleet --only drain    one part
    python -m benchmarks.fleet --json FILE     keep the raw figures

Real hubs and real sites, each its own process on 127.0.0.1; what a thousand sites do is done by one process over real
TLS connections.  Everything that is started here is ended here.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
from rich.console import Console
from rich.markdown import Markdown
from tests.faults.cut_transfer import cut_transfer
from tests.hubs import FLEET, Hub, fleet_of, join, member, running_hub, start_site, until, write_site
from tests.sites import Site, free_port

from benchmarks.contenders import ROOT
from benchmarks.crowd import Crowd
from benchmarks.disk import fdatasync_us
from benchmarks.frozen_line import FrozenLine
from ondol.adapters.ledger import SqliteLedger
from ondol.adapters.secrets import gateway_id
from ondol.adapters.site_identity import read_membership, write_membership
from ondol.core.usage import UsageRecord

BACKLOG = 30_000
LARGE_BACKLOG = 200_000
SITES = 1_000
FAILOVERS = 100
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


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the table; `met` None where there is no goal."""

    name: str
    goal: str
    measured: str
    met: bool | None


def drain(place: Path) -> list[Figure]:
    """A backlog, written by the real ledger while the hub is away, then the hub comes back."""
    with running_hub(place / "hub") as hub:
        folder = place / "shop-1"
        port = write_site(folder, "shop-1")
        join(folder, hub.invite("shop-1"))
        hub.stop()
        asyncio.run(_fill(folder / "data", BACKLOG))
        site = start_site(folder, port)
        try:
            time.sleep(2)
            hub.restart()
            began = time.monotonic()
            seen: list[tuple[float, int]] = []
            while not seen or seen[-1][1] < BACKLOG:
                records = sum(one["records"] for one in hub.client.get("usage")["received"])
                if records:
                    seen.append((time.monotonic() - began, records))
                assert time.monotonic() - began < 120, "the backlog did not arrive in two minutes"
        finally:
            site.stop()
    first_s, took_s = seen[0][0], seen[-1][0]
    rate = BACKLOG / took_s
    return [
        Figure(name="first record after the hub is back", goal="≤ 1 s", measured=f"{first_s:.2f} s", met=first_s <= 1),
        Figure(
            name=f"drain of {BACKLOG:,} records into the hub's durable store", goal="≥ 10,000 records/s",
            measured=f"{rate:,.0f} records/s", met=rate >= 10_000,
        ),
    ]  # fmt: skip


def beside(place: Path) -> list[Figure]:
    """Requests while a large backlog drains, against the same requests before; hub and site share the machine."""
    with running_hub(place / "hub") as hub:
        with member(hub, place / "shop-1", "shop-1") as site:
            hub.apply(place / "fleet", FLEET)
            until(lambda: fleet_of(site)["generation"] == 1, "generation 1")
        hub.stop()
        asyncio.run(_fill(place / "shop-1" / "data", LARGE_BACKLOG))
        again = start_site(place / "shop-1", site.port)
        try:
            before = [_one_request(again) for _ in range(600)]
            hub.restart()
            until(lambda: fleet_of(again)["state"] == "joined", "the session")
            during: list[float] = []
            while (fleet := fleet_of(again))["acknowledged"] < fleet["records"] - 100:
                during += [_one_request(again) for _ in range(20)]
        finally:
            again.stop()
    calm_ms, busy_ms = 1000 * _p99(before), 1000 * _p99(during)
    ratio = busy_ms / calm_ms
    return [
        Figure(
            name="requests' p99 while a backlog drains, against before", goal="≤ 1.2 ×",
            measured=f"{ratio:.2f} × ({calm_ms:.1f} to {busy_ms:.1f} ms, {len(during)} requests)",
            met=ratio <= 1.2,
        )
    ]  # fmt: skip


def _one_request(site: Site) -> float:
    time.sleep(0.005)
    began = time.monotonic()
    assert site.chat("hello").status == 200
    return time.monotonic() - began


def _p99(values: list[float]) -> float:
    return sorted(values)[max(0, int(0.99 * len(values)) - 1)]


async def _fill(data: Path, rows: int) -> None:
    ledger = SqliteLedger(
        data / "ledger.db",
        gateway=gateway_id(data),
        max_bytes=1 << 34,
        loop=asyncio.get_running_loop(),
        site="shop-1",
    )
    name, now_ns = gateway_id(data), time.time_ns()
    for first in range(0, rows, 1000):
        await asyncio.gather(
            *(
                ledger.submit(_record(name, number, now_ns))
                for number in range(first, min(rows, first + 1000))
            )
        )
    await ledger.close()


def _record(gateway: str, number: int, now_ns: int) -> UsageRecord:
    return UsageRecord(
        request_id=f"req_{number:026d}", time_ns=now_ns, site="shop-1", gateway=gateway, tenant="default", team="tour",
        key_id="abcdefghij", route="assistant", task="chat", outcome="completed", status=200, model="helper",
        deployment="helper-fake", answered_by="shop-1", cost=number, total_ns=10**9, overhead_ns=10**5,
    )  # fmt: skip


def silence(place: Path) -> list[Figure]:
    """A line that swallows everything and resets nothing."""
    with running_hub(place / "hub") as hub, FrozenLine(hub.port) as line:
        folder = place / "shop-1"
        port = write_site(folder, "shop-1")
        join(folder, hub.invite("shop-1"))
        data = folder / "data"
        write_membership(
            data, msgspec.structs.replace(read_membership(data), hub_urls=(f"https://127.0.0.1:{line.port}",))
        )
        site = start_site(folder, port)
        try:
            until(lambda: fleet_of(site)["state"] == "joined", "it joins")
            until(lambda: hub.site("shop-1")["state"] == "current", "the hub sees it")
            line.frozen = True
            began = time.monotonic()
            until(lambda: fleet_of(site)["state"] == "away", "the site notices", limit_s=60)
            noticed_s = time.monotonic() - began
            until(lambda: hub.site("shop-1")["state"] == "stale", "the hub shows it as stale", limit_s=90)
            stale_s = time.monotonic() - began
        finally:
            site.stop()
    return [
        Figure(
            name="a link that is silently dead: noticed by the site", goal="≤ 15 s", measured=f"{noticed_s:.1f} s",
            met=noticed_s <= 15,
        ),
        Figure(
            name="… shown by the hub as stale", goal="≤ 60 s", measured=f"{stale_s:.1f} s", met=stale_s <= 60
        ),
    ]  # fmt: skip


def boot(place: Path) -> list[Figure]:
    """A site starts while its hub cannot be reached."""
    took = []
    with running_hub(place / "hub") as hub:
        with member(hub, place / "shop-1", "shop-1") as site:
            hub.apply(place / "fleet", FLEET)
            until(lambda: fleet_of(site)["generation"] == 1, "generation 1")
        hub.stop()
        for _ in range(5):
            began = time.monotonic()
            again = start_site(place / "shop-1", site.port)
            until(lambda: again.call("GET", "/readyz", key=None).status == 200, "it is ready")  # noqa: B023
            took.append(time.monotonic() - began)
            again.stop()
    typical = statistics.median(took)
    return [
        Figure(
            name="site boot with the WAN down, to ready",
            goal="≤ 3 s",
            measured=f"{typical:.2f} s",
            met=typical <= 3,
        )
    ]


def failover(place: Path) -> list[Figure]:
    """The preferred endpoint is gone: how much longer the local answer takes than without it."""
    text = FLEET.replace("sites: {names: [shop-*]}", "site: shop-1") + CLOUD.replace(
        "{port}", str(free_port())
    )
    with running_hub(place / "hub") as hub, member(hub, place / "shop-1", "shop-1") as site:
        hub.apply(place / "fleet", text)
        until(lambda: fleet_of(site)["generation"] == 1, "generation 1")
        plain: list[float] = []
        failed_over: list[float] = []
        refused = 0
        for number in range(FAILOVERS):
            for model, taken in (("assistant", plain), ("both", failed_over)):
                began = time.monotonic()
                refused += site.chat(f"question {number}", model=model).status != 200
                taken.append(time.monotonic() - began)
    added_ms = [1000 * (slow - fast) for slow, fast in zip(failed_over, plain, strict=True)]
    p99 = sorted(added_ms)[int(0.99 * len(added_ms)) - 1]
    return [
        Figure(
            name="requests that fail while the cloud is gone (connecting is refused)", goal="0",
            measured=f"{refused} of {2 * FAILOVERS}", met=refused == 0,
        ),
        Figure(
            name="added time to the first local answer there, p99", goal="≤ 300 ms", measured=f"{p99:.1f} ms",
            met=p99 <= 300,
        ),
    ]  # fmt: skip


def models(place: Path) -> list[Figure]:
    """A model over a line that breaks fifty times."""
    found = asyncio.run(cut_transfer(place, megabytes=90, cuts=50))
    return [
        Figure(
            name="model of 90 MB over a line cut 50 times, bytes on the wire", goal="≤ 1.02 ×",
            measured=f"{found.ratio:.4f} ×", met=found.ratio <= 1.02,
        )
    ]  # fmt: skip


def ledger(place: Path) -> list[Figure]:
    """Eight writers, each waiting for its own record."""
    sync_us = statistics.median(fdatasync_us(place))
    rate = asyncio.run(_eight_writers(place))
    bound = 8 / (sync_us / 1e6)
    return [
        Figure(
            name="ledger appends, durable, 8 writers", goal="≥ 1.0 × writers ÷ fdatasync p50",
            measured=f"{rate / bound:.2f} × ({rate:,.0f}/s; fdatasync p50 {sync_us:.0f} µs)", met=rate >= bound,
        )
    ]  # fmt: skip


async def _eight_writers(place: Path) -> float:
    book = SqliteLedger(
        place / "ledger.db", gateway="g", max_bytes=1 << 34, loop=asyncio.get_running_loop(), site="shop-1"
    )
    count, seconds = 0, 4.0
    end = time.monotonic() + seconds

    async def write(writer: int) -> None:
        nonlocal count
        number = writer
        while time.monotonic() < end:
            await book.append(_record("g", number, 1))
            number += 8
            count += 1

    await asyncio.gather(*(write(writer) for writer in range(8)))
    await book.close()
    return count / seconds


def crowd(place: Path) -> list[Figure]:
    """A generation to a thousand sites, each with its own key and its own watch."""
    with running_hub(place / "hub") as hub:
        took_s = asyncio.run(_to_all(hub, place))
        peak_mb = _peak_mb(hub)
    return [
        Figure(
            name=f"desired state to {SITES:,} simulated sites: all have fetched and checked it", goal="≤ 10 s",
            measured=f"{took_s:.1f} s", met=took_s <= 10,
        ),
        Figure(name="… memory of the hub, at most", goal="≤ 300 MB", measured=f"{peak_mb:.0f} MB", met=peak_mb <= 300),
    ]  # fmt: skip


async def _to_all(hub: Hub, place: Path) -> float:
    doc = {"name": "shops", "tier": "edge", "region": "kr-seoul", "country": "KR", "grid_zone": "KR"}
    made = hub.client.post("invites", {"invitations": [{"doc": doc, "count": SITES, "minutes": 60}]})["data"]
    sites = Crowd(hub.port, (hub.folder / "data" / "ca.pem").read_text(), SITES)
    await sites.join(made[0]["token"])
    began = time.monotonic()
    await asyncio.to_thread(hub.apply, place / "fleet", FLEET)
    await sites.until_all_have(1)
    took_s = time.monotonic() - began
    await sites.close()
    return took_s


def _peak_mb(hub: Hub) -> float:
    status = Path(f"/proc/{hub.process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


PARTS: dict[str, Callable[[Path], list[Figure]]] = {
    "failover": failover, "silence": silence, "drain": drain, "beside": beside, "models": models, "ledger": ledger,
    "crowd": crowd, "boot": boot,
}  # fmt: skip


def markdown(figures: list[Figure]) -> str:
    """The table, as in the README."""
    lines = ["| figure | goal | measured | verdict |", "|---|---|---|---|"]
    verdicts = {True: "met", False: "missed", None: "–"}
    lines += [f"| {one.name} | {one.goal} | {one.measured} | {verdicts[one.met]} |" for one in figures]
    return "\n".join(lines)


def main() -> int:
    """Read the command line, run, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--only", action="append", choices=tuple(PARTS), help="this part (may be given again)"
    )
    parser.add_argument("--json", type=Path, help="where to write the raw figures")
    options = parser.parse_args()
    console = Console()
    cache = ROOT / ".cache" / "bench"
    cache.mkdir(parents=True, exist_ok=True)
    figures: list[Figure] = []
    with (
        tempfile.TemporaryDirectory(dir=cache, prefix="fleet-") as place,
        console.status("starting") as status,
    ):
        for name in options.only or PARTS:
            status.update(name)
            folder = Path(place) / name
            folder.mkdir()
            figures += PARTS[name](folder)
    console.print(Markdown(markdown(figures)))
    print(markdown(figures))
    if options.json is not None:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(figures), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
