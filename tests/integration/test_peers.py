"""Sites of one fleet ask each other with proofs that no hub is asked about: real hub, three real sites."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest
from tests.hubs import Hub, fleet_of, join, running_hub, start_site, until, write_site
from tests.sites import Answer, Site

from ondol.adapters.ledger_reader import records
from ondol.adapters.site_identity import read_membership
from ondol.core.trust import authorization
from ondol.core.usage import UsageRecord

NAMES = ("shop-a", "shop-b", "shop-c")

RING = """
kind: Team
name: till
---
kind: Model
name: helper
task: chat
---
kind: Price
name: list
input_per_mtok: "1.00"
output_per_mtok: "2.00"
source: made for a test
date: "2026-01-01"
---
kind: Deployment
name: here
sites: {names: [shop-*]}
model: helper
engine: fake
price: list
---
kind: Route
name: local
deployments: [here]
"""

PEER = """
---
kind: Deployment
name: {name}
site: {there}
sites: {{names: [{here}]}}
model: helper
engine: peer
upstream_model: {route}
url: http://127.0.0.1:{port}/v1
"""

ROUTES = """
---
kind: Route
name: around
deployments: [a-to-b, b-to-c, c-to-a]
---
kind: Route
name: next
deployments: [a-asks-b]
"""


class World:
    """A hub and three sites that point at each other: `around` a → b → c → a, `next` a → b's own model."""

    def __init__(self, hub: Hub, sites: dict[str, Site]) -> None:
        self.hub = hub
        self.sites = sites

    def proof(self, name: str, audience: str) -> str:
        """What a site would say to `audience` now: whoever has its disk can."""
        data = self.sites[name].folder / "data"
        return authorization(
            (data / "site.key").read_bytes(), read_membership(data).credential, site=name, audience=audience,
            now_ns=time.time_ns(),
        )  # fmt: skip

    def ask(self, at: str, proof: str, **headers: str) -> Answer:
        body = {"model": "local", "messages": [{"role": "user", "content": "Hello"}]}
        headers = {"x-ondol-origin": "shop-a;req-1;1", "x-ondol-hops": "shop-a"} | headers
        return self.sites[at].call(
            "POST", "/v1/chat/completions", body, key=None, authorization=proof, **headers
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("ring")
    with contextlib.ExitStack() as stack:
        hub = stack.enter_context(running_hub(root / "hub"))
        ports = {name: write_site(root / name, name) for name in NAMES}
        sites = {}
        for name in NAMES:
            join(root / name, hub.invite(name), "--address", f"http://127.0.0.1:{ports[name]}")
            sites[name] = start_site(root / name, ports[name])
            stack.callback(_stop, sites[name])
        text = RING
        for name, here, there, route in (
            ("a-to-b", "shop-a", "shop-b", "around"),
            ("b-to-c", "shop-b", "shop-c", "around"),
            ("c-to-a", "shop-c", "shop-a", "around"),
            ("a-asks-b", "shop-a", "shop-b", "local"),
        ):
            text += PEER.format(name=name, here=here, there=there, route=route, port=ports[there])
        text += ROUTES
        hub.apply(root / "fleet", text)
        for name in NAMES:
            until(lambda site=sites[name]: fleet_of(site)["generation"] == 1, f"{name} runs it")  # type: ignore[misc]
        yield World(hub, sites)


def _stop(site: Site) -> None:
    if site.process.poll() is None:
        site.stop()


def test_a_site_asks_another_in_the_name_of_its_caller_and_it_is_paid_once(world: World) -> None:
    a, b = world.sites["shop-a"], world.sites["shop-b"]
    key = a.new_key(name="app", team="till")
    answer = a.chat("Hello", key=key, model="next")
    assert answer.status == 200, answer.body
    assert answer.headers["x-ondol-site"] == "shop-b"
    request = answer.headers["x-ondol-request-id"]
    [here] = [one for one in _records(a) if one.request_id == request]
    [there] = [one for one in _records(b) if one.origin is not None and one.origin.request_id == request]
    assert (there.team, there.key_id) == ("till", "site:shop-a")
    assert there.origin is not None
    assert (there.origin.site, there.origin.hops) == ("shop-a", ("shop-a",))
    assert (there.cost or 0) > 0
    assert not here.cost


def test_a_ring_of_sites_is_left_after_one_round(world: World) -> None:
    answer = world.sites["shop-a"].chat("Hello", model="around")
    assert answer.status == 503, answer.body
    asked = {name: _around(site) for name, site in world.sites.items()}
    assert [len(records) for records in asked.values()] == [1, 1, 1], "every site was asked once"
    origins = [None if one.origin is None else one.origin.hops for [one] in asked.values()]
    assert origins == [None, ("shop-a",), ("shop-a", "shop-b")]
    assert all(one.outcome != "completed" and not one.cost for [one] in asked.values())


def _around(site: Site) -> list[UsageRecord]:
    return [one for one in _records(site) if one.route == "around"]


def _records(site: Site) -> list[UsageRecord]:
    return list(records(site.folder / "data" / "ledger.db"))


def test_a_site_is_let_in_by_its_own_proof_alone(world: World) -> None:
    good = world.proof("shop-a", "shop-b")
    assert world.ask("shop-b", good).status == 200
    assert world.ask("shop-c", good).status == 401, "it was made for shop-b"
    assert world.ask("shop-b", world.proof("shop-a", "hub")).status == 401
    assert world.ask("shop-b", good[:-12] + "AAAAAAAAAAAA").status == 401
    assert world.ask("shop-b", good, **{"x-ondol-origin": "shop-c;req-1;1"}).status == 403
    administration = world.sites["shop-b"].call("GET", "/v1/ondol/keys", key=None, authorization=good)
    assert administration.status == 403, "a peer administers nothing"


def test_the_whole_fleet_goes_on_when_the_hub_is_away_and_a_revoked_site_is_out_when_it_is_back(
    world: World,
) -> None:
    a, b, c = (world.sites[name] for name in NAMES)
    world.hub.kill()
    assert a.chat("Hello", model="next").status == 200
    world.hub.restart()
    stolen = world.proof("shop-c", "shop-b")
    asked = {"x-ondol-origin": "shop-c;req-1;1", "x-ondol-hops": "shop-c"}
    assert world.ask("shop-b", stolen, **asked).status == 200
    for site in (a, b):
        until(lambda site=site: fleet_of(site)["state"] == "joined", "it is joined again", limit_s=60)  # type: ignore[misc]
    world.hub.ondol("sites", "revoke", "shop-c")
    until(lambda: world.ask("shop-b", stolen, **asked).status == 401, "shop-c is out at shop-b", limit_s=60)
    # It joins again as another machine would: by its name it is in, and the stolen key is not.
    c.stop()
    fresh = c.folder.parent / "shop-c-again"
    port = write_site(fresh, "shop-c")
    join(fresh, world.hub.invite("shop-c"))
    world.sites["shop-c"] = start_site(fresh, port)
    try:
        until(
            lambda: world.ask("shop-b", world.proof("shop-c", "shop-b"), **asked).status == 200,
            "shop-b has heard that shop-c is in again", limit_s=60,
        )  # fmt: skip
        assert world.ask("shop-b", stolen, **asked).status == 401
    finally:
        world.sites["shop-c"].stop()
