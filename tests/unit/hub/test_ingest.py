"""Ranges, events and reports: taken once, whole, from whom they are, or not at all."""

from __future__ import annotations

import random
from collections.abc import Iterator

import msgspec
import pytest
from tests.ranges import SiteLedger, record

from ondol.adapters.database_sqlite import InlineDatabase
from ondol.core import dsse
from ondol.core.inference import Usage
from ondol.core.ports import Tx
from ondol.core.usage import encode_record, link
from ondol.errors import Forbidden, InvalidRequest, OndolError, RangeRefused, TooLarge
from ondol.hub import ingest, usage
from ondol.hub.schema import MIGRATIONS
from ondol.wire import sync


class Hub:
    def __init__(self) -> None:
        self.database = InlineDatabase(":memory:", migrations=MIGRATIONS)

    def take(self, ledger: SiteLedger, message: sync.Range, *, site: str = "") -> int:
        reply = self.database.write_now(
            lambda tx: ingest.take_range(tx, site or ledger.site, message, site_key=ledger.key, now_ns=5)
        )
        assert self.mark(message.gateway) == (reply.mark, reply.mark_hash)
        return reply.mark

    def mark(self, gateway: str) -> tuple[int, bytes]:
        return self.database.write_now(lambda tx: ingest.mark_of(tx, gateway))

    def stored(self, gateway: str) -> list[bytes]:
        rows = self.database.write_now(lambda tx: usage.rows_after(tx, gateway, 0, 1 << 30))
        assert [seq for seq, _ in rows] == list(range(1, len(rows) + 1))
        return [payload for _, payload in rows]

    def requests(self) -> int:
        return sum(row.requests for row in self.database.write_now(lambda tx: usage.totals(tx, by="")))

    def events(self, site: str, **fields: object) -> tuple[int, int]:
        message = sync.Events(instance="i", **fields)  # type: ignore[arg-type]  # tests name real fields
        reply = self.database.write_now(lambda tx: ingest.take_events(tx, site, message, now_ns=9))
        return reply.audit, reply.telemetry

    def ids(self, name: str) -> list[int]:
        sql = "SELECT id FROM events WHERE class = ? ORDER BY id"
        return [row[0] for row in self.database.write_now(lambda tx: tx.run(sql, (name,)))]


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub()
    yield made
    made.database.close_now()


def test_ranges_in_order_are_stored_as_they_were_written(hub: Hub) -> None:
    shop = SiteLedger("shop").fill(10)
    assert hub.mark(shop.gateway) == (0, shop.hashes[0])

    assert hub.take(shop, shop.range(1, 4)) == 4
    assert hub.take(shop, shop.range(5, 10)) == 10

    assert hub.stored(shop.gateway) == shop.rows
    assert hub.mark(shop.gateway) == (10, shop.hashes[10])


def test_in_any_order_and_any_number_of_times_each_row_counts_once(hub: Hub) -> None:
    shop = SiteLedger("shop").fill(60)
    dice = random.Random(11)
    ranges = [(first, min(first + dice.randrange(12), 60)) for first in range(1, 61)] * 3
    dice.shuffle(ranges)
    for first, last in [*ranges, *sorted(ranges)]:
        before = hub.mark(shop.gateway)[0]
        after = hub.take(shop, shop.range(first, last))
        assert after == (max(before, last) if first <= before + 1 else before)

    assert hub.stored(shop.gateway) == shop.rows
    assert hub.requests() == 60


def test_a_gap_is_answered_with_the_mark_and_nothing_is_kept(hub: Hub) -> None:
    shop = SiteLedger("shop").fill(10)
    assert hub.take(shop, shop.range(4, 6)) == 0
    hub.take(shop, shop.range(1, 3))
    assert hub.take(shop, shop.range(8, 9)) == 3
    assert hub.stored(shop.gateway) == shop.rows[:3]
    assert hub.requests() == 3


@pytest.mark.parametrize("known", [0, 3, 5])
def test_a_range_that_was_changed_on_its_way_is_refused(hub: Hub, known: int) -> None:
    shop = SiteLedger("shop").fill(5)
    if known:
        hub.take(shop, shop.range(1, known))
    good = shop.range(1, 5)
    other = SiteLedger("shop").fill(5)
    rows = list(good.rows)
    rows[1] = rows[1].replace(b'"cost":2', b'"cost":1')
    assert rows[1] != good.rows[1]
    for bad in (
        msgspec.structs.replace(good, rows=tuple(rows)),
        msgspec.structs.replace(good, rows=good.rows[:4]),
        msgspec.structs.replace(good, rows=good.rows[::-1]),
        msgspec.structs.replace(good, previous=b"\0" * 32),
        msgspec.structs.replace(good, previous=b""),
        msgspec.structs.replace(good, head=other.head(5)),
        msgspec.structs.replace(good, head=shop.head(5, hash=b"")),
        msgspec.structs.replace(good, head=shop.head(5, seq=4)),
        msgspec.structs.replace(good, head=shop.head(5, site="other")),
        msgspec.structs.replace(good, head=dsse.sign(shop.private, sync.HEAD_TYPE, b"no head")),
        msgspec.structs.replace(good, head=dsse.sign(shop.private, "application/other", b"x")),
    ):
        with pytest.raises(RangeRefused):
            hub.take(shop, bad)
    assert hub.stored(shop.gateway) == shop.rows[:known]
    assert hub.requests() == known
    assert hub.take(shop, good) == 5


@pytest.mark.parametrize(("first", "last"), [(1, 2), (1, 4), (1, 6), (3, 4), (5, 6)])
def test_a_fork_is_called_one_wherever_it_touches(hub: Hub, first: int, last: int) -> None:
    shop = SiteLedger("shop").fill(4)
    hub.take(shop, shop.range(1, 4))
    twin = SiteLedger("shop", private=shop.private)
    twin.fill(1, team="another").fill(5)
    with pytest.raises(RangeRefused, match="fork"):
        hub.take(twin, twin.range(first, last))
    assert hub.stored(shop.gateway) == shop.rows


def test_a_gateway_belongs_to_the_site_that_used_it_first(hub: Hub) -> None:
    shop = SiteLedger("shop", "g").fill(2)
    hub.take(shop, shop.range(1, 2))
    thief = SiteLedger("thief", "g").fill(3)
    with pytest.raises(Forbidden, match="belongs to site shop"):
        hub.take(thief, thief.range(1, 3))
    assert hub.stored("g") == shop.rows


def test_rows_of_another_site_or_gateway_are_refused(hub: Hub) -> None:
    for site, gateway in (("other", "gateway-of-shop"), ("shop", "other")):
        shop = SiteLedger("shop").fill(1)
        shop.write([record(site, gateway, 2)])
        with pytest.raises(RangeRefused, match="record 2 is of"):
            hub.take(shop, shop.range(1, 2))
    assert hub.requests() == 0


@pytest.mark.parametrize(
    "row",
    [
        b"", b"{}", b"\xff\xfe", b"[" * 5000, encode_record(record("shop", "gateway-of-shop", 1))[:-1],
        encode_record(record("shop", "gateway-of-shop", 1, currency="XAU")),
        encode_record(record("shop", "gateway-of-shop", 1, time_ns=-1)),
        encode_record(record("shop", "gateway-of-shop", 1, time_ns=1 << 63)),
        encode_record(record("shop", "gateway-of-shop", 1)).replace(b'"time_ns":', b'"time_ns":1.5,"x":'),
        b'{"x":' + b"[" * 100_000,
    ],
)  # fmt: skip
def test_what_is_no_record_is_refused_with_its_number(hub: Hub, row: bytes) -> None:
    shop = SiteLedger("shop").fill(1)
    good = shop.rows[0]
    shop.rows, shop.hashes = [], shop.hashes[:1]
    for seq, one in enumerate([good, row], 1):
        shop.rows.append(one)
        shop.hashes.append(link(shop.hashes[-1], seq, one))
    with pytest.raises(RangeRefused, match="record 2"):
        hub.take(shop, shop.range(1, 2))
    assert hub.stored(shop.gateway) == []


def test_names_with_nul_and_amounts_beyond_63_bits_are_taken(hub: Hub) -> None:
    shop = SiteLedger("shop")
    shop.fill(2, team="a\0b", cost=1 << 62).fill(1, team="a\ufffdb", cost=1 << 62)
    assert hub.take(shop, shop.range(1, 3)) == 3
    (row,) = hub.database.write_now(lambda tx: usage.totals(tx, by=""))
    assert row.cost == str(3 * (1 << 62))[:-9] + "." + str(3 * (1 << 62))[-9:]


def test_counts_beyond_63_bits_are_refused(hub: Hub) -> None:
    shop = SiteLedger("shop")
    shop.fill(3, usage=Usage((1 << 62), 0), team="a", key_id="k")
    with pytest.raises(RangeRefused, match="no such count"):
        hub.take(shop, shop.range(1, 3))
    assert hub.stored(shop.gateway) == []


def test_a_range_is_bounded(hub: Hub) -> None:
    shop = SiteLedger("shop").fill(sync.RANGE_ROWS_MAX + 1)
    with pytest.raises(TooLarge):
        hub.take(shop, shop.range(1, sync.RANGE_ROWS_MAX + 1))
    assert hub.take(shop, shop.range(1, sync.RANGE_ROWS_MAX)) == sync.RANGE_ROWS_MAX
    large = SiteLedger("large").fill(2, error="x" * (sync.RANGE_BYTES_MAX // 2))
    with pytest.raises(TooLarge):
        hub.take(large, large.range(1, 2))
    assert hub.take(large, large.range(1, 1)) == 1


@pytest.mark.parametrize(
    "changed",
    [{"first": 0}, {"first": -3}, {"first": 1 << 63}, {"rows": ()}, {"gateway": ""}, {"gateway": "a\nb"}],
)
def test_a_malformed_range_is_refused(hub: Hub, changed: dict[str, object]) -> None:
    shop = SiteLedger("shop").fill(1)
    message = msgspec.structs.replace(shop.range(1, 1), **changed)
    with pytest.raises(InvalidRequest):
        hub.take(shop, message)


def test_any_changed_bit_is_refused_or_changes_no_row(hub: Hub) -> None:
    shop = SiteLedger("shop").fill(3)
    raw = sync.encode(shop.range(1, 3))
    dice = random.Random(3)
    refused = 0
    for _ in range(400):
        at = dice.randrange(len(raw))
        bad = raw[:at] + bytes([raw[at] ^ (1 << dice.randrange(8))]) + raw[at + 1 :]
        try:
            message = sync.decode(bad, sync.Range)
            hub.take(shop, message)
        except OndolError:
            refused += 1
            assert hub.requests() == 0
        else:  # a field that proves nothing, such as the instance, or a name that is ignored
            assert hub.stored(message.gateway) == shop.rows
            hub.database.write_now(_forget_all)
    assert refused > 300


def _forget_all(tx: Tx) -> None:
    for table in ("usage", "marks", "cells"):
        tx.run(f"DELETE FROM {table}")


# ---- events and reports


def _events(*ids: int) -> tuple[sync.Event, ...]:
    return tuple(
        sync.Event(id=one, time_ns=one, kind="k", fields={"text": "a\0ü", "n": one, "x": 0.5}) for one in ids
    )


def test_events_are_taken_once(hub: Hub) -> None:
    assert hub.events("shop", audit=_events(1, 2), telemetry=_events(1, 4)) == (2, 4)
    assert hub.events("shop", audit=_events(1, 2, 3), telemetry=_events(4, 9), thinned=6) == (3, 9)
    assert hub.events("shop") == (3, 9)
    assert hub.ids("audit") == [1, 2, 3]
    assert hub.ids("telemetry") == [1, 4, 9]
    rows = hub.database.write_now(
        lambda tx: tx.run("SELECT thinned FROM event_marks WHERE class = 'telemetry'")
    )
    assert rows == [(6,)]


def test_a_gap_in_audit_is_asked_for_once_and_then_counted(hub: Hub) -> None:
    hub.events("shop", audit=_events(1, 2))
    assert hub.events("shop", audit=_events(5, 6)) == (2, 0)
    assert hub.events("shop", audit=_events(3, 4, 5, 6)) == (6, 0)

    assert hub.events("shop", audit=_events(9, 10)) == (6, 0)
    assert hub.events("shop", audit=_events(9, 10)) == (10, 0)
    assert hub.ids("audit") == [1, 2, 3, 4, 5, 6, 9, 10]
    rows = hub.database.write_now(lambda tx: tx.run("SELECT missing FROM event_marks WHERE class = 'audit'"))
    assert rows == [(2,)]


@pytest.mark.parametrize(
    "events",
    [
        _events(0), _events(2, 1), _events(1, 1), _events(1 << 63),
        (sync.Event(id=1, time_ns=-1, kind="k", fields={}),),
        (sync.Event(id=1, time_ns=1, kind="", fields={}),),
        (sync.Event(id=1, time_ns=1, kind="a\0", fields={}),),
        (sync.Event(id=1, time_ns=1, kind="k", fields={}, offset_ns=1 << 63),),
    ],
)  # fmt: skip
def test_malformed_events_are_refused_whole(hub: Hub, events: tuple[sync.Event, ...]) -> None:
    with pytest.raises(InvalidRequest):
        hub.events("shop", audit=_events(1), telemetry=events)
    assert hub.ids("audit") == []


def test_too_many_events_are_refused(hub: Hub) -> None:
    with pytest.raises(TooLarge):
        hub.events("shop", telemetry=_events(*range(1, ingest.EVENTS_MAX + 2)))


def test_old_telemetry_is_forgotten_and_audit_is_not(hub: Hub) -> None:
    hub.events("shop", audit=_events(1), telemetry=_events(1, 2))
    hub.database.write_now(lambda tx: ingest.prune_telemetry(tx, before_ns=10))
    assert (hub.ids("audit"), hub.ids("telemetry")) == ([1], [])
    assert hub.events("shop", telemetry=_events(2, 3)) == (1, 3)


def _report(**fields: object) -> sync.Report:
    known: dict[str, object] = {
        "instance": "i", "generation": 1, "epoch": 0, "last_seq": 3, "acknowledged": 0, "wall_ns": 1,
    }  # fmt: skip
    return sync.Report(**{**known, **fields})  # type: ignore[arg-type]  # tests name real fields


def test_a_report_replaces_the_one_before(hub: Hub) -> None:
    for generation in (1, 2):
        reply = hub.database.write_now(
            lambda tx, n=generation: ingest.take_report(tx, "shop", _report(generation=n), now_ns=40 + n)  # type: ignore[misc]
        )
        assert reply == sync.ReportReply(hub_ns=40 + generation)
    assert hub.database.write_now(lambda tx: ingest.report_of(tx, "shop")) == (42, _report(generation=2))
    assert hub.database.write_now(ingest.reports) == {"shop": (42, _report(generation=2))}
    assert hub.database.write_now(lambda tx: ingest.report_of(tx, "other")) is None


def test_a_site_is_told_that_its_clock_is_off_and_that_the_hub_went_back(hub: Hub) -> None:
    shop = SiteLedger("shop").fill(2)
    hub.take(shop, shop.range(1, 2))
    report = _report(acknowledged=3, offset_ns=-3_500_000_000)
    reply = hub.database.write_now(lambda tx: ingest.take_report(tx, "shop", report, now_ns=1))
    assert len(reply.notes) == 2
    assert "3.5 s behind" in reply.notes[0]
    assert "up to 2, and had said 3" in reply.notes[1]
