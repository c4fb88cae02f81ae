"""What a site does beside answering: it looks at its power meter, lets old content go, and keeps its memory still."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
from collections.abc import Callable, Collection
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

from ondol.adapters.power import RaplMeter
from ondol.core.catalog import Catalog
from ondol.core.energy import MeasuredPower
from ondol.core.ports import Clock, Ledger
from ondol.gateway.cache import CacheStats
from ondol.gateway.endpoints import Endpoint, Power
from ondol.gateway.semantic import SemanticStats

LOG: Final = logging.getLogger("ondol.site")
POWER_S: Final = 5.0


async def measure_power(power: Power, clock: Clock) -> None:
    """Look at the processors' energy counters, where there are any, so that energy is measured and not modelled."""
    meter = RaplMeter.open()
    if meter is None:
        return
    before_ns = clock.now_ns()
    while True:
        await asyncio.sleep(POWER_S)
        now_ns = clock.now_ns()
        try:
            package_uj = meter.delta_uj()
        except (OSError, ValueError) as error:
            LOG.warning("power_meter_lost", extra={"fields": {"why": str(error)}})
            power.measured = MeasuredPower()
            return
        power.look(package_uj=package_uj, window_ns=now_ns - before_ns, cpus=os.cpu_count() or 1)
        before_ns = now_ns


def gauges(
    running: int,
    cache: CacheStats,
    endpoints: Collection[Endpoint],
    ledger: Ledger,
    *,
    semantic: SemanticStats,
) -> dict[str, list[tuple[dict[str, str], float]]]:
    """What operators see of a site: values by metric and labels."""
    return {
        "ondol_requests_running": [({}, float(running))],
        "ondol_cache_bytes": [({}, float(cache.bytes))],
        "ondol_cache_hits": [({}, float(cache.hits))],
        "ondol_cache_misses": [({}, float(cache.misses))],
        "ondol_endpoint_in_flight": [({"deployment": e.name}, float(e.in_flight)) for e in endpoints],
        "ondol_endpoint_up": [({"deployment": e.name}, float(e.engine.problem() is None)) for e in endpoints],
        "ondol_semantic_entries": [({}, float(semantic.entries))],
        "ondol_semantic_served": [({}, float(semantic.served))],
        "ondol_semantic_checked": [({}, float(semantic.checked))],
        "ondol_semantic_checked_wrong": [({}, float(semantic.checked_wrong))],
        "ondol_semantic_refused": [({}, float(semantic.refused))],
        "ondol_ledger_writable": [({}, float(ledger.problem() is None))],
    }


def settle_memory() -> None:
    """Keep what was loaded at start out of every later garbage collection, and collect less often.

    Requests leave no cycles behind, so a young collection every 700 objects finds nothing to do.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def ignore_late_callbacks(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Drop what the server's threads say to futures that are already cancelled; log the rest."""
    if not isinstance(context.get("exception"), asyncio.InvalidStateError):
        loop.default_exception_handler(context)


async def in_thread(work: Callable[..., Any], *args: Any) -> None:
    """Run something that blocks, for a task that nobody waits for."""
    await asyncio.to_thread(work, *args)


def field_of(catalog: Catalog, name: str) -> object:
    """A field of the Gateway document by its dotted name."""
    return attrgetter(name)(catalog.gateway)


def stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes whenever a file is written; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
