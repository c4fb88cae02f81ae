"""A site's way to its models: whom it asks, in what order, under which terms; behind `gateway.models.Fetching`."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

from ondol.adapters.fleet_models import FleetModels
from ondol.adapters.model_transfer import ModelTransfer, Progress, Terms
from ondol.adapters.transfer_sources import DirectorySource, HttpSource, Source
from ondol.core.catalog import Catalog
from ondol.core.ports import Clock
from ondol.core.trust import HUB
from ondol.errors import InvalidRequest

Authorization = Callable[[str], str]
"""The header's value for an audience: `hub`, or the name of a site."""


class SiteModels:
    """Fetches for one site.  The catalogue is asked for at each fetch, so that a reload counts at once."""

    def __init__(
        self,
        models: FleetModels,
        *,
        catalog: Callable[[], Catalog],
        keys: Callable[[], Mapping[str, bytes]],
        clock: Clock,
        hub: Callable[[], str | None],
        authorization: Authorization,
        tls: Callable[[str], ssl.SSLContext | None],
    ) -> None:
        """`keys` are the hub's public keys, `hub` its address; `tls` gives the context for an audience."""
        self._models = models
        self._catalog = catalog
        self._hub = hub
        self._authorization = authorization
        self._tls = tls
        self._transfer = ModelTransfer(models, keys=keys, clock=clock, terms=self._terms)

    async def fetch(
        self, digest: str, *, wanted: Collection[str], say: Callable[[int, int, float, str], None]
    ) -> None:
        """As `gateway.models.Fetching`."""

        def progress(one: Progress) -> None:
            say(one.done, one.total, one.bytes_per_s, one.source)

        self._models.most_bytes = self._catalog().site.transfer.disk_bytes
        sources = self.sources()
        try:
            await self._transfer.fetch(digest, sources, wanted=wanted, progress=progress)
        finally:
            for source in sources:
                await source.close()

    def held(self) -> Sequence[str]:
        """As `gateway.models.Fetching`."""
        return [one.digest for one in self._models.held()]

    def used(self, digests: Collection[str]) -> None:
        """As `gateway.models.Fetching`."""
        for digest in digests:
            self._models.used(digest)

    def sources(self) -> list[Source]:
        """Whom to ask: the Site's `transfer.places`, then its `sources` in their order.

        Who has no address that may be used is passed over.
        """
        found: list[Source] = []
        seen: set[str] = set()
        for text in self._catalog().site.transfer.places:
            with contextlib.suppress(InvalidRequest):
                found.append(place(text))
        for name, url in self._places():
            if url in seen:
                continue
            seen.add(url)
            try:
                found.append(self._source(name, url))
            except InvalidRequest:
                continue
        return found

    def _places(self) -> Iterator[tuple[str, str]]:
        catalog = self._catalog()
        site = catalog.site
        for kind in site.transfer.sources:
            names: tuple[str, ...] = ()
            if kind == "hub":
                hub = self._hub()
                if hub is not None:
                    yield HUB, hub
            elif kind == "neighbours":
                names = site.neighbours
            elif site.parent is not None:
                names = (site.parent,)
            for name in names:
                other = catalog.sites.get(name)
                if other is not None and other.address is not None:
                    yield name, other.address

    def _source(self, name: str, url: str) -> Source:
        # A site's address is where clients reach it, which may name a path below it.
        parts = urlsplit(url)
        plain = f"{parts.scheme}://{parts.netloc}" if parts.netloc else url
        return HttpSource(
            plain, name=name, tls=self._tls(name), authorization=lambda: self._authorization(name),
            bytes_per_s=self._terms().bytes_per_s,
        )  # fmt: skip

    def _terms(self) -> Terms:
        catalog = self._catalog()
        transfer = catalog.site.transfer
        return Terms(
            bytes_per_s=transfer.bytes_per_s, hours=transfer.hours, zone=ZoneInfo(catalog.gateway.timezone)
        )


def place(text: str, *, name: str = "") -> Source:
    """A place of published files that somebody names: an https address of an object store, or a folder.

    Raises:
        InvalidRequest: it is an address that is not https, or a path that is not absolute.
    """
    if "://" in text:
        return HttpSource(text, name=name or urlsplit(text).netloc, objects=True)
    if not Path(text).is_absolute():
        raise InvalidRequest(f"found the folder {text[:100]!r}, expected an absolute path")
    return DirectorySource(Path(text), name=name)
