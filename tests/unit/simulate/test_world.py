"""Whole runs on a small fleet: what policies do, what comes of it, and that no policy beats the optimum's bound."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ondol.core.catalog import DeploymentDoc, ModelDoc, RouteDoc, SiteDoc
from ondol.core.fleet import Fleet
from ondol.core.inference import Objective
from ondol.core.money import Price
from ondol.core.route_terms import CachePolicy
from ondol.errors import ConfigError
from ondol.simulate.bound_terms import terms_of
from ondol.simulate.compare import NAMES, compare
from ondol.simulate.fleet import FleetModel, Known, Limits, Link, Region, Setting, model_of
from ondol.simulate.generate import Law, made
from ondol.simulate.lagrangian import lagrangian
from ondol.simulate.optimum import windowed
from ondol.simulate.outcome import Outcome, outcome
from ondol.simulate.policies import POLICIES, Fixed, Ours
from ondol.simulate.service import Service
from ondol.simulate.trace import Trace, TraceError
from ondol.simulate.workload import Workload, lay
from ondol.simulate.world import CACHED, REFUSED, Run, run

LIMITS = Limits(first_token_ms=2000, total_ms=20_000)
EDGE = Service(
    prefill_tokens_per_s=3000, step_ms=10, step_ms_per_sequence=0.5, decode_while_prefill=0.5, slots=32,
    kv_blocks=100, source="test",
)  # fmt: skip
CLOUD = Service(prefill_tokens_per_s=20_000, step_ms=8, overhead_ms=200, elastic=True, source="test")


def fleet(*, cache: CachePolicy | None = None, setting: Setting | None = None) -> FleetModel:
    """A shop with a machine and a vendor that costs ten times as much."""
    sites = {
        "shop": SiteDoc(name="shop", tier="edge", region="kr", country="KR", grid_zone="KR"),
        "vendor": SiteDoc(name="vendor", tier="cloud", region="us", country="US", grid_zone="US", rtt_ms=100),
    }
    deployments = {
        "here": DeploymentDoc(name="here", site="shop", model="m", engine="upstream", url="http://127.0.0.1:1/v1",
                              price="own", parallel=32, context_tokens=8000, energy_j_per_token=1.0),
        "there": DeploymentDoc(name="there", site="vendor", model="m", engine="upstream", url="https://x.test/v1",
                               price="dear", energy_j_per_token=2.0),
    }  # fmt: skip
    route = RouteDoc(name="ask", deployments=("here", "there"), objective=Objective.CHEAP, cache=cache)
    prices = {
        "own": Price(id="own", currency="USD", input=10**8, output=4 * 10**8),
        "dear": Price(id="dear", currency="USD", input=10**9, output=4 * 10**9),
    }
    return model_of(
        Fleet(sites=sites, models={"m": ModelDoc(name="m")}, deployments=deployments, routes={"ask": route}),
        Known(prices=prices, exchange={}, grids={"KR": 400.0, "US": 100.0}),
        setting or Setting(entries=("shop",), limits=LIMITS, services={"here": EDGE, "there": CLOUD}),
    )


def load(requests: int = 400, rate: float = 4.0, **fields: object) -> Trace:
    return made(Law(requests=requests, rate=rate, **fields), 5)  # type: ignore[arg-type]  # checked by Law


def played(policy: str, trace: Trace, model: FleetModel) -> tuple[Workload, Run, Outcome]:
    work = lay(trace, model)
    result = run(work, POLICIES[policy](work, LIMITS))
    return work, result, outcome(policy, work, result, LIMITS)


def test_times_cost_and_carbon_of_one_request_by_hand() -> None:
    trace = Trace(name="t", times=[0.0], prompts=[1000], outputs=[11])
    _, result, one = played("all-cloud", trace, fleet())
    assert result.first[0] == pytest.approx(50 + 200 + 50 + 50)  # half the way, overhead, reading, back
    assert one.total_ms_mean == pytest.approx(350 + 10 * 8)
    assert one.cost_usd == pytest.approx(1000 * 1e-6 + 11 * 4e-6)
    assert one.carbon_g == pytest.approx(11 * 2.0 * 100 / 3.6e6)
    assert one.network_ms_p50 == pytest.approx(100)
    assert one.hit_rate is None and one.prefix_hit_rate is None
    assert one.places == {"there@vendor": 1}


def test_each_baseline_goes_where_it_says() -> None:
    trace = load()
    assert played("all-cloud", trace, fleet())[2].places.keys() == {"there@vendor"}
    assert played("all-edge", trace, fleet())[2].places.keys() == {"here@shop"}
    assert played("round-robin", trace, fleet())[2].places == {"here@shop": 200, "there@vendor": 200}


def test_what_must_stay_stays_under_every_policy_and_the_cloud_refuses_it() -> None:
    trace = load(private=0.3)
    assert trace.classes is not None
    private = [index for index, one in enumerate(trace.classes) if one == "confidential"]
    model = fleet()
    for policy in POLICIES:
        work, result, one = played(policy, trace, model)
        stayed = {result.option[index] for index in private}
        away = {option.number for option in work.fleet.options if not option.local}
        assert private and not stayed & away, policy
        if policy == "all-cloud":
            assert stayed == {REFUSED}
            assert (
                one.refused == len(private) and one.violations is not None and one.violations >= len(private)
            )


def test_ours_learns_to_fill_the_cheap_place_and_keeps_the_limits() -> None:
    trace = load(4_000, rate=4.0, burst=8.0)
    model = fleet()
    edge, ours, cloud = (played(name, trace, model)[2] for name in ("all-edge", "ours", "all-cloud"))
    assert edge.violations is not None and edge.violations > 400
    assert ours.violations is not None and ours.violations <= 80
    assert ours.cost_usd is not None and cloud.cost_usd is not None
    assert ours.cost_usd < 0.45 * cloud.cost_usd


def test_a_run_repeats_to_the_last_bit() -> None:
    one, two = (played("ours", load(burst=5.0), fleet()) for _ in range(2))
    assert one[1].first == two[1].first and one[1].option == two[1].option
    assert one[2] == two[2]


def test_exact_repeats_are_answered_from_the_cache_for_nothing() -> None:
    trace = load(repeats=0.4)
    work, result, one = played("all-cloud", trace, fleet(cache=CachePolicy(ttl_s=600)))
    hits = [index for index, option in enumerate(result.option) if option == CACHED]
    assert one.hit_rate is not None and 0.25 < one.hit_rate < 0.42
    contents = work.trace.contents
    assert contents is not None
    assert all(contents[index] in contents[:index] for index in hits)
    assert played("all-cloud", trace, fleet())[2].hit_rate is None
    never = played("all-cloud", trace, fleet(cache=CachePolicy(ttl_s=0.001)))[2]
    assert never.hit_rate is not None and never.hit_rate < 0.01  # but for those within a millisecond


def test_growing_conversations_hit_the_prefix_cache() -> None:
    one = played("all-edge", load(turns=5, prompt=600, rate=1.0), fleet())[2]
    assert one.prefix_hit_rate is not None and one.prefix_hit_rate > 0.4


def test_a_trace_with_nowhere_to_go_is_refused_with_its_first_request() -> None:
    model = fleet()
    trace = load(10)
    with pytest.raises(TraceError, match=r"row 4 .*nowhere to go.*region 'mars'"):
        lay(msgspec.structs.replace(trace, regions=[None] * 3 + ["mars"] * 7), model)
    with pytest.raises(TraceError, match=r"row 1 .*does not serve the route 'other'.*ask"):
        lay(msgspec.structs.replace(trace, routes=["other"] * 10), model)
    long = msgspec.structs.replace(trace, prompts=[*trace.prompts[:2], 9000, *trace.prompts[3:]])
    lay(long, model)
    with pytest.raises(TraceError, match=r"row 3 .*prompt is too long.*may not leave"):
        lay(msgspec.structs.replace(long, classes=["restricted"] * 10), model)


def test_ways_are_those_of_the_setting() -> None:
    setting = Setting(
        entries=("shop",), limits=LIMITS, services={"here": EDGE, "there": CLOUD}, bytes_per_token=4,
        links=(Link(a="vendor", b="shop", rtt_ms=60, mbit_per_s=1, usd_per_gb=1000, source="test"),),
        regions={"far": Region(site="shop", rtt_ms=30)},
    )  # fmt: skip
    trace = Trace(name="t", times=[0.0], prompts=[1000], outputs=[1], regions=["far"])
    _, _, one = played("all-cloud", trace, fleet(setting=setting))
    assert one.ttft_ms_p50 == pytest.approx(30 + 60 + 32 + 200 + 50)  # 4,000 bytes at 1 Mbit/s: 32 ms
    assert one.cost_usd == pytest.approx(1000 * 1e-6 + 4e-6 + 1001 * 4 / 1e9 * 1000)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (Setting(entries=("nowhere",)), "entries: found 'nowhere'; allowed: shop, vendor"),
        (Setting(services={"x": EDGE}), "services: found 'x'"),
        (Setting(route="x"), "route: found 'x'; allowed: ask"),
    ],
)
def test_a_setting_that_names_what_is_not_there_is_refused(setting: Setting, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        fleet(setting=setting)
    assert words in str(caught.value)


def test_what_is_assumed_is_said() -> None:
    assert any("here: no service figures" in note for note in fleet(setting=Setting()).notes)
    assert fleet().notes == ()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([2.0, 10.0, 40.0]), st.booleans())
def test_no_policy_within_the_limits_beats_the_bounds(seed: int, rate: float, cached: bool) -> None:
    trace = made(Law(requests=120, rate=rate, repeats=0.3, turns=2), seed)
    work = lay(trace, fleet(cache=CachePolicy() if cached else None))
    terms = terms_of(work, LIMITS)
    best, loose = windowed(work, terms, 1), lagrangian(terms, LIMITS, 1)
    assert loose <= best.bound_usd * (1 + 1e-6)
    for name, make in POLICIES.items():
        one = outcome(name, work, run(work, make(work, LIMITS)), LIMITS)
        if one.violations is not None and one.violations <= 1:
            assert one.cost_usd is not None and one.cost_usd >= best.bound_usd * (1 - 1e-6), name


def test_the_bound_is_the_cheapest_where_there_is_room_and_its_plan_is_played() -> None:
    work = lay(load(100, rate=0.5), fleet())
    compared = compare(work, NAMES)
    by = {one.policy: one for one in compared.outcomes}
    assert list(by) == list(NAMES)
    assert by["optimum"].cost_usd == pytest.approx(by["all-edge"].cost_usd, rel=0.006)
    assert by["all-edge"].gap_to_optimum == pytest.approx(0, abs=0.006)
    assert by["all-cloud"].gap_to_optimum == pytest.approx(9, rel=0.01)
    assert by["optimum"].ttft_ms_p50 is not None
    assert len(compared.first_ms["ours"]) == 101


def test_a_plan_is_followed_and_gateways_keep_what_they_learnt() -> None:
    work = lay(load(50), fleet())
    plan = [work.able[index][index % 2] for index in range(50)]
    assert run(work, Fixed(work, plan)).option.tolist() == [option.number for option in plan]
    first = Ours(work, LIMITS)
    run(work, first)
    before = first.gateways["shop"].decisions
    run(work, Ours(work, LIMITS, gateways=first.gateways))
    assert first.gateways["shop"].decisions == 2 * before == 100
