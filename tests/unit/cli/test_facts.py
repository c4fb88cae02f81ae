"""`ondol facts`: from a hub's file to Parquet, and from a question to an answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.postgres import running_postgres
from tests.ranges import SiteLedger

from ondol.adapters.database_postgres import PostgresDatabase
from ondol.adapters.database_sqlite import InlineDatabase
from ondol.cli import facts
from ondol.core.ports import Tx
from ondol.errors import StateUnavailable
from ondol.hub import ingest
from ondol.hub.schema import MIGRATIONS

HUB = "kind: Hub\nname: test\n"
LEDGER = SiteLedger("shop").fill(30, cost=10**12)


def _take(tx: Tx) -> None:
    ingest.take_range(tx, "shop", LEDGER.range(1, 30), site_key=LEDGER.key, now_ns=1)


@pytest.fixture
def installation(tmp_path: Path) -> Path:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "hub.yaml").write_text(HUB)
    return tmp_path


@pytest.fixture
def hub(installation: Path) -> Iterator[Path]:
    """An installation whose hub runs: its database stays open."""
    (installation / "hub/data").mkdir()
    database = InlineDatabase(installation / "hub/data/hub.db", migrations=MIGRATIONS)
    database.write_now(_take)
    yield installation
    database.close_now()


def test_facts_are_built_beside_a_running_hub_and_asked(
    hub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert facts.rebuild(directory=hub) == 0
    assert "30 records; 1 files written, 0 kept" in capsys.readouterr().out
    assert facts.rebuild(directory=hub, as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == {"written": 0, "kept": 1, "records": 30}

    sql = "SELECT site, count(*) AS requests, sum(cost) AS cost, max(energy_uj) AS none FROM usage GROUP BY site"
    assert facts.query(sql, directory=hub) == 0
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split() == ["site", "requests", "cost", "none"]
    assert row.split() == ["shop", "30", "30000000000000", "–"]
    assert facts.query(sql, directory=hub, as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"site": "shop", "requests": 30, "cost": 30 * 10**12, "none": None}
    ]
    large = (
        "SELECT sum(cost) * 1000000000 AS cost, min(currency) AS c, now() > '2020-01-01' AS late FROM usage"
    )
    assert facts.query(large, config=hub / "hub/hub.yaml", as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == [{"cost": f"{30 * 10**21}", "c": "USD", "late": True}]


def test_more_rows_than_are_given_are_told(hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts.rebuild(directory=hub)
    facts.query("SELECT a.seq FROM usage a, usage b, usage c", directory=hub)
    assert capsys.readouterr().out.splitlines()[-1] == "only the first 10000 rows; ask for less"


def test_without_a_hub_it_is_said_what_is_missing(installation: Path) -> None:
    with pytest.raises(StateUnavailable, match="hub that was started once"):
        facts.rebuild(directory=installation)
    with pytest.raises(StateUnavailable, match="ondol facts rebuild"):
        facts.query("SELECT 1", directory=installation)


def test_a_hub_on_postgresql_is_read_the_same_way(
    installation: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running_postgres() as dsn:
        folder = dsn.split()[0].removeprefix("host=")
        url = f"postgresql://ondol@/postgres?host={folder}&port=5432"
        database = PostgresDatabase(url, migrations=MIGRATIONS)
        database.write_now(_take)
        database.close_now()
        (installation / "hub/hub.yaml").write_text(f"{HUB}database: {url}\n")
        assert facts.rebuild(directory=installation) == 0
    assert "30 records; 1 files written" in capsys.readouterr().out
