"""Rollouts on a real database: steps, verdicts, going back, and what must hold whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Literal

import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ondol.adapters.database_sqlite import InlineDatabase
from ondol.core.catalog import Judge, RolloutDoc, RouteDoc, Selector, SiteDoc
from ondol.core.ports import Tx
from ondol.errors import Conflict, NotFound
from ondol.hub import ingest, publish, rollouts, sites
from ondol.hub.decide.rollout import OVER, looks, order, sizes
from ondol.hub.schema import MIGRATIONS
from ondol.units import NS_PER_S
from ondol.wire.sync import DeploymentState, Figures, Report

ROOT = Path(__file__).resolve().parents[3]
START_NS = 1_800_000_000 * NS_PER_S
BAKE_S = 100.0


def site_doc(name: str, **labels: str) -> SiteDoc:
    return SiteDoc(name=name, tier="edge", region="kr-seoul", country="KR", grid_zone="KR", labels=labels)


def rules(**changes: object) -> RolloutDoc:
    judge = {"min_requests": 50, "max_wait_s": 300.0, **changes}
    return RolloutDoc(
        name="careful", steps=("1", "50%", "100%"), bake_s=BAKE_S, judge=msgspec.convert(judge, Judge),
        sites=Selector(labels={"kind": "shop"}),
    )  # fmt: skip


class World:
    """A hub's database, and sites that do what they are told: they run what is wanted and answer requests."""

    def __init__(self, shops: int = 8, others: int = 2, seed: int = 1) -> None:
        self.database = InlineDatabase(":memory:", migrations=MIGRATIONS, durable=False)
        self.rng = Random(seed)
        self.now_ns = START_NS
        docs = [site_doc(f"shop-{n}", kind="shop", size=str(n % 2)) for n in range(shops)]
        docs += [site_doc(f"office-{n}", kind="office") for n in range(others)]
        self.docs = {doc.name: doc for doc in docs}
        self.runs = dict.fromkeys(self.docs, 0)
        self.history: dict[str, list[int]] = {name: [] for name in self.docs}
        self.counts: dict[tuple[str, int], list[float]] = {}
        self.away: set[str] = set()
        self.refusing: set[str] = set()
        self.unready: set[str] = set()
        self.slow: dict[int, float] = {}
        self.failing: dict[int, float] = {}
        self.said: list[str] = []

        def join(tx: object) -> None:
            for doc in docs:
                sites.add(tx, doc, START_NS)  # type: ignore[arg-type]
                tx.run("UPDATE sites SET key = ? WHERE name = ?", (b"k", doc.name))  # type: ignore[attr-defined]

        self.database.write_now(join)

    def apply(self, doc: RolloutDoc | None, route: str = "r") -> int:
        """A new generation; staged by `doc`, or everywhere at once."""

        def work(tx: Tx) -> int:
            before = publish.fleet_generation(tx)
            documents = (("Route", RouteDoc(name=route, deployments=("d",))),)
            number = publish.apply(
                tx, documents, author="a", message="m", now_ns=self.now_ns, everywhere=doc is None
            )
            if doc is not None:
                fleet = publish.fleet_at(tx, number)
                rollouts.begin(tx, number, before, doc, fleet, now_ns=self.now_ns)
            return number

        return self.database.write_now(work)

    def wanted(self, name: str) -> int:
        return self.database.write_now(lambda tx: publish.wanted(tx, name))

    def work(self, requests: int = 20) -> None:
        """Every site that is there takes what is wanted, answers some requests, and reports."""
        for name in self.docs:
            if name in self.away:
                continue
            wanted = self.wanted(name)
            refuses = name in self.refusing and wanted > self.runs[name]
            if not refuses and wanted != self.runs[name]:
                self.runs[name] = wanted
                self.history[name].append(wanted)
            self._answer(name, requests)
            report = self._report(name, wanted if refuses else 0)
            self.database.write_now(
                lambda tx, name=name, report=report: ingest.take_report(tx, name, report, now_ns=self.now_ns)  # type: ignore[misc]
            )

    def _answer(self, name: str, requests: int) -> None:
        generation = self.runs[name]
        seen = self.counts.setdefault((name, generation), [0, 0])
        times = self.counts.setdefault((name, generation + 1_000_000), [])
        usual = 50.0 * (1 + len(name) + int(name[-1]))
        for _ in range(requests):
            seen[0] += 1
            if self.rng.random() < self.failing.get(generation, 0.0):
                seen[1] += 1
            else:
                times.append(usual * self.slow.get(generation, 1.0) * self.rng.lognormvariate(0, 0.3))

    def _report(self, name: str, refused: int) -> Report:
        figures = []
        for generation in sorted({g for n, g in self.counts if n == name and g < 1_000_000})[-2:]:
            requests, errors = self.counts[name, generation]
            times = self.counts[name, generation + 1_000_000]
            at = range(int(requests) - len(times) + 1, int(requests) + 1)
            figures.append(
                Figures(
                    generation=generation, requests=int(requests), errors=int(errors), latency_ms=tuple(times[-200:]),
                    latency_at=tuple(at)[-200:],
                )
            )  # fmt: skip
        return Report(
            instance="i", generation=self.runs[name], epoch=0, last_seq=0, acknowledged=0, wall_ns=self.now_ns,
            figures=tuple(figures), refused="it names a model that is not there" if refused else "",
            refused_generation=refused,
            deployments=(DeploymentState(name="chat", ready=(name, self.runs[name]) not in self._unready()),),
        )  # fmt: skip

    def _unready(self) -> set[tuple[str, int]]:
        return {
            (name, self.runs[name]) for name in self.unready if self.runs[name] == max(self.runs.values())
        }

    def tick(self, seconds: float = 5.0, requests: int = 20) -> None:
        self.now_ns += int(seconds * NS_PER_S)
        self.work(requests)
        self.said += self.database.write_now(
            lambda tx: rollouts.advance(tx, now_ns=self.now_ns, stale=lambda row: row.name in self.away)
        )

    def until(self, done: Callable[[], bool], *, ticks: int = 400, requests: int = 20) -> None:
        for _ in range(ticks):
            if done():
                return
            self.tick(requests=requests)
        raise AssertionError(f"it never came: {self.said[-5:]}")

    def view(self) -> rollouts.RolloutView:
        return self.database.write_now(rollouts.everything)[0]

    def steer(self, action: str) -> rollouts.RolloutView:
        one = self.view()
        return self.database.write_now(lambda tx: rollouts.steer(tx, str(one.id), action, now_ns=self.now_ns))


@contextmanager
def world(**sizes: int) -> Iterator[World]:
    made = World(**sizes)
    try:
        yield made
    finally:
        made.database.close_now()


def begun(one: World, doc: RolloutDoc | None = None) -> int:
    """Generation 1 runs everywhere and is well known; generation 2 begins."""
    one.apply(None, "old")
    for _ in range(10):
        one.tick()
    return one.apply(doc or rules(), "new")


def shops_with(one: World, generation: int) -> int:
    return sum(1 for name, runs in one.runs.items() if runs == generation and name.startswith("shop"))


def test_a_good_generation_goes_step_by_step_to_all() -> None:
    with world() as one:
        second = begun(one)
        seen = []
        while one.view().state == "running":
            one.tick()
            seen.append(shops_with(one, second))
            assert len(seen) < 200
        assert one.view().state == "done"
        assert sorted(set(seen)) == [1, 4, 8]
        assert seen == sorted(seen)
        one.tick()
        assert set(one.runs.values()) == {second}, "the sites that it does not select get it when it is done"
        looked = [
            event.action.verdict for event in one.view().events if event.action and event.action.verdict
        ]
        assert [each.against for each in looked if each.outcome == "continue"][-1] == "earlier"
        assert {each.against for each in looked} == {"old", "earlier"}
        assert min(each.requests_new for each in looked) > 0
        numbers = [(event.step, event.action.looks) for event in one.view().events if event.action]
        assert numbers == [(step, look) for step in (1, 2, 3) for look in (1, 2, 3, 4)], (
            "it looks when it may"
        )


def test_a_slow_generation_is_taken_back_by_a_new_number_and_the_others_never_saw_it() -> None:
    with world() as one:
        second = begun(one)
        one.slow[second] = 2.0
        one.until(lambda: one.view().state == "aborted")
        one.tick()
        view = one.view()
        assert view.back == second + 1
        assert {name for name, had in one.history.items() if second in had} == set(view.sites[:1])
        assert all(had == sorted(set(had)) for had in one.history.values())
        assert set(one.runs.values()) == {view.back}
        old = one.database.write_now(lambda tx: publish.documents(tx, view.back or 0))
        assert old == one.database.write_now(lambda tx: publish.documents(tx, 1))
        assert "worse" in view.ended
        said = [event for event in view.events if event.action is not None and event.action.do == "abort"]
        assert said[0].action is not None
        verdict = said[0].action.verdict
        assert verdict is not None
        assert [each.measure for each in verdict.comparisons if each.worse] == ["latency"]


def test_errors_are_found_long_before_the_bake_time_is_over() -> None:
    with world() as one:
        second = begun(one)
        one.failing[second] = 0.5
        began = one.now_ns
        one.until(lambda: one.view().state == "aborted")
        assert one.now_ns - began < BAKE_S / 2 * NS_PER_S


def test_what_was_slow_in_all_hours_before_counts_for_nothing_now() -> None:
    """The old generation was fast for a long time, and everything is slow now: both sides are seen now."""
    with world() as one:
        second = begun(one)
        for _ in range(60):
            one.tick()
            one.slow.update({1: 2.5, second: 2.5})
        one.until(lambda: one.view().state in ("done", "held", "aborted"))
        assert one.view().state == "done"


def test_a_site_that_refuses_the_generation_ends_it() -> None:
    with world() as one:
        begun(one)
        one.refusing.update(one.view().sites[:1])
        one.until(lambda: one.view().state == "aborted")
        assert "names a model that is not there" in one.view().ended


def test_a_deployment_that_does_not_come_up_holds_it() -> None:
    with world() as one:
        begun(one)
        one.unready.update(one.view().sites[:1])
        one.until(lambda: one.view().state == "held")
        assert "chat at shop-" in one.view().events[-1].what


def test_sites_that_are_away_block_nothing_and_get_it_when_they_return() -> None:
    with world() as one:
        second = begun(one)
        lost = one.view().sites[2:4]
        one.away.update(lost)
        one.until(lambda: one.view().state == "done")
        actions = [event.action for event in one.view().events if event.action]
        assert max(action.away for action in actions) == 2
        assert all(one.runs[name] == 1 for name in lost)
        one.away.clear()
        one.tick()
        assert set(one.runs.values()) == {second}


def test_a_site_that_returns_after_going_back_never_gets_it() -> None:
    with world() as one:
        second = begun(one)
        one.until(lambda: one.view().step == 2)
        lost = one.view().sites[3]
        one.away.add(lost)
        one.failing[second] = 0.6
        one.until(lambda: one.view().state == "aborted")
        one.away.clear()
        one.tick()
        assert one.runs[lost] == one.view().back
        assert set(one.runs.values()) == {one.view().back}


@pytest.mark.parametrize(("chosen", "state"), [("hold", "held"), ("abort", "aborted"), ("continue", "done")])
def test_without_requests_it_does_as_told_after_its_longest_wait(chosen: str, state: str) -> None:
    with world() as one:
        begun(one, rules(inconclusive=chosen))
        began = one.now_ns
        one.until(lambda: one.view().state == state, requests=0)
        steps = 3 if chosen == "continue" else 1
        assert one.now_ns - began >= steps * 300 * NS_PER_S
        assert any("inconclusive after" in event.what for event in one.view().events)


def test_a_held_rollout_goes_on_only_when_told() -> None:
    with world() as one:
        begun(one)
        one.until(lambda: one.view().state == "held", requests=0)
        for _ in range(20):
            one.tick()
        assert one.view().state == "held"
        assert one.steer("resume").step == 2
        one.until(lambda: one.view().state == "done")


def test_a_pause_stops_the_judge_and_its_clock() -> None:
    with world() as one:
        begun(one)
        one.tick()
        due = one.view().next_look_ns
        one.steer("pause")
        for _ in range(100):
            one.tick()
        assert (one.view().state, one.view().next_look_ns) == ("paused", None)
        assert one.steer("resume").next_look_ns == (due or 0) + 500 * NS_PER_S
        with pytest.raises(Conflict, match="is running, so it cannot resume"):
            one.steer("resume")
        one.until(lambda: one.view().state == "done")


def test_an_operator_takes_it_back_and_then_it_is_over() -> None:
    with world() as one:
        second = begun(one)
        one.tick()
        assert one.steer("abort").back == second + 1
        with pytest.raises(NotFound, match="no rollout '2' goes on, none does"):
            one.steer("pause")
        one.tick()
        assert set(one.runs.values()) == {second + 1}


def test_a_new_apply_supersedes_and_going_back_brings_everybody_to_what_all_had() -> None:
    with world() as one:
        second = begun(one)
        one.until(lambda: one.view().step == 2)
        one.tick()
        third = one.apply(rules(), "newer")
        first, older = one.database.write_now(rollouts.everything)
        assert (older.state, older.id) == ("superseded", second)
        assert first.previous == 1
        one.failing[third] = 0.6
        one.until(lambda: one.view().state == "aborted")
        one.tick()
        assert set(one.runs.values()) == {third + 1}, "also the sites that still ran the second, unjudged"


def test_without_a_selected_site_all_get_it_at_once() -> None:
    with world(shops=0, others=2) as one:
        second = begun(one)
        assert one.database.write_now(rollouts.everything) == []
        one.tick()
        assert set(one.runs.values()) == {second}


def test_a_single_site_is_compared_with_itself_before() -> None:
    with world(shops=1, others=0) as one:
        second = begun(one)
        one.slow[second] = 3.0
        one.until(lambda: one.view().state == "held")
        verdicts = [event.action.verdict for event in one.view().events if event.action]
        assert {each.against for each in verdicts if each} == {"before"}
        assert verdicts[-1] is not None
        assert verdicts[-1].reason == "all_changed"
    with world(shops=1, others=0) as one:
        begun(one)
        one.until(lambda: one.view().state == "done")


def test_a_site_whose_process_began_anew_counts_from_nothing() -> None:
    with world() as one:
        begun(one)
        one.counts = {key: [] if key[1] >= 1_000_000 else [0, 0] for key in one.counts}
        one.until(lambda: any(event.action for event in one.view().events))
        verdict = next(event.action.verdict for event in one.view().events if event.action)
        assert verdict is not None
        assert verdict.requests_old == 7 * verdict.requests_new > 0
        one.until(lambda: one.view().state == "done")


def test_the_order_is_by_chance_and_kinds_are_spread() -> None:
    fleet = {f"s{n}": site_doc(f"s{n}", kind="ab"[n % 2]) for n in range(100)}
    assert order(7, fleet) == order(7, fleet)
    assert sorted(order(7, fleet)) == sorted(fleet)
    firsts = {order(generation, fleet)[0] for generation in range(50)}
    assert len(firsts) > 25, "no shop is always the first"
    for generation in range(20):
        for size in (10, 20, 50):
            kinds = [fleet[name].labels["kind"] for name in order(generation, fleet)[:size]]
            assert abs(kinds.count("a") - size / 2) <= 1


steps = st.lists(
    st.one_of(st.integers(0, 40).map(str), st.integers(0, 150).map(lambda n: f"{n}%")), min_size=1, max_size=5
)


@given(steps, st.integers(1, 300))
def test_sizes_rise_from_one_to_all(words: list[str], total: int) -> None:
    found = sizes(RolloutDoc(name="r", steps=tuple(words)), total)
    assert found == sorted(set(found))
    assert found[0] >= 1
    assert found[-1] == total


@given(st.floats(1, 10_000), st.floats(1, 10_000))
def test_the_shares_of_all_looks_are_one_alpha(bake_s: float, wait_s: float) -> None:
    plan = looks(RolloutDoc(name="r", bake_s=bake_s, judge=Judge(max_wait_s=wait_s)))
    assert sum(one.share for one in plan) == pytest.approx(1)
    assert [one.after_s for one in plan] == sorted(one.after_s for one in plan)
    assert [one.baked for one in plan] == [one.after_s >= bake_s for one in plan]
    assert plan[-1].after_s == pytest.approx(max(bake_s, wait_s))


Kind = Literal[
    "tick", "long", "lose", "find", "slow", "break", "refuse", "pause", "resume", "apply", "restart"
]
happenings = st.lists(
    st.sampled_from(["tick", "tick", "tick", "long", "lose", "find", "slow", "break", "refuse", "pause", "resume",
                     "apply", "restart"]),
    min_size=1, max_size=25,
)  # fmt: skip


def happen(one: World, what: str, rng: Random, doc: RolloutDoc) -> None:
    newest = max(one.view().id, *one.runs.values())
    match what:
        case "long":
            one.tick(seconds=rng.choice([60, 400, 4000]))
        case "lose":
            one.away.add(rng.choice(list(one.docs)))
        case "find":
            one.away.clear()
        case "slow":
            one.slow[newest] = 3.0
        case "break":
            one.failing[newest] = 0.7
        case "refuse":
            one.refusing = set(rng.sample(list(one.docs), 1))
        case "pause" | "resume":
            try:
                one.steer(what)
            except (Conflict, NotFound):
                pass
        case "apply":
            one.refusing.clear()
            one.apply(doc, f"route-{one.now_ns}")
        case "restart":
            one.counts = {key: [] if key[1] >= 1_000_000 else [0, 0] for key in one.counts}
        case _:
            one.tick(seconds=20.0, requests=rng.choice([0, 3, 20]))


@settings(max_examples=40)
@given(
    happenings, st.integers(1, 9), st.integers(0, 2), steps, st.sampled_from(["hold", "continue", "abort"]),
    st.integers(0, 2**32),
)  # fmt: skip
def test_whatever_happens(
    events: list[str], shops: int, others: int, words: list[str], chosen: str, seed: int
) -> None:
    """No step is skipped, nobody outside is touched, numbers only rise at a site, and it always ends."""
    rng = Random(seed)
    doc = msgspec.structs.replace(rules(inconclusive=chosen), steps=tuple(words))
    with world(shops=shops, others=others, seed=seed) as one:
        begun(one, doc)
        last = (one.view().id, one.view().step)
        for what in [*events, *["end"] * 400]:
            if what == "end":
                one.away.clear()
                if one.view().state in ("paused", "held"):
                    one.steer("resume")
                one.tick(seconds=60.0)
            else:
                happen(one, what, rng, doc)
            view = one.view()
            if view.id == last[0]:
                assert view.step in (last[1], last[1] + 1), "a step was skipped"
            last = (view.id, view.step)
            check(one, view)
            if what == "end" and view.state in OVER:
                break
        else:
            raise AssertionError(f"it did not end: {view.state} at step {view.step}")
        one.refusing.clear()
        one.tick()
        one.tick()
        assert len(set(one.runs.values())) == 1
        assert set(one.runs.values()) == {view.id if view.state == "done" else view.back}


def check(one: World, view: rollouts.RolloutView) -> None:
    for name, had in one.history.items():
        assert had == sorted(set(had)), f"{name} went back: {had}"
    if view.state in ("running", "paused", "held"):
        allowed = set(view.sites[: view.sizes[view.step - 1]])
        have = {name for name in one.docs if one.wanted(name) == view.id}
        assert have == allowed
        assert not {name for name in one.docs if name.startswith("office")} & have


def test_the_document_of_the_guide_is_one_with_the_defaults() -> None:
    page = (ROOT / "docs/guide/rollouts.md").read_text(encoding="utf-8")
    fields = yaml.safe_load(page.partition("```yaml\n")[2].partition("```")[0])
    assert fields.pop("kind") == "Rollout"
    fields.pop("sites")
    assert msgspec.convert(fields, RolloutDoc) == RolloutDoc(name="careful")
