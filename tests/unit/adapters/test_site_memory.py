"""What a joined site knows without its hub: there after a restart, in bounds, and whole after a power cut."""

from __future__ import annotations

import asyncio
import random
import stat
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest
from tests.powercut import Disk, after_cut

from ondol.adapters import site_memory
from ondol.adapters.site_memory import SqliteSiteMemory, open_memory
from ondol.core import dsse
from ondol.core.desired import Desired, DocumentRef, Manifest, assemble, digest_of, sign_manifest
from ondol.core.ports import HeldLease, SiteEvent
from ondol.core.trust import Epoch, Trust, issue_epoch
from ondol.errors import SchemaTooNew, StateError, StateUnavailable
from ondol.units import NS_PER_S

pytestmark = pytest.mark.anyio

PRIVATE = dsse.new_private_key()
TRUST = Trust(fleet="shops", keys={dsse.key_id(dsse.public_key(PRIVATE)): dsse.public_key(PRIVATE)})


def _desired(generation: int, *texts: str) -> Desired:
    bodies = {digest_of(text.encode()): text.encode() for text in texts}
    manifest = Manifest(
        fleet="shops", site="s", generation=generation, issued_ns=1,
        documents=tuple(DocumentRef("Model", f"m{at}", digest) for at, digest in enumerate(bodies)),
    )  # fmt: skip
    return Desired(envelope=sign_manifest(PRIVATE, manifest), manifest=manifest, bodies=bodies)


def _epoch(number: int) -> dsse.Envelope:
    return issue_epoch(PRIVATE, Epoch(fleet="shops", number=number, issued_ns=1, stale_s=60))


def _event(number: int, kind: str = "sample") -> SiteEvent:
    return SiteEvent(
        time_ns=number, kind=kind, fields={"n": number, "share": 0.5, "who": "홍"}, offset_ns=-number
    )


def _lease(granted: int = 2**80) -> HeldLease:
    return HeldLease(budget="team", period="2026-01", number=3, granted=granted, until_ns=99)


@pytest.fixture(params=[True, False], ids=["inline", "threaded"])
def inline(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


async def test_everything_is_there_after_a_restart(tmp_path: Path, inline: bool) -> None:
    path = tmp_path / "fleet.db"
    with SqliteSiteMemory(path, inline=inline) as memory:
        assert (memory.desired(), memory.epoch(), memory.hub_seen_ns, memory.leases()) == (None, None, 0, ())
        await memory.keep_desired(_desired(1, "a", "b"))
        await memory.keep_desired(_desired(2, "b", "c"))
        await memory.keep_epoch(_epoch(7))
        await memory.saw_hub(120 * NS_PER_S)
        await memory.keep_lease(_lease())
        assert await memory.note("audit", _event(5, "key_made")) == 1
        assert await memory.note("telemetry", _event(6)) == 1
        assert await memory.note("audit", _event(8, "key_revoked")) == 2
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with SqliteSiteMemory(path, inline=inline) as memory:
        desired = memory.desired()
        assert desired is not None and desired.documents() == [b"b", b"c"]
        again = assemble(desired.envelope, TRUST, site="s", known=desired.bodies, sent=(), least=0)
        assert again.manifest.generation == 2
        assert memory.epoch() == _epoch(7)
        assert memory.hub_seen_ns == 120 * NS_PER_S
        assert memory.leases() == (_lease(),)
        assert memory.event_marks() == {"audit": (0, 2), "telemetry": (0, 1)}
        audit = await memory.events_after("audit", 0, rows=9)
        assert [(one.id, one.kind, one.fields, one.offset_ns) for one in audit] == [
            (1, "key_made", {"n": 5, "share": 0.5, "who": "홍"}, -5),
            (2, "key_revoked", {"n": 8, "share": 0.5, "who": "홍"}, -8),
        ]
        assert [one.id for one in await memory.events_after("audit", 1, rows=9)] == [2]
        await memory.drop_leases([("team", "2026-01"), ("none", "x")])
        assert memory.leases() == ()


async def test_the_hubs_time_never_goes_back_and_is_written_once_a_minute(tmp_path: Path) -> None:
    with open_memory(tmp_path) as memory:
        await memory.saw_hub(1000 * NS_PER_S)
        await memory.saw_hub(1030 * NS_PER_S)
        await memory.saw_hub(900 * NS_PER_S)
        assert memory.hub_seen_ns == 1030 * NS_PER_S
    with open_memory(tmp_path) as memory:
        assert memory.hub_seen_ns == 1000 * NS_PER_S


async def test_telemetry_at_its_bound_is_thinned_and_counted_and_audit_never_is(tmp_path: Path) -> None:
    with SqliteSiteMemory(tmp_path / "fleet.db", inline=True, telemetry_rows=8) as memory:
        for number in range(1, 21):
            await memory.note("telemetry", _event(number))
            await memory.note("audit", _event(number, "said"))
        left = [one.id for one in await memory.events_after("telemetry", 0, rows=99)]
        assert len(left) <= 8 and left == sorted(left) and left[-1] == 20
        assert len(left) + memory.thinned == 20
        assert len(await memory.events_after("audit", 0, rows=99)) == 20
        thinned = memory.thinned
    with SqliteSiteMemory(tmp_path / "fleet.db", inline=True, telemetry_rows=8) as memory:
        assert memory.thinned == thinned
        assert await memory.note("telemetry", _event(21)) == 21


async def test_what_the_hub_has_goes_and_audit_can_be_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site_memory, "AUDIT_KEPT", 3)
    with open_memory(tmp_path) as memory:
        for number in range(1, 11):
            await memory.note("telemetry", _event(number))
            await memory.note("audit", _event(number, "said"))
        await memory.events_acknowledged(audit=9, telemetry=4)
        assert memory.event_marks() == {"audit": (9, 10), "telemetry": (4, 10)}
        assert [one.id for one in await memory.events_after("telemetry", 0, rows=99)] == [5, 6, 7, 8, 9, 10]
        assert [one.id for one in await memory.events_after("audit", 0, rows=99)] == [7, 8, 9, 10]
        await memory.events_acknowledged(audit=7, telemetry=4)  # the hub was restored from a backup
        assert memory.event_marks()["audit"] == (7, 10)
        await memory.events_acknowledged(audit=99, telemetry=4)  # or says what cannot be
        assert memory.event_marks()["audit"] == (10, 10)


async def test_joining_another_fleet_forgets_the_old_one(tmp_path: Path) -> None:
    with open_memory(tmp_path) as memory:
        await memory.keep_desired(_desired(9, "a"))
        await memory.keep_lease(_lease())
        await memory.note("audit", _event(1, "said"))
        memory.begin_anew(_epoch(1), hub_ns=5)
        assert (memory.desired(), memory.leases(), memory.hub_seen_ns) == (None, (), 5)
        assert memory.epoch() == _epoch(1)
        assert await memory.note("audit", _event(1, "said")) == 1


async def test_a_damaged_body_is_seen_and_not_used(tmp_path: Path) -> None:
    with open_memory(tmp_path) as memory:
        await memory.keep_desired(_desired(1, "a", "b"))
    tampered = apsw.Connection(str(tmp_path / "fleet.db"))
    tampered.execute("UPDATE body SET body = x'00' WHERE digest = ?", (digest_of(b"a"),))
    tampered.close()
    with open_memory(tmp_path) as memory:
        assert memory.desired() is None
        await memory.keep_desired(_desired(1, "a", "b"))  # the bytes of a damaged body are replaced
    with open_memory(tmp_path) as memory:
        assert memory.desired() is not None


async def test_a_file_that_is_none_or_newer_or_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "fleet.db").write_bytes(b"no database " * 100)
    with pytest.raises(StateError, match="damaged"):
        open_memory(tmp_path)
    with pytest.raises(StateUnavailable, match="Check that the disk"):
        open_memory(tmp_path / "missing")
    newer = apsw.Connection(str(tmp_path / "newer.db"))
    newer.execute("PRAGMA user_version = 99")
    newer.close()
    with pytest.raises(SchemaTooNew):
        SqliteSiteMemory(tmp_path / "newer.db")


async def test_a_write_that_fails_keeps_nothing_and_is_raised(tmp_path: Path) -> None:
    with open_memory(tmp_path) as memory:
        await memory.keep_lease(_lease(5))
        other = apsw.Connection(str(tmp_path / "fleet.db"))
        other.execute(
            "CREATE TRIGGER full BEFORE INSERT ON lease BEGIN SELECT RAISE(ABORT, 'disk full'); END"
        )
        other.close()
        with pytest.raises(StateUnavailable, match="disk full"):
            await memory.keep_lease(_lease(6))
        assert memory.leases() == (_lease(5),)
        await memory.keep_epoch(_epoch(2))


@pytest.fixture
def disk(request: pytest.FixtureRequest) -> Iterator[Disk]:
    disk = Disk(f"memorycut-{request.node.name}")
    yield disk
    disk.unregister()


@pytest.mark.parametrize("lucky", [False, True])
async def test_a_power_cut_takes_nothing_that_was_kept(tmp_path: Path, disk: Disk, lucky: bool) -> None:
    memory = SqliteSiteMemory(tmp_path / "fleet.db", vfs=disk.name)
    kept = []
    for number in range(1, 25):
        await asyncio.gather(
            memory.keep_desired(_desired(number, "shared", f"body {number}" * 50)),
            memory.note("audit", _event(number, "said")),
        )
        await memory.keep_lease(_lease(number))
        kept.append((len(disk.changes), number))
    memory.close()
    luck = random.Random(3)
    for cut in range(40):
        moment = luck.randrange(kept[0][0], len(disk.changes) + 1)
        target = tmp_path / f"cut-{cut}"
        target.mkdir()
        after_cut(disk.changes[:moment], target, luck if lucky else None)
        least = max(number for at, number in kept if at <= moment)
        with open_memory(target) as found:
            desired = found.desired()
            assert desired is not None and desired.manifest.generation >= least
            assert found.leases()[0].granted >= least
            events = await found.events_after("audit", 0, rows=99)
            assert [one.id for one in events] == list(range(1, len(events) + 1)) and len(events) >= least
            assert found.event_marks()["audit"] == (0, len(events))
