"""The fleet's models on a disk: what is evicted, what never, and what a part of a file is worth."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import msgspec
import pytest
from tests.model_files import gguf, model, noise, signed

from ondol.adapters.fleet_models import RESERVE_BYTES, FleetModels, describe, fill
from ondol.adapters.staging import Staged, pieces
from ondol.core import chunks
from ondol.errors import BadModelFile, DigestMismatch, NotFound, StateError

MB = 1_000_000


class Store(FleetModels):
    """A store on a disk of which the test says how much is free."""

    def __init__(self, folder: Path, most: int | None = None) -> None:
        self.free = 10**12
        super().__init__(folder / "models", most_bytes=most, free=lambda _: self.free)

    def add(self, folder: Path, megabytes: float, seed: int, *, used: int, name: str = "") -> str:
        path = folder / f"given-{seed}.gguf"
        path.write_bytes(model(megabytes, seed))
        artifact, envelope = signed(path)
        staged = self.stage(artifact, envelope)
        fill(staged, pieces(path, artifact.sizes))
        held = self.add_verified(staged, envelope, name=name)
        os.utime(held.path, (used, used))
        return artifact.digest


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def test_what_was_put_together_is_a_model_with_its_manifest_and_names(store: Store, tmp_path: Path) -> None:
    digest = store.add(tmp_path, 1, 1, used=5, name="helper")
    assert [one.digest for one in store.held()] == [digest]
    assert store.store.path_of("helper") == store.store.path_of(digest)
    assert store.manifest(digest) is not None
    assert store.find(digest) == (
        str(store.store.path_of(digest)),
        store.store.path_of(digest).stat().st_size,
    )
    assert store.find("../x") is None
    assert store.manifest("sha256:" + "0" * 64) is None
    assert not list((tmp_path / "models" / ".staging").iterdir())


def test_what_nobody_wants_goes_oldest_use_first_and_only_as_much_as_is_needed(tmp_path: Path) -> None:
    store = Store(tmp_path, most=6_500_000)
    old, wanted, young = (
        store.add(tmp_path, 2, seed, used=used) for seed, used in ((1, 10), (2, 5), (3, 20))
    )
    assert store.make_room(1 * MB, keep={wanted}) == [old]
    assert {one.digest for one in store.held()} == {wanted, young}
    assert store.make_room(1 * MB, keep={wanted}) == []
    store.used(wanted)
    assert store.make_room(4 * MB, keep={wanted}) == [young]
    assert store.manifest(young) is None


def test_a_wanted_model_never_goes_and_nothing_goes_in_vain(tmp_path: Path) -> None:
    store = Store(tmp_path, most=7 * MB)
    digests = [store.add(tmp_path, 2, seed, used=seed) for seed in range(3)]
    with pytest.raises(StateError, match="do not fit"):
        store.make_room(5 * MB, keep=set(digests[:2]))
    assert {one.digest for one in store.held()} == set(digests)


def test_the_disk_itself_bounds_too(store: Store, tmp_path: Path) -> None:
    digest = store.add(tmp_path, 2, 1, used=1)
    store.free = RESERVE_BYTES + MB
    assert store.make_room(MB, keep=()) == []
    assert store.make_room(2 * MB, keep=()) == [digest]
    with pytest.raises(StateError, match="nearly full"):
        store.make_room(2 * MB, keep=())


def test_a_part_that_nobody_wants_any_more_goes_first(tmp_path: Path) -> None:
    store = Store(tmp_path, most=4 * MB)
    whole = store.add(tmp_path, 2, 1, used=1)
    path = tmp_path / "part.gguf"
    path.write_bytes(model(3, 9))
    artifact, envelope = signed(path)
    staged = store.stage(artifact, envelope)
    for index, data in enumerate(pieces(path, artifact.sizes)):
        if index < 3:
            staged.feed(index, data)
    staged.close()
    assert store.staged()[artifact.digest] == (sum(artifact.sizes[:3]), artifact.size)
    assert store.make_room(int(1.5 * MB), keep=()) == [artifact.digest]
    assert [one.digest for one in store.held()] == [whole]


def test_two_processes_do_not_fill_the_same_file(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(model(1))
    artifact, envelope = signed(path)
    first = store.stage(artifact, envelope)
    with pytest.raises(StateError, match="another process"):
        store.stage(artifact, envelope)
    first.close()
    store.stage(artifact, envelope).close()


def test_another_cut_of_the_same_file_begins_anew(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(model(2))
    artifact, envelope = signed(path)
    staged = store.stage(artifact, envelope)
    staged.feed(0, next(pieces(path, artifact.sizes)))
    staged.close()
    staged = store.stage(artifact, envelope)
    assert staged.have == {0}
    staged.close()
    sizes = (artifact.size // 3, artifact.size - artifact.size // 3)
    digests = [hashlib.sha256(one).digest() for one in pieces(path, sizes)]
    other = chunks.describe(digest=artifact.digest, format_="gguf", sizes=sizes, digests=digests)
    folder = store.staging(artifact.digest)
    staged = Staged(folder, other, chunks.unsigned(other))
    assert staged.have == set()
    fill(staged, pieces(path, sizes))
    assert store.add_verified(staged, None).digest == artifact.digest


def test_a_bad_chunk_leaves_no_mark_and_a_good_one_may_follow(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(model(2))
    artifact, envelope = signed(path)
    staged = store.stage(artifact, envelope)
    data = list(pieces(path, artifact.sizes))
    with pytest.raises(DigestMismatch):
        staged.feed(1, bytes(len(data[1])))
    assert staged.have == set()
    assert staged.resume == (-1, 0)
    staged.feed(1, data[1][:10])
    assert staged.resume == (1, 10)
    staged.feed(1, data[1][10:])
    assert staged.have == {1}
    with pytest.raises(ValueError, match="for a chunk of"):
        staged.feed(0, data[0] + b"x")
    staged.close()


def test_the_header_is_read_before_a_file_is_a_model(store: Store, tmp_path: Path) -> None:
    data = b"GGUF" + noise(5000)
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    digest = hashlib.sha256(data)
    artifact = chunks.describe(
        digest=f"sha256:{digest.hexdigest()}", format_="gguf", sizes=[len(data)], digests=[digest.digest()]
    )
    staged = store.stage(artifact, chunks.unsigned(artifact))
    fill(staged, [data])
    with pytest.raises(BadModelFile):
        store.add_verified(staged, None)
    assert store.held() == []
    assert store.staged() == {}
    with pytest.raises(BadModelFile):
        describe(path)
    with pytest.raises(NotFound):
        describe(tmp_path / "nowhere")


def test_a_manifest_that_names_another_format_is_refused(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf({"t": bytes(64)}))
    artifact = msgspec.structs.replace(describe(path), format="onnx")
    staged = store.stage(artifact, None)
    fill(staged, pieces(path, artifact.sizes))
    with pytest.raises(BadModelFile, match="found gguf, and its manifest says onnx"):
        store.add_verified(staged, None)


def test_a_file_that_was_added_by_hand_gives_its_chunks_too(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "old.gguf"
    tensors = {f"t{n}": noise(400_000 // 32 * 32, n) for n in range(4)}
    path.write_bytes(gguf(tensors))
    store.store.add_file(path, "old")
    newer = tmp_path / "new.gguf"
    newer.write_bytes(gguf({**tensors, "t0": noise(400_000 // 32 * 32, 50)}, "a longer name"))
    artifact, envelope = signed(newer)
    for _ in range(2):  # the second time from the cut that was kept
        staged = store.stage(artifact, envelope)
        assert staged.done == 3 * (400_000 // 32 * 32)
        staged.discard()


def test_a_damaged_local_file_gives_no_wrong_bytes(store: Store, tmp_path: Path) -> None:
    digest = store.add(tmp_path, 2, 1, used=1)
    held = store.held()[0]
    held.path.chmod(0o644)
    with held.path.open("r+b") as file:
        file.seek(held.size - 10)
        file.write(b"damaged!!!")
    newer = tmp_path / "new.gguf"
    newer.write_bytes(model(2, 1, name="a name of another length"))
    artifact, envelope = signed(newer)
    staged = store.stage(artifact, envelope)
    assert staged.missing
    assert staged.recheck() == 0
    staged.close()
    assert store.find(digest) is not None
