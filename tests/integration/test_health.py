"""Probes over real sockets: away after two silences, back after two answers, and what is heard counts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from tests.faults import server as faults
from tests.faults.server import FaultServer
from tests.sites import free_port

from ondol.errors import InvalidRequest
from ondol.net import health
from ondol.net.health import Probe

pytestmark = pytest.mark.anyio
READY = faults.raw(b"{}")
BUSY = faults.raw(b"{}", status="503 Service Unavailable")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "PROBE_S", 0.2)


@contextlib.asynccontextmanager
async def probing(server: FaultServer, judged: list[tuple[bool, bool]]) -> AsyncIterator[Probe]:
    probe = Probe(server.url.removesuffix("/v1"), changed=lambda one: judged.append((one.alive, one.ready)))
    try:
        yield probe
    finally:
        await probe.close()


def state(probe: Probe) -> tuple[bool, bool]:
    return probe.alive, probe.ready


async def test_away_after_two_silences_and_back_after_two_answers() -> None:
    judged: list[tuple[bool, bool]] = []
    async with FaultServer() as server, probing(server, judged) as probe:
        assert state(probe) == (True, True)
        server.say(READY, faults.hang, faults.hang, faults.hang, READY, READY)
        await probe.once()
        assert probe.rtt_ms is not None and probe.rtt_ms > 0
        await probe.once()
        assert state(probe) == (True, True), "one silence is none"
        await probe.once()
        assert state(probe) == (False, False)
        assert probe.why == "it did not answer within 0.2 s"
        await probe.once()
        await probe.once()
        assert state(probe) == (False, False), "one answer may be a line that flaps"
        await probe.once()
        assert state(probe) == (True, True)
        assert probe.why == ""
        assert judged == [(False, False), (True, True)]
        assert {one.path for one in server.asked} == {"/readyz"}


async def test_a_refusal_is_an_answer() -> None:
    judged: list[tuple[bool, bool]] = []
    async with FaultServer() as server, probing(server, judged) as probe:
        server.say(BUSY, READY)
        await probe.once()
        assert state(probe) == (True, False)
        assert probe.why == "it says that it is not ready (HTTP 503)"
        await probe.once()
        assert state(probe) == (True, True)
        assert judged == [(True, False), (True, True)]


async def test_what_comes_by_another_way_counts() -> None:
    async with FaultServer() as server, probing(server, []) as probe:
        server.say(READY, faults.hang, faults.hang, faults.hang)
        await probe.once()
        for _ in range(3):
            asyncio.get_running_loop().call_later(0.05, probe.heard)
            await probe.once()
        assert state(probe) == (True, True)


async def test_nobody_there_is_seen_by_the_first_probe() -> None:
    probe = Probe(f"http://127.0.0.1:{free_port()}")
    await probe.once()
    assert state(probe) == (False, False)
    assert "nothing listens there" in probe.why


@pytest.mark.parametrize(
    "url", ["shop-1:8080", "ftp://a", "http://a/path", "http://a:99999", "http://u@a", "http://"]
)
def test_an_address_is_one(url: str) -> None:
    with pytest.raises(InvalidRequest, match="expected http://HOST:PORT"):
        Probe(url)
