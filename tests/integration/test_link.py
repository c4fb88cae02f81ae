"""The link over real TLS: who is believed, what a bad line or a bad answer does, and the way through a proxy."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trustme
import uvloop
from tests.faults import server as faults
from tests.faults.server import FaultServer, Reply
from tests.sites import free_port

from ondol.adapters.link import HttpsLink
from ondol.errors import ConfigError, HubRefused, LinkDown
from ondol.net import dial
from ondol.wire import sync

pytestmark = pytest.mark.anyio

CA = trustme.CA()
CA_PEM = CA.cert_pem.bytes().decode()


@pytest.fixture(params=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> object:
    return (
        ("asyncio", {"loop_factory": uvloop.new_event_loop}) if request.param == "uvloop" else ("asyncio", {})
    )


def _context(
    ca: trustme.CA = CA, *, name: str = "127.0.0.1", not_before: int = 0, not_after: int = 365
) -> ssl.SSLContext:
    now = datetime.datetime.now(datetime.UTC)
    cert = ca.issue_cert(
        name,
        not_before=now + datetime.timedelta(days=not_before),
        not_after=now + datetime.timedelta(days=not_after),
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    cert.configure_cert(context)
    return context


def _url(server: FaultServer) -> str:
    return server.url.removesuffix("/v1")


@asynccontextmanager
async def _link(*urls: str, proxy: str | None = None, ca_pem: str = CA_PEM) -> AsyncIterator[HttpsLink]:
    link = HttpsLink(urls, ca_pem=ca_pem, authorization=lambda: "Ondol-Site a~b", proxy=proxy)
    try:
        yield link
    finally:
        await link.close()


def _error(code: str, status: str = "409 Conflict") -> faults.Behaviour:
    said = sync.Error(code=code, message="no", retry_after_s=7.0, hub_ns=5)
    return faults.raw(sync.encode(said), status=status, kind=sync.CONTENT_TYPE)


# ---- calls


async def test_a_call_says_who_asks_and_brings_the_answer(anyio_backend: object) -> None:
    async with FaultServer(tls=_context()) as server, _link(_url(server)) as link:
        server.say(faults.raw(b"\x80"), faults.raw(b"\x81"))
        assert await link.call("hello", b"{}", timeout_s=5) == b"\x80"
        assert await link.call("usage", b"{}", timeout_s=5) == b"\x81"
        assert server.connections == 1
        assert [one.path for one in server.asked] == ["/v1/sync/hello", "/v1/sync/usage"]
        assert server.asked[0].headers["authorization"] == "Ondol-Site a~b"
        assert server.asked[0].headers["content-type"] == sync.CONTENT_TYPE


async def test_a_refusal_keeps_the_hubs_code_and_time(anyio_backend: object) -> None:
    async with FaultServer(tls=_context()) as server, _link(_url(server)) as link:
        server.say(_error("fenced"))
        with pytest.raises(HubRefused, match="no") as refused:
            await link.call("usage", b"{}", timeout_s=5)
    assert (refused.value.why, refused.value.retry_after_s, refused.value.hub_ns) == ("fenced", 7.0, 5)


@pytest.mark.parametrize(
    ("behaviour", "why"),
    [
        (faults.reset_before, "the server|reset"),
        (faults.close_before, "the server closed"),
        (faults.not_http, "not HTTP/1.1"),
        (faults.short(b"abc", promised=9), "within the answer"),
        (faults.endless_headers, "headers of the answer pass"),
        (faults.raw(b"x" * 2_000_000), "its answer passes"),
        (faults.raw(b"<html>", status="502 Bad Gateway"), "answered 502, and not as a hub does"),
    ],
)
async def test_a_bad_answer_is_a_link_that_is_down(
    behaviour: faults.Behaviour, why: str, anyio_backend: object
) -> None:
    async with FaultServer(tls=_context()) as server, _link(_url(server)) as link:
        server.say(behaviour, behaviour)
        with pytest.raises(LinkDown, match=why):
            await link.call("report", b"{}", timeout_s=5)


async def test_a_hub_that_does_not_answer_in_time_is_down(anyio_backend: object) -> None:
    async with FaultServer(tls=_context()) as server, _link(_url(server)) as link:
        server.say(faults.hang)
        with pytest.raises(LinkDown, match="no answer to usage within 0.2 s"):
            await link.call("usage", b"{}", timeout_s=0.2)
        server.say(faults.raw(b"\x80"))
        assert await link.call("usage", b"{}", timeout_s=5) == b"\x80"


async def test_after_a_failure_the_next_address_is_asked(anyio_backend: object) -> None:
    async with (
        FaultServer(tls=_context()) as server,
        _link(f"https://127.0.0.1:{free_port()}", _url(server)) as link,
    ):
        server.say(faults.raw(b"\x80"), faults.raw(b"\x80"))
        with pytest.raises(LinkDown, match="refused"):
            await link.call("hello", b"{}", timeout_s=5)
        assert await link.call("hello", b"{}", timeout_s=5) == b"\x80"
        assert await link.call("hello", b"{}", timeout_s=5) == b"\x80"


@pytest.mark.parametrize("code", ["state_unavailable", "draining"])
async def test_a_replica_that_is_unwell_is_left_for_the_next(code: str, anyio_backend: object) -> None:
    unwell = _error(code, "503 Service Unavailable")
    async with (
        FaultServer(tls=_context()) as one,
        FaultServer(tls=_context()) as other,
        _link(_url(one), _url(other)) as link,
    ):
        one.say(unwell)
        other.say(faults.raw(b"\x80"), _error("range_refused"), faults.raw(b"\x81"), unwell)
        with pytest.raises(LinkDown, match=f"{one.port}: no"):
            await link.call("hello", b"{}", timeout_s=5)
        assert link.url == _url(other)
        assert await link.call("hello", b"{}", timeout_s=5) == b"\x80"
        with pytest.raises(HubRefused):  # a refusal of what was asked is no reason to go
            await link.call("usage", b"{}", timeout_s=5)
        assert await link.call("usage", b"{}", timeout_s=5) == b"\x81"
        with pytest.raises(LinkDown):
            await anext(aiter(link.watch(b"{}", silence_s=5)))
        assert link.url == _url(one)


async def test_the_only_hub_that_is_unwell_says_when_to_come_again(anyio_backend: object) -> None:
    async with FaultServer(tls=_context()) as server, _link(_url(server)) as link:
        server.say(_error("state_unavailable", "503 Service Unavailable"))
        with pytest.raises(HubRefused) as refused:
            await link.call("usage", b"{}", timeout_s=5)
    assert (refused.value.why, refused.value.retry_after_s) == ("state_unavailable", 7.0)


async def test_a_name_with_several_addresses_is_reached_by_the_one_that_answers(
    anyio_backend: object,
) -> None:
    async with (
        FaultServer(tls=_context(name="localhost")) as server,
        _link(f"https://localhost:{server.port}") as link,
    ):  # ::1 refuses, where there is one
        server.say(faults.raw(b"\x80"))
        assert await link.call("hello", b"{}", timeout_s=5) == b"\x80"


async def test_a_name_without_an_address_is_said(anyio_backend: object) -> None:
    async with _link("https://no-such-host.invalid") as link:
        with pytest.raises(LinkDown, match="no-such-host.invalid has no address"):
            await link.call("hello", b"{}", timeout_s=10)


async def test_a_line_that_swallows_the_first_packets_is_tried_anew_meanwhile(
    anyio_backend: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first two tries get no answer at all: the third is begun without waiting for them, and taken."""
    tries = 0

    class Swallowing(dial.Dialer):
        async def _connect(self, *args: object) -> object:  # type: ignore[override]
            nonlocal tries
            tries += 1
            if tries <= 2:
                await asyncio.sleep(3600)
            return await super()._connect(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("ondol.adapters.link.Dialer", Swallowing)
    async with FaultServer(tls=_context()) as server, _link(_url(server)) as link:
        server.say(faults.raw(b"\x80"))
        assert await link.call("hello", b"{}", timeout_s=30) == b"\x80"
    assert tries == 3


# ---- whom it believes


async def test_only_the_fleets_own_ca_is_believed(anyio_backend: object) -> None:
    async with FaultServer(tls=_context(trustme.CA())) as server, _link(_url(server)) as link:
        with pytest.raises(LinkDown, match="not of this fleet's CA"):
            await link.call("hello", b"{}", timeout_s=5)
        assert server.asked == []


async def test_a_certificate_for_another_name_is_said_as_that(anyio_backend: object) -> None:
    async with FaultServer(tls=_context(name="hub.example")) as server, _link(_url(server)) as link:
        with pytest.raises(LinkDown, match="not for 127.0.0.1"):
            await link.call("hello", b"{}", timeout_s=5)


async def test_an_expired_certificate_is_refused_and_one_of_tomorrow_is_not(anyio_backend: object) -> None:
    """A clock that stands behind must still reach the hub, to learn the time."""
    async with FaultServer(tls=_context(not_before=-9, not_after=-1)) as server, _link(_url(server)) as link:
        with pytest.raises(LinkDown, match="expired by this machine's clock"):
            await link.call("hello", b"{}", timeout_s=5)
    async with FaultServer(tls=_context(not_before=300)) as server, _link(_url(server)) as link:
        server.say(faults.raw(b"\x80"))
        assert await link.call("hello", b"{}", timeout_s=5) == b"\x80"


async def test_a_server_below_tls_1_3_is_refused(anyio_backend: object) -> None:
    old = _context()
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    async with FaultServer(tls=old) as server, _link(_url(server)) as link:
        with pytest.raises(LinkDown, match="TLS failed|ConnectionResetError"):
            await link.call("hello", b"{}", timeout_s=5)


@pytest.mark.parametrize("urls", [(), ("http://hub",), ("https://",), ("https://hub/path",)])
def test_an_address_that_is_none_is_refused(urls: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        HttpsLink(urls, ca_pem=CA_PEM, authorization=str)


def test_a_ca_or_a_proxy_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError):
        HttpsLink(["https://hub"], ca_pem="no", authorization=str)
    with pytest.raises(ConfigError, match="expected http://HOST:PORT"):
        HttpsLink(["https://hub"], ca_pem=CA_PEM, authorization=str, proxy="https://proxy:1")


# ---- watching


def _lines(*pieces: bytes, after: str) -> faults.Behaviour:
    return faults.stream(*pieces, after=after)


async def _heard(link: HttpsLink, *, silence_s: float = 5.0) -> tuple[list[bytes], str]:
    heard = []
    try:
        async for line in link.watch(b"{}", silence_s=silence_s):
            heard.append(line)
    except (LinkDown, HubRefused) as error:
        return heard, error.message
    return heard, ""


async def test_a_watch_gives_whole_lines_until_its_end(anyio_backend: object) -> None:
    async with FaultServer(tls=_context()) as server, _link(_url(server)) as link:
        server.say(_lines(b"one\ntw", b"o\n", b"three\n", after="end"))
        assert await _heard(link) == ([b"one", b"two", b"three"], "")


async def test_a_watch_that_is_silent_broken_or_refused_is_said(anyio_backend: object) -> None:
    async with FaultServer(tls=_context()) as server, _link(_url(server)) as link:
        server.say(_lines(b"one\n", after="hang"))
        heard, why = await _heard(link, silence_s=0.3)
        assert heard == [b"one"] and "nothing for 0.3 s" in why
        server.say(_lines(b"one\n", after="reset"))
        heard, why = await _heard(link)
        assert heard == [b"one"] and "within the answer" in why
        server.say(_error("fenced"))
        assert await _heard(link) == ([], "no")
        server.say(_lines(b"x" * 80_000, after="hang"))
        assert "passes 65536 bytes" in (await _heard(link))[1]


async def test_leaving_a_watch_hangs_up(anyio_backend: object) -> None:
    async with FaultServer(tls=_context()) as server, _link(_url(server)) as link:
        server.say(_lines(b"one\n", after="hang"))
        lines = link.watch(b"{}", silence_s=60)
        assert await anext(aiter(lines)) == b"one"
        await lines.aclose()  # type: ignore[attr-defined]
        async with asyncio.timeout(5):
            await server.hung_up.wait()


# ---- through a proxy

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def _proxy(
    answer: bytes = b"HTTP/1.1 200 Connection established\r\nvia: p\r\n\r\n", *, to: int | None = None
) -> AsyncIterator[tuple[str, list[bytes]]]:
    """An HTTP proxy; `to` sends every tunnel to that port instead, as one that opens TLS does."""
    heads: list[bytes] = []
    tasks: set[asyncio.Task[None]] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def answer_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        heads.append(head)
        writer.write(answer)
        await writer.drain()
        if b" 200 " in answer:
            port = to or int(head.split(b" ")[1].rpartition(b":")[2])
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))
            finally:
                await _closed(inner_writer)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await answer_one(reader, writer)
        except (asyncio.CancelledError, ConnectionError):
            pass
        finally:
            await _closed(writer)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", heads
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()


async def _closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def test_calls_and_watches_go_through_a_proxy(anyio_backend: object) -> None:
    async with (
        FaultServer(tls=_context()) as server,
        _proxy() as (address, heads),
        _link(_url(server), proxy=f"http://user:p%40ss@{address}") as link,
    ):
        server.say(faults.raw(b"\x80"), _lines(b"one\n", after="end"))
        assert await link.call("hello", b"{}", timeout_s=5) == b"\x80"
        assert await _heard(link) == ([b"one"], "")
        assert heads[0].startswith(b"CONNECT 127.0.0.1:%d HTTP/1.1\r\n" % server.port)
    assert b"proxy-authorization: Basic dXNlcjpwQHNz\r\n" in heads[0]
    assert b"Ondol-Site" not in b"".join(heads)


async def test_a_proxy_that_opens_tls_is_refused_with_that_reason(anyio_backend: object) -> None:
    async with (
        FaultServer(tls=_context(trustme.CA())) as eavesdropper,
        _proxy(to=eavesdropper.port) as (address, _),
        _link(f"https://127.0.0.1:{free_port()}", proxy=f"http://{address}") as link,
    ):
        with pytest.raises(LinkDown, match="not of this fleet's CA .*the proxy answers in the hub's place"):
            await link.call("hello", b"{}", timeout_s=5)
        assert eavesdropper.asked == []


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "answered 407 to CONNECT"),
        (b"SSH-2.0-x\r\n\r\n", "answered no HTTP to CONNECT"),
        (b"", "closed the connection before the tunnel was open"),
        (b"HTTP/1.1 302 Found\r\nx: " + b"y" * 20_000, "more than 16 KiB"),
    ],
)
async def test_a_proxy_that_refuses_is_said(answer: bytes, why: str, anyio_backend: object) -> None:
    async with (
        _proxy(answer) as (address, _),
        _link("https://127.0.0.1:1", proxy=f"http://{address}") as link,
    ):
        with pytest.raises(LinkDown, match=why):
            await link.call("hello", b"{}", timeout_s=5)


async def test_a_proxy_that_is_away_is_said(anyio_backend: object) -> None:
    async with _link("https://127.0.0.1:1", proxy=f"http://127.0.0.1:{free_port()}") as link:
        with pytest.raises(LinkDown, match="refused"):
            await link.call("hello", b"{}", timeout_s=5)


async def test_nothing_is_left_open(anyio_backend: object) -> None:
    """Warnings of unclosed sockets are errors here; this one leaves in the middle of everything."""

    async def slow(reply: Reply) -> None:
        await asyncio.sleep(3600)

    async with FaultServer(tls=_context()) as server, _link(_url(server)) as link:
        server.say(slow, slow)
        calls = [asyncio.create_task(link.call("usage", b"{}", timeout_s=60)) for _ in range(2)]
        await server.arrived.wait()
        for call in calls:
            call.cancel()
        assert all(
            isinstance(one, asyncio.CancelledError)
            for one in await asyncio.gather(*calls, return_exceptions=True)
        )
