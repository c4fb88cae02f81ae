"""Streams through a real site in front of an upstream that misbehaves: defined ends, metered always."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.faults import server as faults
from tests.faults.server import FaultServer
from tests.sites import Site, start

from ondol.adapters.ledger_reader import records
from ondol.gateway.admin import explained

pytestmark = pytest.mark.anyio

TEXT = """
kind: Model
name: helper
task: chat
---
kind: Price
name: list
input_per_mtok: 1.00
output_per_mtok: 2.00
source: made for a test
date: 2026-01-01
---
kind: Deployment
name: helper-up
site: {site}
model: helper
engine: upstream
url: UPSTREAM
price: list
read_timeout_s: 2
---
kind: Deployment
name: helper-fake
site: {site}
model: helper
engine: fake
price: list
---
kind: Route
name: assistant
deployments: [helper-up]
---
kind: Route
name: both
deployments: [helper-fake, helper-up]
objective: best
"""


@pytest.fixture
async def upstream() -> AsyncIterator[FaultServer]:
    async with FaultServer() as running:
        yield running


@pytest.fixture
async def site(upstream: FaultServer, tmp_path: Path) -> AsyncIterator[Site]:
    text = TEXT.replace("UPSTREAM", upstream.url)
    text = text.replace("engine: upstream\n", "engine: upstream\nquality: 0.9\n")
    one = await asyncio.to_thread(start, tmp_path, text)
    yield one
    await asyncio.to_thread(one.stop)


async def _stream(site: Site, **fields: Any) -> tuple[int, list[dict[str, Any]], bool]:
    """Status, the JSON events, and whether `[DONE]` came."""
    answer = await asyncio.to_thread(lambda: site.chat(stream=True, **fields))
    if answer.status != 200:
        return answer.status, [answer.json()], False
    payloads = [line.removeprefix("data: ") for line in answer.body.decode().split("\n\n") if line]
    return 200, [json.loads(one) for one in payloads if one != "[DONE]"], payloads[-1] == "[DONE]"


async def _last_record(site: Site) -> dict[str, Any]:
    """The newest record, read from the ledger file beside the running site."""
    newest = await asyncio.to_thread(lambda: list(records(site.folder / "data" / "ledger.db"))[-1])
    return explained(newest)


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param(faults.stream(faults.chunk("warm"), after="reset"), id="reset"),
        pytest.param(
            faults.stream(faults.chunk("warm"), b'data: {"choices":[{"del', after="close"), id="half a line"
        ),
        pytest.param(faults.stream(faults.chunk("warm"), b"data: \xff\xfe{}\n\n"), id="invalid utf-8"),
        pytest.param(
            faults.stream(faults.chunk("warm"), b'data: {"error":{"message":"gpu gone"}}\n\n'),
            id="error inside",
        ),
        pytest.param(faults.stream(faults.chunk("warm"), after="hang"), id="hang"),
        pytest.param(faults.stream(faults.chunk("warm"), after="end"), id="no finish"),
    ],
)
async def test_a_stream_that_breaks_ends_with_an_error_event(
    site: Site, upstream: FaultServer, behaviour: Any
) -> None:
    upstream.say(behaviour)
    status, events, done = await _stream(site)
    assert status == 200 and not done
    assert events[0]["choices"][0]["delta"]["content"] == "warm"
    assert events[-1]["error"]["code"] in ("engine_failed", "deadline_exceeded")
    record = await _last_record(site)
    assert record["outcome"] == "failed" and record["attempts"][0]["outcome"] in ("failed", "deadline")
    assert record["usage"] == {
        "input_tokens": record["usage"]["input_tokens"],
        "output_tokens": 1,
        "estimated": True,
    }
    assert record["cost"] > 0


@pytest.mark.parametrize(
    "behaviour", [faults.reset_before, faults.close_before, faults.not_http, faults.status("500 Oops"),
                  faults.raw(b'{"error":{"message":"inside a 200"}}'), faults.raw(b"\xff\xfe", kind="application/json")],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
async def test_before_the_first_byte_another_takes_over(
    site: Site, upstream: FaultServer, behaviour: Any, stream: bool
) -> None:
    upstream.say(behaviour)
    answer = await asyncio.to_thread(lambda: site.chat(model="both", stream=stream))
    assert answer.status == 200 and answer.headers["x-ondol-deployment"] == "helper-fake"
    assert answer.headers["x-ondol-reason"] == "fallback"


async def test_what_the_upstream_rejects_is_the_callers_to_mend(site: Site, upstream: FaultServer) -> None:
    upstream.say(faults.status("400 Bad Request", "context too long"))
    answer = await asyncio.to_thread(lambda: site.chat(model="both"))
    assert answer.status == 400 and "context too long" in answer.json()["error"]["message"]
    assert len(upstream.asked) == 1


async def test_retry_after_is_honoured_and_passed_on(site: Site, upstream: FaultServer) -> None:
    upstream.say(faults.status("429 Too Many", "slow down", retry_after="7"))
    answer = await asyncio.to_thread(site.chat)
    assert answer.status == 503 and int(answer.headers["retry-after"]) in (6, 7)
    again = await asyncio.to_thread(site.chat)
    assert again.status == 503 and len(upstream.asked) == 1


async def test_an_absolute_deadline_holds_while_the_upstream_hangs(site: Site, upstream: FaultServer) -> None:
    upstream.say(faults.hang)
    begun = time.monotonic()
    answer = await asyncio.to_thread(lambda: site.chat(headers={"x-ondol-max-latency-ms": "400"}))
    assert answer.status == 504 and answer.code == "deadline_exceeded"
    assert time.monotonic() - begun < 30
    assert (await _last_record(site))["attempts"][0]["outcome"] == "deadline"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_hang_up_stops_the_engine_and_is_metered(
    site: Site, upstream: FaultServer, stream: bool
) -> None:
    upstream.say(faults.stream(faults.chunk("warm"), after="hang") if stream else faults.hang)
    body = json.dumps(
        {"model": "assistant", "stream": stream, "messages": [{"role": "user", "content": "Hi"}]}
    ).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{site.port}\r\n"
        f"Authorization: Bearer {site.admin_key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", site.port), 5) as raw:
        raw.sendall(head.encode() + body)
        if stream:
            assert b"warm" in await asyncio.to_thread(_until, raw, b"warm")
        else:
            async with asyncio.timeout(10):
                await upstream.arrived.wait()
    async with asyncio.timeout(10):
        await upstream.hung_up.wait()
        while not await asyncio.to_thread(lambda: list(records(site.folder / "data" / "ledger.db"))):  # noqa: ASYNC110
            await asyncio.sleep(0.05)  # another process writes it: there is no event to wait for
    record = await _last_record(site)
    assert record["outcome"] == "cancelled" and record["attempts"][0]["outcome"] == "cancelled"
    assert record["usage"]["estimated"] is True


def _until(raw: socket.socket, wanted: bytes) -> bytes:
    got = b""
    while wanted not in got:
        piece = raw.recv(65536)
        if not piece:
            break
        got += piece
    return got
