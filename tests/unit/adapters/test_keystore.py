"""Keys at rest, in real SQLite files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import apsw
import pytest

from ondol.adapters.keystore import KeyRequest, SqliteKeyStore
from ondol.core.identity import ApiKey
from ondol.core.ports import KeyStore
from ondol.errors import InvalidRequest, SchemaTooNew
from ondol.gateway.identity import authenticate


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.db"


@pytest.fixture
def store(path: Path) -> Iterator[SqliteKeyStore]:
    with closing(SqliteKeyStore(path)) as opened:
        yield opened


def test_an_issued_key_opens_the_door_also_after_a_restart(path: Path) -> None:
    wanted = KeyRequest(
        team="shop", tenant="acme", kind="peer", name="till", routes=("assistant",), expires_ns=99,
        requests_per_min=5, tokens_per_min=6,
    )  # fmt: skip
    with closing(SqliteKeyStore(path)) as store:
        key, text = store.issue(wanted, 7)
        assert store.snapshot() == {key.id: key}
    with closing(SqliteKeyStore(path)) as again:
        caller = authenticate("Bearer " + text, again.snapshot(), again.pepper, 8)
        assert again.all() == [key]
    assert (caller.key_id, caller.tenant, caller.team, caller.kind) == (key.id, "acme", "shop", "peer")
    assert (caller.routes, caller.requests_per_min, caller.tokens_per_min) == (("assistant",), 5, 6)
    assert (key.created_ns, key.expires_ns, key.name) == (7, 99, "till")
    assert len(key.id) == 10


def test_it_meets_its_port(store: SqliteKeyStore) -> None:
    port: KeyStore = store
    assert port.snapshot() == {}


def test_the_secret_is_nowhere_on_the_disk(path: Path) -> None:
    with closing(SqliteKeyStore(path)) as store:
        _, text = store.issue(KeyRequest(team="shop"), 0)
        secret = text.split("_")[2][:43].encode()
        for file in path.parent.iterdir():
            assert secret not in file.read_bytes()


def test_only_the_owner_may_read(store: SqliteKeyStore, path: Path) -> None:
    store.issue(KeyRequest(team="shop"), 0)
    files = list(path.parent.iterdir())
    assert path in files
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


def test_a_file_that_was_too_open_is_closed(path: Path) -> None:
    SqliteKeyStore(path).close()
    path.chmod(0o644)
    with closing(SqliteKeyStore(path)):
        assert path.stat().st_mode & 0o777 == 0o600


def test_the_pepper_is_made_once(path: Path) -> None:
    peppers = set()
    for _ in range(2):
        with closing(SqliteKeyStore(path)) as store:
            peppers.add(store.pepper)
    [pepper] = peppers
    assert len(pepper) == 32


def test_a_snapshot_is_replaced_and_never_changed(store: SqliteKeyStore) -> None:
    before = store.snapshot()
    key, _ = store.issue(KeyRequest(team="shop"), 0)
    between = store.snapshot()
    assert store.revoke(key.id, 50)
    assert (before, between[key.id].revoked_ns, store.snapshot()[key.id].revoked_ns) == ({}, None, 50)


def test_a_revocation_keeps_its_first_time_and_needs_a_key(store: SqliteKeyStore) -> None:
    key, _ = store.issue(KeyRequest(team="shop"), 0)
    assert store.revoke(key.id, 50)
    assert store.revoke(key.id, 60)
    assert store.snapshot()[key.id].revoked_ns == 50
    assert not store.revoke("nobody", 60)


def test_keys_come_oldest_first(store: SqliteKeyStore) -> None:
    for created_ns in (5, 1, 3):
        store.issue(KeyRequest(team="shop"), created_ns)
    assert [key.created_ns for key in store.all()] == [1, 3, 5]


def test_an_id_is_given_once(store: SqliteKeyStore) -> None:
    key = ApiKey(id="same", mac=b"m", tenant="default", team="shop")
    store.create(key)
    with pytest.raises(ValueError, match="same"):
        store.create(key)


def test_bad_wishes_are_refused(store: SqliteKeyStore) -> None:
    with pytest.raises(InvalidRequest, match="expected one of user, admin, peer"):
        store.issue(KeyRequest(team="shop", kind="root"), 0)
    with pytest.raises(InvalidRequest, match="expired already"):
        store.issue(KeyRequest(team="shop", expires_ns=5), 5)
    assert store.all() == []


def test_what_another_process_changes_is_seen_on_refresh(store: SqliteKeyStore, path: Path) -> None:
    with closing(SqliteKeyStore(path)) as other:
        key, _ = other.issue(KeyRequest(team="shop"), 0)
    assert store.snapshot() == {}
    assert store.refresh()
    assert store.snapshot() == {key.id: key}
    assert not store.refresh()


def test_last_uses_are_kept_when_they_are_written(store: SqliteKeyStore, path: Path) -> None:
    key, _ = store.issue(KeyRequest(team="shop"), 0)
    store.touch(key.id, 70)
    store.touch(key.id, 80)
    assert store.last_used() == {}
    assert store.write_last_used() == 1
    assert store.last_used() == {key.id: 80}
    assert store.write_last_used() == 0
    store.touch(key.id, 90)
    store.close()
    with closing(SqliteKeyStore(path)) as again:
        assert again.last_used() == {key.id: 90}


def test_a_newer_schema_is_refused_and_left_alone(path: Path) -> None:
    SqliteKeyStore(path).close()
    with closing(apsw.Connection(str(path))) as db:
        db.execute("PRAGMA user_version = 9").fetchall()
    with pytest.raises(SchemaTooNew, match="version 9; this Ondol knows up to 1"):
        SqliteKeyStore(path)
    with closing(apsw.Connection(str(path))) as db:
        assert db.pragma("user_version") == 9
