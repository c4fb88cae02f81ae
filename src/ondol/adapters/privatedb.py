"""SQLite files that only their owner may read, with migrations that never go back."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import apsw

from ondol.errors import SchemaTooNew

_BUSY_MS = 5000
"""How long a writer waits for another process, such as the command line beside a running gateway."""


def open_private(
    path: Path, *, pragmas: Sequence[str], migrations: Sequence[str], vfs: str | None = None
) -> apsw.Connection:
    """Open or make the file with mode 0600 and bring it to the newest schema, one transaction a step.

    `migrations[n]` takes the schema from version n to n + 1; the version is SQLite's `user_version`.

    Raises:
        SchemaTooNew: a newer Ondol wrote the file.  It is left as it is.
        OSError, apsw.Error: the file cannot be made, opened or written.
    """
    make_private(path)
    db = apsw.Connection(str(path), vfs=vfs)
    try:
        db.set_busy_timeout(_BUSY_MS)
        for pragma in pragmas:
            db.execute(f"PRAGMA {pragma}").fetchall()
        _migrate(db, path, migrations)
    except BaseException:
        db.close()
        raise
    return db


def make_private(path: Path) -> None:
    """Make the file with mode 0600, before SQLite sees it, so that it is never readable by others.

    SQLite gives its mode to the journal and the WAL.

    Raises:
        OSError: it cannot be made.
    """
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    path.chmod(0o600)


def _migrate(db: apsw.Connection, path: Path, migrations: Sequence[str]) -> None:
    while _version(db, path, len(migrations)) < len(migrations):
        db.execute("BEGIN IMMEDIATE")
        try:
            # Asked again under the lock: another process may have just done this step.
            version = _version(db, path, len(migrations))
            if version < len(migrations):
                db.execute(migrations[version]).fetchall()
                db.execute(f"PRAGMA user_version = {version + 1}").fetchall()
            db.execute("COMMIT")
        except BaseException:
            db.execute("ROLLBACK")
            raise


def _version(db: apsw.Connection, path: Path, newest: int) -> int:
    version = db.pragma("user_version")
    assert isinstance(version, int)
    if version > newest:
        raise SchemaTooNew(
            f"{path} has schema version {version}; this Ondol knows up to {newest}. "
            "Run the newer Ondol again, or restore the file from before the upgrade."
        )
    return version
