"""What a hub sends: a generation to a thousand sites, and a model over a line that breaks fifty times."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from tests.faults.cut_transfer import cut_transfer
from tests.hubs import FLEET, Hub, running_hub

from benchmarks.crowd import Crowd
from benchmarks.fleet_figures import Figure, Say, Sizes, at_most, since


def models(place: Path, sizes: Sizes, say: Say) -> list[Figure]:
    """A model over a line that is reset, evenly over its bytes."""
    say("transferring")
    found = asyncio.run(cut_transfer(place, megabytes=sizes.model_mb, cuts=sizes.cuts))
    assert found.cuts == sizes.cuts, f"the line was cut {found.cuts} times, not {sizes.cuts}"
    return [
        at_most(
            f"model of {sizes.model_mb:g} MB over a line cut {sizes.cuts} times, bytes on the wire", found.ratio, 1.02,
            goal="≤ 1.02 ×", measured=f"{found.ratio:.4f} ×", wire=found.wire, size=found.size,
        )
    ]  # fmt: skip


def crowd(place: Path, sizes: Sizes, say: Say) -> list[Figure]:
    """A generation to many sites, each with its own key, its own connections and its own watch."""
    with running_hub(place / "hub") as hub:
        took_s, joined_s = asyncio.run(_to_all(hub, place, sizes.sites, say))
        peak_mb = _peak_mb(hub)
    return [
        at_most(
            f"desired state to {sizes.sites:,} simulated sites: all have fetched and checked it", took_s, 10,
            goal="≤ 10 s", measured=f"{took_s:.1f} s", joined_s=joined_s,
        ),
        at_most("… memory of the hub, at most", peak_mb, 300, goal="≤ 300 MB", measured=f"{peak_mb:.0f} MB"),
    ]  # fmt: skip


async def _to_all(hub: Hub, place: Path, count: int, say: Say) -> tuple[float, float]:
    doc = {"name": "shops", "tier": "edge", "region": "kr-seoul", "country": "KR", "grid_zone": "KR"}
    made = hub.client.post("invites", {"invitations": [{"doc": doc, "count": count, "minutes": 60}]})["data"]
    sites = Crowd(hub.port, (hub.folder / "data" / "ca.pem").read_text(), count)
    try:
        began = time.monotonic()
        await sites.join(made[0]["token"], say)
        joined_s = since(began)
        say("applying")
        began = time.monotonic()
        await asyncio.to_thread(hub.apply, place / "fleet", FLEET)
        await sites.until_all_have(1)
        return since(began), joined_s
    finally:
        await sites.close()


def _peak_mb(hub: Hub) -> float:
    status = Path(f"/proc/{hub.process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024
