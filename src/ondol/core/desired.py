"""Desired state: what one site shall be, signed by the hub, numbered by a generation that only rises.

A **manifest** names every document of the site by its digest; the bodies travel beside it, and only those
that the site has not got yet.  So a generation that changes one document of three hundred costs one document,
and a body that was changed on its way is not the one that the manifest names.

A body is the document as JSON with sorted keys, `kind` included: the same document has the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, Final

import msgspec

from ondol.core import dsse
from ondol.core.dsse import Envelope
from ondol.core.identity import ApiKey
from ondol.core.trust import Trust
from ondol.errors import BadSignature, GenerationRefused

MANIFEST_TYPE: Final = dsse.TYPE_PREFIX + "manifest.v1"


class DocumentRef(msgspec.Struct, frozen=True, array_like=True):
    """One document of a manifest: SHA-256 of its body, in hex."""

    kind: str
    name: str
    digest: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What one site shall be.

    `keys` are the fleet's API keys that this site may know, as HMACs under `pepper`; a site's own keys stand
    in its own store and are not touched.
    """

    fleet: str
    site: str
    generation: int
    issued_ns: int
    documents: tuple[DocumentRef, ...]
    keys: tuple[ApiKey, ...] = ()
    pepper: bytes = b""


class Desired(msgspec.Struct, frozen=True, kw_only=True):
    """A whole desired state: the signed manifest, and the body of every document that it names, by digest."""

    envelope: Envelope
    manifest: Manifest
    bodies: Mapping[str, bytes]

    def documents(self) -> list[bytes]:
        """The bodies in the manifest's order."""
        return [self.bodies[one.digest] for one in self.manifest.documents]


def plain(kind: str, document: msgspec.Struct) -> dict[str, Any]:
    """The document as JSON data, without the fields that have their default.

    So a site of an older release, which does not know a field yet, takes every document that does not use it.
    """
    fields: dict[str, Any] = msgspec.to_builtins(document)
    for name, default in _defaults(type(document)):
        if getattr(document, name) == default:
            del fields[name]
    return {**fields, "kind": kind}


@lru_cache(maxsize=64)
def _defaults(kind: type[msgspec.Struct]) -> tuple[tuple[str, Any], ...]:
    """The fields that may be left out, each with its default; reading them off a type takes 0.5 ms."""
    return tuple(
        [
            (
                field.name,
                field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory(),
            )
            for field in msgspec.structs.fields(kind)
            if not field.required
        ]
    )


def body_of(kind: str, document: msgspec.Struct) -> bytes:
    """The bytes of a document."""
    return msgspec.json.encode(plain(kind, document), order="sorted")


def digest_of(body: bytes) -> str:
    """The name of a body."""
    return hashlib.sha256(body).hexdigest()


def sign_manifest(private: bytes, manifest: Manifest) -> Envelope:
    """The hub signs what a site shall be."""
    return dsse.sign(private, MANIFEST_TYPE, msgspec.json.encode(manifest))


def read_manifest(envelope: Envelope, trust: Trust, *, site: str) -> Manifest:
    """The manifest, if the hub of this fleet signed it for this site.

    Raises:
        BadSignature: not signed by the hub, of another fleet or for another site.
    """
    payload = dsse.verify(envelope, MANIFEST_TYPE, trust.keys)
    try:
        manifest = msgspec.json.decode(payload, type=Manifest)
    except msgspec.MsgspecError as error:
        raise BadSignature(f"manifest: not one ({error})") from error
    if (manifest.fleet, manifest.site) != (trust.fleet, site):
        raise BadSignature(
            f"manifest: it is for site {manifest.site[:64]!r} of fleet {manifest.fleet[:64]!r}; expected "
            f"{site!r} of {trust.fleet!r}"
        )
    return manifest


def assemble(
    envelope: Envelope, trust: Trust, *, site: str, known: Mapping[str, bytes], sent: Iterable[bytes], least: int,
) -> Desired:  # fmt: skip
    """The whole desired state, from a manifest, what the site has already, and what was sent beside it.

    `least` is the generation that the site runs: a lower one is refused, the same one is fine (it heals what a
    watch missed).

    Raises:
        BadSignature: the manifest is not the hub's, or a body is not the one that it names.
        GenerationRefused: it is older than what the site runs.
    """
    manifest = read_manifest(envelope, trust, site=site)
    if manifest.generation < least:
        raise GenerationRefused(
            f"generation {manifest.generation} was offered, and this site runs {least} already: a hub that was "
            "restored from an older backup does this. Apply the files again; the next generation will be higher."
        )
    bodies = {digest_of(body): body for body in sent}
    missing = [
        f"{one.kind}/{one.name}"
        for one in manifest.documents
        if one.digest not in bodies and one.digest not in known
    ]
    if missing:
        raise BadSignature(
            f"generation {manifest.generation}: the bodies of {', '.join(missing[:5])} are missing, or are not the "
            "ones that the manifest names"
        )
    whole = {
        one.digest: bodies[one.digest] if one.digest in bodies else known[one.digest]
        for one in manifest.documents
    }
    return Desired(envelope=envelope, manifest=manifest, bodies=whole)
