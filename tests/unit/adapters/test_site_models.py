"""Whom a site asks for a model, and in what order; and that it then comes, under the site's own terms."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from tests.model_files import KEYS, RangeServer, model, signed

from ondol.adapters.fleet_models import FleetModels
from ondol.adapters.model_sources import FetchFailed
from ondol.adapters.site_models import SiteModels, place
from ondol.adapters.transfer_sources import DirectorySource, HttpSource
from ondol.core.catalog import Catalog, GatewayDoc, SiteDoc, Transfer
from ondol.errors import InvalidRequest, StateError
from ondol.units import NS_PER_S

pytestmark = pytest.mark.anyio


class NoonClock:
    """It is noon, always."""

    def now_ns(self) -> int:
        return 0

    def wall_ns(self) -> int:
        return 12 * 3600 * NS_PER_S


def catalog(addresses: dict[str, str], **transfer: object) -> Catalog:
    def site(name: str, **more: object) -> SiteDoc:
        return SiteDoc(
            name=name, tier="edge", region="r", country="KR", grid_zone="KR", address=addresses.get(name), **more,  # type: ignore[arg-type]
        )  # fmt: skip

    here = site("here", parent="depot", neighbours=("n1", "n2"), transfer=Transfer(**transfer))  # type: ignore[arg-type]
    sites = {one.name: one for one in (here, site("depot"), site("n1"), site("n2"))}
    return Catalog(
        site=here, gateway=GatewayDoc(name="g", timezone="UTC"), tenants={}, teams={}, budgets={}, sites=sites,
        models={}, deployments={}, routes={}, prices={}, exchange={}, grids={},
    )  # fmt: skip


class Rig:
    """One site's way to its models."""

    def __init__(self, folder: Path, found: Catalog, hub: str | None) -> None:
        self.catalog = found
        self.asked: list[str] = []
        self.models = FleetModels(folder / "models")
        self.site = SiteModels(
            self.models, catalog=lambda: self.catalog, keys=lambda: KEYS, clock=NoonClock(), hub=lambda: hub,
            authorization=self._who, tls=self._tls,
        )  # fmt: skip

    def _who(self, audience: str) -> str:
        self.asked.append(audience)
        return f"Ondol-Site for-{audience}"

    def _tls(self, _: str) -> ssl.SSLContext | None:
        return None


HERE = {"depot": "https://depot.example:8443/v1", "n1": "https://n1.example", "n2": "http://n2.example"}


@pytest.mark.parametrize(
    ("order", "names"),
    [
        (("parent", "neighbours", "hub"), ["depot", "n1", "hub"]),
        (("hub", "parent"), ["hub", "depot"]),
        (("neighbours",), ["n1"]),
    ],
)
def test_the_order_is_the_sites_own_and_an_address_in_clear_text_is_passed_over(
    tmp_path: Path, order: tuple[str, ...], names: list[str]
) -> None:
    rig = Rig(tmp_path, catalog(HERE, sources=order), "https://hub.example")
    assert [one.name for one in rig.site.sources()] == names


def test_places_that_are_named_come_first(tmp_path: Path) -> None:
    rig = Rig(
        tmp_path, catalog(HERE, places=(str(tmp_path), "https://store.example/m", "not/absolute")), None
    )
    assert [one.name for one in rig.site.sources()] == [str(tmp_path), "store.example", "depot", "n1"]


def test_without_a_hub_or_an_address_there_is_nobody_to_ask(tmp_path: Path) -> None:
    assert Rig(tmp_path, catalog({}), None).site.sources() == []


async def test_each_is_asked_as_who_we_are_to_them_and_the_model_comes(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(model(1))
    artifact, envelope = signed(path)
    depot, hub = RangeServer(), RangeServer()
    hub.offer(path, envelope, artifact)
    said: list[tuple[int, int, float, str]] = []
    async with depot.running() as a, hub.running() as b:
        rig = Rig(tmp_path, catalog({"depot": f"{a}/v1"}), b)
        await rig.site.fetch(artifact.digest, wanted=[artifact.digest], say=lambda *one: said.append(one))
    assert rig.asked == ["depot", "hub", "depot", "hub"]
    assert said[-1][0] == said[-1][1] == artifact.size
    assert said[-1][3] == "hub"
    assert rig.site.held() == [artifact.digest]
    rig.site.used(["sha256:" + "0" * 64, artifact.digest])
    assert rig.models.held()[0].path.read_bytes() == path.read_bytes()


async def test_the_terms_of_the_site_hold(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(model(2))
    artifact, envelope = signed(path)
    hub = RangeServer()
    hub.offer(path, envelope, artifact)
    async with hub.running() as url:
        rig = Rig(tmp_path, catalog({}, hours="22:00-06:00"), url)
        with pytest.raises(FetchFailed, match="from 22:00"):
            await rig.site.fetch(artifact.digest, wanted=(), say=lambda *_: None)
        rig.catalog = catalog({}, disk_bytes=1_000_000)
        with pytest.raises(StateError, match="at most 1 MB"):
            await rig.site.fetch(artifact.digest, wanted=(), say=lambda *_: None)
    assert hub.body_sent == 0


def test_a_place_is_a_folder_or_an_object_store(tmp_path: Path) -> None:
    assert isinstance(place(str(tmp_path)), DirectorySource)
    store = place("https://bucket.example/models?sig=1")
    assert isinstance(store, HttpSource)
    assert store.name == "bucket.example"
    for wrong in ("models", "http://bucket.example/x", "ftp://x", "https://user@x/", "https://x/ y"):
        with pytest.raises(InvalidRequest):
            place(wrong)
