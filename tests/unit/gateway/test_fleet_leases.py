"""The sum holds: a hub and its sites, messages that get lost, late and doubled, crashes, and clocks that move."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from datetime import UTC
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tests.simulation.loop import VirtualLoop

from ondol.adapters.database_sqlite import InlineDatabase
from ondol.core.catalog import BudgetDoc, BudgetScope
from ondol.core.identity import Origin, Principal
from ondol.core.money import Money
from ondol.core.ports import HeldLease
from ondol.errors import HubRefused, LinkDown, OndolError
from ondol.gateway.budget import Budgets, Exhausted, NeedsGrant, NeedsLease, Reservation
from ondol.gateway.explain import exhausted_sentence
from ondol.gateway.fleet_leases import FleetLeases
from ondol.hub.leases import take_lease
from ondol.hub.schema import MIGRATIONS
from ondol.units import NS_PER_S
from ondol.wire import sync

T = TypeVar("T")
START_NS = 20_000 * 86_400 * NS_PER_S
PERIOD = "2024-10-04"
KEY = ("b USD", PERIOD)


def budget(amount: int = 100_000, **fields: Any) -> BudgetDoc:
    text = f"{amount // 10**9}.{amount % 10**9:09d}"
    given = {"scope": BudgetScope(team="t"), "period": "day", "amount": text, **fields}
    return BudgetDoc(name="b", **given)


class Hub:
    """`take_lease` on a real SQLite file."""

    def __init__(self, doc: BudgetDoc) -> None:
        self.doc = doc
        self.database = InlineDatabase(":memory:", migrations=MIGRATIONS, durable=False)
        self.calls = 0

    def take(self, site: str, body: bytes, now_ns: int) -> bytes:
        self.calls += 1
        message = sync.decode(body, sync.Lease)
        return sync.encode(
            self.database.write_now(lambda tx: take_lease(tx, site, message, budget=self.doc, now_ns=now_ns))
        )

    def held(self) -> dict[str, int]:
        rows = self.database.write_now(lambda tx: tx.run("SELECT site, granted FROM lease_grants"))
        return {site: int(granted) for site, granted in rows}


class Post:
    """A letter on its way: to the hub while `answer` is None, back from it after."""

    def __init__(self, site: str, body: bytes, waiter: asyncio.Future[bytes]) -> None:
        self.site, self.body, self.waiter = site, body, waiter
        self.answer: bytes | OndolError | None = None


class Link:
    """`HubLink`: at once, or as letters that the test delivers, doubles or loses."""

    def __init__(self, world: World, site: str) -> None:
        self.world, self.site = world, site

    async def call(self, name: str, body: bytes, *, timeout_s: float) -> bytes:
        assert name == "lease"
        if not self.world.by_hand:
            if not self.world.up:
                raise LinkDown("the hub is away")
            await asyncio.sleep(self.world.rtt_s)
            return self.world.hub.take(self.site, body, self.world.now_ns())
        post = Post(self.site, body, asyncio.get_running_loop().create_future())
        self.world.post.append(post)
        try:
            async with asyncio.timeout(timeout_s):
                return await post.waiter
        except TimeoutError as error:
            raise LinkDown("no answer") from error

    def watch(self, body: bytes, *, silence_s: float) -> AsyncIterator[bytes]:
        raise NotImplementedError("leases need no watch")

    async def close(self) -> None:
        """Nothing is open."""


class World:
    """Virtual time, the hub, and what is on the way."""

    def __init__(self, doc: BudgetDoc | None = None, *, by_hand: bool = False) -> None:
        self.loop = VirtualLoop(limit_s=1e9)
        self.hub = Hub(doc or budget())
        self.by_hand, self.up, self.rtt_s = by_hand, True, 0.01
        self.post: list[Post] = []
        self.sites: list[Site] = []

    def now_ns(self) -> int:
        return START_NS + int(self.loop.time() * NS_PER_S)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    def sleep(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))

    def site(self, name: str = "a") -> Site:
        made = Site(self, name)
        self.sites.append(made)
        made.boot()
        return made

    def close(self) -> None:
        for site in self.sites:
            site.kill()
        self.hub.database.close_now()
        self.loop.close()


class Site:
    """One site: what is durable stays over `kill`, the rest does not."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.kept: dict[tuple[str, str], HeldLease] = {}
        self.leased: dict[tuple[str, str], int] = {}
        self.recorded = 0
        self.truly = 0
        self.open: list[tuple[Reservation, int]] = []
        self.notes: list[tuple[str, str]] = []
        self.link_up = True
        self.wall_ahead_ns = 0
        self.task: asyncio.Task[None] | None = None

    # ---- what is durable: `SiteMemory` and `Ledger`, as far as leases need them

    @property
    def hub_seen_ns(self) -> int:
        return START_NS

    def leases(self) -> tuple[HeldLease, ...]:
        return tuple(self.kept.values())

    async def keep_lease(self, lease: HeldLease) -> None:
        await asyncio.sleep(0)
        self.kept[lease.budget, lease.period] = lease
        await asyncio.sleep(0)

    async def drop_leases(self, ended: Iterable[tuple[str, str]]) -> None:
        await asyncio.sleep(0)
        for key in ended:
            self.kept.pop(key, None)

    async def lease(self, name: str, period: str, amount: int) -> None:
        self.leased[name, period] = amount
        await asyncio.sleep(0)

    # ---- the clock

    def now_ns(self) -> int:
        return int(self.world.loop.time() * NS_PER_S)

    def wall_ns(self) -> int:
        return self.world.now_ns() + self.wall_ahead_ns

    # ---- the process

    def boot(self) -> None:
        spent = {("b", PERIOD): self.recorded}
        self.budgets = Budgets(
            {"b": self.world.hub.doc}, {}, zone=lambda _: UTC, spent=spent, leases=dict(self.leased)
        )

        async def begin() -> None:
            self.fleet = FleetLeases(
                link=Link(self.world, self.name), memory=self, ledger=self, budgets=self.budgets,  # type: ignore[arg-type]
                clock=self, instance="i", hub_now_ns=self.wall_ns, link_up=lambda: self.link_up,
                noted=lambda event, what: self.notes.append((event, what)),
            )  # fmt: skip
            self.task = asyncio.get_running_loop().create_task(self.fleet.run())

        self.world.run(begin())

    def kill(self) -> None:
        """What was reserved may have been paid: it was, in full."""
        if self.task is not None:
            self.task.cancel()
            self.world.run(asyncio.wait({self.task}))
            self.task = None
        for reservation, worst in self.open:
            self.truly += 0 if reservation.unleased else worst
        self.open.clear()

    def stop(self) -> None:
        """A clean stop: everything is settled and given back."""
        while self.open:
            self.settle(0, 1.0)
        assert self.task is not None
        self.task.cancel()
        self.world.run(asyncio.wait({self.task}))
        self.task = None
        for one in self.budgets.closing_leases():
            self.world.run(self.lease(one.budget, one.period, one.total))
        self.world.run(self.fleet.close())

    async def reserve(self, worst: int, *, local: bool = False) -> Reservation | Exhausted:
        """As the pipeline does it."""
        since_ns, alone, wall_ns = self.now_ns(), False, self.wall_ns()
        while True:
            answer = self.budgets.reserve(
                ("b",), Money(worst, "USD"), wall_ns, now_ns=self.now_ns(), local=local, alone=alone
            )
            if isinstance(answer, NeedsLease):
                await self.lease(answer.budget, answer.period, answer.total)
                self.budgets.leased(answer.budget, answer.period, answer.total)
            elif isinstance(answer, NeedsGrant):
                alone = not await self.fleet.ask(answer, since_ns)
            else:
                if isinstance(answer, Reservation):
                    self.open.append((answer, worst))
                return answer

    def try_reserve(self, worst: int, **how: Any) -> Reservation | Exhausted:
        return self.world.run(self.reserve(worst, **how))

    def settle(self, index: int, share: float) -> None:
        reservation, worst = self.open.pop(index)
        actual = int(worst * share)
        self.budgets.settle(reservation, Money(actual, "USD"))
        if not reservation.unleased:
            self.truly += actual
            self.recorded += actual

    @property
    def certain(self) -> int:
        """What it has truly spent, and what its open requests may yet spend."""
        return self.truly + sum(worst for reservation, worst in self.open if not reservation.unleased)

    def holds(self) -> int:
        kept = self.kept.get(KEY)
        return 0 if kept is None else kept.granted


@pytest.fixture
def world() -> Any:
    made = World()
    yield made
    made.close()


def reserved(answer: Reservation | Exhausted) -> Reservation:
    assert isinstance(answer, Reservation), answer
    return answer


def refused(answer: Reservation | Exhausted) -> Exhausted:
    assert isinstance(answer, Exhausted)
    return answer


# ---- the model

NAMES = ("a", "b", "c")
AMOUNT = 100_000


class Fleet(RuleBasedStateMachine):
    """Three sites, one budget; the test is the network."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(budget(AMOUNT), by_hand=True)
        self.most = AMOUNT
        self.answers: list[tuple[str, bytes]] = []
        for name in NAMES:
            self.world.site(name)

    def teardown(self) -> None:
        self.world.close()

    def _site(self, index: int) -> Site:
        site = self.world.sites[index]
        if site.task is None:
            site.boot()
        return site

    @rule(site=st.integers(0, 2), worst=st.integers(1, 30_000), wait=st.booleans())
    def reserve(self, site: int, worst: int, wait: bool) -> None:
        made = self._site(site)
        task = self.world.loop.create_task(made.reserve(worst))
        if wait:
            self.world.run(asyncio.wait({task}))
        else:
            self.world.sleep(0.001)

    @rule(site=st.integers(0, 2), index=st.integers(0, 50), share=st.floats(0, 1))
    def settle(self, site: int, index: int, share: float) -> None:
        made = self.world.sites[site]
        if made.open:
            made.settle(index % len(made.open), share)

    @precondition(lambda self: self.world.post)
    @rule(index=st.integers(0, 50), answered=st.booleans())
    def deliver(self, index: int, answered: bool) -> None:
        """To the hub, and back at once, or later, or never."""
        post = self.world.post[index % len(self.world.post)]
        answer = self.world.hub.take(post.site, post.body, self.world.now_ns())
        if answered and not post.waiter.done():
            post.waiter.set_result(answer)
        self.world.sleep(0.001)

    @precondition(lambda self: self.world.post)
    @rule(index=st.integers(0, 50))
    def lose(self, index: int) -> None:
        self.world.post.pop(index % len(self.world.post))

    @rule(seconds=st.sampled_from([0.5, 3.0, 6.0, 61.0, 3000.0]))
    def pass_time(self, seconds: float) -> None:
        self.world.sleep(seconds)

    @rule(site=st.integers(0, 2))
    def crash(self, site: int) -> None:
        self.world.sites[site].kill()
        self._site(site)

    @rule(site=st.integers(0, 2))
    def restart(self, site: int) -> None:
        made = self.world.sites[site]
        if made.task is not None:
            self.world.sleep(0.001)
            made.stop()
        self._site(site)

    @rule(site=st.integers(0, 2))
    def lose_memory(self, site: int) -> None:
        """The file of leases is lost with a crash; the ledger is not, and no letter outlives that by so much."""
        made = self.world.sites[site]
        made.kill()
        made.kept.clear()
        self.world.post[:] = [post for post in self.world.post if post.site != made.name]
        self._site(site)

    @rule(amount=st.sampled_from([AMOUNT // 2, AMOUNT, AMOUNT + 50_000]))
    def change_amount(self, amount: int) -> None:
        self.world.hub.doc = budget(amount)
        self.most = max(self.most, amount)

    @invariant()
    def the_sum_holds(self) -> None:
        spent = sum(site.certain for site in self.world.sites)
        granted = self.world.hub.held()
        assert spent <= self.most, (spent, granted)
        assert sum(granted.values()) <= self.most, granted
        for site in self.world.sites:
            assert site.certain <= granted.get(site.name, 0)
            assert site.holds() <= granted.get(site.name, 0)


Fleet.TestCase.settings = settings(max_examples=100, stateful_step_count=60)
TestFleet = Fleet.TestCase


# ---- what a request sees


def test_requests_do_not_wait_once_a_site_is_going(world: World) -> None:
    site = world.site()
    world.sleep(1)
    waits = 0
    for _ in range(200):
        before = world.loop.time()
        reserved(site.try_reserve(10))
        waits += world.loop.time() > before
        site.settle(0, 1.0)
        world.sleep(0.1)
    assert waits <= 2
    assert site.certain == 2000


def test_a_thousand_requests_at_once_on_two_sites_stop_at_the_amount(world: World) -> None:
    sites = [world.site("a"), world.site("b")]

    async def storm() -> list[Reservation | Exhausted]:
        return await asyncio.gather(*(sites[n % 2].reserve(199) for n in range(1000)))

    answers = world.run(storm())
    passed = sum(isinstance(one, Reservation) for one in answers)
    assert sum(site.certain for site in sites) == passed * 199 <= AMOUNT
    assert passed >= AMOUNT // 199 - 2  # what is left at the end is less than a request at each site
    assert {one.why for one in answers if isinstance(one, Exhausted)} == {"spent"}


def test_a_cut_off_site_spends_what_it_holds_and_then_says_why_not(world: World) -> None:
    site = world.site()
    world.sleep(1)
    site.link_up = False
    holds = site.holds()
    assert holds > 0
    reserved(site.try_reserve(holds))
    answer = refused(site.try_reserve(1))
    assert answer.why == "lease"
    assert "the hub, which could give more, cannot be reached now" in exhausted_sentence(answer)
    site.link_up = True
    site.fleet.connected()
    reserved(site.try_reserve(1))


def test_a_silent_hub_holds_a_request_for_two_seconds_and_the_next_not_at_all(world: World) -> None:
    site = world.site()
    world.sleep(1)
    world.rtt_s = 60.0
    before = world.loop.time()
    assert refused(site.try_reserve(50_000)).why == "lease"
    assert world.loop.time() - before == pytest.approx(2.0)


def test_the_hub_comes_back_without_anybody_saying_so(world: World) -> None:
    site = world.site()
    world.sleep(1)
    world.up = False
    assert refused(site.try_reserve(50_000)).why == "lease"
    world.sleep(2)
    world.up = True
    world.sleep(40)
    reserved(site.try_reserve(20_000))


def test_local_answers_go_on_without_a_lease_and_are_not_counted() -> None:
    world = World(budget(offline="local"))
    try:
        site = world.site()
        world.sleep(1)
        site.link_up = False
        reserved(site.try_reserve(site.holds()))
        assert refused(site.try_reserve(5_000)).why == "lease"
        free = reserved(site.try_reserve(5_000, local=True))
        assert free.unleased == ("b",)
        used = site.budgets.status(site.wall_ns())[0]
        assert site.budgets.settle(free, Money(4_000, "USD")).overruns == ()
        assert site.budgets.status(site.wall_ns())[0] == used
        assert site.budgets.can_afford(
            ("b",), Money(1, "USD"), site.wall_ns(), now_ns=site.now_ns(), local=True
        )
        assert not site.budgets.can_afford(("b",), Money(1, "USD"), site.wall_ns(), now_ns=site.now_ns())
        assert refused(site.try_reserve(200_000, local=True)).why == "spent"
    finally:
        world.close()


def test_a_term_ends_by_the_sites_own_clock_and_after_a_restart_by_the_wall(world: World) -> None:
    site = world.site()
    world.sleep(1)
    site.link_up = False
    world.sleep(3500)
    reserved(site.try_reserve(1))
    world.sleep(200)
    assert refused(site.try_reserve(1)).why == "lease"
    site.kill()
    site.boot()
    assert refused(site.try_reserve(1)).why == "lease"
    site.wall_ahead_ns = -3000 * NS_PER_S
    site.link_up = True
    world.sleep(6)
    reserved(site.try_reserve(1))


def test_a_quiet_site_gives_back_what_it_does_not_need(world: World) -> None:
    busy, other = world.site("a"), world.site("b")
    world.sleep(1)
    reserved(busy.try_reserve(9_000))
    busy.settle(0, 0.1)
    assert world.hub.held()["a"] >= 9_000
    world.sleep(1200)
    assert busy.holds() == world.hub.held()["a"] <= 900 + 2 * (AMOUNT // 1000)
    reserved(other.try_reserve(40_000))


def test_where_little_is_left_an_idle_site_keeps_nothing(world: World) -> None:
    idle, busy = world.site("a"), world.site("b")
    world.sleep(1)
    assert idle.holds() > 0
    for _ in range(40):
        answer = busy.try_reserve(2_400)
        if isinstance(answer, Reservation):
            busy.settle(0, 1.0)
    world.sleep(700)
    assert idle.holds() == 0
    assert busy.try_reserve(1).__class__ is Reservation


def test_a_clean_stop_gives_everything_back_and_a_crash_writes_off_a_block(world: World) -> None:
    site = world.site()
    world.sleep(1)
    reserved(site.try_reserve(3_000))
    site.settle(0, 0.5)
    site.stop()
    assert world.hub.held()["a"] == site.holds() == 1_500
    site.boot()
    world.sleep(1)
    reserved(site.try_reserve(10))
    site.kill()
    site.boot()
    world.sleep(1)
    [row] = site.budgets.status(site.wall_ns())
    assert float(row.written_off) >= 10e-9
    assert row.granted is not None
    assert row.fleet_left is not None


def test_a_site_whose_memory_went_back_counts_as_spent_what_it_may_have(world: World) -> None:
    site = world.site()
    world.sleep(1)
    reserved(site.try_reserve(5_000))
    site.settle(0, 1.0)
    site.recorded, site.leased = 0, {}
    site.kill()
    site.kept.clear()
    held = world.hub.held()["a"]
    site.boot()
    world.sleep(1)
    assert [event for event, _ in site.notes] == ["leases_went_back"]
    [row] = site.budgets.status(site.wall_ns())
    assert float(row.written_off) == pytest.approx(held * 1e-9)
    reserved(site.try_reserve(1))


def test_a_new_currency_uses_nothing_of_the_old_grant(world: World) -> None:
    site = world.site()
    world.sleep(1)
    won = BudgetDoc(name="b", scope=BudgetScope(team="t"), amount="1000", currency="KRW", period="day")
    site.budgets.reload({"b": won}, {("USD", "KRW"): "1000"}, spent={}, leases={})
    assert site.budgets.status(site.wall_ns())[0].granted == "0"
    assert refused(site.try_reserve(1)).why == "lease"
    assert [event for event, _ in site.notes] == ["lease_refused"]
    world.hub.doc = won
    world.sleep(40)
    reserved(site.try_reserve(1))


@pytest.mark.parametrize(
    "answer",
    [
        b"\x80", b"nonsense", sync.encode(sync.LeaseReply(budget="b", period=PERIOD, number=1, granted="-5", term_s=1, left="0")),
        sync.encode(sync.LeaseReply(budget="c", period=PERIOD, number=1, granted="5", term_s=1, left="0")),
    ],
)  # fmt: skip
def test_an_answer_that_is_none_is_not_used(answer: bytes) -> None:
    world = World(by_hand=True)
    try:
        site = world.site()
        world.sleep(0.1)
        world.post[0].waiter.set_result(answer)
        world.sleep(0.1)
        assert [event for event, _ in site.notes] == ["lease_refused"]
        assert site.holds() == 0
        assert site.fleet.away("b USD")
    finally:
        world.close()


def test_a_hub_that_refuses_is_asked_again_when_it_said(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = world.site()
    world.sleep(1)
    take: Callable[..., bytes] = world.hub.take

    def no(*_: Any) -> bytes:
        raise HubRefused("the fleet has no budget 'b'", why="not_found", retry_after_s=5.0)

    monkeypatch.setattr(world.hub, "take", no)
    assert refused(site.try_reserve(50_000)).why == "lease"
    monkeypatch.setattr(world.hub, "take", take)
    world.sleep(12)
    reserved(site.try_reserve(20_000))


def test_a_disk_that_takes_nothing_gives_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(_: HeldLease) -> None:
        raise OndolError("the disk is full")

    site = Site(world, "a")
    world.sites.append(site)
    monkeypatch.setattr(site, "keep_lease", full)
    site.boot()
    world.sleep(1)
    assert refused(site.try_reserve(1)).why == "lease"
    assert world.hub.calls == 0


def test_a_peers_request_is_paid_where_it_came_in(world: World) -> None:
    site = world.site()
    caller = Principal(key_id="k", tenant="default", team="t")
    there = Principal(
        key_id="k", tenant="default", team="t", origin=Origin(site="x", request_id="r", attempt=1)
    )
    assert site.budgets.covering(caller, ()) == ("b",)
    assert site.budgets.covering(there, ()) == ()


def test_soft_budgets_are_reported_and_never_asked_for() -> None:
    world = World(budget(1_000, hard=False))
    try:
        site = world.site()
        reserved(site.try_reserve(9_000))
        site.settle(0, 1.0)
        world.sleep(70)
        assert world.hub.held() == {"a": 9_000}
        calls = world.hub.calls
        world.sleep(600)
        assert world.hub.calls == calls
    finally:
        world.close()


def test_an_idle_site_is_quiet(world: World) -> None:
    world.site()
    world.sleep(60)
    calls = world.hub.calls
    world.sleep(3600)
    assert world.hub.calls - calls <= 7
