"""Cutting, planning and believing: no byte is asked for twice, and none believed that is not named."""

from __future__ import annotations

import hashlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol.core import chunks, dsse
from ondol.core.chunks import CHUNK_BYTES, Artifact
from ondol.errors import BadSignature, DigestMismatch, InvalidRequest

PRIVATE = dsse.new_private_key()
KEYS = {dsse.key_id(dsse.public_key(PRIVATE)): dsse.public_key(PRIVATE)}


def artifact(pieces: list[bytes]) -> Artifact:
    whole = b"".join(pieces)
    return chunks.describe(
        digest=f"sha256:{hashlib.sha256(whole).hexdigest()}", format_="gguf", sizes=[len(one) for one in pieces],
        digests=[hashlib.sha256(one).digest() for one in pieces], name="m",
    )  # fmt: skip


@given(st.integers(1, 40 * CHUNK_BYTES), st.lists(st.integers(-5, 40 * CHUNK_BYTES), max_size=50))
def test_a_cut_covers_the_file_exactly_whatever_its_tensors(size: int, starts: list[int]) -> None:
    sizes = chunks.cut(size, starts)
    assert sum(sizes) == size
    assert all(0 < one <= CHUNK_BYTES for one in sizes)


@given(
    st.lists(st.integers(CHUNK_BYTES // 4, 3 * CHUNK_BYTES), min_size=2, max_size=12), st.integers(1, 10_000)
)
def test_a_header_that_grows_moves_no_cut_inside_the_tensors(tensors: list[int], grown: int) -> None:
    def cuts(header: int) -> tuple[int, ...]:
        starts = [header + sum(tensors[:n]) for n in range(len(tensors))]
        return chunks.cut(header + sum(tensors), starts)

    before, after = cuts(1000), cuts(1000 + grown)
    assert before[1:] == after[1:]
    assert (before[0], after[0]) == (1000, 1000 + grown)


def test_a_file_without_tensors_that_are_known_is_cut_evenly() -> None:
    assert chunks.cut(10) == (10,)
    assert chunks.cut(2 * CHUNK_BYTES + 1) == (CHUNK_BYTES, CHUNK_BYTES, 1)


def test_chunks_grow_with_the_file_so_that_a_manifest_stays_small() -> None:
    assert chunks.chunk_bytes(CHUNK_BYTES) == CHUNK_BYTES
    for size in (1 << 33, 1 << 36, chunks.ARTIFACT_BYTES_MAX):
        assert size // chunks.chunk_bytes(size) <= chunks.CHUNKS_MAX // 2
    with pytest.raises(InvalidRequest):
        chunks.cut(0)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.sets(st.integers(0, 29)), st.integers(1, 40))
def test_a_plan_asks_for_every_missing_byte_once(sizes: list[int], have: set[int], most: int) -> None:
    made = artifact([bytes([n]) * size for n, size in enumerate(sizes)])
    offsets = made.offsets()
    asked: list[int] = []
    for span in chunks.plan(made, have, most=most):
        assert span.offset == offsets[span.first]
        assert span.length == offsets[span.last + 1] - span.offset
        assert span.length <= most or span.first == span.last
        asked.extend(range(span.first, span.last + 1))
    assert asked == [n for n in range(len(sizes)) if n not in have]


def test_neighbours_are_one_request() -> None:
    made = artifact([b"a", b"bb", b"ccc", b"d"])
    assert chunks.plan(made, {1}) == [chunks.Span(0, 0, 0, 1), chunks.Span(2, 3, 3, 4)]
    assert chunks.plan(made, {0, 1, 2, 3}) == []


def test_chunks_are_found_in_another_file_wherever_they_stand_there() -> None:
    new = artifact([b"head2", b"same", b"other", b"same"])
    old = artifact([b"h", b"gone", b"same"])
    assert chunks.shared(new, old, {0, 1, 2, 3}) == {1: 5, 3: 5}
    assert chunks.shared(new, old, {0, 2}) == {}


def test_only_the_named_bytes_are_believed() -> None:
    made = artifact([b"abc", b"de"])
    chunks.verify_chunk(made, 1, b"de")
    for wrong in (b"dE", b"d", b"def", b""):
        with pytest.raises(DigestMismatch):
            chunks.verify_chunk(made, 1, wrong)


def test_a_manifest_is_believed_by_its_signature_and_for_one_file_alone() -> None:
    made = artifact([b"abc"])
    envelope = chunks.sign(PRIVATE, made)
    assert chunks.read(envelope, KEYS, digest=made.digest) == made
    assert chunks.unverified(envelope) == made
    with pytest.raises(BadSignature):
        chunks.read(envelope, KEYS, digest="sha256:" + "0" * 64)
    with pytest.raises(BadSignature):
        chunks.read(chunks.unsigned(made), KEYS, digest=made.digest)
    other = dsse.new_private_key()
    with pytest.raises(BadSignature):
        chunks.read(chunks.sign(other, made), KEYS, digest=made.digest)


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "md5:0"}, {"size": 4}, {"size": 0}, {"sizes": ()}, {"sizes": (3, 0)}, {"sizes": (-1, 4)},
        {"digests": b"x" * 31}, {"digests": b"x" * 64}, {"name": "x" * 129},
        {"size": 2**41, "sizes": (2**41,)}, {"size": 5 * CHUNK_BYTES, "sizes": (5 * CHUNK_BYTES,)},
    ],
)  # fmt: skip
def test_a_manifest_that_contradicts_itself_is_refused(change: dict[str, object]) -> None:
    broken = msgspec.structs.replace(artifact([b"abc"]), **change)
    with pytest.raises(InvalidRequest):
        chunks.decode(msgspec.json.encode(broken))


@given(st.binary(max_size=200))
def test_noise_is_no_manifest(raw: bytes) -> None:
    with pytest.raises(InvalidRequest):
        chunks.decode(raw)
