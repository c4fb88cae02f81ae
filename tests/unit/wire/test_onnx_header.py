"""ONNX files: what a good one holds, and what is refused before native code sees it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.onnx_files import external, node, num, onnx, sub, tensor, varint

from ondol.errors import BadModelFile
from ondol.wire import onnx_header
from ondol.wire.onnx_header import OnnxHeader


def parse(file: bytes) -> OnnxHeader:
    return onnx_header.read_header(lambda offset, size: file[offset : offset + size], len(file))


def test_a_good_file_is_read() -> None:
    file = onnx(tensors=(tensor("a"), tensor("b", (4,))), nodes=(node(), node("Relu")))
    header = parse(file)
    assert (header.ir_version, header.operators, header.tensors, header.parameters) == (9, 2, 2, 10)
    assert header.opsets == {"": 17}
    assert header.external == ()
    assert [file[one : one + 4] for one in header.starts] == [bytes(4)] * 2


def test_packed_dimensions_and_graphs_inside_operators_are_read() -> None:
    packed = sub(1, varint(2) + varint(3)) + num(2, 1) + sub(9, bytes(24))
    inner = sub(1, node()) + sub(5, packed)
    header = parse(onnx(nodes=(node("If", attribute=sub(1, "then_branch") + sub(6, inner)),)))
    assert (header.operators, header.tensors, header.parameters) == (2, 2, 12)


def test_functions_that_the_file_defines_are_its_own() -> None:
    function = sub(25, sub(1, "f") + sub(7, node()) + sub(10, "mine"))
    assert parse(onnx(nodes=(node("f", "mine"),), opsets=("", "mine"), more=function)).opsets["mine"] == 17


def test_other_files_of_its_folder_are_named() -> None:
    file = onnx(tensors=(external("weights/a.bin", ("offset", "0"), ("length", "16")), external("b.bin")))
    assert parse(file).external == ("b.bin", "weights/a.bin")


def nested(levels: int) -> bytes:
    graph = sub(1, node())
    for _ in range(levels):
        graph = sub(1, node("If", attribute=sub(6, graph)))
    return num(1, 9) + sub(7, graph) + sub(8, num(2, 17))


@pytest.mark.parametrize(
    "location",
    [
        "../x",
        "/etc/passwd",
        "a/../../x",
        "C:\\x",
        "a\\..\\x",
        "",
        ".",
        "a//b",
        "~/x",
        "file:x",
        "a\0b",
        "./x",
    ],
)
def test_data_outside_the_folder_is_refused(location: str) -> None:
    with pytest.raises(BadModelFile, match="inside the model's own folder"):
        parse(onnx(tensors=(external(location),)))


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (b"", "expected 1 to"),
        (b"\x08", "cut off"),
        (b"\x08" + b"\xff" * 11, "ten bytes"),
        (b"\x08" + b"\xff" * 9 + b"\x7f", "64 bits"),
        (b"\x0f\x01", "wire type"),
        (b"\x00\x01", "field number"),
        (num(1, 9), "no ONNX file"),
        (onnx(graphs=0), "0 graphs"),
        (onnx(graphs=2), "twice"),
        (onnx(opsets=()), "operator sets"),
        (onnx(ir=0), "version 0"),
        (onnx()[:-3], "passes the end|cut off"),
        (onnx(opsets=("", "evil.ops")), "evil.ops"),
        (onnx(nodes=(node("Run", "evil.ops"),)), "evil.ops"),
        (onnx(nodes=(node("EPContext", "com.microsoft"),), opsets=("", "com.microsoft")), "EPContext"),
        (onnx(more=sub(20, b"")), "training"),
        (nested(40), "deep"),
        (onnx(tensors=(tensor(raw=bytes(23)),)), "23 bytes of a tensor"),
        (onnx(tensors=(tensor(kind=99),)), "tensor type"),
        (onnx(tensors=(tensor(dims=(2**40, 2**40), raw=b""),)), "elements"),
        (onnx(tensors=(tensor(dims=(2**64 - 1,), raw=b""),)), "elements"),
        (onnx(tensors=(external("a") + sub(9, bytes(16)),)), "locations"),
        (onnx(tensors=(external("a", ("location", "b")),)), "2 locations"),
        (onnx(tensors=(external("a", ("offset", "-1")),)), "offset"),
        (onnx(tensors=(external("a")[:-2],)), "two things"),
        (onnx(nodes=(node("x" * 5000),)), "name of 5000"),
        (onnx(nodes=(sub(4, b"\xff"),)), "UTF-8"),
        (onnx(nodes=(node("If", attribute=sub(6, b"") + sub(6, b"")),)), "twice"),
    ],
)
def test_a_bad_one_is_refused_in_words(file: bytes, words: str) -> None:
    with pytest.raises(BadModelFile, match=words):
        parse(file)


def test_many_fields_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_header, "FIELDS_MAX", 1000)
    with pytest.raises(BadModelFile, match="more than 1000 fields"):
        parse(onnx(nodes=tuple(node() for _ in range(400))))


GOOD = onnx(
    tensors=(tensor("a"), external("w.bin", ("offset", "0"))),
    nodes=(node(), node("If", attribute=sub(6, sub(1, node())))), opsets=("", "ai.onnx.ml"),
)  # fmt: skip


@settings(max_examples=500)
@given(st.data())
def test_a_changed_file_is_read_or_refused_and_nothing_else(data: st.DataObject) -> None:
    file = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 5))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    for one in (bytes(file), bytes(file[: data.draw(st.integers(0, len(file)))])):
        try:
            header = parse(one)
        except BadModelFile:
            continue
        assert all(0 <= start <= len(one) for start in header.starts)
        assert all(".." not in place.split("/") and not place.startswith("/") for place in header.external)


@given(st.binary(max_size=300))
def test_noise_is_no_onnx_file(file: bytes) -> None:
    try:
        parse(file)
    except BadModelFile:
        return
    pytest.fail("noise passed")
