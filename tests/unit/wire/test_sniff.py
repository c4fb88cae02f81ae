"""A file's kind, by its content: three are let in, and a pickle in no wrapping."""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.model_files import gguf
from tests.onnx_files import external, onnx
from tests.unit.wire.test_safetensors import build

from ondol.errors import BadModelFile
from ondol.wire import sniff


def kind(file: bytes) -> str:
    return sniff.read_model(lambda offset, size: file[offset : offset + size], len(file)).format


def zipped(member: str, data: bytes = b"x") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(member, data)
    return out.getvalue()


GGUF = gguf({"t": bytes(64)})


def test_the_three_formats_are_told_apart() -> None:
    assert kind(GGUF) == "gguf"
    assert kind(onnx()) == "onnx"
    assert kind(build()) == "safetensors"


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_pickle_is_refused_in_every_protocol_that_says_so(protocol: int) -> None:
    with pytest.raises(BadModelFile, match="runs code"):
        kind(pickle.dumps({"a": 1}, protocol))


def test_an_old_torch_save_is_named_as_such() -> None:
    with pytest.raises(BadModelFile, match="older PyTorch save"):
        kind(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps({}, 2))


@pytest.mark.parametrize("protocol", [0, 1])
def test_a_pickle_without_a_magic_number_is_nothing_that_we_know(protocol: int) -> None:
    with pytest.raises(BadModelFile):
        kind(pickle.dumps({"a": [1, 2.5, "x"]}, protocol))


@pytest.mark.parametrize("member", ["archive/data.pkl", "POC/DATA.PKL", "x/Data.Pkl", "notes.txt"])
@pytest.mark.parametrize("before", [b"", GGUF, onnx()])
def test_an_archive_is_refused_also_behind_a_whole_model(member: str, before: bytes) -> None:
    words = "ZIP archive with a pickle" if before and member.lower().endswith("data.pkl") else "ZIP archive"
    with pytest.raises(BadModelFile, match=words):
        kind(before + zipped(member))


def test_the_letters_of_an_archives_end_within_weights_mean_nothing() -> None:
    data = b"PK\x05\x06" + bytes([255] * 60)
    assert kind(gguf({"t": data})) == "gguf"


def other_tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("sys_info"))
    return out.getvalue()


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (b"", "nothing"), (b"\x1f\x8b123", "gzip"), (b"<html>", "web page"), (b"\x7fELF...", "program"),
        (b"#!/bin/sh\n", "script"), (b"\x89HDF\r\n", "HDF5"), (b"\x93NUMPY", "pickle"), (other_tar(), "tar"),
        (b"version https://git-lfs.github.com/spec/v1", "LFS"), (b"\xde\xad\xbe\xef", "deadbeef"),
        (onnx(tensors=(external("w.bin"),)), "one file"),
    ],
)  # fmt: skip
def test_what_else_it_is_is_said(file: bytes, words: str) -> None:
    with pytest.raises(BadModelFile, match=words):
        kind(file)


@given(st.binary(max_size=400))
def test_noise_is_always_refused(file: bytes) -> None:
    with pytest.raises(BadModelFile):
        kind(file)


@given(st.sampled_from([GGUF, onnx(), build()]), st.data())
def test_a_changed_model_is_read_or_refused_and_nothing_else(good: bytes, data: st.DataObject) -> None:
    file = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        file[data.draw(st.integers(0, min(len(file), 200) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert kind(bytes(file)) in ("gguf", "onnx", "safetensors")
    except BadModelFile as error:
        assert error.message
