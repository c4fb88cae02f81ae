"""Questions about usage: what the cells say is what the records say, whatever they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.ranges import DAY_NS, SiteLedger, record

from ondol.adapters.database_sqlite import InlineDatabase
from ondol.core.costs import CostRow, fold
from ondol.core.identity import Origin
from ondol.core.inference import Usage
from ondol.core.usage import Attempt, UsageRecord
from ondol.errors import InvalidRequest
from ondol.hub import ingest, usage
from ondol.hub.schema import MIGRATIONS

BASE_NS = 20_000 * DAY_NS
SITES = ("edge", "cloud")
SEOUL = ZoneInfo("Asia/Seoul")


@pytest.fixture
def database() -> Iterator[InlineDatabase]:
    made = InlineDatabase(":memory:", migrations=MIGRATIONS)
    yield made
    made.close_now()


def _attempt(site: str, cost: int, energy_uj: int | None, *, peer: bool) -> Attempt:
    return Attempt(
        deployment="d", engine="peer" if peer else "fake", site=site, outcome="ok", usage=Usage(7, 5),
        cost=0 if peer else cost, currency="USD", energy_uj=energy_uj, carbon_ng=None if peer else 3,
        peer_request="far" if peer else None, peer_cost=cost if peer else None,
    )  # fmt: skip


@st.composite
def _records(draw: st.DrawFn, site: str) -> list[dict[str, object]]:
    fields = st.fixed_dictionaries(
        {
            "time_ns": st.integers(BASE_NS - 2 * DAY_NS, BASE_NS + 2 * DAY_NS),
            "team": st.sampled_from(["a", "b", "팀", "a\0"]),
            "key_id": st.sampled_from(["k1", "k2"]),
            "route": st.sampled_from(["r", ""]),
            "model": st.sampled_from(["m", "n", ""]),
            "currency": st.sampled_from(["USD", "KRW"]),
            "cost": st.integers(0, 1 << 70),
            "answered_by": st.sampled_from(["", *SITES]),
            "cache": st.sampled_from(["off", "exact", "miss"]),
            "unpriced": st.booleans(),
            "usage": st.builds(Usage, st.integers(0, 1 << 30), st.integers(0, 1 << 30)),
            "tags": st.sampled_from([(), (("app", "x"),), (("app", "x"), ("app", "y"), ("floor", "3"))]),
            "energy_uj": st.none() | st.integers(0, 1 << 70),
            "origin": st.none() | st.just(Origin(site="edge", request_id="q", attempt=1)),
            "attempts": st.lists(
                st.builds(
                    lambda peer, cost, energy_uj: _attempt(site, cost, energy_uj, peer=peer),
                    st.booleans(), st.integers(0, 1000), st.none() | st.integers(0, 1000),
                ),
                max_size=3,
            ).map(tuple),
        }
    )  # fmt: skip
    return draw(st.lists(fields, max_size=12))


def _take(database: InlineDatabase, ledger: SiteLedger, *, size: int) -> None:
    for first in range(1, len(ledger.rows) + 1, size):
        message = ledger.range(first, min(first + size - 1, len(ledger.rows)))
        database.write_now(
            lambda tx, message=message: ingest.take_range(  # type: ignore[misc]  # bound now
                tx, ledger.site, message, site_key=ledger.key, now_ns=1
            )
        )


def _between(
    records: Sequence[UsageRecord], since: date | None, until: date | None, zone: ZoneInfo | None
) -> list[UsageRecord]:
    found = []
    for one in records:
        day = datetime.fromtimestamp(one.time_ns // 1_000_000_000, zone or UTC).date()
        if (since is None or day >= since) and (until is None or day < until):
            found.append(one)
    return found


@given(edge=_records("edge"), cloud=_records("cloud"), size=st.integers(1, 5), days=st.integers(-3, 3))
def test_the_hub_says_what_the_ledgers_together_say(
    edge: list[dict[str, object]], cloud: list[dict[str, object]], size: int, days: int
) -> None:
    database = InlineDatabase(":memory:", migrations=MIGRATIONS)
    records: list[UsageRecord] = []
    for site, many in (("edge", edge), ("cloud", cloud)):
        ledger = SiteLedger(site)
        ledger.write([record(site, ledger.gateway, n, **fields) for n, fields in enumerate(many, 1)])
        _take(database, ledger, size=size)
        records += ledger.records
    day = date.fromordinal(date(1970, 1, 1).toordinal() + 20_000 + days)

    for zone in (None, SEOUL):
        for since, until in (
            (None, None),
            (day, None),
            (None, day),
            (day, date.fromordinal(day.toordinal() + 1)),
        ):
            wanted = _between(records, since, until, zone)
            for by in ("team", "route", "site", "day", "model", "key", "tag", "tag:app"):
                found = database.write_now(
                    lambda tx, by=by, since=since, until=until, zone=zone: usage.totals(  # type: ignore[misc]
                        tx, by=by, since=since, until=until, zone=zone or UTC
                    )
                )
                assert _readable(found) == _readable(fold(wanted, by=by, zone=zone or UTC))
    database.close_now()


def _readable(rows: list[CostRow]) -> list[CostRow]:
    """With NUL as it is stored; the order of two keys that differ in it is not promised."""
    return sorted(
        (CostRow(**{**_fields(row), "key": row.key.replace("\0", "\ufffd")}) for row in rows),  # type: ignore[arg-type]
        key=lambda row: (row.key, row.currency),
    )


def _fields(row: CostRow) -> dict[str, object]:
    return {name: getattr(row, name) for name in row.__struct_fields__}


def test_a_peer_request_is_counted_once_and_paid_once(database: InlineDatabase) -> None:
    edge, cloud = SiteLedger("edge"), SiteLedger("cloud")
    edge.write([
        record(
            "edge", edge.gateway, 1, cost=0, answered_by="cloud", usage=Usage(10, 20),
            attempts=(_attempt("cloud", 500, None, peer=True),),
        )
    ])  # fmt: skip
    cloud.write([
        record(
            "cloud", cloud.gateway, 1, cost=500, usage=Usage(10, 20),
            origin=Origin(site="edge", request_id="q", attempt=1), attempts=(_attempt("cloud", 500, 9, peer=False),),
        )
    ])  # fmt: skip
    _take(database, edge, size=1)
    _take(database, cloud, size=1)

    answer = database.write_now(lambda tx: usage.answer(tx, {}))

    (total,) = answer.total
    assert (total.requests, total.input_tokens, total.output_tokens, total.cost) == (1, 10, 20, "0.0000005")
    assert (total.energy_j, total.for_peers) == (9e-6, 1)
    by_site = {row.key: row for row in answer.rows}
    assert (by_site["cloud"].requests, by_site["cloud"].cost) == (1, "0.0000005")
    assert (by_site["edge"].requests, by_site["edge"].cost) == (0, "0")
    assert [(one.site, one.records) for one in answer.received] == [("cloud", 1), ("edge", 1)]


def test_an_answer_says_what_was_asked(database: InlineDatabase) -> None:
    query = {"by": "day", "since": "2024-01-01", "until": "2024-02-01", "zone": "Asia/Seoul"}
    answer = database.write_now(lambda tx: usage.answer(tx, query))
    assert (answer.by, answer.since, answer.until, answer.zone) == tuple(query.values())
    assert (answer.rows, answer.total, answer.received) == ([], [], [])


@pytest.mark.parametrize(
    "query",
    [
        {"by": "weather"}, {"by": "tag:"}, {"since": "yesterday"}, {"until": "1969-12-31"},
        {"zone": "../../etc/passwd"}, {"zone": "Mars/Base"}, {"zone": ""}, {"group": "site"},
    ],
)  # fmt: skip
def test_a_question_that_is_wrong_is_told_what_is_right(
    database: InlineDatabase, query: dict[str, str]
) -> None:
    with pytest.raises(InvalidRequest, match="expected"):
        database.write_now(lambda tx: usage.answer(tx, query))
