"""Everything that an upstream can do wrong, over a real socket, gives one of our errors in time."""

from __future__ import annotations

import asyncio
import gzip
import logging
import ssl
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
import trustme
from tests.faults import server as faults
from tests.faults.server import FaultServer, chunk

from ondol.adapters.clock import SystemClock
from ondol.core.catalog import KeySource
from ondol.core.identity import Principal
from ondol.core.inference import Chunk, InferenceRequest, Task
from ondol.core.ports import EngineCall
from ondol.engines.exchange import Exchange, UpstreamRefused
from ondol.engines.upstream import UpstreamEngine
from ondol.errors import (
    ConfigError,
    DeadlineExceeded,
    EngineFailed,
    EngineRejected,
    EngineUnavailable,
)

pytestmark = pytest.mark.anyio

SECRET = "sk-live-very-secret-abcd"
PROMPT = "the prompt that must not leak"
OK = b'{"choices":[{"index":0,"message":{"role":"assistant","content":"a"},"finish_reason":"stop"}]}'
Make = Callable[..., UpstreamEngine]


@pytest.fixture(scope="module", params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    """Both loops: a gateway runs on uvloop, a test or a tool may not."""
    return "asyncio", {"use_uvloop": request.param}


@pytest.fixture
async def server() -> AsyncIterator[FaultServer]:
    async with FaultServer() as running:
        yield running


@pytest.fixture
async def make(server: FaultServer) -> AsyncIterator[Make]:
    made: list[UpstreamEngine] = []

    def build(**options: object) -> UpstreamEngine:
        settings: dict[str, object] = {
            "url": server.url,
            "model": "m",
            "clock": SystemClock(),
            "connect_timeout_s": 2.0,
            "read_timeout_s": 5.0,
            "keys": (KeySource(env="KEY"),),
            "environ": {"KEY": SECRET, "KEY2": SECRET + "2", "KEY3": SECRET + "3"},
        }
        engine = UpstreamEngine(**(settings | options))  # type: ignore[arg-type]
        made.append(engine)
        return engine

    yield build
    for engine in made:
        await engine.close()


def call(*, stream: bool = False, time_s: float = 10.0) -> EngineCall:
    body = {"model": "assistant", "messages": [{"role": "user", "content": PROMPT}]}
    return EngineCall(
        request=InferenceRequest(task=Task.CHAT, route="assistant", body=body, stream=stream),
        request_id="req-1",
        attempt=1,
        deadline_ns=SystemClock().now_ns() + int(time_s * 1e9),
        max_output_tokens=50,
        principal=Principal(key_id="k", tenant="default", team="t"),
    )


async def collect(engine: UpstreamEngine, into: list[Chunk], *, time_s: float = 10.0) -> None:
    async for item in engine.stream(call(stream=True, time_s=time_s)):
        into.append(item)


def assert_discreet(error: BaseException) -> None:
    text = str(error)
    assert SECRET not in text
    assert PROMPT not in text
    assert "abcd" not in text


BAD_BEFORE = {
    "reset before headers": (faults.reset_before, "answer"),
    "close before headers": (faults.close_before, "closed the connection before any answer"),
    "not http": (faults.not_http, "not HTTP/1.1"),
    "endless headers": (faults.endless_headers, "headers of the answer pass"),
    "redirect": (
        faults.raw(b"", status="302 Found", location="http://127.0.0.1:1/v1/chat/completions"),
        "redirects (HTTP 302)",
    ),
    "server error": (faults.status("500 Internal Server Error", PROMPT), "HTTP 500"),
    "wrong key": (faults.status("401 Unauthorized", f"bad key {SECRET}"), "HTTP 401"),
    "no path": (faults.status("404 Not Found"), "check `url` and `upstream_model`"),
    "request timeout": (faults.status("408 Request Timeout"), "HTTP 408"),
    "nothing": (faults.raw(b"", status="204 No Content"), "HTTP 204"),
}


@pytest.mark.parametrize("name", BAD_BEFORE)
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
async def test_failure_before_an_answer_is_unavailable(
    server: FaultServer, make: Make, name: str, streamed: bool
) -> None:
    behaviour, sentence = BAD_BEFORE[name]
    server.say(behaviour)
    engine = make()
    with pytest.raises(EngineUnavailable) as caught:
        if streamed:
            await collect(engine, [])
        else:
            await engine.complete(call())
    assert sentence in caught.value.message
    assert f"127.0.0.1:{server.port}" in caught.value.message
    assert_discreet(caught.value)
    assert len(server.asked) == 1  # neither followed nor repeated


WHOLE = {
    "invalid UTF-8": (faults.raw(OK.replace(b'"a"', b'"\xff"')), "not valid UTF-8"),
    "not JSON": (faults.raw(b"<html>" + PROMPT.encode()), "not the JSON"),
    "empty": (faults.raw(b""), "answered nothing"),
    "no choices": (faults.raw(b'{"choices":[]}'), "no `choices`"),
    "other JSON": (faults.raw(b'{"hello":"world"}'), "no `choices`"),
    "an error inside a 200": (
        faults.raw(b'{"error":{"message":"bad key sk-abcd","code":"overloaded"}}'),
        "reported an error within its answer (overloaded)",
    ),
    "html": (faults.raw(b"<html>", kind="text/html"), "answered text/html"),
    "less than promised": (faults.short(OK, promised=1000), "within the answer"),
    "JSON cut at its length": (faults.raw(OK[:-10]), "not the JSON"),
    "gzip that nobody asked for": (
        faults.raw(gzip.compress(b"0" * 10_000_000), content_encoding="gzip"),
        "compressed",
    ),
}


@pytest.mark.parametrize("name", WHOLE)
async def test_bad_whole_answer_is_unavailable(server: FaultServer, make: Make, name: str) -> None:
    behaviour, sentence = WHOLE[name]
    server.say(behaviour)
    with pytest.raises(EngineUnavailable) as caught:
        await make().complete(call())
    assert sentence in caught.value.message
    assert_discreet(caught.value)


async def test_more_than_promised_costs_the_connection_not_the_answer(
    server: FaultServer, make: Make
) -> None:
    # Given a server that smuggles a second answer behind the first
    smuggled = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nbad"
    server.say(faults.long(OK, smuggled))
    engine = make()
    # Then the first is taken as it is, and the next request does not get the second
    assert (await engine.complete(call())).body == OK
    assert b"warm" not in OK
    second = await engine.complete(call())
    assert b'"choices"' in second.body
    assert server.connections == 2


async def test_an_answer_past_its_bound_is_cut_off(
    server: FaultServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ondol.engines.exchange.ANSWER_BYTES_MAX", 100_000)
    server.say(faults.stream(b"[" + b" " * 200_000, after="hang"))
    server.say(faults.short(b"[" + b" " * 200_000, promised=10_000_000))
    engine = make()
    with pytest.raises(EngineUnavailable, match="expected application/json"):
        await engine.complete(call())
    with pytest.raises(EngineUnavailable, match="passes 100000 bytes"):
        await engine.complete(call())


async def test_connection_refused(make: Make, free_port: int) -> None:
    with pytest.raises(EngineUnavailable, match="refused"):
        await make(url=f"http://127.0.0.1:{free_port}/v1").complete(call())


async def test_unknown_host(make: Make) -> None:
    with pytest.raises(EngineUnavailable, match=r"nowhere\.invalid:80: no connection"):
        await make(url="http://nowhere.invalid/v1").complete(call())


@pytest.mark.parametrize(
    "url", ["ftp://a/v1", "a/v1", "http://", "http://a:x/v1", "http://u:p@a/v1", "http://a/ b"]
)
def test_bad_address_is_refused_at_once(url: str) -> None:
    with pytest.raises(ConfigError):
        UpstreamEngine(url=url, model="m", clock=SystemClock())


async def test_hang_ends_at_the_deadline(server: FaultServer, make: Make) -> None:
    server.say(faults.hang, faults.hang)
    engine = make()
    with pytest.raises(DeadlineExceeded):
        await engine.complete(call(time_s=0.1))
    await asyncio.wait_for(server.hung_up.wait(), 5)
    with pytest.raises(DeadlineExceeded):
        await collect(engine, [], time_s=0.1)


async def test_hang_ends_at_the_read_timeout(server: FaultServer, make: Make) -> None:
    server.say(faults.hang)
    with pytest.raises(EngineUnavailable, match=r"sent nothing for 0\.1 s"):
        await make(read_timeout_s=0.1).complete(call())
    await asyncio.wait_for(server.hung_up.wait(), 5)


async def test_deadline_that_has_passed_sends_nothing(server: FaultServer, make: Make) -> None:
    with pytest.raises(DeadlineExceeded):
        await make().complete(call(time_s=-1))
    assert server.asked == []


REJECTED = ["400 Bad Request", "413 Payload Too Large", "415 Unsupported Media Type", "422 Unprocessable"]


@pytest.mark.parametrize("line", REJECTED)
async def test_blame_on_the_request_is_quoted(server: FaultServer, make: Make, line: str) -> None:
    server.say(faults.status(line, "temperature must be at most 2 " + "x" * 10_000))
    with pytest.raises(EngineRejected) as caught:
        await make().complete(call())
    assert caught.value.status == int(line[:3])
    assert caught.value.message.startswith("temperature must be at most 2")
    assert len(caught.value.message) < 600


async def test_blame_on_the_request_inside_a_200(server: FaultServer, make: Make) -> None:
    server.say(faults.raw(b'{"error":{"message":"too long","code":400}}'))
    with pytest.raises(EngineRejected, match="too long"):
        await make().complete(call())


AFTER = {
    "reset mid-stream": (faults.stream(chunk(), after="reset"), "within the answer"),
    "close mid-stream": (faults.stream(chunk(), after="close"), "within the answer"),
    "half an SSE line": (
        faults.stream(chunk(), b'data: {"choices":[{"ind', after="close"),
        "within the answer",
    ),
    "half an SSE line, clean end": (faults.stream(chunk(), b'data: {"choices":[{"ind'), "ended early"),
    "ends without a finish": (faults.stream(chunk()), "ended early"),
    "invalid UTF-8": (faults.stream(chunk(), chunk("x").replace(b"x", b"\xc3\x28")), "not valid UTF-8"),
    "not JSON": (faults.stream(chunk(), b"data: {oops}\n\n"), "not the JSON of a chunk"),
    "an error event": (
        faults.stream(chunk(), b'data: {"error":{"message":"sk-abcd","code":"overloaded"}}\n\n'),
        "reported an error within its answer (overloaded)",
    ),
    "silence": (faults.stream(chunk(), after="hang"), "sent nothing for 0.3 s"),
}


@pytest.mark.parametrize("name", AFTER)
async def test_failure_after_the_first_chunk_is_failed(server: FaultServer, make: Make, name: str) -> None:
    behaviour, sentence = AFTER[name]
    server.say(behaviour)
    got: list[Chunk] = []
    with pytest.raises(EngineFailed) as caught:
        await collect(make(read_timeout_s=0.3), got)
    assert len(got) == 1
    assert sentence in caught.value.message
    assert_discreet(caught.value)


FIRST = {
    "an error event first": (
        faults.stream(b'data: {"error":{"message":"sk-abcd","code":"overloaded"}}\n\n'),
        "(overloaded)",
    ),
    "an error as JSON": (faults.raw(b'{"error":{"message":"x","code":"busy"}}'), "(busy)"),
    "a whole JSON": (faults.raw(OK), "whole JSON where a stream"),
    "html": (faults.raw(b"<html>", kind="text/html"), "expected text/event-stream"),
    "an empty stream": (faults.stream(), "ended early"),
    "comments only": (faults.stream(b": ping\n\n", b": ping\n\n"), "ended early"),
}


@pytest.mark.parametrize("name", FIRST)
async def test_bad_stream_before_the_first_chunk_is_unavailable(
    server: FaultServer, make: Make, name: str
) -> None:
    behaviour, sentence = FIRST[name]
    server.say(behaviour)
    got: list[Chunk] = []
    with pytest.raises(EngineUnavailable) as caught:
        await collect(make(), got)
    assert got == []
    assert sentence in caught.value.message
    assert_discreet(caught.value)


async def test_huge_event_is_cut_off(
    server: FaultServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ondol.engines.exchange.EVENT_BYTES_MAX", 100_000)
    server.say(faults.stream(chunk(), b"data: ", *[b"x" * 60_000] * 9, after="hang", pause_s=0.01))
    got: list[Chunk] = []
    with pytest.raises(EngineFailed, match="larger than 100000 bytes"):
        await collect(make(), got)
    await asyncio.wait_for(server.hung_up.wait(), 5)


async def test_slow_drip_ends_at_the_deadline(server: FaultServer, make: Make) -> None:
    # Bytes come all the time, so no read times out; only the deadline ends it.
    server.say(faults.drip(b"data: nothing", every_s=0.01))
    with pytest.raises(DeadlineExceeded):
        await collect(make(read_timeout_s=5), [], time_s=0.3)
    await asyncio.wait_for(server.hung_up.wait(), 5)


ENDINGS = {
    "done": (chunk(finish="stop"), b"data: [DONE]\n\n"),
    "done without its blank line": (chunk(finish="stop"), b"data: [DONE]\n"),
    "done without a finish": (b"data: [DONE]\n\n",),
    "finish without done": (chunk("", finish="stop"),),
}


@pytest.mark.parametrize("name", ENDINGS)
async def test_a_whole_stream_ends_normally(server: FaultServer, make: Make, name: str) -> None:
    server.say(faults.stream(chunk("a"), *ENDINGS[name]))
    got: list[Chunk] = []
    await collect(make(), got)
    assert got[0].data == chunk("a")[6:-2]


async def test_the_connection_is_kept_after_a_stream(server: FaultServer, make: Make) -> None:
    engine = make()
    for _ in range(3):
        await collect(engine, [])
        await asyncio.sleep(0.05)  # the end of the body may come after [DONE]
    assert server.connections == 1


async def test_a_stream_hung_up_on_is_seen_at_once(server: FaultServer, make: Make) -> None:
    server.say(faults.stream(chunk(), after="hang"))
    chunks = make().stream(call(stream=True))
    await anext(chunks)
    await chunks.aclose()
    await asyncio.wait_for(server.hung_up.wait(), 5)


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
async def test_cancelling_before_the_headers_is_seen_at_once(
    server: FaultServer, make: Make, streamed: bool
) -> None:
    server.say(faults.hang)
    engine = make()
    task = asyncio.create_task(collect(engine, []) if streamed else _complete(engine))
    await server.arrived.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(server.hung_up.wait(), 5)


async def test_a_stale_kept_connection_is_replaced_once(server: FaultServer, make: Make) -> None:
    # Given a server that closes a kept connection as the next request arrives
    engine = make()
    await engine.complete(call())
    server.say(faults.close_before)
    # Then the request goes out again on a new one
    assert b"choices" in (await engine.complete(call())).body
    assert len(server.asked) == 3
    # And a server that does it always is unavailable
    server.say(faults.close_before, faults.close_before)
    with pytest.raises(EngineUnavailable):
        await engine.complete(call())


RETRY = {
    "seconds": ("7", 7.0),
    "a date": ("in an hour", 3600.0),
    "a date gone by": ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
    "far away": ("99999999", 86400.0),
    "nonsense": ("soon", None),
    "negative": ("-5", None),
}


@pytest.mark.parametrize("line", ["429 Too Many Requests", "503 Service Unavailable"])
@pytest.mark.parametrize("name", RETRY)
async def test_retry_after_is_told(server: FaultServer, make: Make, line: str, name: str) -> None:
    text, seconds = RETRY[name]
    if text == "in an hour":
        text = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    server.say(faults.status(line, retry_after=text))
    with pytest.raises(EngineUnavailable) as caught:
        await make(keys=()).complete(call())
    if line.startswith("503"):
        assert isinstance(caught.value, UpstreamRefused)
        assert caught.value.retry_after_s == pytest.approx(seconds, abs=120)
    else:
        # A limit without a word about its end rests a second.
        assert caught.value.retry_after_s == pytest.approx(1.0 if seconds is None else seconds, abs=120)


async def test_a_limited_key_makes_room_for_the_next_at_once(server: FaultServer, make: Make) -> None:
    engine = make(keys=tuple(KeySource(env=name) for name in ("KEY", "KEY2", "KEY3")))
    server.say(faults.status("429 Too Many Requests", retry_after="60"))
    await engine.complete(call())
    for _ in range(4):
        await engine.complete(call())
    used = [asked.headers["authorization"].removeprefix(f"Bearer {SECRET}") for asked in server.asked]
    assert used == ["", "2", "3", "2", "3", "2"]
    assert engine.problem() is None


async def test_all_keys_limited(server: FaultServer, make: Make) -> None:
    engine = make(keys=(KeySource(env="KEY"), KeySource(env="KEY2")))
    server.say(
        faults.status("429 Too Many Requests", retry_after="60"),
        faults.status("429 Too Many Requests", retry_after="20"),
    )
    for _ in range(2):  # the second time without asking the server
        with pytest.raises(EngineUnavailable) as caught:
            await engine.complete(call())
        assert caught.value.retry_after_s == pytest.approx(20, abs=2)
    assert len(server.asked) == 2
    problem = engine.problem()
    assert problem is not None
    assert "all 2 keys rest until" in problem


async def test_a_refused_key_is_left_out_and_named_once(
    server: FaultServer, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    server.keys = frozenset({SECRET + "2"})
    engine = make(keys=(KeySource(env="KEY"), KeySource(env="KEY2")))
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            await collect(engine, [])
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "environment variable KEY" in warnings[0]
    assert SECRET not in caplog.text
    assert len(server.asked) == 4


async def test_no_key_no_header(server: FaultServer, make: Make) -> None:
    await make(keys=()).complete(call())
    assert "authorization" not in server.asked[0].headers


async def test_a_key_file_is_read_again_when_it_changes(
    server: FaultServer, make: Make, tmp_path: Path
) -> None:
    path = tmp_path / "key"
    engine = make(keys=(KeySource(file="key"),), folder=tmp_path)
    problem = engine.problem()
    assert problem is not None
    assert "key file key does not exist" in problem
    with pytest.raises(EngineUnavailable, match="does not exist"):
        await engine.complete(call())
    path.write_text("first\n")
    await engine.start()
    await engine.complete(call())
    assert server.asked[-1].headers["authorization"] == "Bearer first"


async def test_a_closed_engine_ends_what_runs(server: FaultServer, make: Make) -> None:
    server.say(faults.hang)
    engine = make()
    task = asyncio.create_task(_complete(engine))
    await server.arrived.wait()
    await engine.close()
    await engine.close()
    with pytest.raises(EngineUnavailable):
        await task
    with pytest.raises(EngineUnavailable, match="closed"):
        await engine.complete(call())


async def test_a_slow_reader_is_not_a_slow_server(server: FaultServer, make: Make) -> None:
    # Given more than the reader lets pile up, and a reader slower than the read timeout
    big = [chunk("x" * 100_000) for _ in range(30)]
    server.say(faults.stream(*big, chunk("", finish="stop"), b"data: [DONE]\n\n"))
    got = 0
    async for item in make(read_timeout_s=0.2).stream(call(stream=True)):
        got += 1
        if got == 3:
            await asyncio.sleep(0.6)
        assert item.data
    assert got == 31


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
async def secure(authority: trustme.CA) -> AsyncIterator[FaultServer]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    async with FaultServer(tls=context) as running:
        yield running


async def test_tls_with_a_known_authority(secure: FaultServer, authority: trustme.CA) -> None:
    trusted = ssl.create_default_context()
    authority.configure_trust(trusted)
    exchange = Exchange(secure.url, connect_timeout_s=5, read_timeout_s=5, clock=SystemClock(), tls=trusted)
    body = b'{"messages":[{"role":"user","content":"a"}]}'
    deadline_ns = call().deadline_ns
    for _ in range(2):
        assert (await exchange.complete(Task.CHAT, body, {}, deadline_ns)).usage is not None
    assert secure.connections == 1
    secure.arrived.clear()
    secure.say(faults.hang)
    task = asyncio.ensure_future(exchange.complete(Task.CHAT, body, {}, deadline_ns))
    await secure.arrived.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(secure.hung_up.wait(), 5)
    await exchange.close()


async def test_tls_with_an_unknown_authority(secure: FaultServer, make: Make) -> None:
    with pytest.raises(EngineUnavailable, match="its certificate is refused"):
        await make(url=secure.url).complete(call())
    assert secure.asked == []


async def test_plain_http_to_a_tls_port(secure: FaultServer, make: Make) -> None:
    with pytest.raises(EngineUnavailable):
        await make(url=secure.url.replace("https", "http")).complete(call())


async def test_tls_to_a_plain_port(server: FaultServer, make: Make) -> None:
    with pytest.raises(EngineUnavailable, match="no connection within|TLS failed"):
        await make(url=server.url.replace("http", "https"), connect_timeout_s=0.2).complete(call())


async def _complete(engine: UpstreamEngine) -> None:
    await engine.complete(call())
