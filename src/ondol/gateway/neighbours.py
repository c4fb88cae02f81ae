"""The neighbours of a site, probed once a second: whoever its callers could go to."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from typing import Final

from ondol.core.catalog import Catalog
from ondol.gateway.nearest import Nearest, nearest
from ondol.net.health import Probe

LOG: Final = logging.getLogger("ondol.site")
LOOK_S: Final = 1.0


class Neighbours:
    """One probe for each neighbour with an address, as the catalogue says now.  Runs until cancelled."""

    def __init__(
        self, catalog: Callable[[], Catalog], problem: Callable[[], str | None], tls: ssl.SSLContext | None
    ) -> None:
        """`problem` says why this site itself cannot answer; `tls` trusts the fleet's authority, None the machine's."""
        self._catalog = catalog
        self._problem = problem
        self._tls = tls
        self._probes: dict[str, tuple[Probe, asyncio.Task[None]]] = {}

    async def run(self) -> None:
        """Follow the catalogue."""
        try:
            while True:
                self._follow()
                await asyncio.sleep(LOOK_S)
        finally:
            for name in list(self._probes):
                self._end(name)

    def nearest(self, *, known_only_here: bool) -> Nearest:
        """Who could answer a caller now."""
        catalog = self._catalog()
        health = {name: probe for name, (probe, _) in self._probes.items()}
        return nearest(catalog.site, self._problem(), catalog.sites, health, known_only_here=known_only_here)

    def _follow(self) -> None:
        catalog = self._catalog()
        wanted = {name: catalog.sites[name].address for name in catalog.site.neighbours}
        for name, (probe, _) in list(self._probes.items()):
            if (wanted.get(name) or "").rstrip("/") != probe.url:
                self._end(name)
        for name, address in wanted.items():
            if address is not None and name not in self._probes:
                self._begin(name, address)

    def _begin(self, name: str, address: str) -> None:
        def changed(probe: Probe) -> None:
            LOG.info(
                "neighbour", extra={"fields": {"neighbour": name, "ready": probe.ready, "why": probe.why}}
            )

        probe = Probe(address, tls=self._tls, changed=changed)
        self._probes[name] = probe, asyncio.get_running_loop().create_task(probe.run())

    def _end(self, name: str) -> None:
        _, task = self._probes.pop(name)
        task.cancel()
