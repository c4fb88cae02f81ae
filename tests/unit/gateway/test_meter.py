"""What attempts cost: own money apart from a peer's, and the unknown never taken for zero."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol.core.catalog import DeploymentDoc, Grid, RouteDoc, SiteDoc
from ondol.core.energy import MEASURED, CpuPower, EnergyModel
from ondol.core.identity import Hints, Origin, Principal
from ondol.core.inference import DataClass, InferenceRequest, Receipt, Task, Usage
from ondol.core.money import Money, Price
from ondol.core.usage import Attempt, Decision
from ondol.errors import EngineFailed
from ondol.gateway.call import Ask, Call, merged_tags
from ondol.gateway.meter import Spent, Terms, attempt, nothing, price_of, record_of, totals

SITE = SiteDoc(name="here", tier="edge", region="r", country="KR", grid_zone="KR")
PRICE = Price(id="p@1", currency="USD", input=1_000_000, output=2_000_000, request=7)
ENERGY = EnergyModel(local=True, cpu=CpuPower(watts_min=1, watts_max=10, method="cpu", source="s"))
GRID = Grid(zone="KR", grams_per_kwh=400.0, year=2024, source="s")
REQUEST = InferenceRequest(task=Task.CHAT, route="r", body={}, prompt_tokens=11, prompt_tokens_max=50)
RECEIPT = Receipt(
    site="hub", request_id="r9", model="hub-model", deployment="hd", cost=Money(500, "USD"), energy_uj=60,
    carbon_ng=70,
)  # fmt: skip


def terms(engine: Any = "llamacpp", **changes: Any) -> Terms:
    doc = DeploymentDoc(name="d", site="here", model="m", engine=engine)
    given: dict[str, Any] = {
        "deployment": doc,
        "site": SITE,
        "model": "m",
        "price": PRICE,
        "energy": ENERGY,
        "grid": GRID,
    }
    return Terms(**(given | {"threads": 2} | changes))


def test_a_local_answer_has_price_energy_and_carbon() -> None:
    done = attempt(
        terms(), REQUEST, Spent(outcome="ok", usage=Usage(10, 5)), ttft_ns=3, total_ns=10**9, concurrency=2.0
    )
    assert (done.cost, done.currency, done.price) == (10 + 10 + 7, "USD", "p@1")
    # Two threads at 10 W for a second, shared by two.
    assert (done.energy_uj, done.energy_method) == (10_000_000, "cpu")
    assert (done.carbon_ng, done.carbon_source) == (1_111_111, "KR 2024")
    assert (done.site, done.model, done.engine, done.ttft_ns, done.total_ns) == (
        "here",
        "m",
        "llamacpp",
        3,
        10**9,
    )
    assert (done.peer_cost, done.peer_request) == (None, None)


def test_what_the_machines_meter_says_goes_before_the_model() -> None:
    done = attempt(
        terms(), REQUEST, Spent(outcome="ok", usage=Usage(10, 5)), total_ns=10**9, measured_uw_per_thread=3
    )
    assert (done.energy_uj, done.energy_method) == (6, MEASURED)


def test_a_peer_pays_for_itself_and_only_its_receipt_is_noted() -> None:
    done = attempt(
        terms("peer"),
        REQUEST,
        Spent(outcome="ok", usage=Usage(10, 5), receipt=RECEIPT, model="x"),
        total_ns=10**9,
    )
    assert (done.cost, done.currency, done.price, done.energy_uj, done.carbon_ng) == (None,) * 5
    assert (done.site, done.model) == ("hub", "hub-model")
    assert (done.peer_request, done.peer_cost, done.peer_currency) == ("r9", 500, "USD")
    assert (done.peer_energy_uj, done.peer_carbon_ng) == (60, 70)


@pytest.mark.parametrize(
    ("outcome", "pieces", "usage"),
    [
        ("ok", 4, Usage(11, 4, estimated=True)),
        ("failed", 4, Usage(11, 4, estimated=True)),
        ("cancelled", 0, Usage(11, 0, estimated=True)),
        ("deadline", 2, Usage(11, 2, estimated=True)),
        ("deadline", 0, Usage()),
        ("unavailable", 0, Usage()),
        ("rejected", 0, Usage()),
    ],
)
def test_what_an_engine_did_not_say_is_estimated_from_what_was_seen(
    outcome: str, pieces: int, usage: Usage
) -> None:
    assert attempt(terms(), REQUEST, Spent(outcome=outcome, pieces=pieces)).usage == usage


def test_without_price_grid_or_time_nothing_is_made_up() -> None:
    done = attempt(terms(price=None, grid=None), REQUEST, Spent(outcome="ok", usage=Usage(1, 1)), total_ns=5)
    assert (done.cost, done.price, done.carbon_ng, done.carbon_source) == (None,) * 4
    assert done.energy_uj is not None
    assert attempt(terms(), REQUEST, Spent(outcome="ok", usage=Usage(1, 1))).energy_uj is None
    assert price_of(None, Usage(1, 1)) is None


TOKENS = st.integers(0, 1000)
OWN = st.builds(
    Attempt, deployment=st.just("d"), engine=st.just("upstream"), site=st.just("here"), outcome=st.just("ok"),
    usage=st.builds(Usage, TOKENS, TOKENS), cost=st.none() | TOKENS, energy_uj=st.none() | TOKENS,
    carbon_ng=st.none() | TOKENS,
)  # fmt: skip
PEER = st.builds(
    Attempt, deployment=st.just("p"), engine=st.just("peer"), site=st.just("hub"), outcome=st.just("ok"),
    usage=st.builds(Usage, TOKENS, TOKENS), peer_request=st.none() | st.just("r9"), peer_cost=st.none() | TOKENS,
    peer_currency=st.sampled_from(["USD", "KRW"]), peer_energy_uj=st.none() | TOKENS,
    peer_carbon_ng=st.none() | TOKENS,
).map(lambda a: a if a.peer_request else msgspec.structs.replace(a, peer_cost=None, peer_energy_uj=None, peer_carbon_ng=None))  # fmt: skip


def known(values: list[int | None]) -> int | None:
    return None if all(v is None for v in values) else sum(v or 0 for v in values)


@given(st.lists(OWN | PEER, max_size=4))
def test_own_excludes_peers_and_shown_includes_them(attempts: list[Attempt]) -> None:
    found = totals(attempts, "USD")
    assert found.cost == Money(sum(a.cost or 0 for a in attempts), "USD")
    assert found.energy_uj == known([a.energy_uj for a in attempts])
    assert found.carbon_ng == known([a.carbon_ng for a in attempts])
    assert found.shown_energy_uj == known([v for a in attempts for v in (a.energy_uj, a.peer_energy_uj)])
    assert found.shown_carbon_ng == known([v for a in attempts for v in (a.carbon_ng, a.peer_carbon_ng)])
    used = [a for a in attempts if a.usage.input_tokens or a.usage.output_tokens]
    assert found.unpriced == any(a.cost is None and a.engine != "peer" for a in used)
    unknown = [a for a in used if a.cost is None and (a.peer_cost is None or a.peer_currency != "USD")]
    foreign = [a for a in attempts if a.peer_cost and a.peer_currency != "USD"]
    if unknown or foreign:
        assert found.shown_cost is None
    else:
        peers = sum(a.peer_cost or 0 for a in attempts)
        assert found.shown_cost == Money(found.cost.amount + peers, "USD")
    assert found.usage == (attempts[-1].usage if attempts else Usage())


def test_a_hit_of_the_cache_is_free() -> None:
    free = nothing(Usage(3, 4), "KRW")
    assert (free.usage, free.cost, free.shown_cost) == (Usage(3, 4), Money(0, "KRW"), Money(0, "KRW"))
    assert (free.energy_uj, free.carbon_ng, free.unpriced) == (0, 0, False)
    assert (free.shown_energy_uj, free.shown_carbon_ng) == (0, 0)


def call(**changes: Any) -> Call:
    ask = Ask(task=Task.CHAT, raw=b"{}", header=lambda _: None, received_ns=100, wall_ns=5_000)
    origin = Origin(site="hub", request_id="r9", attempt=0)
    one = Call(
        ask=ask, request_id="req-1",
        principal=Principal(key_id="k", tenant="t", team="shop", origin=origin), request=REQUEST,
        route=RouteDoc(name="r", deployments=("d",)), hints=Hints(tags=(("a", "1"),)),
        data_class=DataClass.PUBLIC, deadline_ns=10**9,
    )  # fmt: skip
    one.decision = Decision(code="fastest", chosen="d")
    for name, value in changes.items():
        setattr(one, name, value)
    return one


def test_the_record_of_a_request_has_all_that_was_found_out() -> None:
    done = attempt(terms(), REQUEST, Spent(outcome="ok", usage=Usage(10, 5)), total_ns=10**9)
    one = call(attempts=[done], engine_ns=700)
    found = record_of(
        one, totals([done], "USD"), outcome="completed", status=200, site="here", gateway="g", now_ns=1_100,
        user="pseudonym", clock_offset_ns=-7,
    )  # fmt: skip
    assert (found.request_id, found.time_ns, found.tenant, found.team, found.key_id) == (
        "req-1",
        5_000,
        "t",
        "shop",
        "k",
    )
    assert (found.model, found.deployment, found.answered_by) == ("m", "d", "here")
    assert (found.cost, found.currency, found.energy_uj) == (27, "USD", done.energy_uj)
    assert (found.total_ns, found.overhead_ns, found.ttft_ns) == (1_000, 300, None)
    assert (found.data_class, found.tags, found.user) == ("public", (("a", "1"),), "pseudonym")
    assert found.origin == one.principal.origin
    assert found.attempts == (done,)
    assert found.clock_offset_ns == -7


def test_the_overhead_of_a_stream_is_that_before_its_first_byte() -> None:
    sums = totals([], "USD")
    found = record_of(
        call(ttft_ns=900, engine_ns=600), sums, outcome="failed", status=200, site="here", gateway="g",
        now_ns=9_000, error=EngineFailed("broke"),
    )  # fmt: skip
    assert (found.overhead_ns, found.ttft_ns, found.error) == (300, 900, "engine_failed")
    assert (found.model, found.deployment, found.answered_by) == ("", "", "")


def test_tags_of_the_header_win_and_all_are_sorted() -> None:
    assert merged_tags((), ()) == ()
    assert merged_tags((("b", "1"), ("a", "2")), ()) == (("a", "2"), ("b", "1"))
    assert merged_tags((("b", "1"), ("a", "2")), (("b", "9"), ("c", "3"))) == (
        ("a", "2"),
        ("b", "9"),
        ("c", "3"),
    )
