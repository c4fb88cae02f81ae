"""API keys at rest in SQLite: HMACs only, in a file that only its owner may read.

Owns `keys.db` and the pepper in it.  A stolen copy gives nobody a key: secrets have 256 bits, and only
their HMACs are kept.  The one invariant: what `snapshot` shows is durable.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Final

import apsw
import msgspec

from ondol.adapters.privatedb import open_private
from ondol.core.apikeys import ID_LENGTH, base62, mac, make_key, secret_text
from ondol.core.identity import ApiKey
from ondol.errors import InvalidRequest

_KINDS = ("user", "admin", "peer")
_MIGRATIONS = (
    """
    CREATE TABLE pepper (one INTEGER PRIMARY KEY CHECK (one = 1), value BLOB NOT NULL);
    CREATE TABLE keys (
        id TEXT PRIMARY KEY,
        mac BLOB NOT NULL,
        tenant TEXT NOT NULL,
        team TEXT NOT NULL,
        kind TEXT NOT NULL,
        name TEXT NOT NULL,
        routes TEXT NOT NULL,
        created_ns INTEGER NOT NULL,
        expires_ns INTEGER,
        revoked_ns INTEGER,
        requests_per_min INTEGER,
        tokens_per_min INTEGER,
        last_used_ns INTEGER
    ) STRICT;
    """,
)
_COLUMNS: Final = (
    "id, mac, tenant, team, kind, name, routes, created_ns, expires_ns, revoked_ns, requests_per_min, "
    "tokens_per_min"
)
_INSERT: Final = f"INSERT INTO keys ({_COLUMNS}) VALUES ({', '.join('?' * len(_COLUMNS.split(', ')))})"  # noqa: S608  # constants
_SELECT: Final = f"SELECT {_COLUMNS} FROM keys ORDER BY created_ns, rowid"  # noqa: S608  # constants


class KeyRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a new key shall be; as in `ApiKey`."""

    team: str
    tenant: str = "default"
    kind: str = "user"
    name: str = ""
    routes: tuple[str, ...] = ()
    expires_ns: int | None = None
    requests_per_min: int | None = None
    tokens_per_min: int | None = None


class SqliteKeyStore:
    """The key store of one site.

    `snapshot` and `touch` cost nothing and may be called anywhere; everything else reads or writes the
    disk (a sync each), and belongs in a thread.  Safe from several threads and beside another process.
    """

    def __init__(self, path: Path) -> None:
        """Open or make the store; the pepper is made with the file.

        Raises:
            SchemaTooNew: a newer Ondol wrote the file.
        """
        self._db = open_private(
            path, pragmas=("journal_mode=WAL", "synchronous=FULL"), migrations=_MIGRATIONS
        )
        self._lock = Lock()
        self._last_used: dict[str, int] = {}
        try:
            self._db.execute("INSERT OR IGNORE INTO pepper VALUES (1, ?)", (secrets.token_bytes(32),))
            self.pepper: bytes = self._db.execute("SELECT value FROM pepper").get
            self._data_version = self._db.pragma("data_version")
            self._snapshot = self._load()
        except BaseException:
            self._db.close()
            raise

    def snapshot(self) -> dict[str, ApiKey]:
        """The keys by id, as of the last change or `refresh`; a new dict each time, never mutated."""
        return self._snapshot

    def refresh(self) -> bool:
        """See what another process changed (`ondol keys create` beside a gateway); whether it did.

        Microseconds when nothing changed: fit for once a second.
        """
        with self._lock:
            version = self._db.pragma("data_version")
            if version == self._data_version:
                return False
            self._data_version = version
            self._snapshot = self._load()
            return True

    def issue(self, wanted: KeyRequest, now_ns: int) -> tuple[ApiKey, str]:
        """Make and store a key; the record, and the text that is shown once and kept nowhere.

        Raises:
            InvalidRequest: the kind is unknown, or an expiry is not in the future.
        """
        if wanted.kind not in _KINDS:
            kinds = ", ".join(_KINDS)
            raise InvalidRequest(f"kind is {wanted.kind!r}; expected one of {kinds}.", param="kind")
        if wanted.expires_ns is not None and wanted.expires_ns <= now_ns:
            raise InvalidRequest("The key would have expired already.", param="expires_in_s")
        key_id = base62(secrets.randbits(64), ID_LENGTH)
        secret = secret_text(secrets.token_bytes(32))
        key = ApiKey(
            id=key_id,
            mac=mac(self.pepper, secret),
            created_ns=now_ns,
            **{name: getattr(wanted, name) for name in KeyRequest.__struct_fields__},
        )
        self.create(key)
        return key, make_key(key_id, secret)

    def create(self, key: ApiKey) -> None:
        """Store a key durably.

        Raises:
            ValueError: there is a key with this id.
        """
        routes = msgspec.json.encode(key.routes).decode()
        who = (key.id, key.mac, key.tenant, key.team, key.kind, key.name, routes)
        until = (key.created_ns, key.expires_ns, key.revoked_ns, key.requests_per_min, key.tokens_per_min)
        row = (*who, *until)
        with self._lock:
            try:
                self._db.execute(_INSERT, row)
            except apsw.ConstraintError as error:
                raise ValueError(f"there is a key with the id {key.id}") from error
            self._snapshot = self._load()

    def revoke(self, key_id: str, now_ns: int) -> bool:
        """Revoke durably; False when there is no such key.  The time of a first revocation stays."""
        with self._lock:
            self._db.execute(
                "UPDATE keys SET revoked_ns = coalesce(revoked_ns, ?) WHERE id = ?", (now_ns, key_id)
            )
            if self._db.changes() == 0:
                return False
            self._snapshot = self._load()
            return True

    def all(self) -> Sequence[ApiKey]:
        """Every key, revoked and expired ones too, oldest first; read from the disk."""
        with self._lock:
            return list(self._load().values())

    def touch(self, key_id: str, wall_ns: int) -> None:
        """Remember when a key was used, in memory; `write_last_used` keeps it."""
        self._last_used[key_id] = wall_ns

    def write_last_used(self) -> int:
        """Write what `touch` remembered, in one transaction; how many keys.  Meant for once a minute."""
        used, self._last_used = self._last_used, {}
        if used:
            rows = [(wall_ns, key_id) for key_id, wall_ns in used.items()]
            with self._lock, self._db:
                self._db.executemany("UPDATE keys SET last_used_ns = ? WHERE id = ?", rows)
        return len(used)

    def last_used(self) -> dict[str, int]:
        """When each key was last used, as far as it was written; wall-clock nanoseconds."""
        with self._lock:
            rows: Any = self._db.execute(
                "SELECT id, last_used_ns FROM keys WHERE last_used_ns IS NOT NULL"
            ).fetchall()
        return dict(rows)

    def close(self) -> None:
        """Write the last uses and close the file."""
        self.write_last_used()
        with self._lock:
            self._db.close()

    def _load(self) -> dict[str, ApiKey]:
        keys = {}
        for row in self._db.execute(_SELECT):
            values = dict(zip(_COLUMNS.split(", "), row, strict=True))
            values["routes"] = msgspec.json.decode(values["routes"], type=tuple[str, ...])
            key = msgspec.convert(values, ApiKey)
            keys[key.id] = key
        return keys
