"""Models over a real socket: cut, killed, capped, forged, and with half of it here already."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from zoneinfo import ZoneInfo

import msgspec
import pytest
from tests.faults.cut_transfer import cut_transfer
from tests.model_files import KEYS, PRIVATE, RangeServer, gguf, model, noise, signed

from ondol.adapters.fleet_models import FleetModels
from ondol.adapters.model_sources import FetchFailed
from ondol.adapters.model_transfer import Fetched, ModelTransfer, OutsideHours, Progress, Terms
from ondol.adapters.transfer_sources import DirectorySource, HttpSource, Source
from ondol.core import chunks, dsse
from ondol.core.chunks import Artifact
from ondol.core.dsse import Envelope
from ondol.errors import BadModelFile, BadSignature, StateError
from ondol.units import NS_PER_S

pytestmark = pytest.mark.anyio


class StepClock:
    """Time that passes only when it is told to."""

    def __init__(self, hour: int = 12) -> None:
        self.ns = hour * 3600 * NS_PER_S

    def now_ns(self) -> int:
        return self.ns

    def wall_ns(self) -> int:
        return self.ns


class Place:
    """A model that a server offers, and an empty store."""

    def __init__(self, folder: Path, megabytes: float = 3) -> None:
        self.path = folder / "given.gguf"
        self.path.write_bytes(model(megabytes))
        self.artifact, self.envelope = signed(self.path)
        self.server = RangeServer()
        self.server.offer(self.path, self.envelope, self.artifact)
        self.models = FleetModels(folder / "models")
        self.clock = StepClock()
        self.terms = Terms(zone=ZoneInfo("UTC"))
        self.seen: list[Progress] = []

    async def fetch(self, sources: Sequence[Source], digest: str = "", **options: object) -> Fetched:
        transfer = ModelTransfer(self.models, keys=lambda: KEYS, clock=self.clock, terms=lambda: self.terms)
        try:
            return await transfer.fetch(
                digest or self.artifact.digest,
                sources,
                progress=self.seen.append,
                **options,  # type: ignore[arg-type]
            )
        finally:
            for source in sources:
                await source.close()

    def here(self) -> bytes | None:
        found = self.models.find(self.artifact.digest)
        return None if found is None else Path(found[0]).read_bytes()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


async def test_a_model_arrives_whole_verified_and_with_its_manifest(place: Place) -> None:
    async with place.server.running() as url:
        fetched = await place.fetch([HttpSource(url, name="hub")])
    assert place.here() == place.path.read_bytes()
    assert (fetched.received, fetched.reused, fetched.requests) == (place.artifact.size, 0, 1)
    assert place.models.manifest(place.artifact.digest) == msgspec.json.encode(place.envelope)
    assert place.seen[-1].done == place.seen[-1].total == place.artifact.size
    assert place.models.staged() == {}


async def test_a_line_that_is_cut_fifty_times_costs_two_percent_at_most(tmp_path: Path) -> None:
    result = await cut_transfer(tmp_path, megabytes=90, cuts=50)
    assert result.cuts == 50
    assert result.requests >= 51
    assert result.ratio <= 1.02, result


async def test_it_goes_on_at_the_byte_within_a_chunk(place: Place) -> None:
    place.server.cut_after = [100_000, 1_000_000, 3]
    async with place.server.running() as url:
        fetched = await place.fetch([HttpSource(url, name="hub")])
    begins = [asked[1] for asked in place.server.asked if asked[1]]
    last = place.artifact.size - 1
    assert begins == [f"bytes={n}-{last}" for n in (0, 100_000, 1_100_000, 1_100_003)]
    assert fetched.received == place.server.body_sent == place.artifact.size


async def test_unchanged_chunks_of_an_older_version_are_not_sent_again(tmp_path: Path) -> None:
    place = Place(tmp_path)
    before = {f"t{n}": noise(640 * 1024, n) for n in range(5)}
    old = tmp_path / "old.gguf"
    old.write_bytes(gguf(before, "the old name"))
    place.models.store.add_file(old, "helper")
    new = tmp_path / "new.gguf"
    new.write_bytes(
        gguf({**before, "t2": noise(640 * 1024, 99)}, "a name that is longer by far than the old one")
    )
    artifact, envelope = signed(new)
    place.server.offer(new, envelope, artifact)
    async with place.server.running() as url:
        fetched = await place.fetch([HttpSource(url, name="hub")], artifact.digest)
    assert fetched.reused == 4 * 640 * 1024
    assert place.server.body_sent == artifact.size - fetched.reused
    assert fetched.held.path.read_bytes() == new.read_bytes()


async def test_who_has_it_not_is_passed_over_and_who_fails_is_followed_by_the_next(place: Place) -> None:
    parent, neighbour = RangeServer(), RangeServer()
    neighbour.manifests = dict(place.server.manifests)
    neighbour.files = dict(place.server.files)
    neighbour.ranges = False
    neighbour.cut_after = [1_500_000]
    async with parent.running() as a, neighbour.running() as b, place.server.running() as c:
        names = zip((a, b, c), ("parent", "neighbour", "hub"), strict=True)
        fetched = await place.fetch([HttpSource(url, name=name) for url, name in names])
    assert place.here() == place.path.read_bytes()
    # The neighbour gave what it could before it was cut; it serves no ranges, so the hub gave the rest.
    assert place.server.body_sent == place.artifact.size - 1_500_000
    assert fetched.received == place.artifact.size


async def test_a_source_that_changes_bytes_is_left_and_none_of_them_are_kept(place: Place) -> None:
    liar = RangeServer(files=place.server.files, manifests=place.server.manifests)
    liar.spoil = lambda _, data: data[:-1] + bytes([data[-1] ^ 1]) if data else data
    size = place.artifact.size
    async with liar.running() as bad, place.server.running() as good:
        fetched = await place.fetch([HttpSource(bad, name="liar"), HttpSource(good, name="hub")])
    assert place.here() == place.path.read_bytes()
    assert size < fetched.received <= 2 * size
    async with liar.running() as bad:
        place.models.remove(place.artifact.digest)
        with pytest.raises(FetchFailed, match="not the one that the signed manifest names"):
            await place.fetch([HttpSource(bad, name="liar")])
    assert place.here() is None


@pytest.mark.parametrize("what", ["another key", "another file", "no json"])
async def test_a_manifest_that_the_hub_did_not_sign_for_this_file_is_refused(place: Place, what: str) -> None:
    digest = place.artifact.digest
    other = msgspec.structs.replace(place.artifact, digest="sha256:" + "0" * 64)
    place.server.manifests[digest] = {
        "another key": msgspec.json.encode(chunks.sign(dsse.new_private_key(), place.artifact)),
        "another file": msgspec.json.encode(chunks.sign(PRIVATE, other)),
        "no json": b"<html>",
    }[what]
    async with place.server.running() as url:
        with pytest.raises(
            (BadSignature, FetchFailed), match="key that is trusted|manifest is of|no signed manifest"
        ):
            await place.fetch([HttpSource(url, name="hub")])
    assert place.server.body_sent == 0
    assert place.here() is None


async def test_a_signed_pickle_is_refused_before_it_is_a_model(tmp_path: Path) -> None:
    place = Place(tmp_path)
    data = b"\x80\x04cos\nsystem\n" + noise(100_000)
    evil = tmp_path / "evil.gguf"
    evil.write_bytes(data)
    sizes = chunks.cut(len(data))
    digest = hashlib.sha256(data).digest()
    artifact = chunks.describe(digest=f"sha256:{digest.hex()}", format_="gguf", sizes=sizes, digests=[digest])
    place.server.offer(evil, chunks.sign(PRIVATE, artifact), artifact)
    async with place.server.running() as url:
        with pytest.raises(BadModelFile, match="pickle"):
            await place.fetch([HttpSource(url, name="hub")], artifact.digest)
    assert place.models.held() == []
    assert place.models.staged() == {}


async def test_outside_its_hours_nothing_is_asked_and_what_came_is_kept(place: Place) -> None:
    place.terms = Terms(zone=ZoneInfo("UTC"), hours="22:00-06:00")
    async with place.server.running() as url:
        with pytest.raises(OutsideHours, match="from 22:00") as caught:
            await place.fetch([HttpSource(url, name="hub")])
        assert caught.value.retry_after_s == 10 * 3600
        assert place.server.asked == []
        place.clock = StepClock(23)
        # The window closes in the middle.
        real = place.seen.append

        class Closing(list[Progress]):
            def append(self, one: Progress) -> None:
                real(one)
                if one.done > place.artifact.size // 2:
                    place.clock.ns = 30 * 3600 * NS_PER_S + 1

        place.seen = Closing()
        with pytest.raises(OutsideHours):
            await place.fetch([HttpSource(url, name="hub")])
        kept = place.models.staged()[place.artifact.digest][0]
        assert kept >= place.artifact.size // 2 - chunks.CHUNK_BYTES
        place.clock = StepClock(5)
        place.seen = []
        fetched = await place.fetch([HttpSource(url, name="hub")])
    assert fetched.received == place.artifact.size - kept
    assert place.here() == place.path.read_bytes()


async def test_the_cap_makes_the_reader_wait_for_exactly_its_bytes(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    real_sleep = asyncio.sleep

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        place.clock.ns += round(seconds * NS_PER_S)
        await real_sleep(0)

    monkeypatch.setattr("ondol.adapters.model_transfer.asyncio.sleep", sleep)
    place.terms = Terms(zone=ZoneInfo("UTC"), bytes_per_s=1_000_000)
    async with place.server.running() as url:
        await place.fetch([HttpSource(url, name="hub", bytes_per_s=1_000_000)])
    # A quarter of a second's worth may come at once.
    assert place.artifact.size / 1e6 - 0.25 == pytest.approx(sum(slept), abs=0.01)


async def test_a_model_for_which_there_is_no_room_is_refused_before_a_byte_of_it_is_sent(
    place: Place,
) -> None:
    place.models.most_bytes = 1_000_000
    async with place.server.running() as url:
        with pytest.raises(StateError, match="do not fit"):
            await place.fetch([HttpSource(url, name="hub")])
    assert place.server.body_sent == 0


async def test_a_folder_is_a_source_too(place: Place, tmp_path: Path) -> None:
    share = tmp_path / "share"
    share.mkdir()
    stem = place.artifact.digest.replace(":", "-")
    (share / f"{stem}.model").write_bytes(place.path.read_bytes())
    (share / f"{stem}.manifest.json").write_bytes(msgspec.json.encode(place.envelope))
    await place.fetch([DirectorySource(share)])
    assert place.here() == place.path.read_bytes()
    with pytest.raises(FetchFailed, match="it has no"):
        await place.fetch([DirectorySource(share)], "sha256:" + "1" * 64)


_CHILD = """
    import asyncio, sys
    from pathlib import Path
    from zoneinfo import ZoneInfo
    from ondol.adapters.clock import SystemClock
    from ondol.adapters.fleet_models import FleetModels
    from ondol.adapters.model_transfer import ModelTransfer, Terms
    from ondol.adapters.transfer_sources import HttpSource
    from tests.model_files import KEYS

    def tell(one):
        print(one.done, flush=True)

    async def main():
        transfer = ModelTransfer(FleetModels(Path(sys.argv[1])), keys=lambda: KEYS, clock=SystemClock(),
                                 terms=lambda: Terms(zone=ZoneInfo("UTC"), bytes_per_s=6_000_000))
        await transfer.fetch(sys.argv[2], [HttpSource(sys.argv[3], name="hub")], progress=tell)

    asyncio.run(main())
"""


async def test_a_process_that_is_killed_loses_one_chunk_at_most(tmp_path: Path) -> None:
    place = Place(tmp_path, megabytes=20)
    async with place.server.running() as url:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", textwrap.dedent(_CHILD), str(place.models.directory), place.artifact.digest, url,
            stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parent.parent.parent,
        )  # fmt: skip
        said = 0
        try:
            assert child.stdout is not None
            while said < place.artifact.size // 2:
                line = await child.stdout.readline()
                assert line, "the child ended by itself"
                said = int(line)
        finally:
            os.kill(child.pid, signal.SIGKILL)
            await child.wait()
        kept = place.models.staged()[place.artifact.digest][0]
        assert kept >= said - chunks.CHUNK_BYTES
        fetched = await place.fetch([HttpSource(url, name="hub")])
    assert fetched.reused >= said - chunks.CHUNK_BYTES
    assert fetched.received == place.artifact.size - fetched.reused
    assert place.here() == place.path.read_bytes()


async def test_bytes_that_a_power_cut_took_are_fetched_again(place: Place) -> None:
    staged = place.models.stage(place.artifact, place.envelope)
    offsets = place.artifact.offsets()
    data = place.path.read_bytes()
    for index in range(3):
        staged.feed(index, data[offsets[index] : offsets[index + 1]])
    with staged.path.open("r+b") as file:
        file.seek(offsets[1] + 5)
        file.write(b"\0\0\0\0")
    staged.close()
    async with place.server.running() as url:
        fetched = await place.fetch([HttpSource(url, name="hub")])
    assert fetched.requests == 2
    assert place.here() == data


def test_the_helpers_sign_what_they_say(place: Place) -> None:
    envelope: Envelope = place.envelope
    artifact: Artifact = chunks.read(envelope, KEYS, digest=place.artifact.digest)
    assert artifact == place.artifact
