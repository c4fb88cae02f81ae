"""Awkward HTTP/1.1 messages against the real server with the guard in front, on a real socket.

The server runs in a process of its own (`http_echo_app.py`), so that a crash of native code shows.  What
each message must become stands beside it: the statuses of all replies, and what the handler saw.  Above
all, no message is read as two, and none reaches the handler as something that it is not.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

APP = Path(__file__).with_name("http_echo_app.py")
HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: ok\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked"
ABC = b"3\r\nabc\r\n0\r\n\r\n"
HEADER_TIMEOUT_S = 2
CONNECTIONS = 24


class Case(NamedTuple):
    """A message, the statuses that must come back, and the body that the handler saw, if it saw one."""

    message: bytes
    statuses: list[int]
    handled: str | None = None


def post(*headers: bytes, body: bytes = b"", host: bytes = b"Host: ok", version: bytes = b"1.1") -> bytes:
    return b"\r\n".join([b"POST /a HTTP/" + version, *filter(None, [host]), *headers, b"", body])


def get(*headers: bytes, target: bytes = b"/a", host: bytes = b"Host: ok", line: bytes = b"") -> bytes:
    return b"\r\n".join([line or b"GET " + target + b" HTTP/1.1", *filter(None, [host]), *headers, b"", b""])


CASES = {
    "plain": Case(post(b"Content-Length: 3", body=b"abc"), [200], "abc"),
    "chunked": Case(post(CHUNKED, body=ABC), [200], "abc"),
    # Two lengths.  Chunked wins, as RFC 9112 (6.3) has it, and the connection ends with the reply.
    "length and chunked": Case(post(b"Content-Length: 5", CHUNKED, body=b"0\r\n\r\n" + HIDDEN), [200], ""),
    "length of all and chunked": Case(
        post(b"Content-Length: %d" % (5 + len(HIDDEN)), CHUNKED, body=b"0\r\n\r\n" + HIDDEN), [200], ""
    ),
    "chunked and length": Case(post(CHUNKED, b"Content-Length: 5", body=b"0\r\n\r\n" + HIDDEN), [200], ""),
    "two different lengths": Case(post(b"Content-Length: 3", b"Content-Length: 4", body=b"abcd"), [400]),
    "the same length twice": Case(
        post(b"Content-Length: 3", b"Content-Length: 3", body=b"abc"), [200], "abc"
    ),
    "a list of lengths": Case(post(b"Content-Length: 3, 3", body=b"abc"), [400]),
    "a length with a sign": Case(post(b"Content-Length: +3", body=b"abc"), [400]),
    "a negative length": Case(post(b"Content-Length: -3", body=b"abc"), [400]),
    "a hexadecimal length": Case(post(b"Content-Length: 0x3", body=b"abc"), [400]),
    "a length with an underscore": Case(post(b"Content-Length: 1_0", body=b"abcdefghij"), [400]),
    "space before the colon": Case(
        post(b"Transfer-Encoding : chunked", b"Content-Length: 3", body=b"abc"), [400]
    ),
    "an unknown coding": Case(post(b"Transfer-Encoding: xchunked", body=ABC), [400]),
    "chunked is not last": Case(post(b"Transfer-Encoding: chunked, identity", body=ABC), [400]),
    "a coding before chunked": Case(post(b"Transfer-Encoding: gzip, chunked", body=ABC), [501]),
    "a control character before chunked": Case(post(b"Transfer-Encoding: \x0bchunked", body=ABC), [400]),
    "chunked twice": Case(post(CHUNKED, CHUNKED, body=ABC), [400]),
    "chunked in HTTP/1.0": Case(post(CHUNKED, body=ABC, version=b"1.0"), [400]),
    # A body that is framed wrongly ends with a refusal, and the connection with it.
    "chunk size with a sign": Case(post(CHUNKED, body=b"+" + ABC + HIDDEN), [400]),
    "chunk size with 0x": Case(post(CHUNKED, body=b"0x" + ABC + HIDDEN), [400]),
    "chunk size with an underscore": Case(post(CHUNKED, body=b"1_0\r\n0123456789abcdef\r\n0\r\n\r\n"), [400]),
    "chunk without its end": Case(post(CHUNKED, body=b"3\r\nabcXX0\r\n\r\n" + HIDDEN), [400]),
    "bare LF after a chunk extension": Case(post(CHUNKED, body=b"3;a\nabc\r\n0\r\n\r\n" + HIDDEN), [400]),
    "bare LF after a chunk size": Case(post(CHUNKED, body=b"3\nabc\n0\n\n" + HIDDEN), [400]),
    # RFC 9112 (2.2) lets a receiver take LF for the end of a line; the message means only one thing.
    "bare LF in the head": Case(
        post(b"Content-Length: 3", body=b"abc").replace(b"\r\n", b"\n"), [200], "abc"
    ),
    "bare CR in a value": Case(get(b"X: a\rContent-Length: 3"), [400]),
    "a folded value": Case(get(b"X: a\r\n b"), [400]),
    "NUL in a value": Case(get(b"X: a\x00b"), [400]),
    "an empty name": Case(get(b": b"), [400]),
    "an underscore in a name": Case(get(b"X_Ondol_Data_Class: public"), [400]),
    "no Host": Case(get(host=b""), [400]),
    "no Host in HTTP/1.0": Case(get(host=b"", line=b"GET /a HTTP/1.0"), [400]),
    "two Hosts": Case(get(b"Host: other"), [400]),
    "two Hosts, one of them hidden": Case(get(b"Host: \xff"), [200], ""),  # the one that counts is allowed
    "a hidden Host": Case(get(host=b"Host: \xff"), [400]),
    "a Host with a path": Case(get(host=b"Host: ok/?x="), [421]),
    "a foreign Host": Case(get(host=b"Host: evil"), [421]),
    "a whole URL of another host": Case(get(target=b"http://evil/a"), [400]),
    "a whole URL of this host": Case(get(target=b"http://ok/a"), [400]),
    "a target that begins with @": Case(get(target=b"@evil/a"), [400]),
    "a target of two slashes": Case(get(target=b"//evil/%2e%2e/admin"), [400]),
    "an encoded slash before a dot segment": Case(get(target=b"/v1%2f..%2fadmin"), [400]),
    "a slash encoded twice": Case(get(target=b"/v1%252fadmin"), [400]),
    "an encoded NUL": Case(get(target=b"/a%00b"), [400]),
    "an encoded line end": Case(get(target=b"/a%0d%0ab"), [400]),
    "an asterisk": Case(get(line=b"OPTIONS * HTTP/1.1"), [400]),
    "a tunnel": Case(get(line=b"CONNECT evil:80 HTTP/1.1"), [400]),
    "an unknown version": Case(get(line=b"GET /a HTTP/1.9"), [400]),
    "a method in small letters": Case(get(line=b"get /a HTTP/1.1"), [400]),
    "a websocket with a request as its body": Case(
        get(
            b"Upgrade: websocket",
            b"Connection: Upgrade",
            b"Sec-WebSocket-Version: 13",
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
            b"Content-Length: %d" % len(HIDDEN),
        )
        + HIDDEN,
        [400],
    ),  # fmt: skip
    # Java's client does that on clear text.  The upgrade is ignored; the body stays the body.
    "an upgrade to HTTP/2 with a body": Case(
        post(
            b"Upgrade: h2c",
            b"Connection: Upgrade, HTTP2-Settings",
            b"HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA",
            b"Content-Length: %d" % len(HIDDEN),
            body=HIDDEN,
        ),
        [200],
        HIDDEN.decode(),
    ),  # fmt: skip
    "a websocket protocol that is not ASCII": Case(
        get(b"Upgrade: websocket", b"Connection: Upgrade", b"Sec-WebSocket-Protocol: \xff\xfe"), [400]
    ),
    "a label that is not ASCII": Case(get(b"X-Ondol-Data-Class: \xff"), [400]),
    "a large header": Case(get(b"X: " + b"a" * 65_536), [431]),
    "many headers": Case(get(*[b"X%d: a" % n for n in range(2000)]), [431]),
    "a compressed body": Case(post(b"Content-Encoding: gzip", b"Content-Length: 3", body=b"abc"), [415]),
    "a body that is too large": Case(post(b"Content-Length: 1000000000", body=b"abc"), [413]),
}


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    words = [sys.executable, str(APP), str(HEADER_TIMEOUT_S), str(CONNECTIONS)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
            assert process.poll() is None, "the server ended under the payloads"
        finally:
            process.terminate()
            process.wait(10)


def exchange(
    port: int, message: bytes, *, end: bool = False, wait_s: float = 5.0
) -> tuple[list[int], list[Any], bool]:
    """Statuses, the JSON of what the handler saw, and whether the server closed, for one message.

    A message that is understood is followed by a plain one on the same connection; its reply (or the
    close) shows that all that had to come has come, without waiting for silence.
    """
    with socket.create_connection(("127.0.0.1", port), 5) as client:
        client.settimeout(wait_s)
        try:
            client.sendall(message + (b"" if end else get(target=b"/last")))
            if end:
                client.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the server closed while we were still sending: its reply is what counts
        received = b""
        is_closed = False
        while b'"path": "/last"' not in received:
            try:
                part = client.recv(65_536)
            except ConnectionResetError:
                part = b""
            if not part:
                is_closed = True
                break
            received += part
    statuses, seen = [], []
    while received:
        head, _, received = received.partition(b"\r\n\r\n")
        statuses.append(int(head.split(b" ", 2)[1]))
        length = next(
            (int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")), 0
        )  # fmt: skip
        body, received = received[:length], received[length:]
        if body.startswith(b"{"):
            seen.append(json.loads(body))
    return statuses, seen, is_closed


@pytest.mark.parametrize("name", CASES)
def test_a_message_is_what_it_is(server: int, name: str) -> None:
    case = CASES[name]
    statuses, seen, is_closed = exchange(server, case.message)
    paths = [one["path"] for one in seen]
    assert "/hidden" not in paths
    if not is_closed:
        assert (statuses.pop(), paths.pop()) == (200, "/last")
        seen.pop()
    assert statuses == case.statuses
    assert [one["body"] for one in seen] == ([] if case.handled is None else [case.handled])
    assert all(path == "/a" for path in paths)


AMBIGUOUS = [name for name, case in CASES.items() if HIDDEN in case.message and CHUNKED in case.message]


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_after_an_ambiguous_body_the_connection_ends(server: int, name: str) -> None:
    assert exchange(server, CASES[name].message)[2]


@pytest.mark.parametrize(
    "message",
    [
        post(b"Content-Length: 10", body=b"abc"),
        post(CHUNKED, body=b"3\r\nabc\r\n"),
        post(CHUNKED, body=b"3\r\nab"),
    ],
)
def test_a_body_that_breaks_off_never_reaches_the_handler(server: int, message: bytes) -> None:
    statuses, seen, is_closed = exchange(server, message, end=True)
    assert (statuses, seen, is_closed) == ([400], [], True)


def test_a_head_that_does_not_come_is_given_up(server: int) -> None:
    with socket.create_connection(("127.0.0.1", server), 5) as client:
        client.settimeout(HEADER_TIMEOUT_S + 20)
        client.sendall(b"GET /a HTTP/1.1\r\nHost: ok\r\n")
        assert client.recv(100) == b""


def test_a_body_that_comes_too_slowly_is_refused(server: int) -> None:
    with socket.create_connection(("127.0.0.1", server), 5) as client:
        client.settimeout(20)
        client.sendall(post(b"Content-Length: 100", body=b"a"))
        assert client.recv(100).startswith(b"HTTP/1.1 408 ")


def test_one_connection_more_than_allowed_waits_for_another_to_end(server: int) -> None:
    deadline = time.monotonic() + 60
    clients: list[socket.socket] = []
    try:
        while len(clients) < CONNECTIONS:
            client = socket.create_connection(("127.0.0.1", server), 5)
            clients.append(client)
            client.settimeout(10)
            client.sendall(post(CHUNKED))  # a request that is never whole holds its place until it is refused
        late = socket.create_connection(("127.0.0.1", server), 5)
        clients.append(late)
        late.sendall(get())
        late.settimeout(0.3)
        with pytest.raises(TimeoutError):
            late.recv(100)
        for client in clients[:-1]:
            client.close()
        late.settimeout(max(1.0, deadline - time.monotonic()))
        assert late.recv(100).startswith(b"HTTP/1.1 200 ")
    finally:
        for client in clients:
            client.close()
