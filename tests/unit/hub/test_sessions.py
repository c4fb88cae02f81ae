"""One process speaks for a site.  A model of sites that start, die, hang and are copied, against the real state.

What must hold, whatever happens in whatever order, also while the hub's wall clock is set back and forth:
never two processes are taken at once; a site that lives on one machine is never fenced and always let in again;
of two machines with one disk, both alive, one stays and the other is fenced.
"""

from __future__ import annotations

import itertools
from functools import partial

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule
from tests.unit.hub.conftest import START_NS, site_doc

from ondol.adapters.database_sqlite import InlineDatabase
from ondol.core.ports import Tx
from ondol.errors import Fenced, HelloAgain, InvalidRequest
from ondol.hub import sessions, sites
from ondol.hub.liveness import Liveness
from ondol.hub.schema import MIGRATIONS
from ondol.hub.sites import SiteRow
from ondol.units import NS_PER_S
from ondol.wire import sync

SITE = "shop-1"
REPORT_S = 5.0


class Process:
    """One start of a site, as `gateway/sync.py` behaves: it waits when told to, and answers a challenge at once."""

    def __init__(self, machine: int, number: int) -> None:
        self.machine = machine
        self.instance = f"process{number:04d}"
        self.number = number
        self.alive = True
        self.speaks = False
        self.fenced = False
        self.not_before_ns = 0
        self.said: list[sync.Hello] = []


class HubModel:
    """The hub's half of a session: the tables, the memory of one replica, and two clocks."""

    def __init__(self) -> None:
        self.database = InlineDatabase(":memory:", migrations=MIGRATIONS, durable=False)
        self.liveness = Liveness()
        self.mono_ns = NS_PER_S
        self.offset_ns = START_NS
        self.challenges = itertools.count()
        self.database.write_now(lambda tx: sites.add(tx, site_doc(SITE), self.wall_ns))

    @property
    def wall_ns(self) -> int:
        return self.mono_ns + self.offset_ns

    def row(self) -> SiteRow:
        return self.database.write_now(lambda tx: sites.get(tx, SITE))

    def hello(self, message: sync.Hello) -> tuple[float, str]:
        def work(tx: Tx) -> tuple[float, str]:
            row = sites.get(tx, SITE)
            live = self.liveness.live(SITE, row.instance, self.mono_ns, self.wall_ns - row.heard_ns)
            answer = sessions.hello(
                tx, SITE, message, now_ns=self.wall_ns, live=live,
                new_challenge=lambda: f"challenge{next(self.challenges)}",
            )  # fmt: skip
            if answer == (0.0, ""):
                sites.heard(tx, SITE, self.wall_ns, 0)
            return answer

        answer = self.database.write_now(work)
        if answer == (0.0, ""):
            self.liveness.heard(SITE, self.mono_ns)
        return answer

    def call(self, instance: str) -> None:
        due = self.liveness.due(SITE, self.mono_ns)

        def work(tx: Tx) -> None:
            sessions.require_instance(tx, SITE, instance)
            if due:
                sites.heard(tx, SITE, self.wall_ns, 0)

        self.database.write_now(work)
        self.liveness.heard(SITE, self.mono_ns, written=due)


def _require(tx: Tx, instance: str) -> None:
    sessions.require_instance(tx, SITE, instance)


class Sites(RuleBasedStateMachine):
    """Up to three machines with one disk, or one alone."""

    processes = Bundle("processes")

    def __init__(self) -> None:
        super().__init__()
        self.hub = HubModel()
        self.all: list[Process] = []
        self.machines = 1

    @initialize(machines=st.integers(1, 3))
    def how_many(self, machines: int) -> None:
        self.machines = machines

    # ---- what happens

    @rule(target=processes, machine=st.integers(0, 2))
    def start(self, machine: int) -> object:
        if machine >= self.machines or self.on(machine) is not None:
            return multiple()
        made = Process(machine, len(self.all))
        self.all.append(made)
        return made

    @rule(process=processes, noticed=st.booleans())
    def kill(self, process: Process, noticed: bool) -> None:
        if process.alive:
            process.alive = False
            if noticed and process.speaks:
                self.hub.liveness.hung_up(SITE, process.instance)

    @rule(process=processes)
    def speak(self, process: Process) -> None:
        self.turn(process)

    @rule(seconds=st.sampled_from([0.1, 4, 10, 16, 60]))
    def nothing_happens(self, seconds: float) -> None:
        self.hub.mono_ns += int(seconds * NS_PER_S)

    @rule(seconds=st.sampled_from([3, 12, 40]))
    def all_speak(self, seconds: int) -> None:
        self.live_on(seconds)

    @rule(process=processes)
    def the_watch_breaks(self, process: Process) -> None:
        if process.speaks:
            self.hub.liveness.watching(SITE, process.instance)
            self.hub.liveness.hung_up(SITE, process.instance)

    @rule(process=processes)
    def a_late_message_comes(self, process: Process) -> None:
        """What a dead process said, delivered once more; what it would have learnt from the answer, it cannot."""
        if not process.alive and process.said:
            try:
                self.hub.hello(process.said.pop())
            except Fenced:
                return

    @rule(seconds=st.sampled_from([-86_400, -3600, -20, 20, 3600, 86_400]))
    def the_wall_clock_is_set(self, seconds: int) -> None:
        self.hub.offset_ns += seconds * NS_PER_S

    @rule()
    def the_hub_restarts(self) -> None:
        self.hub.liveness = Liveness()

    @rule()
    def an_operator_admits(self) -> None:
        self.hub.database.write_now(lambda tx: sessions.admit(tx, SITE))

    # ---- what a process does

    def on(self, machine: int) -> Process | None:
        return next((one for one in self.all if one.machine == machine and one.alive), None)

    def turn(self, process: Process) -> None:
        """A process says what it has to say now, to the end of its exchange."""
        if not process.alive or self.hub.mono_ns < process.not_before_ns:
            return
        process.fenced = False
        try:
            if process.speaks:
                self.hub.call(process.instance)
            else:
                self.greet(process)
        except HelloAgain:
            process.speaks = False
        except Fenced:
            process.speaks, process.fenced = False, True

    def greet(self, process: Process) -> None:
        answer = ""
        for _ in range(3):
            message = sync.Hello(
                boot=process.number, instance=process.instance, gateway="g", generation=0, epoch=0,
                acknowledged=0, wall_ns=self.hub.wall_ns, answer=answer,
            )  # fmt: skip
            process.said.append(message)
            wait_s, answer = self.hub.hello(message)
            process.not_before_ns = self.hub.mono_ns + int(wait_s * NS_PER_S)
            if not answer:
                process.speaks = wait_s == 0
                return

    def live_on(self, seconds: int) -> None:
        """All that live speak every second, for a while."""
        for _ in range(seconds):
            self.hub.mono_ns += NS_PER_S
            for process in self.all:
                self.turn(process)

    # ---- what must hold

    def taken(self) -> list[Process]:
        found = []
        for process in self.all:
            try:
                self.hub.database.write_now(partial(_require, instance=process.instance))
            except (Fenced, HelloAgain):
                continue
            found.append(process)
        return found

    @invariant()
    def one_at_most_is_taken(self) -> None:
        assert len(self.taken()) <= 1

    @invariant()
    def a_site_on_one_machine_is_never_fenced(self) -> None:
        if self.machines == 1:
            process = self.on(0)
            assert process is None or self.hub.row().fenced != process.instance

    def teardown(self) -> None:
        """Whatever came before: with all machines on, soon exactly one speaks, and the others are fenced."""
        for machine in range(self.machines):
            if self.on(machine) is None:
                self.start(machine)
        self.live_on(150)
        taken, alive = self.taken(), [one for one in self.all if one.alive]
        assert len(taken) == 1
        assert taken[0].alive and taken[0].speaks
        if self.machines <= 2:
            assert [one.fenced for one in alive if one is not taken[0]] == [True] * (self.machines - 1)
        self.live_on(60)
        assert self.taken() == taken, "who speaks for a site changes no more"
        self.hub.database.close_now()


TestSites = Sites.TestCase
TestSites.settings = settings(stateful_step_count=40)


@pytest.fixture
def hub() -> HubModel:
    return HubModel()


def hello(instance: str, answer: str = "", **fields: object) -> sync.Hello:
    return sync.Hello(
        boot=1, instance=instance, gateway="g", generation=0, epoch=0, acknowledged=0, wall_ns=0,
        answer=answer, **fields,  # type: ignore[arg-type]
    )  # fmt: skip


def test_a_restart_whose_end_was_noticed_passes_at_once(hub: HubModel) -> None:
    assert hub.hello(hello("aaaaaaaa")) == (0, "")
    hub.liveness.watching(SITE, "aaaaaaaa")
    hub.liveness.hung_up(SITE, "aaaaaaaa")
    assert hub.hello(hello("bbbbbbbb")) == (0, "")


def test_a_restart_that_nobody_noticed_waits_for_the_silence(hub: HubModel) -> None:
    hub.hello(hello("aaaaaaaa"))
    waited = 0.0
    while (wait_s := hub.hello(hello("bbbbbbbb"))[0]) > 0:
        waited += wait_s
        hub.mono_ns += int(wait_s * NS_PER_S)
    assert waited == sessions.LIVE_S


def test_a_wall_clock_that_jumps_fences_nobody(hub: HubModel) -> None:
    hub.hello(hello("aaaaaaaa"))
    assert hub.hello(hello("bbbbbbbb"))[0] > 0
    hub.offset_ns += 3600 * NS_PER_S
    hub.mono_ns += 5 * NS_PER_S
    assert hub.hello(hello("bbbbbbbb"))[0] > 0
    hub.offset_ns -= 7200 * NS_PER_S
    hub.mono_ns += 10 * NS_PER_S
    assert hub.hello(hello("bbbbbbbb")) == (0, "")


def test_what_the_waiting_process_says_keeps_nobody_alive(hub: HubModel) -> None:
    hub.hello(hello("aaaaaaaa"))
    for _ in range(3):
        assert hub.hello(hello("bbbbbbbb"))[0] > 0
        with pytest.raises(HelloAgain):
            hub.call("bbbbbbbb")
        hub.mono_ns += 5 * NS_PER_S
    assert hub.hello(hello("bbbbbbbb")) == (0, "")


@pytest.mark.parametrize("instance", ["", "short", "x" * 65, "has space here", "läääääääg!"])
def test_an_instance_is_a_name(hub: HubModel, instance: str) -> None:
    with pytest.raises(InvalidRequest, match="8 to 64"):
        hub.hello(hello(instance))


def test_a_site_of_an_unknown_version_is_told_which_are_known(hub: HubModel) -> None:
    with pytest.raises(InvalidRequest, match=r"speaks versions \(99,\), this hub 1 to 1"):
        hub.hello(hello("aaaaaaaa", versions=(99,)))
    assert hub.hello(hello("aaaaaaaa", versions=(1, 99))) == (0, "")
