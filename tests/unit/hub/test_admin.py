"""What operators ask: documents, sites as they are, keys; and what a hub never says."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import pytest
from tests.unit.hub.conftest import Fleet, Speaker

from ondol.config.fleet import check_fleet
from ondol.core.catalog import SiteDoc
from ondol.core.fleet import Fleet as Documents
from ondol.errors import ConfigError, InvalidRequest, NotFound
from ondol.hub import publish
from ondol.hub.admin import HubAdmin
from ondol.hub.liveness import Liveness
from ondol.wire import sync

pytestmark = pytest.mark.anyio

DOCUMENTS: list[dict[str, Any]] = [
    {"kind": "Model", "name": "helper"},
    {
        "kind": "Price", "name": "list", "input_per_mtok": "1", "output_per_mtok": "2", "source": "a test",
        "date": "2026-01-01",
    },
    {
        "kind": "Deployment", "name": "local", "model": "helper", "engine": "fake", "price": "list",
        "sites": {"names": ["shop-*"]},
    },
    {"kind": "Route", "name": "assistant", "deployments": ["local"]},
]  # fmt: skip


async def check(documents: Sequence[Mapping[str, Any]], invited: Mapping[str, SiteDoc]) -> Documents:
    return check_fleet(documents, invited)


class Asking:
    """An operator."""

    def __init__(self, fleet: Fleet) -> None:
        self.admin = HubAdmin(fleet.hub, check)

    async def __call__(self, method: str, path: str, body: Any = None, **query: str) -> Any:
        raw = b"" if body is None else msgspec.json.encode(body)
        return msgspec.json.decode(await self.admin.handle(method, path, query, raw))

    async def state(self, name: str) -> str:
        found: str = (await self("GET", f"sites/{name}"))["state"]
        return found


@pytest.fixture
def ask(fleet: Fleet) -> Asking:
    return Asking(fleet)


async def report(site: Speaker, generation: int, **fields: Any) -> sync.ReportReply:
    return await site.report(generation=generation, **fields)


async def test_apply_makes_generations_and_says_what_changed(fleet: Fleet, ask: Asking) -> None:
    await fleet.joined("shop-1")
    dry = await ask("POST", "diff", {"documents": DOCUMENTS})
    assert (await ask("GET", "generations"))["data"] == []
    first = await ask("POST", "apply", {"documents": DOCUMENTS, "message": "first", "author": "me"})
    assert first["generation"] == 1
    assert first["changes"] == dry["changes"]
    assert {one["change"] for one in first["changes"]} == {"added"}
    again = await ask("POST", "apply", {"documents": DOCUMENTS})
    assert (again["generation"], again["changes"]) == (1, [])
    fewer = [*DOCUMENTS[:3], DOCUMENTS[3] | {"max_output_tokens": 9}]
    second = await ask("POST", "apply", {"documents": fewer})
    assert [(one["kind"], one["change"], one["sites"]) for one in second["changes"]] == [
        ("Route", "changed", 1)
    ]
    back = await ask("POST", "rollback", {})
    assert (back["generation"], back["of"]) == (3, 1)
    now = await ask("GET", "documents")
    assert now == {"generation": 3, "documents": (await ask("GET", "documents", generation="1"))["documents"]}
    listed = (await ask("GET", "generations"))["data"]
    assert [one["number"] for one in listed] == [3, 2, 1]
    assert (listed[2]["message"], listed[2]["author"]) == ("first", "me")


async def test_a_fleet_that_does_not_hold_together_changes_nothing(fleet: Fleet, ask: Asking) -> None:
    await fleet.joined("shop-1")
    broken = [*DOCUMENTS[:3], {"kind": "Route", "name": "assistant", "deployments": ["locale"]}]
    with pytest.raises(ConfigError, match="local"):
        await ask("POST", "apply", {"documents": broken})
    assert fleet.hub.numbers.generation == 0
    assert (await ask("GET", "generations"))["data"] == []


async def test_a_rollback_needs_something_to_go_back_to(fleet: Fleet, ask: Asking) -> None:
    with pytest.raises(NotFound):
        await ask("POST", "rollback", {})
    await fleet.joined("shop-1")
    await ask("POST", "apply", {"documents": DOCUMENTS})
    with pytest.raises(NotFound, match="no other"):
        await ask("POST", "rollback", {})
    with pytest.raises(NotFound, match="the newest are 1"):
        await ask("POST", "rollback", {"generation": 7})
    with pytest.raises(NotFound):
        await ask("GET", "documents", generation="7")
    with pytest.raises(InvalidRequest):
        await ask("GET", "documents", generation="one")


async def test_a_site_is_shown_as_it_is_and_never_as_current_when_it_is_silent(
    fleet: Fleet, ask: Asking
) -> None:
    await fleet.token("shop-1")
    assert await ask.state("shop-1") == "never"
    site = await fleet.joined("shop-2")
    await ask("POST", "apply", {"documents": DOCUMENTS})
    await report(site, 0)
    assert await ask.state("shop-2") == "behind"
    await report(site, 1, deployments=(sync.DeploymentState(name="local", ready=False, why="loading"),))
    shown = await ask("GET", "sites/shop-2")
    assert (shown["state"], shown["why"]) == ("behind", "local: loading")
    await report(site, 1, deployments=(sync.DeploymentState(name="local", ready=True),))
    assert await ask.state("shop-2") == "current"
    fleet.clock.move(sync.STALE_S + 1)
    shown = await ask("GET", "sites/shop-2")
    assert shown["state"] == "stale"
    assert shown["heard_s"] == pytest.approx(sync.STALE_S + 1)
    await report(site, 1)
    assert await ask.state("shop-2") == "current"
    refusing = {"refused": "no such engine", "refused_generation": 2}
    await ask("POST", "apply", {"documents": [*DOCUMENTS[:3], DOCUMENTS[3] | {"max_output_tokens": 9}]})
    await report(site, 1, **refusing)
    shown = await ask("GET", "sites/shop-2")
    assert (shown["state"], shown["why"]) == ("behind", "generation 2 was refused: no such engine")
    await ask("POST", "sites/shop-2/revoke", {})
    assert await ask.state("shop-2") == "revoked"
    assert (await ask("GET", "status"))["sites"] == {"never": 1, "revoked": 1}


async def test_a_replica_that_never_heard_a_site_goes_by_the_database(fleet: Fleet, ask: Asking) -> None:
    site = await fleet.joined("shop-1")
    await report(site, 0)
    fleet.hub.liveness = Liveness()  # as in a replica that has just started
    assert await ask.state("shop-1") == "current"
    fleet.clock.move(sync.STALE_S + 1)
    assert await ask.state("shop-1") == "stale"


async def test_a_key_is_shown_once_and_its_mac_never(fleet: Fleet, ask: Asking) -> None:
    made = await ask("POST", "keys", {"name": "till", "team": "default"})
    before = fleet.hub.numbers.epoch
    listed = await ask("GET", "keys")
    assert [one["id"] for one in listed["data"]] == [made["id"]]
    assert "mac" not in made
    assert "mac" not in listed["data"][0]
    assert "key" not in listed["data"][0]
    assert (await ask("DELETE", f"keys/{made['id']}"))["revoked"] is True
    assert fleet.hub.numbers.epoch > before
    with pytest.raises(NotFound):
        await ask("DELETE", "keys/none")


async def test_an_invitation_wakes_no_watch_and_a_generation_does(fleet: Fleet, ask: Asking) -> None:
    site = await fleet.joined("shop-1")
    lines = fleet.hub.watch(site.header, sync.encode(sync.Watch(instance=site.instance)))
    await anext(lines)
    woken: list[str] = []
    fleet.hub.wake = lambda: woken.append("woken")  # type: ignore[method-assign]
    await fleet.token("shop-2")
    await fleet.hub.look()
    assert woken == []
    await ask("POST", "apply", {"documents": DOCUMENTS})
    assert woken == ["woken"]
    await lines.aclose()  # type: ignore[attr-defined]
    assert fleet.hub.watches == 0


async def test_a_fleet_is_read_once_for_all_that_ask_at_once(fleet: Fleet, ask: Asking) -> None:
    everyone = [await fleet.joined(f"shop-{number}") for number in range(20)]
    await ask("POST", "apply", {"documents": DOCUMENTS})
    read: list[int] = []
    fleet_at = publish.fleet_at

    def counted(tx: Any, generation: int) -> Documents:
        read.append(generation)
        return fleet_at(tx, generation)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publish, "fleet_at", counted)
        replies = await asyncio.gather(*[site.fetch() for site in everyone])
    assert read == [1]
    assert all(one.manifest is not None for one in replies)


async def test_what_changed_since_is_not_served_from_memory(fleet: Fleet, ask: Asking) -> None:
    site = await fleet.joined("shop-1")
    peer = {
        "kind": "Deployment", "name": "next-door", "model": "helper", "engine": "peer", "site": "shop-2",
        "url": "https://shop-2.example:8443", "trusted": True, "price": "list",
    }  # fmt: skip
    await fleet.token("shop-2")
    documents = [*DOCUMENTS[:3], peer, {"kind": "Route", "name": "a", "deployments": ["local", "next-door"]}]
    await ask("POST", "apply", {"documents": documents})
    before = await site.fetch()
    assert not any(b"moved.example" in body for body in before.bodies)
    invitation = {"doc": {
        "name": "shop-2", "tier": "edge", "region": "kr-seoul", "country": "KR", "grid_zone": "KR",
        "address": "https://moved.example:8443",
    }}  # fmt: skip
    await ask("POST", "invites", {"invitations": [invitation]})
    after = await site.fetch()
    assert any(b"moved.example" in body for body in after.bodies)


async def test_what_is_not_there_is_said(ask: Asking) -> None:
    for method, path in (
        ("GET", "nothing"), ("GET", "apply"), ("POST", "sites"), ("PUT", "keys"), ("GET", "rollouts/9"),
        ("POST", "rollouts/9/stop"), ("GET", "sites/nobody"), ("DELETE", "sites/nobody"),
    ):  # fmt: skip
        with pytest.raises(NotFound):
            await ask(method, path)
    for body in (None, 3, {"documents": 1}, {"documents": [], "other": 1}):
        with pytest.raises(InvalidRequest):
            await ask("POST", "apply", body)
