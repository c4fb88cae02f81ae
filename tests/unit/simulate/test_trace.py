"""Traces: what is read, what is refused with row and column, and what repair does."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import duckdb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol.simulate.generate import KINDS, Law, from_text, made
from ondol.simulate.trace import Trace, TraceError, build
from ondol.simulate.trace_files import as_csv, read_trace

GOOD = {"time_s": "0", "prompt_tokens": "10", "output_tokens": "5"}


def rows(*changes: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**GOOD, "time_s": str(number), **change} for number, change in enumerate(changes)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"time_s": "-1"}, ["row 2", "column time_s", "'-1'"]),
        ({"time_s": "nan"}, ["row 2", "column time_s"]),
        ({"time_s": ""}, ["row 2", "column time_s"]),
        ({"time_s": "1e12"}, ["row 2", "column time_s"]),
        ({"prompt_tokens": "0"}, ["row 2", "column prompt_tokens", "1 to 10000000"]),
        ({"prompt_tokens": "99999999999"}, ["row 2", "column prompt_tokens"]),
        ({"prompt_tokens": "1.5"}, ["row 2", "column prompt_tokens"]),
        ({"output_tokens": "-3"}, ["row 2", "column output_tokens"]),
        ({"output_tokens": True}, ["row 2", "column output_tokens"]),
        ({"class": "secret"}, ["row 2", "column class", "restricted"]),
        ({"prefix": "1 x"}, ["row 2", "column prefix"]),
        ({"small_ok": "maybe"}, ["row 2", "column small_ok"]),
        ({"region": "r" * 300}, ["row 2", "column region"]),
    ],
)
def test_a_wrong_cell_is_refused_with_row_and_column_and_left_out_by_repair(
    change: dict[str, Any], words: list[str]
) -> None:
    blank = dict.fromkeys(change.keys() - GOOD.keys(), "")
    bad = rows(blank, change, blank)
    with pytest.raises(TraceError) as caught:
        build(bad, name="t")
    assert all(word in str(caught.value) for word in words), caught.value
    repaired = build(bad, name="t", repair=True)
    assert len(repaired) == 2
    assert [repaired.row(index) for index in range(2)] == [1, 3]
    assert "left out 1 rows" in repaired.repairs[0]


def test_times_that_fall_are_refused_or_sorted_by_repair() -> None:
    bad = rows({"time_s": "5"}, {"time_s": "3", "prompt_tokens": "7"}, {"time_s": "6"})
    with pytest.raises(TraceError, match=r"row 2, column time_s: found 3 after 5"):
        build(bad, name="t")
    repaired = build(bad, name="t", repair=True)
    assert repaired.times == [3, 5, 6]
    assert repaired.prompts == [7, 10, 10]
    assert repaired.row(0) == 2
    assert "sorted" in repaired.repairs[0]


def test_a_missing_column_is_refused_also_with_repair() -> None:
    for repair in (False, True):
        with pytest.raises(TraceError, match="column output_tokens: missing"):
            build([{"time_s": 0, "prompt_tokens": 1}], name="t", repair=repair)


def test_an_empty_trace_is_refused() -> None:
    with pytest.raises(TraceError, match="found no request"):
        build([], name="t")


def test_what_a_trace_lacks_is_none() -> None:
    trace = build(rows({"region": "", "class": "public"}, {"region": "", "class": ""}), name="t")
    assert trace.regions is None and trace.contents is None and trace.prefixes is None
    assert trace.classes == ["public", None]


def full() -> Trace:
    return made(Law(requests=60, turns=3, repeats=0.3, private=0.2, regions="a+b"), 3, name="x")


def same(one: Trace, two: Trace) -> bool:
    fields = ("times", "prompts", "outputs", "classes", "regions", "sessions", "contents")
    return all(getattr(one, field) == getattr(two, field) for field in fields)


def test_csv_jsonl_and_parquet_read_the_same(tmp_path: Path) -> None:
    wanted = full()
    text = as_csv(wanted)
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(text.encode()))
    with duckdb.connect() as database:
        source = f"SELECT * FROM read_csv('{tmp_path}/t.csv', header=true)"
        database.execute(f"COPY ({source}) TO '{tmp_path}/t.parquet'")
        database.execute(f"COPY ({source}) TO '{tmp_path}/t.jsonl' (FORMAT json)")
    for name in ("t.csv", "t.csv.gz", "t.parquet", "t.jsonl"):
        found = read_trace(tmp_path / name)
        assert same(found, wanted), name
    csv = read_trace(tmp_path / "t.csv")
    assert csv.prefixes is not None and wanted.prefixes is not None
    assert [one or () for one in csv.prefixes] == [one or () for one in wanted.prefixes]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", b"time_s,prompt_tokens,output_tokens\n0,1,\xff\n"),
        ("t.csv", b"time_s,prompt_tokens,output_tokens\n0,1,2,3\n"),
        ("t.jsonl", b'{"time_s": 0\n'),
        ("t.jsonl", b"[1]\n"),
        ("t.parquet", b"PAR1 is not enough"),
        ("t.csv.gz", b"not gzip"),
        ("t.txt", b""),
    ],
)
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TraceError, match="allowed"):
        read_trace(tmp_path / name)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30), st.integers(0, 2**31))
def test_repair_gives_times_that_do_not_fall(times: list[float], seed: int) -> None:
    trace = build([{**GOOD, "time_s": time} for time in times], name="t", repair=True)
    assert trace.times == sorted(times)


def test_generated_traces_repeat_by_seed_and_keep_their_law() -> None:
    law = Law(requests=4_000, rate=5, prompt=300, output=80)
    one, two, other = made(law, 1), made(law, 1), made(law, 2)
    assert same(one, two) and not same(one, other)
    assert 3_500 < len(one) / one.times[-1] * 800 < 4_500  # 5 a second, within an eighth
    assert sorted(one.prompts)[2_000] == pytest.approx(300, rel=0.1)


def test_a_conversation_grows_and_keeps_its_blocks() -> None:
    trace = made(Law(requests=500, turns=6, prompt=800), 1)
    assert trace.sessions is not None and trace.prefixes is not None
    last: dict[str, tuple[int, tuple[int, ...]]] = {}
    for session, prompt, blocks in zip(trace.sessions, trace.prompts, trace.prefixes, strict=True):
        assert session is not None and blocks is not None
        before = last.get(session, (0, ()))
        assert prompt > before[0]
        assert blocks[: len(before[1])] == before[1]
        last[session] = prompt, blocks


def test_a_generated_trace_by_text() -> None:
    trace = from_text("bursty:requests=50,rate=2", 1)
    assert trace is not None and len(trace) == 50
    assert from_text("bursty.csv", 1) is None
    assert set(KINDS) == {"poisson", "bursty", "conversations"}
    with pytest.raises(Exception, match="allowed: poisson:NAME=VALUE"):
        from_text("poisson:speed=2", 1)
