"""The site's sync in virtual time: sessions, desired state, ranges, events, reports; and what may go wrong."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.unit.gateway.fleet_world import LIFE_S, Hub, World, live, refused

from ondol.core.ports import SiteEvent
from ondol.errors import ConfigError, LinkDown, StateUnavailable
from ondol.gateway.reconcile import BUSY_BYTES, BUSY_BYTES_PER_S
from ondol.units import NS_PER_S
from ondol.wire import sync

HOUR = 3600.0


async def _joined(world: World) -> None:
    await world.until(lambda: world.sync.connected, within_s=5)


# ---- records


def test_records_go_up_as_they_come_exactly_and_in_order(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.outbox.add(1000)
        await world.until(lambda: len(world.hub.rows) == 1000, within_s=3)
        await asyncio.sleep(HOUR / 4)
        world.outbox.add(1)
        assert await world.until(lambda: len(world.hub.rows) == 1001, within_s=1) <= 0.1
        assert world.hub.rows == [payload for payload, _ in world.outbox.rows]
        await world.until(lambda: world.outbox.acknowledged_seq == 1001, within_s=1)
        assert world.sync.status().acknowledged == 1001

    live(tmp_path, story)


def test_after_hours_away_the_first_record_is_there_within_a_second(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await _joined(world)
        world.hub.cut()
        for _ in range(60):
            world.outbox.add(500)
            await asyncio.sleep(60)
        assert world.sync.status().state == "away"
        world.hub.down = False
        assert await world.until(lambda: bool(world.hub.rows), within_s=5) <= 1.0
        world.hub.row_s = 20e-6
        await world.until(lambda: len(world.hub.rows) == 30_000, within_s=10)
        assert world.hub.rows == [payload for payload, _ in world.outbox.rows]

    live(tmp_path, story)


def test_an_answer_that_is_lost_is_asked_for_again_and_nothing_is_doubled(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await _joined(world)
        world.hub.lose_answers.add("usage")
        world.outbox.add(50)
        await world.until(lambda: len(world.hub.rows) == 50, within_s=3)
        assert world.outbox.acknowledged_seq == 0
        world.hub.lose_answers.clear()
        await world.until(lambda: world.outbox.acknowledged_seq == 50, within_s=5)
        assert len(world.hub.rows) == 50

    live(tmp_path, story)


def test_a_hub_that_was_restored_is_filled_again_and_it_is_said(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.outbox.add(300)
        await world.until(lambda: world.outbox.acknowledged_seq == 300, within_s=3)
        world.hub.cut()
        await asyncio.sleep(5)
        del world.hub.rows[100:], world.hub.hashes[100:]
        world.hub.down = False
        await world.until(lambda: len(world.hub.rows) == 300, within_s=5)
        assert world.hub.rows == [payload for payload, _ in world.outbox.rows]
        assert 100 in world.outbox.marks  # the lower mark was noted: those rows may not be pruned
        assert world.events("hub_went_back") == [{"had": "300", "has": "100"}]

    live(tmp_path, story)


def test_a_gap_in_the_middle_of_a_session_is_sent_from_the_hubs_mark(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.outbox.add(100)
        await world.until(lambda: world.outbox.acknowledged_seq == 100, within_s=3)
        del world.hub.rows[40:], world.hub.hashes[40:]  # another replica took over, with an older state
        world.outbox.add(1)
        await world.until(lambda: len(world.hub.rows) == 101, within_s=5)
        assert world.events("gap") == [{"sent_from": "101", "hub_has": "40"}]
        assert world.hub.rows == [payload for payload, _ in world.outbox.rows]

    live(tmp_path, story)


def test_a_refused_range_stops_shipping_loudly_and_nothing_else(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await _joined(world)
        world.hub.answers["usage"] = [refused("range_refused", "a fork")] * 3
        world.outbox.add(5)
        await world.until(lambda: world.sync.status().stopped == "a fork", within_s=3)
        await asyncio.sleep(100)
        assert world.events("shipping_stopped") == [{"why": "a fork"}]  # tried since, and said once
        assert world.sync.connected
        assert world.hub.reports[-1].notes == ("a fork",)
        world.hub.publish(1, "a")
        await world.until(lambda: world.activated == [1], within_s=3)
        await world.until(lambda: len(world.hub.rows) == 5, within_s=200)  # mended at the hub
        assert world.sync.status().stopped == ""

    live(tmp_path, story)


def test_a_hub_that_has_more_than_the_site_is_a_fork(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.hub.rows, world.hub.hashes = [b"1", b"2"], [b"1" * 32, b"2" * 32]
        world.outbox.add(1)
        await world.until(lambda: "another one here" in world.sync.status().stopped, within_s=3)
        await asyncio.sleep(30)
        assert world.hub.times("usage") == []

    live(tmp_path, story)


def test_a_thin_line_gets_small_ranges_and_a_wide_one_large_ranges(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.hub.row_s = 0.02  # fifty rows a second
        world.outbox.add(600)
        await world.until(lambda: len(world.hub.rows) == 600, within_s=60)
        sizes = [
            len(sync.decode(body, sync.Range).rows) for _, name, body in world.hub.asked if name == "usage"
        ]
        assert max(sizes[3:]) <= 32
        world.hub.row_s = 0.0
        world.outbox.add(20_000)
        await world.until(lambda: len(world.hub.rows) == 20_600, within_s=3)
        sizes = [
            len(sync.decode(body, sync.Range).rows) for _, name, body in world.hub.asked if name == "usage"
        ]
        assert max(sizes) > 2000

    live(tmp_path, story)


def test_while_requests_run_ranges_are_small_and_leave_them_time(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await _joined(world)
        world.running, world.hub.row_s = 3, 100e-6
        world.outbox.add(3000, size=1000)
        took_s = await world.until(lambda: len(world.hub.rows) == 3000, within_s=10)
        sizes = [len(body) for _, name, body in world.hub.asked if name == "usage"]
        assert max(sizes) <= BUSY_BYTES + 4000
        assert took_s >= 3000 * 1000 / BUSY_BYTES_PER_S * 0.9

        world.running = 0
        world.outbox.add(3000, size=1000)  # records that come say as well that requests run
        assert await world.until(lambda: len(world.hub.rows) == 6000, within_s=10) >= 0.3

    live(tmp_path, story)


def test_a_range_that_is_too_large_is_sent_in_smaller_ones(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await _joined(world)
        world.hub.answers["usage"] = [refused("request_too_large")]
        world.outbox.add(200)
        await world.until(lambda: len(world.hub.rows) == 200, within_s=5)
        assert world.sync.status().stopped == ""

    live(tmp_path, story)


def test_a_hub_whose_disk_is_full_is_asked_again_without_a_new_session(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await _joined(world)
        world.hub.answers["usage"] = [refused("state_unavailable")] * 5
        world.outbox.add(3)
        await world.until(lambda: len(world.hub.rows) == 3, within_s=10)
        assert len(world.hub.times("hello")) == 1

    live(tmp_path, story)


def test_a_mark_is_noted_again_on_a_quiet_site(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.outbox.add(1)
        await world.until(lambda: world.outbox.acknowledged_seq == 1, within_s=3)
        await asyncio.sleep(HOUR / 2)
        assert 3 <= world.outbox.marks.count(1) <= 5

    live(tmp_path, story)


# ---- sessions


def test_a_line_that_says_nothing_is_noticed_and_replaced(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await _joined(world)
        world.hub.silent = True
        await world.until(lambda: world.sync.status().state == "away", within_s=15)
        world.outbox.add(1)
        await asyncio.sleep(60)
        world.hub.silent = False
        await world.until(lambda: len(world.hub.rows) == 1, within_s=6)  # one hello hangs for at most 5 s

    live(tmp_path, story)


def test_a_dead_line_ends_every_call_that_waits_on_it(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await _joined(world)
        world.hub.silent = True
        world.hub.publish(1, "a")
        await world.until(lambda: world.sync.status().state == "away", within_s=15)
        world.hub.silent = False
        await world.until(lambda: world.activated == [1], within_s=8)  # the fetch that hung would wait 120 s

    live(tmp_path, story)


def test_one_that_is_fenced_ships_nothing_says_so_and_asks_slowly(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await _joined(world)
        world.hub.answers["usage"] = [refused("fenced", "two machines")]
        world.hub.answers["hello"] = [refused("fenced", "two machines")] * 8
        world.outbox.add(5)
        await world.until(lambda: world.sync.status().state == "fenced", within_s=5)
        assert world.sync.status().why == "two machines"
        before = len(world.hub.times("hello"))
        await asyncio.sleep(60)
        assert world.hub.rows == []
        assert len(world.hub.times("hello")) - before <= 6
        await world.until(lambda: len(world.hub.rows) == 5, within_s=120)  # an operator has admitted it

    live(tmp_path, story)


def test_a_challenge_is_answered_and_a_wait_is_waited(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        hub = world.hub
        hub.answers["hello"] = [
            lambda: hub.hello(wait_s=5.0), lambda: hub.hello(challenge="prove"), lambda: hub.hello()
        ]  # fmt: skip
        await world.until(lambda: world.sync.status().state == "waiting", within_s=2)
        await _joined_within(world, 6)
        said = [sync.decode(body, sync.Hello).answer for _, name, body in hub.asked if name == "hello"]
        assert said == ["", "", "prove"]

    live(tmp_path, story)


async def _joined_within(world: World, within_s: float) -> None:
    await world.until(lambda: world.sync.connected, within_s=within_s)


def test_a_hub_that_forgot_the_site_is_greeted_again(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await _joined(world)
        world.hub.answers["usage"] = [refused("hello_again")]
        world.outbox.add(2)
        await world.until(lambda: len(world.hub.rows) == 2, within_s=3)
        assert len(world.hub.times("hello")) == 2

    live(tmp_path, story)


def test_a_hub_that_is_away_is_asked_often_and_one_that_refuses_is_not(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.hub.down = True
        asked: list[float] = []
        call = world.hub.call

        async def counted(name: str, body: bytes, *, timeout_s: float) -> bytes:
            asked.append(asyncio.get_running_loop().time())
            return await call(name, body, timeout_s=timeout_s)

        world.hub.call = counted  # type: ignore[method-assign]
        await asyncio.sleep(60)
        gaps = [b - a for a, b in zip(asked[1:], asked[2:], strict=False)]
        assert max(gaps) < 1.0 and min(gaps) > 0.05 and len(set(gaps)) > 10
        world.hub.down = False
        world.hub.answers["hello"] = [refused("forbidden", "revoked")] * 100
        await asyncio.sleep(2)
        asked.clear()
        await asyncio.sleep(60)
        assert len(asked) <= 6
        assert (world.sync.status().state, world.sync.status().why) == ("refused", "revoked")

    live(tmp_path, story)


def test_a_mistake_in_one_loop_stops_no_other(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        def broken() -> sync.Message:
            raise ValueError("surprise")

        world.hub.answers["report"] = [broken] * 3
        world.hub.answers["usage"] = [broken]
        await _joined(world)
        world.outbox.add(3)
        await world.until(lambda: len(world.hub.rows) == 3, within_s=5)
        await world.until(lambda: bool(world.hub.reports), within_s=60)
        assert {one["what"] for one in world.events("sync_failed")} == {"reports", "ship"}

    live(tmp_path, story)


# ---- clocks


def test_a_site_whose_clock_is_far_off_learns_the_time_from_the_refusal(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        hub = world.hub
        hub.answers["hello"] = [
            lambda: refused("invalid_api_key", "the assertion was made long ago", hub_ns=hub.hub_ns())()
        ]
        await _joined_within(world, 2)
        assert abs(world.sync.hub_now_ns() - hub.hub_ns()) < NS_PER_S // 50
        await world.until(lambda: bool(hub.reports), within_s=5)
        report = hub.reports[-1]
        assert (
            report.offset_ns is not None
            and abs(report.offset_ns + 56 * 365 * 86_400 * NS_PER_S) < NS_PER_S // 50
        )
        assert "behind the hub's; set it" in report.notes[0]

    live(tmp_path, story, ahead_s=-56 * 365 * 86_400)


def test_the_hubs_time_is_known_after_a_restart_and_never_goes_back(tmp_path: Path) -> None:
    async def first(world: World) -> int:
        await _joined(world)
        await asyncio.sleep(HOUR / 4)
        return world.hub.hub_ns()

    async def second(world: World) -> int:
        world.hub.down = True
        world.clock.ahead_s = -(10**6)
        await asyncio.sleep(1)
        return world.sync.hub_now_ns()

    seen = live(tmp_path, first)
    assert live(tmp_path, second) >= seen - 70 * NS_PER_S


# ---- desired state


def test_a_generation_is_activated_kept_and_reported(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await _joined(world)
        world.hub.publish(1, "a", "b")
        assert await world.until(lambda: world.activated == [1], within_s=2) < 0.5
        world.hub.publish(2, "b", "c")
        await world.until(lambda: world.activated == [1, 2], within_s=2)
        fetched = [
            sync.decode(body, sync.Fetch).have for _, name, body in world.hub.asked if name == "desired"
        ]
        assert len(fetched[-1]) == 2  # only the new body came
        await world.until(lambda: world.hub.reports[-1].generation == 2, within_s=2)
        kept = world.memory.desired()
        assert kept is not None and kept.documents() == [b"b", b"c"]
        assert world.events("generation") == [{"number": "1"}, {"number": "2"}]

    live(tmp_path, story)


def test_a_generation_that_cannot_be_activated_is_refused_and_the_old_one_stays(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await _joined(world)
        world.hub.publish(1, "a")
        await world.until(lambda: world.activated == [1], within_s=2)
        world.refuse = ConfigError("Route/x: there is no deployment y")
        world.hub.publish(2, "b")
        await world.until(lambda: world.hub.reports[-1].refused_generation == 2, within_s=3)
        assert world.hub.reports[-1].refused == "Route/x: there is no deployment y"
        assert world.hub.reports[-1].generation == 1
        kept = world.memory.desired()
        assert kept is not None and kept.manifest.generation == 1
        before = len(world.hub.times("desired"))
        await asyncio.sleep(180)
        assert len(world.hub.times("desired")) - before == 3  # once a minute, not with every heartbeat
        assert len(world.events("generation_refused")) == 1
        world.refuse = None
        await world.until(lambda: world.activated == [1, 2], within_s=61)
        await world.until(lambda: world.hub.reports[-1].refused == "", within_s=3)

    live(tmp_path, story)


def test_a_hub_that_cannot_make_the_sites_state_is_quoted_and_not_pressed(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await _joined(world)
        world.hub.answers["desired"] = [refused("invalid_config", "generation 1 does not fit s")] * 3
        world.hub.publish(1, "a")
        await world.until(lambda: "does not fit" in world.sync.status().refused, within_s=3)
        assert world.sync.connected
        await world.until(lambda: world.activated == [1], within_s=200)

    live(tmp_path, story)


def test_a_lower_generation_of_a_restored_hub_is_not_taken_and_it_is_said(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.hub.publish(5, "a")
        await world.until(lambda: world.activated == [5], within_s=3)
        world.hub.cut()
        await asyncio.sleep(2)
        world.hub.down = False
        world.hub.publish(4, "old")
        await world.until(lambda: "runs 5 already" in world.sync.status().refused, within_s=5)
        assert {"runs": "5", "offered": "4"} in world.events("hub_went_back")
        world.hub.publish(6, "new")
        await world.until(lambda: world.activated == [5, 6], within_s=3)

    live(tmp_path, story)


def test_what_a_watch_missed_is_healed_within_a_minute(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await _joined(world)
        await asyncio.sleep(1)
        world.hub.generation, world.hub.texts = 1, ("a",)  # and the watch goes on announcing the old number
        assert await world.until(lambda: world.activated == [1], within_s=62) > 10

    live(tmp_path, story)


def test_a_disk_that_is_full_for_a_while_keeps_no_generation_for_ever(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await _joined(world)
        keep, fails = world.memory.keep_desired, [True]

        async def failing(desired: object) -> None:
            if fails:
                fails.pop()
                raise StateUnavailable("disk full")
            await keep(desired)  # type: ignore[arg-type]

        world.memory.keep_desired = failing  # type: ignore[method-assign]
        world.hub.publish(1, "a")
        await world.until(lambda: world.memory.desired() is not None, within_s=70)

    live(tmp_path, story)


def test_the_list_of_who_is_out_is_kept_and_never_goes_back(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await _joined(world)
        world.hub.epoch, world.hub.numbers = Hub.epoch_of(7), (0, 7)
        world.hub.say()
        await world.until(lambda: world.sync.status().epoch == 7, within_s=2)
        assert world.memory.epoch() == Hub.epoch_of(7)
        before = world.retrusted
        world.hub.epoch = Hub.epoch_of(3)
        await asyncio.sleep(130)
        assert world.sync.status().epoch == 7
        assert world.retrusted == before
        assert "7 is known already" in world.events("epoch_refused")[0]["why"]

    live(tmp_path, story)
    assert live(tmp_path, _epoch_at_start) == 7


async def _epoch_at_start(world: World) -> int:
    world.hub.down = True
    await asyncio.sleep(0.1)
    return world.sync.status().epoch


# ---- events, reports, credentials


def _event(kind: str) -> SiteEvent:
    return SiteEvent(time_ns=1, kind=kind, fields={"who": "me"}, offset_ns=-3)


def test_events_wait_for_the_hub_and_audit_goes_first(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.hub.down = True
        for _ in range(150):
            await world.memory.note("telemetry", _event("sample"))
            await world.memory.note("audit", _event("key_made"))
        world.hub.down = False
        await world.until(lambda: len(world.hub.events["telemetry"]) >= 150, within_s=20)
        batches = [sync.decode(body, sync.Events) for _, name, body in world.hub.asked if name == "events"]
        assert (len(batches[0].audit), len(batches[0].telemetry)) == (150, 50)
        assert [one.id for one in world.hub.events["audit"]] == list(range(1, 151))
        assert world.hub.events["audit"][0].offset_ns == -3
        await world.until(lambda: world.memory.event_marks()["audit"] == (150, 150), within_s=1)
        world.hub.events["audit"].clear()  # restored from a backup
        await world.memory.note("audit", _event("key_revoked"))
        await world.until(lambda: bool(world.hub.events["audit"]), within_s=10)

    live(tmp_path, story)


def test_events_give_way_to_records_but_not_for_ever(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.hub.row_s = 0.01
        world.outbox.add(20_000)
        await world.memory.note("audit", _event("key_made"))
        await _joined(world)
        await asyncio.sleep(20)
        assert world.hub.events["audit"] == []
        await world.until(lambda: bool(world.hub.events["audit"]), within_s=20)

    live(tmp_path, story)


def test_a_site_says_how_it_is_every_ten_seconds_and_samples_itself_also_alone(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await _joined(world)
        world.hub.notes = ("your clock is off",)
        await asyncio.sleep(100)
        assert 9 <= len(world.hub.reports) <= 13
        assert world.events("hub_says") == [{"what": "your clock is off"}]
        world.sync.report_soon()
        before = len(world.hub.reports)
        await world.until(lambda: len(world.hub.reports) > before, within_s=2)
        world.hub.cut()
        await asyncio.sleep(100)
        assert world.memory.event_marks()["telemetry"][1] >= 19

    live(tmp_path, story)


def test_the_credential_is_renewed_at_half_of_its_life_by_the_hubs_clock(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await _joined(world)
        world.hub.answers["renew"] = [lambda: LinkDown("reset"), refused("state_unavailable")]
        await world.until(lambda: len(world.identity.kept) == 1, within_s=0.7 * LIFE_S)
        assert len(world.hub.times("renew")) == 3
        times = world.hub.times("renew")
        assert times[0] >= LIFE_S / 2 - 11 and all(
            b - a >= 60 for a, b in zip(times, times[1:], strict=False)
        )
        await asyncio.sleep(LIFE_S / 4)
        assert len(world.identity.kept) == 1
        await world.until(lambda: len(world.identity.kept) == 2, within_s=LIFE_S / 2)

    live(tmp_path, story, ahead_s=10**6)
