"""The Parquet copy: the same bytes for the same records, and questions that can do nothing but read."""

from __future__ import annotations

import hashlib
import threading
from decimal import Decimal
from pathlib import Path

import pytest
from tests.ranges import SiteLedger, record

from ondol.adapters import facts
from ondol.adapters.facts import FactStore
from ondol.core.costs import fold
from ondol.core.identity import Origin
from ondol.core.inference import Usage
from ondol.core.usage import Attempt, Decision
from ondol.errors import InvalidRequest, StateError, StateUnavailable

ODD = "g/../?*'\" 온돌"


class Source:
    """Ledgers as a hub has them; counts what is read."""

    def __init__(self, *ledgers: SiteLedger) -> None:
        self.ledgers = {ledger.gateway: ledger for ledger in ledgers}
        self.reads = 0

    @property
    def marks(self) -> list[tuple[str, int]]:
        return [(gateway, len(ledger.rows)) for gateway, ledger in self.ledgers.items()]

    def __call__(self, gateway: str, after: int, limit: int) -> list[tuple[int, bytes]]:
        self.reads += 1
        return list(enumerate(self.ledgers[gateway].rows, 1))[after : after + limit]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "BLOCK_ROWS", 10)
    monkeypatch.setattr(facts, "PAGE_ROWS", 4)


@pytest.fixture
def source() -> Source:
    return Source(SiteLedger("shop").fill(25), SiteLedger("cloud", ODD).fill(3))


@pytest.fixture
def store(tmp_path: Path, source: Source) -> FactStore:
    made = FactStore(tmp_path / "facts")
    made.build(source.marks, source)
    return made


def _digests(store: FactStore) -> dict[str, str]:
    return {
        str(path.relative_to(store.folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in store.files()
    }


def test_files_are_named_after_their_records(store: FactStore) -> None:
    names = {f"{path.parent.name}/{path.name}" for path in store.files()}
    assert {name for name in names if name.startswith("gateway-of-shop/")} == {
        "gateway-of-shop/000000000001-000000000010.parquet",
        "gateway-of-shop/000000000011-000000000020.parquet",
        "gateway-of-shop/000000000021-000000000025.parquet",
    }
    assert len(names) == 4
    assert all(path.resolve().is_relative_to(store.folder.resolve()) for path in store.files())


def test_the_same_records_make_the_same_bytes(tmp_path: Path, source: Source, store: FactStore) -> None:
    before = _digests(store)
    other = FactStore(tmp_path / "other")
    other.build(source.marks[::-1], source)
    assert _digests(other) == before
    assert store.build(source.marks, source, again=True) == facts.Built(written=4, kept=0, records=28)
    assert _digests(store) == before


def test_a_build_goes_on_where_the_last_one_ended(source: Source, store: FactStore) -> None:
    before = _digests(store)
    source.ledgers["gateway-of-shop"].fill(7)
    assert store.build(source.marks, source) == facts.Built(written=2, kept=3, records=35)
    after = _digests(store)
    assert "gateway-of-shop/000000000021-000000000025.parquet" not in after
    assert {name for name in after if after[name] == before.get(name)} == set(before) - {
        "gateway-of-shop/000000000021-000000000025.parquet"
    }
    assert store.query("SELECT count(*), sum(seq) FROM usage WHERE site = 'shop'").rows == [
        (32, 32 * 33 // 2)
    ]


def test_a_hub_that_went_back_takes_its_facts_with_it(source: Source, store: FactStore) -> None:
    del source.ledgers[ODD]
    ledger = source.ledgers["gateway-of-shop"]
    del ledger.rows[12:]
    store.build(source.marks, source)
    assert store.query("SELECT count(*), max(seq), count(DISTINCT gateway) FROM usage").rows == [(12, 12, 1)]
    assert [path.name for path in store.folder.iterdir()] == ["gateway-of-shop"]


def test_what_a_killed_build_left_is_cleared(source: Source, store: FactStore) -> None:
    left = store.folder / ".building-old"
    left.mkdir()
    (left / "000000000001-000000000010.parquet").write_bytes(b"half")
    store.build(source.marks, source)
    assert not left.exists()


def test_a_missing_record_is_said_and_not_left_out(tmp_path: Path, source: Source) -> None:
    store = FactStore(tmp_path / "facts")
    marks = [("gateway-of-shop", 26)]
    with pytest.raises(StateError, match="record 26 is missing"):
        store.build(marks, source)
    with pytest.raises(StateError, match="record 3 is missing"):
        store.build(
            [("gateway-of-shop", 25)],
            lambda gateway, after, limit: [row for row in source(gateway, after, limit) if row[0] != 3],
            again=True,
        )


def test_every_field_comes_through_exactly(tmp_path: Path) -> None:
    ledger = SiteLedger("edge")
    attempts = (
        Attempt(
            deployment="far",
            engine="peer",
            site="cloud",
            outcome="ok",
            peer_request="q",
            energy_uj=5,
            carbon_ng=5,
        ),
        Attempt(deployment="near", engine="fake", site="edge", outcome="ok", energy_uj=1 << 70, carbon_ng=7),
    )
    ledger.write([
        record(
            "edge", ledger.gateway, 1, cost=10**30 + 1, usage=Usage(3, 4, 1, 2), team="팀'\"", user=None,
            tags=(("app", "x"), ("층", "3\n")), decision=Decision(code="fast"), attempts=attempts, error="a\0b",
            clock_offset_ns=-5, unpriced=True, stream=True,
        ),
        record("edge", ledger.gateway, 2, origin=Origin(site="far", request_id="q", attempt=2), cost=-3),
    ])  # fmt: skip
    store = FactStore(tmp_path / "facts")
    store.build([(ledger.gateway, 2)], Source(ledger))
    names = "cost, input_tokens, cached_tokens, team, tags, reason, energy_uj, carbon_ng, attempts, error, clock_offset_ns, unpriced, stream, origin_site"
    assert store.query(f"SELECT {names} FROM usage ORDER BY seq").rows == [
        (
            Decimal(10**30 + 1), 3, 1, "팀'\"", {"app": "x", "층": "3\n"}, "fast", Decimal(1 << 70), Decimal(7), 2,
            "a\0b", -5, True, True, None,
        ),
        (Decimal(-3), 0, 0, "team2", {}, None, None, None, 0, None, None, False, False, "far"),
    ]  # fmt: skip


def test_the_sums_are_those_of_the_ledger(source: Source, store: FactStore) -> None:
    wanted = fold([one for ledger in source.ledgers.values() for one in ledger.records], by="team")
    found = store.query(
        "SELECT team, count(*) FILTER (origin_site IS NULL), sum(cost) FROM usage GROUP BY team ORDER BY team"
    )
    assert found.columns[0] == "team"
    assert [(team, requests, cost) for team, requests, cost in found.rows] == [
        (row.key, row.requests, Decimal(row.cost).scaleb(9)) for row in wanted
    ]


@pytest.mark.parametrize(
    "sql",
    [
        "", ";", "SELECT 1; SELECT 2", "COPY usage TO '{folder}/x.csv'", "CREATE TABLE t(a INT)", "DROP VIEW usage",
        "ATTACH '{folder}/x.db'", "INSTALL httpfs", "LOAD httpfs", "SET enable_external_access = true",
        "RESET lock_configuration", "PRAGMA enable_profiling", "EXPORT DATABASE '{folder}/x'",
        "SELECT * FROM read_csv('/etc/passwd')", "SELECT * FROM read_text('/etc/passwd')",
        "SELECT * FROM '/etc/passwd'", "SELECT * FROM glob('/etc/*')", "SELECT * FROM read_blob('{folder}/../secret')",
        "SELECT nope FROM usage", "SELEC 1",
    ],
)  # fmt: skip
def test_a_question_can_only_read_the_facts(store: FactStore, tmp_path: Path, sql: str) -> None:
    (tmp_path / "secret").write_text("do not read")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(InvalidRequest, match="facts: ") as told:
        store.query(sql.format(folder=store.folder))
    assert "do not read" not in str(told.value)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_question_is_bounded_in_rows_time_and_memory(store: FactStore) -> None:
    cut = store.query("SELECT a.seq FROM usage a, usage b", rows_max=100)
    assert (len(cut.rows), cut.cut) == (100, True)
    assert not store.query("SELECT seq FROM usage", rows_max=28).cut
    with pytest.raises(InvalidRequest, match="took more than 0.3 s"):
        store.query(
            "SELECT count(*) FROM range(100000000) a, range(100000) b WHERE a.range <> b.range + random()",
            timeout_s=0.3,
        )
    with pytest.raises(InvalidRequest, match="needs more than 20MB"):
        store.query("SELECT list(range) FROM range(100000000)", memory="20MB")
    assert not [one for one in threading.enumerate() if isinstance(one, threading.Timer)]


def test_what_is_not_built_or_damaged_is_said(tmp_path: Path, store: FactStore) -> None:
    with pytest.raises(StateUnavailable, match="Run `ondol facts rebuild` first"):
        FactStore(tmp_path / "none").query("SELECT 1")
    store.files()[0].write_bytes(b"no parquet")
    with pytest.raises(StateError, match="rebuild --again"):
        store.query("SELECT count(*) FROM usage")


def test_a_fleet_without_a_record_has_the_same_columns(tmp_path: Path, store: FactStore) -> None:
    empty = FactStore(tmp_path / "empty")
    assert empty.build([], Source()) == facts.Built(written=0, kept=0, records=0)
    types = "SELECT column_name, column_type FROM (DESCRIBE usage)"
    for question in ("SELECT * FROM usage", "SELECT team, sum(cost) FROM usage GROUP BY team", types):
        assert empty.query(question).columns == store.query(question).columns
    assert empty.query("SELECT * FROM usage").rows == []
    assert empty.query(types).rows == store.query(types).rows


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, source: Source) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateUnavailable, match="Check that the disk has room"):
        FactStore(tmp_path / "file" / "facts").build(source.marks, source)
