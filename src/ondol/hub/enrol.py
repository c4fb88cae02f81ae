"""Who belongs to the fleet: invitations, joining, credentials, revocation.  Pure over a transaction.

A token is good once, for fifteen minutes; a factory key may enrol a number of new sites of one label.  The hub keeps
an HMAC of its secret.  Who comes with a good token and a public key gets a credential for that key; the private
key never leaves the site.

A site that never got its answer may send the same token with the same key again, while the token lasts: the answer
holds nothing but what is of use to the owner of that key.  With any other key a used token is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from hmac import compare_digest
from random import Random
from typing import Final, NamedTuple
from urllib.parse import urlsplit

import msgspec

from ondol.core import apikeys, dsse
from ondol.core.catalog import SiteDoc
from ondol.core.dsse import Envelope
from ondol.core.invites import HubPlace, make_token, parse_proof
from ondol.core.ports import Tx
from ondol.core.trust import (
    ASSERTION_S,
    HUB,
    LEEWAY_S,
    Credential,
    Epoch,
    Trust,
    issue_credential,
    issue_epoch,
    read_epoch,
)
from ondol.errors import BadSignature, Conflict, InvalidRequest, NotFound, Unauthenticated
from ondol.hub import audit, sites
from ondol.units import NS_PER_S
from ondol.wire import sync

SCHEMA: Final[tuple[str, ...]] = (
    "CREATE TABLE invites(id TEXT NOT NULL PRIMARY KEY, mac BLOB NOT NULL, site TEXT NOT NULL, template TEXT,"
    " remaining BIGINT NOT NULL, expires_ns BIGINT NOT NULL, made_ns BIGINT NOT NULL, used_by TEXT NOT NULL)",
    "CREATE TABLE revoked_keys(key_id TEXT NOT NULL PRIMARY KEY, site TEXT NOT NULL, until_ns BIGINT NOT NULL)",
    "CREATE TABLE epochs(number BIGINT NOT NULL PRIMARY KEY, envelope BLOB NOT NULL, issued_ns BIGINT NOT NULL)",
)
_REFUSED: Final = "this invitation is not good here: it is unknown, was used, or has ended; ask for a new one"
FACTORY_MAX: Final = 100_000
ADDRESS_MAX: Final = 256
KEEP_USED_S: Final = 90 * 86_400
"""How long an invitation that is over is kept, for whoever asks the database who came with it."""


class Authority(msgspec.Struct, frozen=True, kw_only=True):
    """The hub as it signs.  `pepper` is under what secrets are kept; times in seconds."""

    fleet: str
    private: bytes
    keys: Mapping[str, bytes]
    pepper: bytes
    credential_s: int
    stale_s: int


class Invitation(msgspec.Struct, frozen=True, kw_only=True):
    """Who is invited: one site by its document, or with `count` > 1 new sites made after it, named by themselves.

    `names` bounds how these may call themselves: a pattern such as `shop-*`; empty is any name that is new.
    """

    doc: SiteDoc
    count: int = 1
    minutes: int = 15
    names: str = ""


def invite(
    tx: Tx,
    invitations: Sequence[Invitation],
    place: HubPlace,
    authority: Authority,
    *,
    rng: Random,
    now_ns: int,
) -> list[tuple[str, str]]:
    """(site or pattern, token) of each; the tokens are shown now and never again.

    Raises:
        InvalidRequest: a name that no site may have, or a count or a time out of range.
        Conflict: the site has joined already and was not revoked.
    """
    made = []
    for one in invitations:
        name = one.doc.name
        if name == HUB:
            raise InvalidRequest(f"no site may be called {HUB!r}: that is who sites speak to")
        if one.names and one.count == 1:
            raise InvalidRequest(f"invite {name}: a pattern of names is for factory keys, which have a count")
        if not 1 <= one.count <= FACTORY_MAX or not 1 <= one.minutes <= 366 * 24 * 60:
            raise InvalidRequest(f"invite {name}: count is 1 to {FACTORY_MAX}, minutes 1 to a year of them")
        if one.doc.address is not None:
            host_of(one.doc.address)
        known = sites.find(tx, name)
        if one.count == 1:
            if known is not None and known.key is not None and known.revoked_ns is None:
                raise Conflict(
                    f"site {name} has joined already. To replace its machine, first: ondol sites revoke {name}"
                )
            sites.add(tx, one.doc, now_ns)
        invite_id, secret = (
            apikeys.base62(rng.getrandbits(64), apikeys.ID_LENGTH),
            apikeys.secret_text(rng.randbytes(32)),
        )
        template = msgspec.json.encode(_Template(one.doc, one.names)).decode() if one.count > 1 else None
        tx.run(
            "INSERT INTO invites(id, mac, site, template, remaining, expires_ns, made_ns, used_by)"
            " VALUES(?,?,?,?,?,?,?,'')",
            (
                invite_id, apikeys.mac(authority.pepper, secret), name, template, one.count,
                now_ns + one.minutes * 60 * NS_PER_S, now_ns,
            ),
        )  # fmt: skip
        audit.note(tx, now_ns, "invited", name, f"{one.count} for {one.minutes} min")
        made.append((name, make_token(invite_id, secret, place)))
    tx.run("DELETE FROM invites WHERE expires_ns < ?", (now_ns - KEEP_USED_S * NS_PER_S,))
    return made


class _Template(NamedTuple):
    """What a factory key makes sites after."""

    doc: SiteDoc
    names: str


class _Token(NamedTuple):
    """An invitation whose secret was shown; `again` where this very key has joined with it before."""

    id: str
    doc: SiteDoc
    again: bool


def join(tx: Tx, message: sync.Join, authority: Authority, *, now_ns: int) -> sync.JoinReply:
    """A site comes with its token and its public key.

    Raises:
        Unauthenticated: the token is not good (one message for every cause).
        InvalidRequest, Conflict: the key is no key, or the name is taken or missing.
    """
    if len(message.key) != 32:
        raise InvalidRequest(f"join: expected an Ed25519 public key of 32 bytes, found {len(message.key)}")
    if tx.run("SELECT 1 FROM revoked_keys WHERE key_id = ?", (dsse.key_id(message.key),)):
        raise Conflict("join: this key was revoked; join with a new one: ondol join TOKEN --again")
    token = _redeem(tx, message, authority, now_ns)
    doc, known = token.doc, sites.find(tx, token.doc.name)
    if not token.again:
        if known is not None and known.key is not None and known.revoked_ns is None:
            raise Conflict(
                f"site {doc.name} has joined with another key; revoke it first, or take another name"
            )
        doc = _at_its_address(tx, doc, message.address)
        sites.add(tx, doc, now_ns)
        sites.joined(tx, doc.name, message.key, token.id, now_ns)
        if known is not None and known.revoked_ns is not None:
            new_epoch(tx, authority, now_ns=now_ns)
    what = "joined again" if token.again else "joined"
    audit.note(tx, now_ns, what, doc.name, f"invitation {token.id}, software {message.software[:40]}")
    return sync.JoinReply(
        fleet=authority.fleet, site=doc.name,
        credential=credential(authority, doc.name, message.key, now_ns=now_ns),
        epoch=current_epoch(tx, authority, now_ns=now_ns), hub_keys=dict(authority.keys), hub_ns=now_ns,
    )  # fmt: skip


def _at_its_address(tx: Tx, doc: SiteDoc, address: str) -> SiteDoc:
    """The document with the address that the site gives.

    What the invitation says is not the site's to change, and no site takes the host of another: it would get a TLS
    certificate for it.
    """
    if not address or address == doc.address:
        return doc
    if doc.address is not None:
        raise InvalidRequest(f"{doc.name} was invited with the address {doc.address}, found {address[:64]!r}")
    host = host_of(address)
    for one in sites.documents(tx).values():
        if one.name == doc.name or one.address is None or urlsplit(one.address).hostname != host:
            continue
        if one.address == address or not loopback(host):
            raise Conflict(
                f"{one.name} is at {host} already. Where both shall be there, say so when inviting: --address URL"
            )
    return msgspec.structs.replace(doc, address=address)


def host_of(address: str) -> str:
    """The host of a site's address, in small letters.

    Raises:
        InvalidRequest: it is none.
    """
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    plain = address.isascii() and address.isprintable() and " " not in address and len(address) <= ADDRESS_MAX
    if (
        not plain
        or not host
        or port == 0
        or parts.scheme not in ("http", "https")
        or parts.username is not None
        or parts.path.strip("/") + parts.query + parts.fragment
    ):
        raise InvalidRequest(
            f"found the address {address[:64]!r}, expected one such as https://shop-7.example:8443"
        )
    return host


def loopback(host: str) -> bool:
    """Whether it is this machine: several sites may be on it, and a certificate for it is of no use elsewhere."""
    return host in ("localhost", "::1") or host.startswith("127.")


def _redeem(tx: Tx, message: sync.Join, authority: Authority, now_ns: int) -> _Token:
    """The invitation, used up by this; with the same key it may be shown again."""
    try:
        invite_id, secret = parse_proof(message.token.partition(".")[0])
    except InvalidRequest as error:
        raise Unauthenticated(error.message) from error
    rows = tx.run("SELECT mac, site, template, remaining, expires_ns FROM invites WHERE id = ?", (invite_id,))
    mac = apikeys.mac(authority.pepper, secret)
    proved = compare_digest(mac, bytes(rows[0][0]) if rows else b"\0" * 32)
    if not rows or not proved:
        raise Unauthenticated(_REFUSED)
    _, site, template, remaining, expires_ns = rows[0]
    if now_ns < expires_ns:
        came = sites.find(tx, site if template is None else message.site)
        if (
            came is not None
            and came.invite == invite_id
            and came.key == message.key
            and came.revoked_ns is None
        ):
            return _Token(invite_id, came.doc, again=True)
    if remaining < 1 or now_ns >= expires_ns:
        audit.note(tx, now_ns, "join_refused", site, f"invitation {invite_id} was used or has ended")
        raise Unauthenticated(_REFUSED)
    if template is None:
        if message.site not in ("", site):
            raise Unauthenticated(
                f"this invitation is for {site}, and the site calls itself {message.site[:64]!r}"
            )
        doc = sites.get(tx, site).doc
    else:
        doc = _named(tx, msgspec.json.decode(template, type=_Template), message.site)
    tx.run("UPDATE invites SET remaining = remaining - 1, used_by = ? WHERE id = ?", (doc.name, invite_id))
    return _Token(invite_id, doc, again=False)


def _named(tx: Tx, template: _Template, name: str) -> SiteDoc:
    """The document of a new site that names itself, after the one that its factory key was made with."""
    if not name:
        raise InvalidRequest("a factory key enrols sites that name themselves: ondol join TOKEN --site NAME")
    try:
        doc = msgspec.convert({**msgspec.to_builtins(template.doc), "name": name}, SiteDoc)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"join: {error}") from error
    if template.names and not fnmatchcase(name, template.names):
        raise InvalidRequest(f"this factory key is for sites called {template.names}, found {name!r}")
    if name == HUB or sites.find(tx, name) is not None:
        raise Conflict(f"the name {name!r} is taken; choose another with --site")
    return doc


def credential(authority: Authority, site: str, key: bytes, *, now_ns: int) -> Envelope:
    """The hub's word on whose a key is, good from now on."""
    return issue_credential(
        authority.private,
        Credential(
            fleet=authority.fleet, site=site, key=key, issued_ns=now_ns,
            expires_ns=now_ns + authority.credential_s * NS_PER_S,
        ),
    )  # fmt: skip


def revoke(tx: Tx, name: str, authority: Authority, *, now_ns: int) -> int:
    """The site is out, and so are invitations for it; the number of the new epoch, which says so to all others.

    With the name of a factory key it is the key that is out, and the sites which came with it stay.

    Raises:
        NotFound: there is neither a site nor an open invitation of this name.
    """
    open_ = tx.run("SELECT COUNT(*) FROM invites WHERE site = ? AND remaining > 0", (name,))[0][0]
    tx.run("UPDATE invites SET remaining = 0 WHERE site = ?", (name,))
    site = sites.find(tx, name)
    if site is None and not open_:
        raise NotFound(f"there is no site {name[:64]!r}; `ondol sites list` shows those that there are")
    audit.note(tx, now_ns, "revoked", name, f"{open_} open invitations")
    if site is not None:
        sites.revoke(tx, name, now_ns)
    if site is not None and site.key is not None:
        # As long as a credential for the key may be around: then nobody takes it any more.
        until_ns = now_ns + (authority.credential_s + ASSERTION_S + 2 * LEEWAY_S) * NS_PER_S
        tx.run(
            "INSERT INTO revoked_keys(key_id, site, until_ns) VALUES(?,?,?) ON CONFLICT(key_id) DO NOTHING",
            (dsse.key_id(site.key), name, until_ns),
        )
    return new_epoch(tx, authority, now_ns=now_ns)


def new_epoch(tx: Tx, authority: Authority, *, now_ns: int) -> int:
    """Issue the list of who is out anew; its number, which is higher than all before it.

    It is also above the time in seconds since 2020: a hub that was restored from an old backup must not issue a
    number that its sites have seen already.
    """
    number = max(newest_number(tx) + 1, (now_ns // NS_PER_S) - 1_577_836_800)
    out = tx.run("SELECT name FROM sites WHERE revoked_ns IS NOT NULL ORDER BY name")
    keys = tx.run("SELECT id FROM fleet_keys WHERE revoked_ns IS NOT NULL ORDER BY id")
    site_keys = tx.run("SELECT key_id FROM revoked_keys WHERE until_ns > ? ORDER BY key_id", (now_ns,))
    envelope = issue_epoch(
        authority.private,
        Epoch(
            fleet=authority.fleet, number=number, issued_ns=now_ns, stale_s=authority.stale_s,
            sites=tuple([row[0] for row in out]), api_keys=tuple([row[0] for row in keys]),
            site_keys=tuple([row[0] for row in site_keys]),
        ),
    )  # fmt: skip
    tx.run("DELETE FROM epochs")
    tx.run(
        "INSERT INTO epochs(number, envelope, issued_ns) VALUES(?,?,?)",
        (number, msgspec.json.encode(envelope), now_ns),
    )
    return number


def current_epoch(tx: Tx, authority: Authority, *, now_ns: int) -> Envelope:
    """The newest list; the first one is made when it is asked for."""
    if not newest_number(tx):
        new_epoch(tx, authority, now_ns=now_ns)
    return newest_epoch(tx)


def newest_epoch(tx: Tx) -> Envelope:
    """The newest list.

    Raises:
        NotFound: there is none yet.
    """
    rows = tx.run("SELECT envelope FROM epochs ORDER BY number DESC LIMIT 1")
    if not rows:
        raise NotFound("no list of who is out was issued yet")
    return msgspec.json.decode(bytes(rows[0][0]), type=Envelope)


def ensure_epoch(tx: Tx, authority: Authority, *, now_ns: int) -> None:
    """There is a list, and it is by the key that this hub has now."""
    try:
        read_epoch(newest_epoch(tx), Trust(fleet=authority.fleet, keys=authority.keys))
    except (NotFound, BadSignature):
        new_epoch(tx, authority, now_ns=now_ns)


def refresh_epoch(tx: Tx, authority: Authority, *, now_ns: int) -> bool:
    """Issue the list again when a fifth of its time is over, so that it never gets stale at a connected site."""
    rows = tx.run("SELECT issued_ns FROM epochs ORDER BY number DESC LIMIT 1")
    if rows and now_ns - int(rows[0][0]) < authority.stale_s * NS_PER_S // 5:
        return False
    new_epoch(tx, authority, now_ns=now_ns)
    return True


def newest_number(tx: Tx) -> int:
    """The number of the newest list; 0 before the first."""
    return int(tx.run("SELECT COALESCE(MAX(number), 0) FROM epochs")[0][0])
