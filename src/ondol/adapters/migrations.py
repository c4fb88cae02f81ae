"""Bringing a hub's database to the newest schema: the same steps on SQLite and on PostgreSQL.

The version stands in a table, `schema_version`, because only SQLite has a place of its own for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ondol.core.ports import Tx
from ondol.errors import SchemaTooNew

Migrations = Sequence[Sequence[str]]
"""`migrations[n]` holds the statements that lead from version n to n + 1.  A released step is never edited."""


def migrate(tx: Tx, migrations: Migrations, *, has_table: Callable[[str], bool], where: str) -> int:
    """Run the steps that are missing, in the caller's transaction; the version that was found.

    Raises:
        SchemaTooNew: a newer Ondol wrote the database.  It is left as it is.
    """
    if not has_table("schema_version"):
        tx.run("CREATE TABLE schema_version(version BIGINT NOT NULL)")
    rows = tx.run("SELECT version FROM schema_version")
    found = int(rows[0][0]) if rows else 0
    if not rows:
        tx.run("INSERT INTO schema_version(version) VALUES(?)", (0,))
    if found > len(migrations):
        raise SchemaTooNew(
            f"{where} has schema version {found}; this Ondol knows up to {len(migrations)}. "
            "Run the newer Ondol again, or restore the database from before the upgrade."
        )
    for step in migrations[found:]:
        for statement in step:
            tx.run(statement)
    if found < len(migrations):
        tx.run("UPDATE schema_version SET version = ?", (len(migrations),))
    return found
