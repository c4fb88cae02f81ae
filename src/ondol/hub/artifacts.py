"""Which models the hub offers to its sites: their manifests, as it signed them.

The files themselves lie in the hub's model store, on its disk or one that its replicas share; a row here says that a
file is one of the fleet's.  A model is offered from when its row is there, and withdrawn by taking the row away.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from ondol.core import chunks
from ondol.core.chunks import Artifact
from ondol.core.dsse import Envelope
from ondol.core.ports import Tx
from ondol.errors import Conflict, InvalidRequest, NotFound

SCHEMA: Final[tuple[str, ...]] = (
    "CREATE TABLE artifacts (digest TEXT PRIMARY KEY, name TEXT NOT NULL, size BIGINT NOT NULL, format TEXT NOT NULL, "
    "manifest BLOB NOT NULL, published_ns BIGINT NOT NULL)",
    "CREATE UNIQUE INDEX artifacts_name ON artifacts (name)",
)
ARTIFACTS_MAX: Final = 10_000
_NAME_CHARACTERS: Final = frozenset("abcdefghijklmnopqrstuvwxyz0123456789._/-")


class Offered(msgspec.Struct, frozen=True, kw_only=True):
    """A model that the hub offers.  `published_ns` is wall-clock time."""

    name: str
    digest: str
    size: int
    format: str
    published_ns: int


def publish(
    tx: Tx, envelope: Envelope, keys: Mapping[str, bytes], *, now_ns: int, replace: bool = False
) -> Artifact:
    """Offer a file that is in the store, by the manifest that the hub signed.  The same file again changes nothing.

    With `replace` its name moves from another file, which is withdrawn.

    Raises:
        BadSignature: the manifest is not the hub's.
        InvalidRequest: its name is none.
        Conflict: another file has that name, or there are too many.
    """
    artifact = chunks.read(envelope, dict(keys), digest=chunks.unverified(envelope).digest)
    check_name(artifact.name)
    before = tx.run("SELECT digest FROM artifacts WHERE name = ?", (artifact.name,))
    if before and before[0][0] != artifact.digest:
        if not replace:
            raise Conflict(
                f"the name {artifact.name!r} is that of {str(before[0][0])[:23]}… already; choose another, or publish "
                "with --replace"
            )
        tx.run("DELETE FROM artifacts WHERE digest = ?", (before[0][0],))
    count = int(tx.run("SELECT COUNT(*) FROM artifacts")[0][0])
    if count >= ARTIFACTS_MAX:
        raise Conflict(f"{count} models are offered, and at most {ARTIFACTS_MAX}; withdraw some")
    tx.run(
        "INSERT INTO artifacts (digest, name, size, format, manifest, published_ns) VALUES (?, ?, ?, ?, ?, ?) "
        "ON CONFLICT (digest) DO UPDATE SET name = excluded.name, manifest = excluded.manifest",
        (
            artifact.digest, artifact.name, artifact.size, artifact.format, msgspec.json.encode(envelope), now_ns,
        ),
    )  # fmt: skip
    return artifact


def offered(tx: Tx) -> list[Offered]:
    """Every model that is offered, by name."""
    rows = tx.run("SELECT name, digest, size, format, published_ns FROM artifacts ORDER BY name")
    return [
        Offered(name=name, digest=digest, size=int(size), format=kind, published_ns=int(published))
        for name, digest, size, kind, published in rows
    ]


def manifest_of(tx: Tx, digest: str) -> bytes | None:
    """The signed manifest of a model that is offered, as JSON."""
    rows = tx.run("SELECT manifest FROM artifacts WHERE digest = ?", (digest,))
    return bytes(rows[0][0]) if rows else None


def withdraw(tx: Tx, name_or_digest: str) -> str:
    """Offer a model no longer; its digest.  Sites that have it keep it.

    Raises:
        NotFound: none is offered under that name.
    """
    rows = tx.run(
        "SELECT digest FROM artifacts WHERE name = ? OR digest = ?", (name_or_digest, name_or_digest)
    )
    if not rows:
        raise NotFound(
            f"no model {name_or_digest[:140]!r} is offered; `ondol models list --hub` shows which are"
        )
    tx.run("DELETE FROM artifacts WHERE digest = ?", (rows[0][0],))
    return str(rows[0][0])


def missing_for(tx: Tx, documents: list[dict[str, Any]]) -> list[str]:
    """Sentences on Model documents that name a digest which the hub does not offer: no site could fetch it."""
    have = {row[0] for row in tx.run("SELECT digest FROM artifacts")}
    return [
        f"Model {one.get('name')!r} has the digest {str(one['digest'])[:23]}…, which the hub does not offer; "
        f"publish it: ondol models publish FILE --name {one.get('name')}"
        for one in documents
        if one.get("kind") == "Model"
        and one.get("digest")
        and not one.get("file")
        and one["digest"] not in have
    ]


def check_name(name: str) -> None:
    """A model's name is written as in a Model document.

    Raises:
        InvalidRequest: this is none.
    """
    ends = name[:1] + name[-1:]
    if not name or len(name) > 128 or not _NAME_CHARACTERS.issuperset(name) or set(ends) & set("._/-"):
        raise InvalidRequest(
            f"found the name {name[:140]!r}, expected up to 128 of a-z 0-9 . _ / - that start and end with a letter "
            "or digit",
            param="name",
        )
