"""`ondol simulate` on the worked fleets and the sample trace: what it prints, writes and refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ondol.cli.simulate import simulate
from ondol.errors import OndolError
from ondol.simulate.compare import NAMES

ROOT = Path(__file__).resolve().parents[2]
FLEETS = ROOT / "examples/fleets"
SAMPLE = str(ROOT / "examples/traces/sample.csv")
FIELDS = {
    "policy", "requests", "ttft_ms_p50", "ttft_ms_p95", "total_ms_mean", "total_ms_p95", "cost_usd", "carbon_g",
    "hit_rate", "violations", "gap_to_optimum",
}  # fmt: skip


def test_the_sample_on_the_retail_chain_gives_a_row_a_policy_and_a_report(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    assert simulate(SAMPLE, fleet=FLEETS / "retail", report=page, as_json=True) == 0
    rows = json.loads(capfd.readouterr().out)
    assert [row["policy"] for row in rows] == list(NAMES)
    assert all(row.keys() >= FIELDS for row in rows)
    by: dict[str, dict[str, Any]] = {row["policy"]: row for row in rows}
    assert by["ours"]["cost_usd"] < by["least-busy"]["cost_usd"] < by["all-cloud"]["cost_usd"]
    assert by["ours"]["violations"] <= by["ours"]["requests"] / 100
    assert by["ours"]["gap_to_optimum"] <= 0.05
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") >= 7 and "첫 토큰" in text and "Cost over the optimum" in text
    assert not re.search(r"<script|(src|href)=|url\(|@import", text)


@pytest.mark.parametrize("name", ["retail", "telecom", "global"])
def test_the_worked_fleets_say_where_every_figure_is_from(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert (
        simulate("poisson:requests=100,rate=2", fleet=FLEETS / name, policy=("ours", "optimum"), as_json=True)
        == 0
    )
    said = capfd.readouterr()
    rows = json.loads(said.out)
    assert [row["policy"] for row in rows] == ["ours", "optimum"]
    assert all(row["cost_usd"] > 0 for row in rows) and rows[0]["carbon_g"] > 0
    assert "note:" not in said.err


def test_a_table_on_the_terminal_and_what_is_unknown(capfd: pytest.CaptureFixture[str]) -> None:
    assert simulate("poisson:requests=50", fleet=FLEETS / "global", policy=("all-cloud",)) == 0
    out = capfd.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("all-cloud"))
    assert " – " in row  # the trace carries no repeats
    assert "50 requests" in out


def test_one_sites_file_is_a_fleet_too_and_says_what_is_assumed(capfd: pytest.CaptureFixture[str]) -> None:
    assert simulate("poisson:requests=20", fleet=ROOT / "examples/shop.yaml", as_json=True) == 0
    said = capfd.readouterr()
    assert len(json.loads(said.out)) == len(NAMES)
    assert "no service figures; those assumed for tier edge" in said.err


def test_a_saved_trace_reads_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "t.csv"
    law = "conversations:requests=60,turns=3,repeats=0.2"
    simulate(law, fleet=FLEETS / "global", policy=("ours",), save=saved, as_json=True)
    first = json.loads(capfd.readouterr().out)
    simulate(str(saved), fleet=FLEETS / "global", policy=("ours",), as_json=True)
    assert json.loads(capfd.readouterr().out) == first


def test_a_bad_trace_is_refused_and_repaired_where_asked(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text(
        "time_s,prompt_tokens,output_tokens\n0,10,5\n2,-4,5\n1,10,5\n3,10,5\n2.5,9,9\n", encoding="utf-8"
    )
    with pytest.raises(OndolError) as caught:
        simulate(str(bad), fleet=FLEETS / "global")
    assert "row 2, column prompt_tokens: found '-4'" in caught.value.message
    assert "row 5, column time_s: found 2.5 after 3" in caught.value.message
    assert simulate(str(bad), fleet=FLEETS / "global", policy=("ours",), repair=True, as_json=True) == 0
    said = capfd.readouterr()
    assert json.loads(said.out)[0]["requests"] == 4
    assert "repaired: left out 1 rows" in said.err and "repaired: sorted by time" in said.err


def test_what_cannot_be_served_is_said_before_the_run(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text(
        "time_s,prompt_tokens,output_tokens,class\n0,10,5,public\n1,40000,5,restricted\n", encoding="utf-8"
    )
    with pytest.raises(
        OndolError, match=r"row 2 .*nowhere to go.*in-shop: prompt is too long.*may not leave"
    ):
        simulate(str(trace), fleet=FLEETS / "retail")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("speed = 1", "Object contains unknown field `speed`"),
        ("[limits]\nfirst_token_ms = -1", "first_token_ms"),
        ("[services.x]\nprefill_tokens_per_s = 1\nstep_ms = 1", "source"),
        ("[[", "simulation.toml"),
        ('entries = ["x"]', "entries: found 'x'"),
    ],
)
def test_a_wrong_setting_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "fleet.yaml").write_text(
        (FLEETS / "global/fleet.yaml").read_text(encoding="utf-8"), encoding="utf-8"
    )
    (tmp_path / "simulation.toml").write_text(text, encoding="utf-8")
    with pytest.raises(OndolError) as caught:
        simulate("poisson:requests=5", fleet=tmp_path)
    assert words in caught.value.message


def test_no_fleet_and_open_without_report(tmp_path: Path) -> None:
    with pytest.raises(OndolError, match="found nothing"):
        simulate("poisson:requests=5", fleet=tmp_path / "none")
    with pytest.raises(OndolError, match="--report"):
        simulate("poisson:requests=5", fleet=FLEETS / "global", show=True)
