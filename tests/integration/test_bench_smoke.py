"""The benchmarks run, on tiny counts.  What they measure here is nobody's business: no time is judged."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from benchmarks import contenders, measures, wrk
from benchmarks.contenders import Contender, Upstreams
from benchmarks.disk import fdatasync_us
from benchmarks.ondol import start_instrumented, start_ondol
from benchmarks.processes import StartFailed
from benchmarks.raw_http import Connection
from benchmarks.report import markdown
from benchmarks.results import Results, Stage, decode, encode
from benchmarks.run import QUICK, Bench
from benchmarks.stages import STAGES, Sums
from benchmarks.target import Target

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
pytestmark = [
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed, and it is the benchmarks' upstream"),
    pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed, and it makes the load"),
]


def silent(_: str) -> None:
    """Nobody watches the progress."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"), QUICK, silent)


@pytest.fixture(scope="module")
def upstreams(bench: Bench) -> Iterator[Upstreams]:
    with bench.upstreams() as ports:
        yield ports


@pytest.fixture(scope="module")
def gateway(upstreams: Upstreams, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Contender]:
    contender = start_ondol(tmp_path_factory.mktemp("gateway"), upstreams)
    yield contender
    contender.process.end()


@pytest.mark.parametrize(
    "start",
    [contenders.start_relay, contenders.start_own_relay, contenders.start_nginx, contenders.start_fixed],
)
def test_a_baseline_gives_the_answer_and_streams_it(
    start: Callable[[Path, Upstreams], Contender], tmp_path: Path, upstreams: Upstreams
) -> None:
    contender = start(tmp_path, upstreams)  # `ready` has seen the right answer
    try:
        assert contender.process.rss_kib() > 0
        assert contender.stream is None or contenders.stream_problem(contender) is None
    finally:
        contender.process.end()
    assert not contender.process.alive()


def test_a_contender_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(StartFailed, match="relay ended with code"):
        contenders.start_relay(tmp_path, Upstreams("not", "a", "port"))  # type: ignore[arg-type]


def test_the_gateway_is_measured_with_its_whole_pipeline_on(gateway: Contender, upstreams: Upstreams) -> None:
    direct = Target(port=upstreams.instant)
    load = wrk.load(gateway.chat, connections=2, seconds=1.0)
    assert load.requests > 0
    assert (load.refused, load.broken) == (0, 0)
    added = measures.added_latency([("ondol", gateway.chat)], direct, samples=5, say=silent)["ondol"]
    assert (added.samples, added.failed) == (5, 0)
    paced = Target(port=upstreams.paced)
    assert gateway.stream is not None
    token = measures.first_token([("ondol", gateway.stream)], paced, samples=2, say=silent)["ondol"]
    assert (token.samples, token.failed) == (2, 0)
    with Connection(gateway.chat.port) as connection:
        reply = connection.exchange(gateway.chat.request())
        assert gateway.cached is not None
        hits = [connection.exchange(gateway.cached.request()) for _ in range(2)]
    assert reply.get("x-ondol-deployment") == "bench-instant"
    assert reply.get("x-ondol-cost") not in (None, "unpriced")
    assert reply.get("x-ratelimit-limit-requests") is not None
    assert hits[-1].get("x-ondol-cache") == "exact"


def test_open_streams_are_counted_and_whole(gateway: Contender) -> None:
    crowd = measures.crowd(gateway, streams=8, seconds=1.5, say=silent)
    assert (crowd.figures.completed, crowd.figures.broken) == (8, {})
    assert crowd.figures.tokens > 8
    assert set(crowd.control) == {"healthz", "cached request"}
    assert crowd.control_failed == 0


def test_every_stage_is_found_by_its_name(tmp_path: Path, upstreams: Upstreams) -> None:
    out = tmp_path / "stages.json"
    contender = start_instrumented(tmp_path, upstreams, out)
    contender.process.end()
    sums = msgspec.json.decode(out.read_bytes(), type=Sums)
    assert sums.unknown == ()
    assert sums.requests >= 2
    assert set(sums.spent_ns) == {label for label, _, _ in STAGES}


def test_a_result_survives_its_file_and_becomes_a_table(tmp_path: Path, bench: Bench) -> None:
    results: Results = bench.results
    results.missing["litellm"] = "not installed here"
    results.stages = (Stage(name="authenticate", us=1.5),)
    results.fdatasync_us = {"p50": fdatasync_us(tmp_path, times=3)[1], "p99": 1.0}
    again = decode(encode(results))
    assert again == results
    table = markdown(again)
    assert "| added latency, 1 connection, p50 | ≤ 0.8 ms | – |" in table
    assert "- Left out: litellm: not installed here" in table
    assert "| authenticate | 1.5 |" in table
