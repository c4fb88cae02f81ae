from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol.core.catalog import Limits
from ondol.units import NS_PER_S
from ondol.wire.guard import (
    JSON_BRACKETS_MAX,
    AddressGate,
    BodyMeter,
    HeadGuard,
    Refusal,
    allowed_hosts,
    json_depth_ok,
)

GUARD = HeadGuard(
    allowed_hosts("127.0.0.1:8080", ["Store-1.example.com", "other:9000", "[fd00::1]"]),
    Limits(header_count=8, header_bytes=400),
)
HOST = ("host", "127.0.0.1:8080")


def check(
    *headers: tuple[str, str],
    method: str = "POST",
    path: str = "/v1/chat/completions",
    authority: str | None = None,
    names: list[str] | None = None,
) -> tuple[int, str] | None:
    refusal = GUARD.check(method, path, authority, list(headers), names)
    return None if refusal is None else (refusal.status, refusal.code)


def test_an_honest_request_passes() -> None:
    assert (
        check(
            HOST, ("content-type", "application/json"), ("accept", "a"), ("accept", "b"), ("upgrade", "h2c")
        )
        is None
    )


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1:8080", "localhost:8080", "LOCALHOST:8080", "localhost.:8080", "[::1]:8080",
        "store-1.example.com", "STORE-1.example.com:443", "store-1.example.com.", "other:9000", "[fd00::1]:1",
        "[FD00::1]",
    ],
)  # fmt: skip
def test_hosts_that_are_allowed(host: str) -> None:
    assert check(("host", host)) is None


@pytest.mark.parametrize(
    "host",
    [
        "", "x", "127.0.0.1", "127.0.0.1:8081", "localhost", "other", "other:9001", "[::1]", "a/?x=",
        "store-1.example.com:", "store-1.example.com:80:80", "store-1.example.com:8o", "evil.store-1.example.com",
        "store-1.example.com@evil", "127.0.0.1:8080 ", "[fd00::2]", "store-1.example.com:٣",
    ],
)  # fmt: skip
def test_hosts_that_are_not(host: str) -> None:
    assert check(("host", host)) == (421, "unknown_host")


def test_exactly_one_host() -> None:
    assert check() == (400, "no_host")
    assert check(HOST, HOST) == (400, "duplicate_header")


@pytest.mark.parametrize("authority", ["127.0.0.1:8080", "evil", ""])
def test_a_target_with_an_authority_is_refused(authority: str) -> None:
    assert check(HOST, authority=authority) == (400, "absolute_target")


@pytest.mark.parametrize(
    "path",
    [
        "", "*", "a", "@evil/a", "//evil/a", "/a//b", "/a/../b", "/..", "/a/..", "/a/..;/b", "/./a", "/a/.",
        "/a\\b", "/a\x00b", "/a\r\nb", "/a\ufffdb", "/a%2fb", "/a%2Fb", "/a%5cb", "/a%00", "/%2e%2e/a",
    ],
)  # fmt: skip
def test_paths_that_mean_two_things(path: str) -> None:
    assert check(HOST, path=path) == (400, "bad_path")


@pytest.mark.parametrize(
    "path", ["/", "/v1/models/a..b", "/v1/models/.hidden", "/v1/models/모델", "/a%20b", "/a b/"]
)
def test_paths_that_mean_one_thing(path: str) -> None:
    assert check(HOST, path=path) is None


def test_methods() -> None:
    assert check(HOST, method="post") == (400, "bad_method")
    assert check(HOST, method="Get") == (400, "bad_method")
    assert check(HOST, method="BREW") == (405, "method_not_allowed")
    assert check(HOST, method="CONNECT") == (405, "method_not_allowed")
    assert check(HOST, method="DELETE") is None


@pytest.mark.parametrize(
    "name", ["content-length", "authorization", "x-ondol-data-class", "transfer-encoding"]
)
def test_what_we_act_on_comes_once_and_readable(name: str) -> None:
    assert check(HOST, (name, "chunked"), (name, "chunked")) == (400, "duplicate_header")
    assert check(HOST, names=["host", name]) == (400, "bad_header")


def test_a_hidden_value_that_nobody_reads_does_no_harm() -> None:
    assert check(HOST, names=["host", "x-title"]) is None


def test_underscores_are_refused_where_they_hide_too() -> None:
    assert check(HOST, ("x_ondol_data_class", "public")) == (400, "bad_header")
    assert check(HOST, names=["host", "x_ondol_data_class"]) == (400, "bad_header")


def test_the_head_is_bounded() -> None:
    assert check(HOST, *[(f"x{n}", "") for n in range(7)]) is None
    assert check(HOST, *[(f"x{n}", "") for n in range(8)]) == (431, "too_many_headers")
    used = len("host127.0.0.1:8080") + 4 + len("x") + 4
    assert check(HOST, ("x", "a" * (400 - used))) is None
    assert check(HOST, ("x", "a" * (401 - used))) == (431, "headers_too_large")


@pytest.mark.parametrize(
    ("name", "value", "refused"),
    [
        ("upgrade", "websocket", (400, "no_upgrade")),
        ("upgrade", "h2c, websocket", (400, "no_upgrade")),
        ("transfer-encoding", "gzip, chunked", (501, "transfer_encoding")),
        ("content-encoding", "gzip", (415, "content_encoding")),
        ("content-encoding", "identity", None),
        ("expect", "100-Continue", None),
        ("expect", "a miracle", (417, "expectation")),
    ],
)
def test_what_we_do_not_speak(name: str, value: str, refused: tuple[int, str] | None) -> None:
    assert check(HOST, (name, value)) == refused


def test_a_refusal_repeats_nothing_that_was_sent() -> None:
    refusal = GUARD.check("POST", "/a", None, [("host", "top-secret.example")])
    assert refusal is not None
    assert "top-secret" not in refusal.message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.sampled_from('ab"\\[]{}\n\u00e9')),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.sampled_from('a"\\[{')), inner, max_size=4)
    ),
    max_leaves=30,
)


def depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(depth, value), default=0)
    return 0


@given(JSON, st.integers(1, 8), st.booleans())
def test_the_depth_of_json_is_exact(value: Any, limit: int, ascii_only: bool) -> None:
    raw = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert json_depth_ok(raw, limit) == (depth(value) <= limit)


@given(st.text(st.sampled_from('[]{}"\\a')), st.integers(1, 5))
def test_broken_json_never_passes_deeper_than_it_may(text: str, limit: int) -> None:
    level = deepest = 0
    in_string = escaped = False
    for char in text:
        if in_string:
            in_string = escaped or char != '"'
            escaped = char == "\\" and not escaped
        elif char == '"':
            in_string = True
        elif char in "[{":
            level += 1
            deepest = max(deepest, level)
        elif char in "]}":
            level = max(0, level - 1)
    is_escape_outside = "\\" in text  # no parser gets past that, so its depth is not asked for
    if json_depth_ok(text.encode(), limit) and not is_escape_outside:
        assert deepest <= limit


def test_many_brackets_are_refused_before_they_cost() -> None:
    assert json_depth_ok(b"[" + b"[]," * (JSON_BRACKETS_MAX - 2) + b"[]]", 64)
    assert not json_depth_ok(b"[" + b"[]," * JSON_BRACKETS_MAX + b"[]]", 64)
    assert not json_depth_ok(b"[" * 1000, 64)


def meter(length: str | None = None) -> BodyMeter:
    limits = Limits(body_bytes=100, body_bytes_per_s=10, body_grace_s=2)
    return BodyMeter(limits, started_ns=5 * NS_PER_S, content_length=length)


def code(refusal: Refusal | None) -> str | None:
    return None if refusal is None else refusal.code


def test_a_whole_body_passes() -> None:
    body = meter("3")
    assert code(body.begin()) is None
    assert [code(body.feed(chunk)) for chunk in (b"abc", b"")] == [None, None]
    assert code(body.finish()) is None
    assert body.received == 3


def test_a_body_too_large_is_refused_by_its_word_and_by_its_bytes() -> None:
    assert code(meter("101").begin()) == "request_too_large"
    assert code(meter("100").begin()) is None
    body = meter()
    assert code(body.feed(b"a" * 100)) is None
    assert code(body.feed(b"a")) == "request_too_large"


def test_a_broken_body_is_seen_by_its_second_empty_chunk() -> None:
    body = meter()
    for chunk in (b"abc", b"", b""):
        body.feed(chunk)
    assert code(body.finish()) == "body_broken"


def test_a_body_shorter_than_declared_is_broken() -> None:
    body = meter("4")
    for chunk in (b"abc", b""):
        body.feed(chunk)
    assert code(body.finish()) == "body_broken"


def test_patience_grows_with_what_came() -> None:
    body = meter()
    assert body.patience_ns(5 * NS_PER_S) == 2 * NS_PER_S
    assert body.patience_ns(7 * NS_PER_S) == 0
    body.feed(b"a" * 15)
    assert body.patience_ns(7 * NS_PER_S) == 1.5 * NS_PER_S
    assert code(body.too_slow()) == "body_too_slow"


def test_an_address_has_so_many_requests_at_once() -> None:
    gate = AddressGate(2)
    assert [code(gate.enter(f"10.0.0.1:{port}")) for port in (1, 2, 3)] == [None, None, "too_many_at_once"]
    assert code(gate.enter("10.0.0.2:1")) is None
    gate.leave("10.0.0.1:1")
    assert code(gate.enter("10.0.0.1:4")) is None
