"""Endpoints as they run: snapshots for the choice, and what an attempt leaves behind."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol.adapters.clock import SystemClock
from ondol.core.catalog import DeploymentDoc, Grid, ModelDoc, SiteDoc
from ondol.core.energy import MEASURED, CpuPower, EnergyModel
from ondol.core.inference import InferenceRequest, Task, Usage
from ondol.core.money import Money, Price
from ondol.engines.fake import FakeEngine
from ondol.gateway.breaker import Breaker
from ondol.gateway.endpoints import PARALLEL_UNSTATED, Endpoint, Power, deadline
from ondol.gateway.meter import Spent, Terms
from ondol.gateway.predict import Predictor, Prior

MS = 1_000_000
S = 1_000_000_000
SITE = SiteDoc(name="here", tier="edge", region="r", country="KR", grid_zone="KR")
PRICE = Price(id="p", currency="USD", input=1_000_000_000, output=2_000_000_000, cached=10, request=500)
ENERGY = EnergyModel(local=True, cpu=CpuPower(watts_min=1, watts_max=10, method="cpu", source="s"))
GRID = Grid(zone="KR", grams_per_kwh=400.0, year=2024, source="s")
REQUEST = InferenceRequest(
    task=Task.CHAT, route="r", body={}, prompt_tokens=100, prompt_tokens_max=400, n=2, choices=2, answers=2
)
OK = Spent(outcome="ok", usage=Usage(100, 11))


def endpoint(*, here: str = "here", quality: float | None = None, **changes: Any) -> Endpoint:
    doc = DeploymentDoc(
        name="d",
        site="here",
        model="m",
        engine="fake",
        parallel=changes.pop("parallel", 2),
        queue=3,
        quality=quality,
    )
    given: dict[str, Any] = {
        "deployment": doc,
        "site": SITE,
        "model": "m",
        "price": PRICE,
        "energy": ENERGY,
        "grid": GRID,
    }
    predictor = Predictor()
    predictor.add("d", Prior(first_token_ms=10, prompt_ms_per_1k=100, token_ms=1), parallel=2)
    return Endpoint(
        terms=Terms(**(given | {"threads": 2} | changes)), model=ModelDoc(name="m", quality=0.25), site=SITE,
        engine=FakeEngine(model="m", clock=SystemClock()), breaker=Breaker(lambda: 0.5),
        predictor=predictor, here=here, context_tokens=2048, power=Power(),
    )  # fmt: skip


def test_the_worst_case_is_the_bound_of_the_prompt_and_every_choice_at_full_length() -> None:
    assert endpoint().worst(REQUEST, 50) == Money(2 * 400_000 + 2 * 50 * 2_000 + 500, "USD")
    assert endpoint(price=None).worst(REQUEST, 50) is None


def test_a_snapshot_says_what_is_expected() -> None:
    found = endpoint().candidate(REQUEST, 50, 0, affordable=True)
    assert (found.name, found.site, found.local, found.task) == ("d", "here", True, Task.CHAT)
    assert (found.context_tokens, found.parallel, found.queue, found.in_flight) == (2048, 2, 3, 0)
    # The prior: 10 ms + 100 tokens at 100 ms a thousand; a quarter of 2 x 50 tokens at 1 ms.
    assert found.ttft_ms == pytest.approx(20)
    assert found.total_ms == pytest.approx((20 + 25) * 0.7)
    assert found.cost == pytest.approx(500e-9 + 100 * 1e-6 + 25 * 2e-6)
    assert found.carbon_g == pytest.approx(0.045 * 2 * 10 / 3.6e6 * 400, rel=1e-3)
    assert (found.quality, found.affordable, found.problem) == (0.25, True, None)


def test_what_is_unknown_stays_unknown() -> None:
    found = endpoint(price=None, grid=None, quality=0.75).candidate(REQUEST, 50, 0, affordable=False)
    assert found.cost is found.carbon_g is None
    assert (found.quality, found.affordable) == (0.75, False)
    assert endpoint(energy=None).candidate(REQUEST, 50, 0, affordable=True).carbon_g is None
    assert endpoint(parallel=None).parallel == PARALLEL_UNSTATED
    assert not endpoint(here="elsewhere").local


def test_an_open_breaker_is_a_problem_until_it_rested() -> None:
    one = endpoint()
    for _ in range(5):
        ticket = one.breaker.begin(0)
        assert ticket is not None
        one.begin(ticket, 0).end(REQUEST, 50, Spent(outcome="unavailable"), 1)
    problem = one.candidate(REQUEST, 50, 2, affordable=True).problem
    assert problem is not None
    assert "5 failures in a row" in problem
    assert one.candidate(REQUEST, 50, 2 * S, affordable=True).problem is None


def test_an_engine_that_asks_for_rest_gets_it() -> None:
    one = endpoint()
    one.begin(0, 0).end(REQUEST, 50, Spent(outcome="unavailable", retry_after_s=9.0), 0)
    assert "asked for 9 s of rest" in (one.candidate(REQUEST, 50, 8 * S, affordable=True).problem or "")
    assert one.candidate(REQUEST, 50, 9 * S, affordable=True).problem is None


def test_waiting_counts_from_the_first_that_finds_no_slot() -> None:
    one = endpoint()
    calm = one.candidate(REQUEST, 50, 0, affordable=True).ttft_ms
    one.begin(0, 0)
    assert one.candidate(REQUEST, 50, 0, affordable=True).ttft_ms == calm
    one.begin(0, 0)
    assert one.candidate(REQUEST, 50, 0, affordable=True).ttft_ms > calm


@given(st.lists(st.sampled_from(["begin", "ok", "failed", "cancelled", "unavailable"]), max_size=30))
def test_whatever_happens_each_is_counted_out_once(steps: list[str]) -> None:
    one, running = endpoint(), []
    for now, step in enumerate(steps):
        if step == "begin":
            running.append(one.begin(0, now))
        elif running:
            done = running.pop(0).end(REQUEST, 50, Spent(outcome=step, usage=Usage(1, 1)), now)
            assert (done.outcome, done.cost is None) == (step, False)
        assert one.in_flight == len(running)


def test_an_attempt_is_metered_and_taught_to_the_predictions() -> None:
    one = endpoint()
    running = one.begin(0, 0)
    running.first_ns = 40 * MS
    done = running.end(REQUEST, 50, OK, 140 * MS)
    assert (done.ttft_ns, done.total_ns) == (40 * MS, 140 * MS)
    assert done.energy_uj == round(0.140 * 2 * 10 * 1e6)
    learnt = one.predictor.predict(
        "d", prompt_tokens=100, output_tokens_max=100, queue_depth=0, now_ns=140 * MS
    )
    assert learnt.samples == 1
    assert learnt.ttft_ms > 20
    assert learnt.per_token_ms > 1


def test_times_count_from_the_attempts_own_start() -> None:
    one, start = endpoint(), 1000 * S
    running = one.begin(0, start)
    running.first_ns = start + 20 * MS
    done = running.end(REQUEST, 50, OK, start + 50 * MS)
    assert (done.ttft_ns, done.total_ns) == (20 * MS, 50 * MS)
    learnt = one.predictor.predict(
        "d", prompt_tokens=100, output_tokens_max=100, queue_depth=0, now_ns=start + 50 * MS
    )
    # 30 ms for the ten tokens after the first: half way from the prior's 1 ms to 3; 20 ms were expected.
    assert learnt.per_token_ms == pytest.approx(2)
    assert learnt.ttft_ms == pytest.approx(20)


def test_the_first_token_of_an_answer_in_one_piece_is_its_end_less_its_tokens() -> None:
    one, start = endpoint(), 1000 * S
    assert one.candidate(REQUEST, 50, start, affordable=True).ttft_ms == pytest.approx(20)
    one.begin(0, start).end(REQUEST, 50, OK, start + 31 * MS)  # 11 tokens at 1 ms
    after = one.candidate(REQUEST, 50, start + 31 * MS, affordable=True)
    assert after.ttft_ms == pytest.approx(20)
    one.begin(0, start).end(REQUEST, 50, OK, start + 5 * MS)
    assert 0 < one.candidate(REQUEST, 50, start + 31 * MS, affordable=True).ttft_ms < 20


@pytest.mark.parametrize("outcome", ["failed", "cancelled", "deadline", "unavailable", "rejected"])
def test_failures_teach_the_predictions_nothing(outcome: str) -> None:
    one = endpoint()
    one.begin(0, 0).end(REQUEST, 50, Spent(outcome=outcome), S)
    assert (
        one.predictor.predict("d", prompt_tokens=1, output_tokens_max=1, queue_depth=0, now_ns=S).samples == 0
    )


def test_those_who_share_an_engine_share_its_energy() -> None:
    alone, shared = endpoint(), endpoint()
    whole = alone.begin(0, 0).end(REQUEST, 50, OK, S).energy_uj
    first, second = shared.begin(0, 0), shared.begin(0, 0)
    parts = [run.end(REQUEST, 50, OK, S).energy_uj for run in (first, second)]
    assert whole is not None
    assert all(part is not None and part < whole for part in parts)
    assert sum(part or 0 for part in parts) >= whole


def test_what_the_meter_measured_is_used_from_then_on() -> None:
    one = endpoint()
    one.begin(0, 0).end(REQUEST, 50, OK, S)
    assert one.power.busy_thread_ns == 2 * S
    one.power.look(package_uj=6_000_000, window_ns=S, cpus=2)
    assert one.power.busy_thread_ns == 0
    done = one.begin(0, S).end(REQUEST, 50, OK, 2 * S)
    assert (done.energy_uj, done.energy_method) == (6_000_000, MEASURED)


@pytest.mark.parametrize(
    ("timeout_s", "latency_ms", "expected"),
    [(2.0, None, 2 * S), (2.0, 500, S // 2), (0.1, 500, S // 10), (1e7, None, 10**16)],
)
def test_the_shorter_of_route_and_caller_is_the_deadline(
    timeout_s: float, latency_ms: int | None, expected: int
) -> None:
    assert deadline(7, timeout_s, latency_ms) == 7 + expected
