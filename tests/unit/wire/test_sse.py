"""Server-sent events: however the bytes are cut, the same payloads come out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol.wire.sse import DONE, EventTooLarge, SseDecoder, encode


def decode(*pieces: bytes, max_event_bytes: int = 1000) -> list[bytes]:
    decoder = SseDecoder(max_event_bytes=max_event_bytes)
    return [payload for piece in pieces for payload in decoder.feed(piece)]


@pytest.mark.parametrize(
    ("stream", "payloads"),
    [
        (b'data: {"a":1}\n\n', [b'{"a":1}']),
        (b"data:x\n\n", [b"x"]),
        (b"data:  x\n\n", [b" x"]),
        (b"data\n\n", [b""]),
        (b"data: a\ndata: b\n\n", [b"a\nb"]),
        (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"a", b"b"]),
        (b"data: a\r\rdata: b\r\r", [b"a", b"b"]),
        (b"data: a\r\n\ndata: b\n\r\n", [b"a", b"b"]),
        (b": ping\n\ndata: a\n\n", [b"a"]),
        (b": ping\ndata: a\n\n", [b"a"]),
        (b"event: message\nid: 7\nretry: 10\ndata: a\n\n", [b"a"]),
        (b"event: ping\n\n", []),
        (b"\n\n\n\ndata: a\n\n\n\n", [b"a"]),
        (b"\n\n\ndata: a\n\n", [b"a"]),
        (b"\xef\xbb\xbfdata: a\n\n", [b"a"]),
        (b"dataset: a\n\n", []),
        (b"data: a: b\n\n", [b"a: b"]),
        ("data: 안녕\n\n".encode(), ["안녕".encode()]),
        (DONE, [b"[DONE]"]),
        (b"data: half", []),
        (b"", []),
    ],
)
def test_a_stream_whole_and_byte_by_byte(stream: bytes, payloads: list[bytes]) -> None:
    assert decode(stream) == payloads
    assert decode(*(stream[at : at + 1] for at in range(len(stream)))) == payloads


LINES = st.lists(
    st.sampled_from(
        [b"data: a", b"data:b", b"data", b": c", b"event: x", b"", b"", b"nonsense", b"\xed\x95\x9c"]
    )
)
ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])


@given(
    lines=LINES,
    ends=st.lists(ENDS, min_size=1),
    bom=st.booleans(),
    cuts=st.lists(st.integers(0, 200), max_size=8),
)
def test_cuts_change_nothing(lines: list[bytes], ends: list[bytes], bom: bool, cuts: list[int]) -> None:
    stream = b"\xef\xbb\xbf" * bom + b"".join(line + ends[at % len(ends)] for at, line in enumerate(lines))
    edges = [0, *sorted(cut for cut in cuts if cut < len(stream)), len(stream)]
    pieces = [stream[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    assert decode(*pieces) == reference(stream)


def reference(stream: bytes) -> list[bytes]:
    """The algorithm of the standard, line by line and slow."""
    text = stream.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    payloads: list[bytes] = []
    values: list[bytes] = []
    for line in text.split(b"\n")[:-1]:
        if not line:
            if values:
                payloads.append(b"\n".join(values))
            values = []
        elif line == b"data" or line.startswith(b"data:"):
            values.append(line[5:].removeprefix(b" "))
    return payloads


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\r")).map(str.encode))
def test_encode_and_decode(payload: bytes) -> None:
    assert decode(encode(payload), max_event_bytes=100_000) == [payload]


def test_encode_is_one_line_for_json() -> None:
    assert encode(b'{"a":1}') == b'data: {"a":1}\n\n'


def test_unfinished() -> None:
    decoder = SseDecoder()
    assert not decoder.unfinished()
    decoder.feed(b"data: a\n\n: comment")
    assert not decoder.unfinished()
    decoder.feed(b"\ndata: b")
    assert decoder.unfinished()
    assert decoder.feed(b"\n\n") == [b"b"]
    assert not decoder.unfinished()


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_too_large_an_event_comes_after_those_before_it(size: int) -> None:
    stream = b"data: a\n\ndata: " + b"x" * 100 + b"\n\ndata: b\n\n"
    decoder = SseDecoder(max_event_bytes=50)
    got: list[bytes] = []

    def feed_all() -> None:
        for at in range(0, len(stream), size):
            got.extend(decoder.feed(stream[at : at + size]))
        got.extend(decoder.feed(b"\n\n"))

    with pytest.raises(EventTooLarge, match="larger than 50 bytes"):
        feed_all()
    assert got == [b"a"]
    assert decoder.unfinished()


def test_an_event_of_many_pieces_is_searched_once() -> None:
    # Quadratic time would take minutes here.
    decoder = SseDecoder(max_event_bytes=10_000_000)
    assert decoder.feed(b"data: ") == []
    for _ in range(400_000):
        decoder.feed(b"xxxxxxxxxx")
    assert [len(payload) for payload in decoder.feed(b"\n\n")] == [4_000_000]
