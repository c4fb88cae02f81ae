"""What the fleet shall be: generations of documents, and which of them each site shall run.

A generation is a list of documents; its number only rises, also after a rollback (a new number with old content)
and after the hub was restored from a backup (above all that any site has reported).  Each site is wanted at the
fleet's generation, or at another while a rollout goes on.  Pure over a transaction.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final

import msgspec

from ondol.core.catalog import AnyDocument, RouteDoc, SiteDoc
from ondol.core.desired import DocumentRef, Manifest, body_of, digest_of, sign_manifest
from ondol.core.dsse import Envelope
from ondol.core.fleet import FLEET_KINDS, Fleet, fleet_of, resolve
from ondol.core.identity import ApiKey
from ondol.core.ports import Tx
from ondol.errors import NotFound
from ondol.hub import freeze, sites
from ondol.hub.enrol import Authority
from ondol.hub.keys import useful

SCHEMA: Final[tuple[str, ...]] = (
    "CREATE TABLE generations(number BIGINT NOT NULL PRIMARY KEY, made_ns BIGINT NOT NULL, author TEXT NOT NULL,"
    " message TEXT NOT NULL, documents BLOB NOT NULL)",
    "CREATE TABLE bodies(digest TEXT NOT NULL PRIMARY KEY, body BLOB NOT NULL)",
    "CREATE TABLE wanted(site TEXT NOT NULL PRIMARY KEY, generation BIGINT NOT NULL)",
    "CREATE TABLE hub_state(name TEXT NOT NULL PRIMARY KEY, value BIGINT NOT NULL)",
)


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """One generation, without its documents."""

    number: int
    made_ns: int
    author: str
    message: str


class Numbers(msgspec.Struct, frozen=True, kw_only=True):
    """The newest numbers, as a watch announces them: of the fleet, of sites that differ, of the epoch.

    `changes` rises with every change of what a site would be sent: of documents, sites or keys.  `era` is that of the
    newest freeze of grants (hub/freeze.py).
    """

    generation: int
    wanted: Mapping[str, int]
    epoch: int
    changes: int
    era: int = 0

    def of(self, site: str) -> int:
        """The generation that a site shall run; 0 before the first."""
        return self.wanted.get(site, self.generation)


def apply(
    tx: Tx,
    documents: Sequence[tuple[str, AnyDocument]],
    *,
    author: str,
    message: str,
    now_ns: int,
    everywhere: bool,
) -> int:
    """Make a generation of these documents; its number.  `everywhere`: all sites shall run it at once."""
    refs = []
    for kind, document in documents:
        body = body_of(kind, document)
        digest = digest_of(body)
        refs.append(DocumentRef(kind, document.name, digest))
        tx.run("INSERT INTO bodies(digest, body) VALUES(?,?) ON CONFLICT(digest) DO NOTHING", (digest, body))
    number = max(newest(tx), sites.highest_generation(tx)) + 1
    tx.run(
        "INSERT INTO generations(number, made_ns, author, message, documents) VALUES(?,?,?,?,?)",
        (number, now_ns, author[:200], message[:500], msgspec.json.encode(refs)),
    )
    if everywhere:
        want_everywhere(tx, number)
    return number


def rollback(tx: Tx, to: int | None, *, author: str, now_ns: int) -> tuple[int, int]:
    """(new number, whose content it has): all sites shall run what was, without going back in number.

    `to` None is the newest generation whose documents differ from those of now.

    Raises:
        NotFound: there is no such generation, or nothing to go back to.
    """
    rows = tx.run("SELECT number, documents FROM generations ORDER BY number DESC")
    now = fleet_generation(tx)
    current = next((bytes(body) for number, body in rows if number == now), b"")
    if to is None:
        to = next((int(n) for n, body in rows if n < now and bytes(body) != current), None)
        if to is None:
            raise NotFound("there is no other generation to go back to")
    body = next((bytes(body) for number, body in rows if number == to), None)
    if body is None:
        known = ", ".join(str(number) for number, _ in rows[:10])
        raise NotFound(f"there is no generation {to}; the newest are {known or 'none'}")
    number = max(newest(tx), sites.highest_generation(tx)) + 1
    tx.run(
        "INSERT INTO generations(number, made_ns, author, message, documents) VALUES(?,?,?,?,?)",
        (number, now_ns, author[:200], f"rollback to {to}", body),
    )
    want_everywhere(tx, number)
    return number, to


def want_everywhere(tx: Tx, generation: int) -> None:
    """All sites shall run it, those to come too."""
    tx.run("DELETE FROM wanted")
    _put(tx, "generation", generation)
    changed(tx)


def set_wanted(tx: Tx, names: Collection[str], generation: int) -> None:
    """These sites shall run it; a rollout does that step by step."""
    tx.many(
        "INSERT INTO wanted(site, generation) VALUES(?,?) ON CONFLICT(site) DO UPDATE SET"
        " generation = excluded.generation",
        [(name, generation) for name in sorted(names)],
    )
    changed(tx)


def wanted(tx: Tx, site: str) -> int:
    """The generation that a site shall run; 0 before the first."""
    rows = tx.run("SELECT generation FROM wanted WHERE site = ?", (site,))
    return int(rows[0][0]) if rows else fleet_generation(tx)


def fleet_generation(tx: Tx) -> int:
    """The generation of every site that no rollout treats otherwise."""
    return _get(tx, "generation")


def changed(tx: Tx) -> None:
    """Something that sites are sent has changed: whoever remembers what he would send, forgets it."""
    _put(tx, "changes", _get(tx, "changes") + 1)


def changes(tx: Tx) -> int:
    """How often `changed` was called."""
    return _get(tx, "changes")


def numbers(tx: Tx) -> Numbers:
    """The newest numbers, for watches."""
    differing = {site: int(number) for site, number in tx.run("SELECT site, generation FROM wanted")}
    epoch = int(tx.run("SELECT COALESCE(MAX(number), 0) FROM epochs")[0][0])
    return Numbers(
        generation=fleet_generation(tx), wanted=differing, epoch=epoch, changes=_get(tx, "changes"),
        era=freeze.era(tx),
    )  # fmt: skip


def generations(tx: Tx, limit: int) -> list[Generation]:
    """The newest ones, newest first."""
    rows = tx.run(
        "SELECT number, made_ns, author, message FROM generations ORDER BY number DESC LIMIT ?", (limit,)
    )
    return [
        Generation(number=int(number), made_ns=int(made_ns), author=author, message=message)
        for number, made_ns, author, message in rows
    ]


def documents(tx: Tx, generation: int) -> list[tuple[str, AnyDocument]]:
    """The documents of a generation, as they were applied.

    Raises:
        NotFound: there is no such generation.
    """
    if generation == 0:
        return []
    rows = tx.run("SELECT documents FROM generations WHERE number = ?", (generation,))
    if not rows:
        raise NotFound(f"there is no generation {generation}")
    found = []
    for ref in msgspec.json.decode(bytes(rows[0][0]), type=list[DocumentRef]):
        body = bytes(tx.run("SELECT body FROM bodies WHERE digest = ?", (ref.digest,))[0][0])
        found.append((ref.kind, msgspec.json.decode(body, type=FLEET_KINDS[ref.kind])))
    return found  # type: ignore[return-value]  # the kinds of FLEET_KINDS are documents


def fleet_at(tx: Tx, generation: int) -> Fleet:
    """The fleet of a generation, with the sites that are known by invitation; a Site document wins over those."""
    return with_sites(fleet_of(documents(tx, generation)), sites.documents(tx))


def with_sites(fleet: Fleet, invited: Mapping[str, SiteDoc]) -> Fleet:
    """The fleet with the sites that were invited, where it has no document of its own for them."""
    written = {name: _reachable(doc, invited.get(name)) for name, doc in fleet.sites.items()}
    return msgspec.structs.replace(fleet, sites={**invited, **written})


def _reachable(doc: SiteDoc, invited: SiteDoc | None) -> SiteDoc:
    """A written document without an address takes the one that the site gave when it joined."""
    if doc.address is None and invited is not None and invited.address is not None:
        return msgspec.structs.replace(doc, address=invited.address)
    return doc


def desired_for(
    fleet: Fleet, site: str, authority: Authority, *, generation: int, keys: tuple[ApiKey, ...], now_ns: int
) -> tuple[Envelope, dict[str, bytes]]:
    """The signed manifest of one site, and every body that it names, by digest; about 1 ms.

    Raises:
        ConfigError: a value does not fit this site.
    """
    bodies: dict[str, bytes] = {}
    refs, routes = [], []
    for kind, document in resolve(fleet, site).documents:
        body = body_of(kind, document)
        digest = digest_of(body)
        bodies[digest] = body
        refs.append(DocumentRef(kind, document.name, digest))
        if isinstance(document, RouteDoc):
            routes.append(document)
    known = useful(keys, routes)
    manifest = Manifest(
        fleet=authority.fleet, site=site, generation=generation, issued_ns=now_ns, documents=tuple(refs),
        keys=known, pepper=authority.pepper if known else b"",
    )  # fmt: skip
    return sign_manifest(authority.private, manifest), bodies


def newest(tx: Tx) -> int:
    """The number of the newest generation; 0 before the first."""
    return int(tx.run("SELECT COALESCE(MAX(number), 0) FROM generations")[0][0])


def _get(tx: Tx, name: str) -> int:
    rows = tx.run("SELECT value FROM hub_state WHERE name = ?", (name,))
    return int(rows[0][0]) if rows else 0


def _put(tx: Tx, name: str, value: int) -> None:
    tx.run(
        "INSERT INTO hub_state(name, value) VALUES(?,?) ON CONFLICT(name) DO UPDATE SET value = excluded.value",
        (name, value),
    )
