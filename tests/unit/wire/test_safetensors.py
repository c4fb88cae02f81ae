"""safetensors headers: what a good one says, and that a bad one is always refused in words."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ondol.errors import BadModelFile
from ondol.wire.safetensors import SafetensorsHeader, read_header

GOOD: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [], "data_offsets": [24, 26]},
    "empty": {"dtype": "I64", "shape": [0, 7], "data_offsets": [26, 26]},
    "half": {"dtype": "F4", "shape": [4], "data_offsets": [26, 28]},
}


def build(
    header: Any = None, *, data: int = 28, raw: bytes | None = None, length: int | None = None
) -> bytes:
    text = raw if raw is not None else json.dumps(GOOD if header is None else header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


def parse(file: bytes) -> SafetensorsHeader:
    return read_header(lambda offset, size: file[offset : offset + size], len(file))


def with_tensor(**fields: Any) -> dict[str, Any]:
    return {"a": {"dtype": "U8", "shape": [28], "data_offsets": [0, 28], **fields}}


def test_a_good_header_is_read() -> None:
    header = parse(build())
    assert (header.tensors, header.parameters, header.metadata) == (4, 11, {"format": "pt"})
    first = header.data_offset
    assert header.starts == (first, first + 24, first + 26, first + 26)


def test_names_may_hold_brackets_and_quotes_and_the_header_may_be_padded() -> None:
    name = 'blk[{[{"\\"}]'
    text = json.dumps({name: with_tensor()["a"]}).encode() + b"   "
    assert parse(build(raw=text)).tensors == 1


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (b"", "at least 8"),
        (build(length=10**12), "header of"),
        (build(length=0), "header of"),
        (build(raw=b"[1]"), "no JSON object"),
        (build(raw=b"{" + b"["  * 5000), "nests"),
        (build(raw=b'{"a":' * 900 + b"1" + b"}" * 900), "nests"),
        (build(raw=b'{"a":{},"a":{}}'), "not JSON"),
        (build(raw=b'{"\xff":{}}'), "not JSON"),
        (build(raw=b'{"a":' + b"9" * 5000 + b"}"), "not JSON"),
        (build({}), "0 tensors"),
        (build({"__metadata__": {"a": 1}, **with_tensor()}), "__metadata__"),
        (build(with_tensor(dtype="OBJECT")), "type"),
        (build(with_tensor(dtype=["U8"])), "type"),
        (build(with_tensor(extra=1)), "expected dtype"),
        (build(with_tensor(shape=[-28])), "whole numbers"),
        (build(with_tensor(shape=[28.0])), "whole numbers"),
        (build(with_tensor(shape=[True])), "whole numbers"),
        (build(with_tensor(shape=[1] * 17)), "dimensions"),
        (build(with_tensor(shape=[2**40, 2**40])), "elements"),
        (build(with_tensor(shape=[27])), "bytes of"),
        (build(with_tensor(data_offsets=[28, 0])), "begin and an end"),
        (build(with_tensor(data_offsets=[0])), "begin and an end"),
        (build(with_tensor(data_offsets=[2**70, 2**70 + 28])), "whole numbers"),
        (build({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
                "b": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}}, data=3), "overlaps"),
        (build({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
                "b": {"dtype": "U8", "shape": [2], "data_offsets": [3, 5]}}, data=5), "hole"),
        (build(data=27), "cut off"),
        (build(data=29), "appended"),
    ],
)  # fmt: skip
def test_a_bad_one_is_refused_in_words(file: bytes, words: str) -> None:
    with pytest.raises(BadModelFile, match=words):
        parse(file)


@settings(max_examples=400)
@given(st.data())
def test_a_changed_header_is_read_or_refused_and_nothing_else(data: st.DataObject) -> None:
    file = bytearray(build())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(file) - 1))
        file[at] = data.draw(st.integers(0, 255))
    cut = bytes(file[: data.draw(st.integers(0, len(file)))])
    for one in (bytes(file), cut):
        try:
            header = parse(one)
        except BadModelFile:
            continue
        assert all(header.data_offset <= start <= len(one) for start in header.starts)


@given(st.recursive(st.none() | st.integers() | st.text() | st.floats(), lambda s: st.lists(s) | st.dictionaries(st.text(), s)))  # fmt: skip
def test_any_json_is_read_or_refused(value: Any) -> None:
    with pytest.raises(BadModelFile):
        parse(build(value, data=1))
    with pytest.raises(BadModelFile):
        parse(build({"a": value}, data=1))
