"""The hub's tables, put together: each module owns its own in its `SCHEMA`, and this is their order.

The SQL is the common part of SQLite and PostgreSQL (types BIGINT, TEXT, BLOB); the adapters change the rest.
"""

from __future__ import annotations

from typing import Final

from ondol.hub import artifacts, audit, enrol, ingest, keys, leases, publish, replicas, rollouts, sites

MIGRATIONS: Final[tuple[tuple[str, ...], ...]] = (
    (
        *sites.SCHEMA, *enrol.SCHEMA, *audit.SCHEMA, *keys.SCHEMA, *publish.SCHEMA, *ingest.SCHEMA, *leases.SCHEMA,
        *rollouts.SCHEMA, *artifacts.SCHEMA, *replicas.SCHEMA,
    ),
)  # fmt: skip
"""Step n leads from schema version n to n + 1.  A step that has been released is never edited."""
