"""The sites of a fleet as the hub knows them: who was invited, whose key is whose, who is out.

Pure over a transaction.  A site is a row from when it is invited; it has a key from when it joins.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import msgspec

from ondol.core.catalog import SiteDoc
from ondol.core.ports import Tx
from ondol.core.trust import Credential
from ondol.errors import Forbidden, NotFound, Unauthenticated

SCHEMA: Final[tuple[str, ...]] = (
    "CREATE TABLE sites(name TEXT NOT NULL PRIMARY KEY, doc TEXT NOT NULL, key BLOB, joined_ns BIGINT,"
    " invited_ns BIGINT NOT NULL, revoked_ns BIGINT, fenced TEXT, boot BIGINT NOT NULL, instance TEXT NOT NULL,"
    " previous TEXT NOT NULL, waiting TEXT NOT NULL, waiting_ns BIGINT NOT NULL, challenge TEXT NOT NULL,"
    " waits BIGINT NOT NULL, heard_ns BIGINT NOT NULL, generation BIGINT NOT NULL, invite TEXT NOT NULL)",
)
_COLUMNS: Final = (
    "name, doc, key, joined_ns, invited_ns, revoked_ns, fenced, boot, instance, previous, waiting, waiting_ns,"
    " challenge, waits, heard_ns, generation, invite"
)


class SiteRow(msgspec.Struct, frozen=True, kw_only=True):
    """One site.  `instance` speaks for it now; `fenced` is the instance that may not (hub/sessions.py has the rest).

    `heard_ns` is when it was heard last, coarse (written every few seconds); `generation` the highest that it
    has reported; `invite` the invitation that it joined with.
    """

    name: str
    doc: SiteDoc
    key: bytes | None = None
    joined_ns: int | None = None
    invited_ns: int = 0
    revoked_ns: int | None = None
    fenced: str | None = None
    boot: int = 0
    instance: str = ""
    previous: str = ""
    waiting: str = ""
    waiting_ns: int = 0
    challenge: str = ""
    waits: int = 0
    heard_ns: int = 0
    generation: int = 0
    invite: str = ""


class Speaker(NamedTuple):
    """Who may speak for a site now: the process `instance`, with the private part of `key`."""

    key: bytes | None
    instance: str
    is_out: bool


def add(tx: Tx, doc: SiteDoc, now_ns: int) -> None:
    """A site that was invited; one that is known keeps its key and gets the new document."""
    body = msgspec.json.encode(doc).decode()
    tx.run(
        "INSERT INTO sites(name, doc, invited_ns, boot, instance, previous, waiting, waiting_ns, challenge, waits,"
        " heard_ns, generation, invite) VALUES(?,?,?,0,'','','',0,'',0,0,0,'') ON CONFLICT(name) DO UPDATE"
        " SET doc = excluded.doc, invited_ns = excluded.invited_ns",
        (doc.name, body, now_ns),
    )


def find(tx: Tx, name: str) -> SiteRow | None:
    """One site."""
    rows = tx.run(f"SELECT {_COLUMNS} FROM sites WHERE name = ?", (name,))  # noqa: S608  # names of ours only
    return _row(rows[0]) if rows else None


def get(tx: Tx, name: str) -> SiteRow:
    """One site.

    Raises:
        NotFound: there is none of this name.
    """
    found = find(tx, name)
    if found is None:
        raise NotFound(f"there is no site {name[:64]!r}; `ondol sites list` shows those that there are")
    return found


def require(tx: Tx, credential: Credential) -> None:
    """The key must be the one that the site has now, and the site must not be out.

    Raises:
        Unauthenticated: there is no such site, or its key is another.
        Forbidden: it was revoked.
    """
    row = find(tx, credential.site)
    if row is None or row.key is None:
        raise Unauthenticated(
            f"this hub does not know site {credential.site}; was it restored from an older backup? Invite it again"
        )
    if row.revoked_ns is not None:
        raise Forbidden(f"site {credential.site} was revoked")
    if row.key != credential.key:
        raise Unauthenticated(
            f"site {credential.site} has joined again with another key; this one is not good any more"
        )


def everyone(tx: Tx) -> list[SiteRow]:
    """All sites by name."""
    return [_row(row) for row in tx.run(f"SELECT {_COLUMNS} FROM sites ORDER BY name")]  # noqa: S608


def speakers(tx: Tx) -> dict[str, Speaker]:
    """Who may speak for each site; 10 ms for 10,000 of them."""
    rows = tx.run("SELECT name, key, instance, revoked_ns FROM sites")
    return {
        name: Speaker(None if key is None else bytes(key), instance, revoked_ns is not None)
        for name, key, instance, revoked_ns in rows
    }


def documents(tx: Tx) -> dict[str, SiteDoc]:
    """The documents of all sites that were invited and are not revoked."""
    rows = tx.run("SELECT name, doc FROM sites WHERE revoked_ns IS NULL ORDER BY name")
    return {name: msgspec.json.decode(doc, type=SiteDoc) for name, doc in rows}


def joined(tx: Tx, name: str, key: bytes, invite: str, now_ns: int) -> None:
    """The site has this key from now on, and nobody has spoken for it yet."""
    tx.run(
        "UPDATE sites SET key = ?, joined_ns = ?, invite = ?, revoked_ns = NULL, fenced = NULL, boot = 0,"
        " instance = '', previous = '', waiting = '', waiting_ns = 0, waits = 0, challenge = '' WHERE name = ?",
        (key, now_ns, invite, name),
    )


def revoke(tx: Tx, name: str, now_ns: int) -> None:
    """The site is out."""
    get(tx, name)
    tx.run("UPDATE sites SET revoked_ns = ? WHERE name = ? AND revoked_ns IS NULL", (now_ns, name))


def heard(tx: Tx, name: str, now_ns: int, generation: int) -> None:
    """Note coarsely when a site was heard, and the highest generation that it has reported."""
    tx.run(
        "UPDATE sites SET heard_ns = ?, generation = CASE WHEN generation < ? THEN ? ELSE generation END"
        " WHERE name = ?",
        (now_ns, generation, generation, name),
    )


def highest_generation(tx: Tx) -> int:
    """The highest generation that any site has ever reported."""
    return int(tx.run("SELECT COALESCE(MAX(generation), 0) FROM sites")[0][0])


def _row(row: tuple[object, ...]) -> SiteRow:
    values = dict(zip([name.strip() for name in _COLUMNS.split(",")], row, strict=True))
    values["doc"] = msgspec.json.decode(str(values["doc"]), type=SiteDoc)
    values["key"] = None if values["key"] is None else bytes(values["key"])  # type: ignore[call-overload]
    return SiteRow(**values)  # type: ignore[arg-type]
