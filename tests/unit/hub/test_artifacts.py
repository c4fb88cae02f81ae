"""Which models the hub offers: only what it signed itself, one file to a name."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import pytest

from ondol.adapters.database_sqlite import SqliteDatabase
from ondol.core import chunks, dsse
from ondol.core.chunks import Artifact
from ondol.errors import BadSignature, Conflict, InvalidRequest, NotFound
from ondol.hub import artifacts
from ondol.hub.schema import MIGRATIONS

pytestmark = pytest.mark.anyio
PRIVATE = dsse.new_private_key()
KEYS = {dsse.key_id(dsse.public_key(PRIVATE)): dsse.public_key(PRIVATE)}


def artifact(data: bytes, name: str = "helper") -> Artifact:
    digest = hashlib.sha256(data)
    return chunks.describe(
        digest=f"sha256:{digest.hexdigest()}",
        format_="gguf",
        sizes=[len(data)],
        digests=[digest.digest()],
        name=name,
    )


@pytest.fixture
async def database(tmp_path: Path) -> SqliteDatabase:
    return SqliteDatabase(tmp_path / "hub.db", migrations=MIGRATIONS)


async def test_what_is_published_is_offered_until_it_is_withdrawn(database: SqliteDatabase) -> None:
    made = artifact(b"one")
    envelope = chunks.sign(PRIVATE, made)
    for now_ns in (5, 6):
        await database.write(lambda tx, n=now_ns: artifacts.publish(tx, envelope, KEYS, now_ns=n))  # type: ignore[misc]
    assert await database.read(artifacts.offered) == [
        artifacts.Offered(name="helper", digest=made.digest, size=3, format="gguf", published_ns=5)
    ]
    raw = await database.read(lambda tx: artifacts.manifest_of(tx, made.digest))
    assert raw == msgspec.json.encode(envelope)
    wanted = [
        {"kind": "Model", "name": "helper", "digest": made.digest}, {"kind": "Model", "name": "far"},
        {"kind": "Model", "name": "own", "digest": "sha256:" + "1" * 64, "file": "x.gguf"},
    ]  # fmt: skip
    assert await database.read(lambda tx: artifacts.missing_for(tx, wanted)) == []
    assert await database.write(lambda tx: artifacts.withdraw(tx, "helper")) == made.digest
    assert await database.read(artifacts.offered) == []
    (warning,) = await database.read(lambda tx: artifacts.missing_for(tx, wanted))
    assert "ondol models publish FILE --name helper" in warning
    with pytest.raises(NotFound):
        await database.write(lambda tx: artifacts.withdraw(tx, "helper"))
    await database.close()


async def test_a_name_moves_only_when_that_is_meant(database: SqliteDatabase) -> None:
    first, second = artifact(b"one"), artifact(b"two")

    async def publish(one: Artifact, *, replace: bool = False) -> None:
        envelope = chunks.sign(PRIVATE, one)
        await database.write(lambda tx: artifacts.publish(tx, envelope, KEYS, now_ns=1, replace=replace))

    await publish(first)
    with pytest.raises(Conflict, match="--replace"):
        await publish(second)
    await publish(second, replace=True)
    assert [one.digest for one in await database.read(artifacts.offered)] == [second.digest]
    await database.close()


async def test_what_the_hub_did_not_sign_or_has_no_name_is_refused(database: SqliteDatabase) -> None:
    with pytest.raises(BadSignature):
        forged = chunks.sign(dsse.new_private_key(), artifact(b"one"))
        await database.write(lambda tx: artifacts.publish(tx, forged, KEYS, now_ns=1))
    for name in ("", "../x", "A", "x" * 128 + "y", "-x", "x/"):
        with pytest.raises(InvalidRequest):
            artifacts.check_name(name)
    await database.close()
