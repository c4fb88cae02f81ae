"""A hub that was put back from an older copy grants nothing that a silent site may hold already."""

from __future__ import annotations

import random
from datetime import UTC
from typing import Any

import msgspec
import pytest
from tests.unit.hub.conftest import START_NS, Fleet, HandClock, Speaker

from ondol.core import dsse
from ondol.core.catalog import BudgetDoc, BudgetScope, Selector
from ondol.core.periods import period
from ondol.core.ports import Tx
from ondol.errors import Unauthenticated
from ondol.hub import audit, enrol, freeze, ingest, leases, publish
from ondol.hub.service import Hub
from ondol.units import NS_PER_S
from ondol.wire import sync

pytestmark = pytest.mark.anyio
UTC_NAME = "UTC"


def budget(**fields: Any) -> BudgetDoc:
    given = {"amount": "0.000001", "period": "month", "timezone": UTC_NAME, **fields}
    return BudgetDoc(name="b", scope=BudgetScope(team="t"), **given)


class Shop:
    """A site that keeps the books of its lease as a real one does."""

    def __init__(self, speaker: Speaker, key: str) -> None:
        self.speaker, self.key = speaker, key
        self.number, self.granted, self.era, self.lease_ns = 0, 0, 0, 0

    async def hello(self, **fields: Any) -> sync.HelloReply:
        who = self.speaker
        known: dict[str, Any] = {
            "generation": 0,
            "acknowledged": 0,
            "lease_ns": self.lease_ns,
            "era": self.era,
        }
        message = sync.Hello(
            boot=1, instance=who.instance, gateway=who.gateway, epoch=0, wall_ns=0, **(known | fields)
        )
        reply = await who.call("hello", message, sync.HelloReply)
        self.era = reply.era
        return reply

    async def lease(self, want: int = 0, *, back: int = 0, **fields: Any) -> sync.LeaseReply:
        self.number += 1
        self.granted -= back
        known: dict[str, Any] = {"granted": str(self.granted), "spent": "0", "era": self.era}
        message = sync.Lease(
            instance=self.speaker.instance, budget="b", period=self.key, number=self.number, want=str(want),
            give_back=str(back), currency="USD", **(known | fields),
        )  # fmt: skip
        reply = await self.speaker.call("lease", message, sync.LeaseReply)
        if reply.number == self.number:
            self.granted, self.lease_ns = int(reply.granted), reply.hub_ns
        return reply


async def shops(fleet: Fleet, count: int = 3, **fields: Any) -> list[Shop]:
    """Sites of a fleet with one budget of 1,000 units."""
    doc = budget(**fields)
    await fleet.hub.database.write(
        lambda tx: publish.apply(
            tx, [("Budget", doc)], author="", message="", now_ns=START_NS, everywhere=True
        )
    )
    await fleet.hub.look()
    made = []
    for number in range(count):
        speaker = await fleet.joined(f"shop-{number}")
        made.append(Shop(speaker, month(fleet.clock)))
        await made[-1].hello()
    return made


def month(clock: HandClock) -> str:

    return period(clock.wall_ns(), "month", UTC).key


def _forget(tx: Tx) -> None:
    """What a backup from before the first lease call knows."""
    tx.run("DELETE FROM lease_grants")


async def restart(fleet: Fleet, sites: list[Shop], *, restored: bool = False) -> Hub:
    """The hub's next process."""
    hub = fleet.hub
    fleet.clock.move(20)
    fleet.hub = Hub(
        database=hub.database, authority=hub.authority, place=hub.place, clock=fleet.clock, rng=random.Random(1),
        certify=lambda csr, site, address: b"", note=lambda event, **fields: None,
    )  # fmt: skip
    await fleet.hub.start(restored=restored)
    for one in sites:
        one.speaker.hub = fleet.hub
    if restored:
        fleet.clock.move(freeze.SETTLE_S)
    return fleet.hub


async def shown(fleet: Fleet) -> leases.FleetBudget:
    [row] = await fleet.hub.database.read(
        lambda tx: leases.status(tx, publish.fleet_at(tx, publish.fleet_generation(tx)).budgets.values())
    )
    return row


async def test_a_hub_that_was_said_to_be_restored_waits_for_all_sites(fleet: Fleet) -> None:
    first, second, third = await shops(fleet)
    for one in (first, second, third):
        await one.lease(1000)
    assert first.granted == 100
    await fleet.hub.database.write(_forget)
    await restart(fleet, [first, second, third], restored=True)
    await first.hello()
    answer = await first.lease(500)
    assert (answer.granted, answer.left) == ("100", "0")
    assert "Silent: shop-1, shop-2. One that never comes back: ondol sites revoke NAME" in answer.frozen
    row = await shown(fleet)
    assert (row.left, row.frozen) == ("0", answer.frozen)
    await second.hello()
    await second.lease()
    assert (await first.lease(500)).granted == "100"
    await third.hello()
    await third.lease()
    answer = await first.lease(500)
    assert (int(answer.granted) > 100, answer.frozen, (await shown(fleet)).frozen) == (True, "", "")
    assert first.granted + second.granted + third.granted <= 1000


async def test_what_comes_back_meanwhile_is_granted_again_and_no_more(fleet: Fleet) -> None:
    first, second, silent = await shops(fleet)
    for one in (first, second, silent):
        await one.lease(1000)
    held = silent.granted
    await restart(fleet, [first, second, silent], restored=True)
    for one in (first, second):
        await one.hello()
        await one.lease()
    assert (await second.lease(500)).granted == str(second.granted)
    await first.lease(back=80)
    before = second.granted
    for _ in range(60):
        await second.lease(500)
    assert second.granted == before + 80
    assert first.granted + second.granted + held <= 1000


async def test_a_call_from_before_the_freeze_proves_nothing(fleet: Fleet) -> None:
    first, second = await shops(fleet, 2)
    await second.lease(1000)
    await fleet.hub.database.write(_forget)
    await restart(fleet, [first, second], restored=True)
    await first.hello()
    await first.lease()
    second.number -= 1  # the call that asked for what it holds now, once more
    late = await second.lease(1000, granted="0")
    assert (late.granted, late.frozen != "") == ("0", True)
    assert "Silent: shop-1" in (await first.lease(900)).frozen
    second.granted = 100
    await second.hello()
    await second.lease()
    assert (await shown(fleet)).granted == "0.0000001"
    assert (await first.lease(900)).frozen == ""


async def test_a_site_of_an_older_release_is_taken_at_its_word(fleet: Fleet) -> None:
    first, second = await shops(fleet, 2)
    await restart(fleet, [first, second], restored=True)
    await first.hello(era=None, lease_ns=0)
    await first.lease(era=None)
    await second.hello()
    await second.lease()
    assert (await first.lease(5, era=None)).granted == "5"


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"acknowledged": 7}, "was told that its records up to 7 are here, and they end at 0"),
        ({"generation": 9}, "runs generation 9, and the newest here is 1"),
        ({"lease_ns": START_NS + 3600 * NS_PER_S}, "has an answer on a budget"),
        ({"era": START_NS}, "has heard of a freeze"),
    ],
)
async def test_a_hub_sees_that_it_went_back_by_what_a_site_says(
    fleet: Fleet, fields: dict[str, int], why: str
) -> None:
    first, second = await shops(fleet, 2)
    assert await fleet.hub.database.read(freeze.era) == 0
    reply = await first.hello(**fields)
    assert reply.era > 0
    assert why in (await fleet.hub.database.read(lambda tx: audit.newest(tx, 1)))[0]["detail"]  # type: ignore[operator]
    await first.lease()
    assert "Silent: shop-1" in (await first.lease(10)).frozen
    again = await first.hello(**(fields | {"era": reply.era}))
    assert again.era == reply.era or "lease_ns" in fields, "the same news is none the second time"
    other = await second.hello(**{name: value for name, value in fields.items() if name != "lease_ns"})
    assert other.era == again.era, "what a site that was silent says is explained by the freeze"


async def test_a_site_that_holds_more_than_was_granted_is_news(fleet: Fleet) -> None:
    first, second = await shops(fleet, 2)
    second.granted = 400
    await second.lease()
    assert await fleet.hub.database.read(freeze.era) > 0
    assert (await first.lease(1000)).granted == "0"


async def test_a_site_that_this_hub_does_not_know_is_waited_for(fleet: Fleet) -> None:
    (first,) = await shops(fleet, 1)
    other = Speaker(fleet.hub, fleet.clock, "shop-9")
    hub, now_ns = fleet.hub, fleet.clock.wall_ns()
    envelope = enrol.credential(hub.authority, "shop-9", dsse.public_key(other.private), now_ns=now_ns)
    assert first.speaker.joined is not None
    other.joined = msgspec.structs.replace(first.speaker.joined, site="shop-9", credential=envelope)
    for _ in range(2):
        with pytest.raises(Unauthenticated, match="restored from an older backup"):
            await other.hello()
    began = await hub.database.read(freeze.era)
    await first.hello()
    assert first.era == began > 0
    await first.lease()
    assert "Silent: shop-9" in (await first.lease(10)).frozen


async def test_a_revoked_site_is_not_waited_for(fleet: Fleet) -> None:
    from ondol.hub import enrol

    first, second = await shops(fleet, 2)
    await restart(fleet, [first, second], restored=True)
    await first.hello()
    await first.lease()
    assert (await first.lease(10)).granted == "0"
    hub = fleet.hub
    await hub.database.write(
        lambda tx: enrol.revoke(tx, "shop-1", hub.authority, now_ns=fleet.clock.wall_ns())
    )
    assert (await first.lease(10)).granted == "10"


async def test_a_budget_waits_only_for_the_sites_that_it_is_for(fleet: Fleet) -> None:
    first, second = await shops(fleet, 2, sites=Selector(names=("shop-0",)))
    await restart(fleet, [first, second], restored=True)
    await first.hello()
    await first.lease()
    assert (await first.lease(10)).granted == "10"


async def test_a_period_that_began_after_the_freeze_is_free(fleet: Fleet) -> None:
    first, second = await shops(fleet, 2)
    await restart(fleet, [first, second], restored=True)
    fleet.clock.move(33 * 86_400)
    first.key = month(fleet.clock)
    await first.hello()
    assert (await first.lease(10)).granted == "10"
    await fleet.hub.database.write(lambda tx: freeze.forget(tx, now_ns=fleet.clock.wall_ns()))
    assert await fleet.hub.database.read(lambda tx: freeze.is_awaited(tx, "shop-1"))
    fleet.clock.move(8 * 86_400)
    await fleet.hub.database.write(lambda tx: freeze.forget(tx, now_ns=fleet.clock.wall_ns()))
    assert not await fleet.hub.database.read(lambda tx: freeze.is_awaited(tx, "shop-1"))


async def test_a_freeze_outlives_the_process_and_is_announced(fleet: Fleet) -> None:
    first, second = await shops(fleet, 2)
    await restart(fleet, [first, second], restored=True)
    began = fleet.hub.numbers.era
    hub = await restart(fleet, [first, second])
    assert hub.numbers.era == began > 0
    lines = hub.watch(first.speaker.header, sync.encode(sync.Watch(instance=first.speaker.instance)))
    said = msgspec.json.decode(await anext(lines), type=sync.Announcement)
    await lines.aclose()  # type: ignore[attr-defined]
    assert said.era == began


async def test_a_hub_that_has_just_started_hears_its_sites_first(fleet: Fleet) -> None:
    first, second = await shops(fleet, 2)
    await first.lease(10)
    await restart(fleet, [first, second])
    await first.hello()
    answer = await first.lease(10)
    assert (answer.granted, "has just started" in answer.frozen) == ("10", True)
    await second.hello()
    assert (await first.lease(10)).granted == "20"
    await restart(fleet, [first, second])
    await first.hello()
    assert (await first.lease(10)).granted == "20"
    fleet.clock.move(freeze.SETTLE_S)
    assert (await first.lease(10)).granted == "30"


async def test_the_audit_is_pruned_but_for_its_newest_line(fleet: Fleet) -> None:
    def work(tx: Tx) -> tuple[list[object], list[object]]:
        for day in range(5):
            audit.note(tx, day * 86_400 * NS_PER_S, "k", str(day), "")
        audit.prune(tx, before_ns=3 * 86_400 * NS_PER_S)
        first = [line["subject"] for line in audit.newest(tx, 9)]
        audit.prune(tx, before_ns=99 * 86_400 * NS_PER_S)
        audit.note(tx, 0, "k", "next", "")
        return first, [line["id"] for line in audit.newest(tx, 9)]

    kept, numbers = await fleet.hub.database.write(work)
    assert kept == ["4", "3"]
    assert numbers == [6, 5]


async def test_marks_of_a_restored_hub_are_said_once(fleet: Fleet) -> None:
    (first,) = await shops(fleet, 1)
    await first.speaker.send(first.speaker.rows(3))
    mark = await fleet.hub.database.read(lambda tx: ingest.mark_of(tx, first.speaker.gateway))
    await first.hello(acknowledged=mark[0])
    assert await fleet.hub.database.read(freeze.era) == 0
