"""Where to answer: hard constraints hold, the named objective decides, and every drop has its reason."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol.core.inference import Capability, DataClass, Objective, Task
from ondol.core.usage import Decision, Dropped
from ondol.errors import (
    BudgetExhausted,
    EngineUnavailable,
    NoEndpoint,
    OndolError,
    Overloaded,
    Unsupported,
)
from ondol.gateway.schedule import REASONS, Candidate, Wish, fell_back, schedule, why_dropped
from ondol.gateway.scorers import FACTORS, WEIGHTS


def place(name: str = "a", **changes: Any) -> Candidate:
    given: dict[str, Any] = {
        "name": name, "site": "here", "local": True, "task": Task.CHAT, "capabilities": frozenset(),
        "context_tokens": 1000, "parallel": 4, "queue": 4, "in_flight": 0, "ttft_ms": 10.0,
        "total_ms": 100.0, "cost": 1.0, "carbon_g": 1.0, "quality": 0.5,
    }  # fmt: skip
    return Candidate(**(given | changes))


def wish(**changes: Any) -> Wish:
    given: dict[str, Any] = {
        "task": Task.CHAT, "needs": frozenset(), "tokens_max": 200, "prompt_tokens": 100,
        "objective": Objective.FAST, "data_class": DataClass.INTERNAL, "remaining_ms": 1000.0,
    }  # fmt: skip
    return Wish(**(given | changes))


TOOLS = frozenset({Capability.TOOLS})
AMOUNT = st.sampled_from([0.0, 0.5, 1.0, 2.0, 100.0])
WISHES = st.builds(
    Wish, task=st.sampled_from([Task.CHAT, Task.EMBEDDING]), needs=st.sampled_from([frozenset(), TOOLS]),
    tokens_max=st.just(200), prompt_tokens=st.sampled_from([10, 2000]), objective=st.sampled_from(Objective),
    data_class=st.sampled_from(DataClass), remaining_ms=st.sampled_from([5.0, 1000.0]),
)  # fmt: skip
PLACES = st.lists(
    st.builds(
        Candidate, name=st.text("abcdef", min_size=1, max_size=3), site=st.just("s"), local=st.booleans(),
        task=st.sampled_from([Task.CHAT, Task.CHAT, Task.EMBEDDING]),
        capabilities=st.sampled_from([frozenset(), TOOLS, TOOLS]),
        context_tokens=st.sampled_from([None, 1000, 4000]), parallel=st.integers(1, 3),
        queue=st.integers(0, 2), in_flight=st.integers(0, 4), ttft_ms=st.sampled_from([1.0, 10.0]),
        total_ms=st.sampled_from([1.0, 50.0, 100.0]), cost=st.none() | AMOUNT, carbon_g=st.none() | AMOUNT,
        quality=st.none() | st.floats(0, 1), affordable=st.sampled_from([True, True, False]),
        problem=st.sampled_from([None, None, "it rests"]),
    ),
    max_size=6, unique_by=lambda one: one.name,
)  # fmt: skip


def forbidden(asked: Wish, one: Candidate) -> set[str]:
    """Every code for which a place must not be chosen, by the rules and not by their order."""
    away = not one.local
    rules = {
        "task": one.task is not asked.task,
        "capability": bool(asked.needs - one.capabilities),
        "context": one.context_tokens is not None and asked.prompt_tokens > one.context_tokens,
        "class_stays": away and asked.data_class.rank >= 2,
        "private_stays": away and asked.objective is Objective.PRIVATE,
        "unhealthy": one.problem is not None,
        "full": one.in_flight >= one.parallel + one.queue,
        "budget": not one.affordable,
        "too_slow": one.ttft_ms > asked.remaining_ms,
    }
    return {code for code, broken in rules.items() if broken}


@given(WISHES, PLACES, st.randoms())
def test_hard_constraints_hold_and_every_drop_has_its_reason(
    asked: Wish, places: list[Candidate], dice: random.Random
) -> None:
    bad = {one.name: codes for one in places if (codes := forbidden(asked, one))}
    able = {one.name for one in places} - bad.keys()
    try:
        found = schedule(asked, places)
    except OndolError as error:
        assert not able
        for one in places:
            assert f"{one.name}: " in error.message
        return
    assert set(found.order) == able
    assert len(found.order) == len(able)
    assert found.decision.chosen == found.order[0]
    assert {one.deployment for one in found.decision.dropped} == bad.keys()
    for drop in found.decision.dropped:
        assert drop.code in bad[drop.deployment]
    # Equal input gives equal output, and the order in which places are listed means nothing.
    assert schedule(asked, places) == found
    shuffled = dice.sample(places, len(places))
    again = schedule(asked, shuffled)
    assert again.order == found.order
    assert (again.decision.code, again.decision.lost_on) == (found.decision.code, found.decision.lost_on)


@given(PLACES, st.sampled_from([DataClass.CONFIDENTIAL, DataClass.RESTRICTED]), st.sampled_from(Objective))
def test_what_is_confidential_never_leaves(
    places: list[Candidate], data_class: DataClass, objective: Objective
) -> None:
    local = {one.name for one in places if one.local}
    try:
        found = schedule(wish(data_class=data_class, objective=objective), places)
    except OndolError:
        return
    assert set(found.order) <= local


@pytest.mark.parametrize(
    ("objective", "better"),
    [
        (Objective.FAST, {"total_ms": 25.0}),
        (Objective.PRIVATE, {"total_ms": 25.0}),
        (Objective.CHEAP, {"cost": 0.25}),
        (Objective.GREEN, {"carbon_g": 0.25}),
        (Objective.BEST, {"quality": 1.0}),
    ],
)
def test_the_named_objective_decides_against_all_others_together(
    objective: Objective, better: dict[str, float]
) -> None:
    everything_else = {"total_ms": 60.0, "cost": 0.6, "carbon_g": 0.6, "quality": 0.6}
    others = {key: value for key, value in everything_else.items() if key not in better}
    found = schedule(wish(objective=objective), [place("a", **others), place("z", **better)])
    assert found.order == ("z", "a")
    assert (found.decision.code, found.decision.runner_up) == (REASONS[objective], "a")
    assert found.decision.objective == objective.value


@pytest.mark.parametrize(
    ("objective", "better", "factor", "values"),
    [
        (Objective.FAST, {"total_ms": 25.0}, "latency", (25.0, 100.0)),
        (Objective.CHEAP, {"cost": 0.25}, "price", (0.25, 1.0)),
        (Objective.GREEN, {"carbon_g": 0.25}, "carbon", (0.25, 1.0)),
        (Objective.BEST, {"quality": 1.0}, "quality", (1.0, 0.5)),
        (Objective.FAST, {}, "queue", (0.0, 7.0)),
    ],
)
def test_the_figure_that_the_runner_up_lost_on_is_told(
    objective: Objective, better: dict[str, float], factor: str, values: tuple[float, float]
) -> None:
    other = place("a") if better else place("a", in_flight=7)
    decision = schedule(wish(objective=objective), [other, place("z", **better)]).decision
    assert decision.lost_on == factor
    assert (decision.chosen_value, decision.runner_up_value) == values


def test_weights_sum_to_one_and_the_named_factor_outweighs_the_rest() -> None:
    named = {
        Objective.FAST: 0,
        Objective.CHEAP: 1,
        Objective.GREEN: 2,
        Objective.BEST: 3,
        Objective.PRIVATE: 0,
    }
    assert len(FACTORS) == 5
    for objective, factor in named.items():
        weights = WEIGHTS[objective]
        assert sum(weights) == pytest.approx(1)
        assert weights[factor] > 0.5


def test_ties_fall_to_the_name() -> None:
    names = ["c", "a", "d", "b"]
    assert schedule(wish(), [place(name) for name in names]).order == ("a", "b", "c", "d")


def test_a_place_that_nobody_can_price_does_not_win_on_price() -> None:
    found = schedule(wish(objective=Objective.CHEAP), [place("a", cost=None), place("b", cost=1e9)])
    assert found.order == ("b", "a")
    assert schedule(wish(objective=Objective.CHEAP), [place("a"), place("b", cost=0.0)]).order[0] == "b"


def test_who_answers_in_time_comes_first_whatever_its_scores() -> None:
    fine, quick = place("fine", quality=0.9, total_ms=2000.0), place("quick", quality=0.1, total_ms=50.0)
    best = wish(objective=Objective.BEST, remaining_ms=1000.0)
    found = schedule(best, [fine, quick])
    assert (found.order, found.decision.code) == (("quick", "fine"), "in_time")
    patient = schedule(wish(objective=Objective.BEST, remaining_ms=9000.0), [fine, quick])
    assert (patient.order, patient.decision.code) == (("fine", "quick"), "best_quality")
    both = schedule(wish(objective=Objective.BEST, remaining_ms=20.0), [fine, quick])
    assert (both.order[0], both.decision.code) == ("fine", "best_quality")


def test_work_that_can_wait_takes_no_place_in_a_queue() -> None:
    busy = place(parallel=2, queue=4, in_flight=2, ttft_ms=7_000.0)
    long = wish(remaining_ms=1e6)
    assert schedule(long, [busy]).order == ("a",)
    with pytest.raises(Overloaded) as refused:
        schedule(msgspec.structs.replace(long, flex=True), [busy])
    assert refused.value.retry_after_s == 7.0


def test_retry_after_is_when_the_first_place_is_free() -> None:
    full = [place(f"p{n}", in_flight=8, ttft_ms=ms) for n, ms in enumerate((9_000.0, 3_000.0, 200_000.0))]
    with pytest.raises(Overloaded) as refused:
        schedule(wish(remaining_ms=1e6), full)
    assert refused.value.retry_after_s == 3.0


def test_balance_is_said_where_the_chosen_is_not_the_extreme() -> None:
    slow = place("a", total_ms=200.0)
    fast = place("z", total_ms=195.0, cost=100.0, quality=0.1, carbon_g=100.0, in_flight=7)
    found = schedule(wish(), [slow, fast])
    assert (found.order[0], found.decision.code) == ("a", "balance")


@pytest.mark.parametrize(
    ("changes", "code", "detail"),
    [
        ({"task": Task.EMBEDDING}, "task", "embedding"),
        ({"capabilities": frozenset()}, "capability", "tools"),
        ({"context_tokens": 99}, "context", "100 > 99"),
        ({"local": False}, "class_stays", "restricted"),
        ({"problem": "it rests"}, "unhealthy", "it rests"),
        ({"in_flight": 8}, "full", "8 at once"),
        ({"affordable": False}, "budget", ""),
        ({"affordable": False, "cost": None}, "budget", "unpriced"),
        ({"ttft_ms": 1001.0}, "too_slow", "1001 ms > 1000 ms"),
    ],
)
def test_each_reason_has_its_figure(changes: dict[str, Any], code: str, detail: str) -> None:
    asked = wish(needs=TOOLS, data_class=DataClass.RESTRICTED)
    places = [place("good", capabilities=TOOLS), place("bad", **({"capabilities": TOOLS} | changes))]
    decision = schedule(asked, places).decision
    assert decision.dropped == (Dropped("bad", code, detail),)
    assert decision.chosen == "good"
    assert decision.code == ("class_stays" if code == "class_stays" else "only_choice")


def test_a_bound_that_is_just_met_is_met() -> None:
    asked = wish(prompt_tokens=1000, remaining_ms=10.0)
    just = place(context_tokens=1000, ttft_ms=10.0, in_flight=7)
    assert schedule(asked, [just]).decision == Decision(code="only_choice", objective="fast", chosen="a")


def test_staying_is_the_reason_only_where_something_was_dropped_for_it() -> None:
    asked = wish(objective=Objective.PRIVATE)
    assert schedule(asked, [place("a"), place("b", local=False)]).decision.code == "private_stays"
    assert schedule(asked, [place("a"), place("b"), place("c", local=False)]).decision.code == "private_stays"
    assert schedule(asked, [place("a")]).decision.code == "only_choice"
    assert schedule(asked, [place("a"), place("b")]).decision.code == "private"


BROKEN: dict[str, dict[str, Any]] = {
    "task": {"task": Task.EMBEDDING}, "capability": {"capabilities": frozenset()},
    "context": {"context_tokens": 99}, "class_stays": {"local": False}, "unhealthy": {"problem": "it rests"},
    "full": {"in_flight": 8}, "budget": {"affordable": False}, "too_slow": {"ttft_ms": 2000.0},
}  # fmt: skip


@pytest.mark.parametrize(
    ("codes", "kind", "retry"),
    [
        (["task"], Unsupported, None),
        (["task", "capability", "context"], Unsupported, None),
        (["budget"], BudgetExhausted, None),
        (["budget", "capability"], BudgetExhausted, None),
        (["budget", "class_stays"], BudgetExhausted, None),
        (["full"], Overloaded, 1.0),
        (["full", "unhealthy"], Overloaded, 1.0),
        (["full", "budget"], Overloaded, 1.0),
        (["unhealthy"], NoEndpoint, 1.0),
        (["unhealthy", "budget", "task"], NoEndpoint, 1.0),
        (["class_stays"], NoEndpoint, None),
        (["class_stays", "capability"], NoEndpoint, None),
        (["too_slow"], NoEndpoint, None),
        (["too_slow", "budget"], NoEndpoint, None),
    ],
)
def test_the_error_is_of_its_cause_and_names_every_endpoint(
    codes: list[str], kind: type[OndolError], retry: float | None
) -> None:
    asked = wish(needs=TOOLS, data_class=DataClass.RESTRICTED)
    places = [place(f"p-{code}", **({"capabilities": TOOLS} | BROKEN[code])) for code in codes]
    with pytest.raises(OndolError) as caught:
        schedule(asked, places)
    assert type(caught.value) is kind
    assert caught.value.retry_after_s == retry
    clauses = caught.value.message.removeprefix("no endpoint is left: ").split("; ")
    assert [clause.partition(": ")[0] for clause in clauses] == [f"p-{code}" for code in codes]
    assert all(clause.partition(": ")[2] for clause in clauses)


def test_a_clause_for_a_code_that_is_unknown_is_the_code() -> None:
    assert why_dropped(Dropped("d", "new_code", "x")) == "d: new_code"
    assert why_dropped(Dropped("d", "unhealthy", "odd {braces}")) == "d: odd {braces}"


def test_a_fall_back_keeps_what_was_dropped_and_adds_the_first_choice() -> None:
    before = schedule(wish(), [place("a"), place("b"), place("c", problem="it rests")]).decision
    after = fell_back(before, "b", EngineUnavailable("refused the connection"))
    assert (after.code, after.chosen, after.runner_up, after.lost_on) == ("fallback", "b", None, None)
    assert after.dropped == (
        Dropped("c", "unhealthy", "it rests"),
        Dropped("a", "unhealthy", "refused the connection"),
    )
    assert msgspec.json.decode(msgspec.json.encode(after), type=Decision) == after
