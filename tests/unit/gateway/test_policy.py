"""May they: which route a name means, who may use it, and what limits say."""

from __future__ import annotations

import pytest

from ondol.core.catalog import Catalog, GatewayDoc, RouteDoc, SiteDoc, TeamDoc
from ondol.core.identity import Principal
from ondol.errors import Forbidden, RateLimited, TooLarge, UnknownModel
from ondol.gateway.policy import admit, find_route, may_use
from ondol.gateway.quota import Quotas


def catalog(*routes: RouteDoc, team: TeamDoc | None = None) -> Catalog:
    return Catalog(
        site=SiteDoc(name="here", tier="edge", region="r", country="KR", grid_zone="KR"),
        gateway=GatewayDoc(name="gateway"), tenants={}, teams={} if team is None else {team.name: team},
        budgets={}, sites={}, models={}, deployments={}, routes={one.name: one for one in routes}, prices={},
        exchange={}, grids={},
    )  # fmt: skip


def route(name: str, *teams: str) -> RouteDoc:
    return RouteDoc(name=name, deployments=("d",), teams=teams)


def caller(*routes: str, kind: str = "user", team: str = "shop") -> Principal:
    return Principal(key_id="k", tenant="default", team=team, routes=routes, kind=kind)


@pytest.mark.parametrize(
    ("routes", "teams", "kind", "allowed"),
    [
        ((), (), "user", True),
        (("assistant",), ("shop",), "user", True),
        (("other",), (), "user", False),
        ((), ("other",), "user", False),
        ((), ("other", "shop"), "user", True),
        ((), ("other",), "admin", True),
        (("other",), (), "admin", False),
        ((), ("other",), "peer", False),
    ],
)
def test_a_key_and_a_route_must_both_allow(
    routes: tuple[str, ...], teams: tuple[str, ...], kind: str, allowed: bool
) -> None:
    assert may_use(route("assistant", *teams), caller(*routes, kind=kind)) is allowed


def test_a_name_finds_its_route() -> None:
    wanted = route("assistant")
    assert find_route(catalog(wanted, route("other")), "assistant", caller()) is wanted


def test_an_unknown_name_gets_the_nearest_that_the_caller_may_use() -> None:
    of = catalog(route("assistant"), route("assistent", "others"), route("translate"))
    with pytest.raises(UnknownModel, match="'asistant' does not exist; nearest: assistant") as caught:
        find_route(of, "asistant", caller())
    assert "assistent" not in caught.value.message
    assert caught.value.param == "model"


def test_a_name_like_none_gets_some_that_exist_and_a_long_one_is_cut() -> None:
    with pytest.raises(UnknownModel, match="nearest: assistant, translate$") as caught:
        find_route(catalog(route("translate"), route("assistant")), "Q" * 100_000, caller())
    assert len(caught.value.message) < 300


def test_whoever_may_use_nothing_is_told_so_and_no_names() -> None:
    with pytest.raises(UnknownModel, match="this key may use no route") as caught:
        find_route(catalog(route("secret-project", "others")), "secret-projekt", caller())
    assert "secret-project'" not in caught.value.message


def test_a_route_of_another_team_is_forbidden_and_says_whom_to_ask() -> None:
    with pytest.raises(Forbidden, match="administrator of team 'shop'") as caught:
        find_route(catalog(route("assistant", "others")), "assistant", caller())
    assert caught.value.param == "model"


def test_limits_say_when_to_come_again_or_that_it_never_passes() -> None:
    quotas, of = Quotas(), catalog(team=TeamDoc(name="shop", tokens_per_min=100))
    assert admit(quotas, of, caller(), tokens=100, now_ns=0).tokens == 100
    with pytest.raises(RateLimited) as limited:
        admit(quotas, of, caller(), tokens=50, now_ns=0)
    assert limited.value.retry_after_s == 30.0
    with pytest.raises(TooLarge, match="100") as never:
        admit(quotas, of, caller(), tokens=101, now_ns=0)
    assert never.value.retry_after_s is None
    assert admit(quotas, of, caller(team="unknown"), tokens=10**9, now_ns=0).tokens_left is None
