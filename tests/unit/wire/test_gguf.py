"""The GGUF header: what a good file says, and that a bad one is always refused in words."""

from __future__ import annotations

import struct
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ondol.errors import BadModelFile
from ondol.wire.gguf import GgufHeader, Limits, parse_header

U32, STRING, ARRAY, U64, BOOL, F32 = 4, 8, 9, 10, 7, 6


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def entry(key: str, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def tensor(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    shape = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


ENTRIES = [
    entry("general.architecture", STRING, text("llama")),
    entry("general.name", STRING, text("작은 모델")),
    entry("general.license", STRING, text("apache-2.0")),
    entry("general.languages", ARRAY, struct.pack("<IQ", STRING, 2) + text("en") + text("ko")),
    entry("general.file_type", U32, struct.pack("<I", 15)),
    entry("llama.context_length", U32, struct.pack("<I", 8192)),
    entry("llama.embedding_length", U64, struct.pack("<Q", 64)),
    entry("tokenizer.chat_template", STRING, text("{% if tools %}{{ tools }}{% endif %}")),
    entry(
        "tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", STRING, 3) + text("a") + text("b") + text(b"\xff")
    ),
    entry("tokenizer.ggml.scores", ARRAY, struct.pack("<IQ3f", F32, 3, 1, 2, 3)),
    entry("tokenizer.ggml.add_bos_token", BOOL, b"\x01"),
]
TENSORS = [tensor("token_embd.weight", (64, 3), 0, 0), tensor("output.weight", (64, 4), 2, 768)]
WEIGHTS = 768 + 64 * 4 // 32 * 18


def build(
    entries: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    *,
    version: int = 3,
    weights: int = WEIGHTS,
    n_tensors: int | None = None,
    n_keys: int | None = None,
) -> bytes:
    entries = ENTRIES if entries is None else entries
    tensors = TENSORS if tensors is None else tensors
    n_tensors = len(tensors) if n_tensors is None else n_tensors
    n_keys = len(entries) if n_keys is None else n_keys
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys)
    data = head + b"".join(entries) + b"".join(tensors)
    return data + bytes(-len(data) % 32 + weights)


def changed(key: str, kind: int, payload: bytes) -> list[bytes]:
    """The entries with one of them replaced, or added."""
    kept = [item for item in ENTRIES if not item.startswith(text(key))]
    return [*kept, entry(key, kind, payload)]


@pytest.mark.parametrize("version", [2, 3])
def test_a_good_header_is_read(version: int) -> None:
    header = parse_header(build(version=version))
    assert header.architecture == "llama"
    assert header.name == "작은 모델"
    assert header.licence == "apache-2.0"
    assert header.languages == ("en", "ko")
    assert header.quantisation == "Q4_K_M"
    assert header.context_tokens == 8192
    assert header.embedding_length == 64
    assert header.parameters == 64 * 7
    assert header.tensors == 2
    assert header.parts == 1
    assert header.has_tools
    assert header.data_offset % 32 == 0


def test_without_a_file_type_the_type_of_most_bytes_is_named() -> None:
    entries = [item for item in ENTRIES if b"general.file_type" not in item]
    assert parse_header(build(entries)).quantisation == "F32"


def test_a_template_without_tools_has_none() -> None:
    header = parse_header(build(changed("tokenizer.chat_template", STRING, text("{{ messages }}"))))
    assert not header.has_tools
    assert not parse_header(build(ENTRIES[:7])).has_tools


def test_values_of_another_type_are_as_absent() -> None:
    entries = changed("general.languages", U32, struct.pack("<I", 7))
    entries = [item for item in entries if b"context_length" not in item]
    entries.append(entry("llama.context_length", STRING, text("8192")))
    header = parse_header(build(entries))
    assert header.languages == ()
    assert header.context_tokens is None


def i32(value: int) -> bytes:
    return struct.pack("<I", value)


def items(kind: int, count: int) -> bytes:
    return struct.pack("<IQ", kind, count)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "ends inside the magic number"),
        (b"PK\x03\x04" + bytes(40), "this is no GGUF file"),
        (build(version=1), "found GGUF version 1, expected 2 or 3"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(40), "big-endian"),
        (build(n_keys=2**63), "metadata keys, expected 1 to"),
        (build(n_tensors=2**63), "tensors, expected 1 to"),
        (build(n_tensors=0), "found 0 tensors"),
        (build(n_keys=12), "bytes of a tensor's name"),
        (build([]), "found 0 metadata keys"),
        (build(ENTRIES[1:]), "general.architecture"),
        (build([*ENTRIES, ENTRIES[0]]), "'general.architecture' twice"),
        (build(changed("x", 13, b"")), "unknown type 13"),
        (build(changed("x", BOOL, b"\x02")), "truth value"),
        (build(changed("x", STRING, struct.pack("<Q", 2**64 - 1))), "bytes of x, expected"),
        (build(changed("x", ARRAY, items(U64, 2**61))), "items of x, expected"),
        (build(changed("x", ARRAY, items(U64, 2**22))), "cut off"),
        (build(changed("x", ARRAY, items(ARRAY, 1))), "item type 9"),
        (build(changed("general.alignment", U32, i32(0))), "power of two"),
        (build(changed("general.alignment", U32, i32(48))), "power of two"),
        (build(changed("general.alignment", U32, i32(2**31))), "power of two"),
        (build(changed("general.name", STRING, text(b"\xff\xfe"))), "not UTF-8"),
        (build(tensors=[tensor("t", (), 0, 0)]), "found 0 dimensions"),
        (build(tensors=[tensor("t", (1,) * 5, 0, 0)]), "found 5 dimensions"),
        (build(tensors=[tensor("t", (0,), 0, 0)]), "found 0 elements"),
        (build(tensors=[tensor("t", (2**32, 2**32), 0, 0)]), "elements of t"),
        (build(tensors=[tensor("t", (2**63, 2), 0, 0)]), "elements along an axis"),
        (build(tensors=[tensor("t", (32,), 77, 0)]), "found the type 77"),
        (build(tensors=[tensor("t", (33,), 2, 0)]), "multiple of 32 for Q4_0"),
        (build(tensors=[tensor("t", (32,), 0, 8)]), "found the offset 8"),
        (build(tensors=[tensor("t", (32,), 0, 2**64 - 32)]), "expected at least"),
        (build(tensors=[tensor("t", (32,), 0, 0)] * 2), "'t' twice"),
        (build(tensors=[tensor("n" * 65, (32,), 0, 0)]), "bytes of a tensor's name"),
        (build(weights=WEIGHTS - 1), "cut off; fetch it again"),
    ],
)
def test_a_bad_header_says_what_was_found(data: bytes, words: str) -> None:
    with pytest.raises(BadModelFile, match=words):
        parse_header(data)


def test_metadata_without_end_stops_at_its_bound() -> None:
    data = build([*ENTRIES, entry("x", ARRAY, items(U64, 1000) + bytes(8000))])
    with pytest.raises(BadModelFile, match="passes its limit of 4096 bytes"):
        parse_header(data, limits=Limits(metadata_bytes=4096))


def test_a_lying_array_takes_no_memory() -> None:
    data = build(changed("x", ARRAY, items(STRING, 4 * 1024 * 1024)))
    tracemalloc.start()
    try:
        with pytest.raises(BadModelFile):
            parse_header(data, file_size=2**40)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * 1024 * 1024


GOOD = build()
HEADER_BYTES = parse_header(GOOD).data_offset


def header_or_refusal(data: bytes, **options: Any) -> GgufHeader | None:
    try:
        return parse_header(data, **options)
    except BadModelFile:
        return None


@given(st.integers(0, len(GOOD) - 1))
def test_a_cut_file_is_always_refused(size: int) -> None:
    assert header_or_refusal(GOOD[:size]) is None


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, HEADER_BYTES - 1), st.integers(0, 255)), min_size=1, max_size=12))
def test_whatever_bytes_change_it_is_read_or_refused(changes: list[tuple[int, int]]) -> None:
    data = bytearray(GOOD)
    for position, value in changes:
        data[position] = value
    header = header_or_refusal(bytes(data))
    assert header is None or header.data_offset <= len(GOOD)


@settings(max_examples=200)
@given(st.integers(4, HEADER_BYTES - 8), st.integers(0, 2**64 - 1), st.integers(0, 2**50))
def test_whatever_number_a_field_has_it_is_read_or_refused(position: int, value: int, file_size: int) -> None:
    data = GOOD[:position] + struct.pack("<Q", value) + GOOD[position + 8 :]
    header_or_refusal(data)
    header_or_refusal(data, file_size=file_size)


@given(st.binary(max_size=400))
def test_noise_is_refused(noise: bytes) -> None:
    assert header_or_refusal(b"GGUF\x03\x00\x00\x00" + noise) is None
