"""Who could answer a caller: by distance, in the same country, where the key is known."""

from __future__ import annotations

from typing import Any

import msgspec

from ondol.core.catalog import SiteDoc
from ondol.gateway.nearest import LeftOut, nearest


class Seen(msgspec.Struct):
    """What a probe says."""

    rtt_ms: float | None = 1.0
    ready: bool = True
    known: bool = True
    why: str = ""


def site(name: str, **fields: Any) -> SiteDoc:
    given = {
        "tier": "edge",
        "region": "kr-seoul",
        "country": "KR",
        "grid_zone": "KR",
        "address": f"https://{name}",
    }
    return SiteDoc(name=name, **(given | fields))


OWN = site("home", neighbours=("far", "near"))
SITES = {one.name: one for one in (OWN, site("far"), site("near"))}
HEALTH = {"far": Seen(9.0), "near": Seen(2.0)}


def ask(**changed: Any) -> Any:
    given: dict[str, Any] = {
        "own": OWN, "problem": None, "sites": SITES, "health": HEALTH, "known_only_here": False,
    }  # fmt: skip
    return nearest(**(given | changed))


def names(answer: Any) -> list[str]:
    return [one.site for one in answer.data]


def why(answer: Any) -> dict[str, str]:
    return {one.site: one.why for one in answer.left_out}


def test_the_site_itself_and_then_by_distance() -> None:
    answer = ask()
    assert names(answer) == ["home", "near", "far"]
    assert [one.rtt_ms for one in answer.data] == [0.0, 2.0, 9.0]
    assert answer.data[1].address == "https://near"
    assert answer.left_out == ()


def test_a_site_that_cannot_answer_says_so_of_itself() -> None:
    answer = ask(problem="draining")
    assert names(answer) == ["near", "far"]
    assert answer.left_out == (LeftOut(site="home", why="draining"),)


def test_the_policy_leaves_neighbours_out() -> None:
    sites = SITES | {"near": site("near", country="JP"), "far": site("far", takeover=False)}
    assert why(ask(sites=sites)) == {
        "near": "it is in JP, and callers of home stay in KR", "far": "its Site document says `takeover: false`",
    }  # fmt: skip
    assert "has no `address`" in why(ask(sites=SITES | {"near": site("near", address=None)}))["near"]


def test_a_key_of_one_site_goes_nowhere_else() -> None:
    answer = ask(known_only_here=True)
    assert names(answer) == ["home"]
    assert all("known there alone" in one for one in why(answer).values())


def test_whoever_is_silent_or_was_not_heard_is_left_out() -> None:
    answer = ask(health={"near": Seen(2.0, ready=False, why="connection refused")})
    assert names(answer) == ["home"]
    assert why(answer) == {
        "far": "it has not been heard yet",
        "near": "it does not answer: connection refused",
    }
    assert why(ask(health={"near": Seen(None)}))["near"] == "it has not been heard yet"
