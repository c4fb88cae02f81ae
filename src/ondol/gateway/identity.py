"""Who asks: from the `Authorization` header, and a snapshot of the keys, to a principal.

Whoever does not prove to hold a key's secret learns nothing: a bad form, an unknown id and a wrong secret
get one and the same message, after the same work.  Whoever does may learn that the key has expired or
was revoked.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from hmac import compare_digest
from typing import Final, NoReturn
from urllib.parse import unquote

import msgspec

from ondol.core.apikeys import mac, make_key, parse_key
from ondol.core.identity import ApiKey, Origin, Principal
from ondol.core.trust import LEEWAY_S, SCHEME, Trust, prove_site
from ondol.errors import ExpiredApiKey, Forbidden, InvalidRequest, RevokedApiKey, Unauthenticated
from ondol.units import NS_PER_S

__all__ = [
    "Authenticator",
    "FleetTrust",
    "authenticate",
    "authenticate_peer",
    "mac",
    "make_key",
    "on_behalf",
    "parse_key",
]

PROOFS_MAX: Final = 4096
HOPS_MAX: Final = 8
"""Longer ways through sites are loops."""

SITE_KEY: Final = "site:"
"""The key id of a peer that proved itself by its credential begins so; no API key's does."""

_MESSAGE: Final = (
    "No valid API key came with this request. Send `Authorization: Bearer ondol_...` with a key that "
    "`ondol keys create` has made."
)
_DUMMY_MAC: Final = b"\0" * 32
_HEADER_MAX: Final = 1024
_NAME_MAX: Final = 128


class FleetTrust(msgspec.Struct, frozen=True, kw_only=True):
    """What a joined site lets others in by; a new value after every change of it.

    `keys` are the fleet's own, their HMACs under `pepper`.  `offset_ns` is what the hub's clock is ahead of ours.
    """

    site: str
    trust: Trust
    keys: Mapping[str, ApiKey] = {}
    pepper: bytes = b""
    offset_ns: int = 0


def authenticate(
    authorization: str | None,
    keys: Mapping[str, ApiKey],
    pepper: bytes,
    wall_ns: int,
    fleet: FleetTrust | None = None,
) -> Principal:
    """The principal of a good key, of this site or of its fleet.

    Raises:
        Unauthenticated: no key, or none of ours, always with the same message.
        ExpiredApiKey, RevokedApiKey: the key was good once, and the caller has its secret.
    """
    if authorization is None or authorization[:7].lower() != "bearer ":
        raise Unauthenticated(_MESSAGE)
    parsed = parse_key(authorization[7:].strip())
    if parsed is None:
        raise Unauthenticated(_MESSAGE)
    key_id, secret = parsed
    key = keys.get(key_id)
    if key is None and fleet is not None:
        key, pepper = _fleet_key(key_id, fleet), fleet.pepper
    # An unknown id costs what a wrong secret costs, so that ids cannot be found by timing.
    proved = compare_digest(mac(pepper, secret), _DUMMY_MAC if key is None else key.mac)
    if key is None or not proved:
        raise Unauthenticated(_MESSAGE)
    if key.revoked_ns is not None:
        raise RevokedApiKey(f"The API key {key.id} was revoked. Ask an administrator for a new one.")
    if key.expires_ns is not None and wall_ns >= key.expires_ns:
        raise ExpiredApiKey(f"The API key {key.id} has expired. Ask an administrator for a new one.")
    return Principal(
        key_id=key.id,
        tenant=key.tenant,
        team=key.team,
        kind=key.kind,
        routes=key.routes,
        requests_per_min=key.requests_per_min,
        tokens_per_min=key.tokens_per_min,
    )


def _fleet_key(key_id: str, fleet: FleetTrust) -> ApiKey | None:
    """A key of the fleet; one that the newest list of who is out names is none."""
    epoch = fleet.trust.epoch
    return None if epoch is not None and key_id in epoch.api_keys else fleet.keys.get(key_id)


def authenticate_peer(header: str, fleet: FleetTrust, wall_ns: int) -> tuple[Principal, int]:
    """The principal of another site of the fleet, verified without the hub, and until when by our wall clock; 250 µs.

    Raises:
        Unauthenticated: it proves nothing, is out, or our list of who is out is too old to say (P4).
    """
    now_ns, epoch = wall_ns + fleet.offset_ns, fleet.trust.epoch
    if epoch is None or epoch.stale(now_ns):
        raise Unauthenticated(
            "this site's list of revoked sites is too old, so it lets no other site in until its hub is reached again"
        )
    if now_ns < epoch.issued_ns - LEEWAY_S * NS_PER_S:
        raise Unauthenticated(
            "this site's clock is behind its list of revoked sites, so it lets no other site in; set its clock"
        )
    credential, until_ns = prove_site(header, fleet.trust, audience=fleet.site, now_ns=now_ns)
    principal = Principal(key_id=SITE_KEY + credential.site, tenant="default", team="default", kind="peer")
    return principal, min(until_ns, epoch.issued_ns + epoch.stale_s * NS_PER_S) - fleet.offset_ns


class Authenticator:
    """`authenticate`, with good proofs remembered until any key changes.

    A proof is remembered by a keyed hash of the header, never by the header.  Bounded; owned by the
    pipeline.  A remembered proof takes 1.2 us, a new one 5.
    """

    def __init__(self, pepper: bytes) -> None:
        self._pepper = pepper
        self._keys: Mapping[str, ApiKey] = {}
        self._fleet: FleetTrust | None = None
        self._proved: dict[bytes, tuple[Principal, int, int | None]] = {}

    def principal(
        self,
        authorization: str | None,
        keys: Mapping[str, ApiKey],
        wall_ns: int,
        fleet: FleetTrust | None = None,
    ) -> Principal:
        """The principal of a good key, or of another site; `keys` and `fleet` are new values after every change.

        Raises:
            Unauthenticated: as `authenticate` and `authenticate_peer` do.
        """
        if keys is not self._keys or fleet is not self._fleet:
            self._keys, self._fleet, self._proved = keys, fleet, {}
        name = blake2b((authorization or "").encode(), key=self._pepper, digest_size=16).digest()
        known = self._proved.get(name)
        # From when, as well: a clock that is set back revives no proof.
        if known is not None and known[1] <= wall_ns and (known[2] is None or wall_ns < known[2]):
            return known[0]
        until_ns: int | None
        if fleet is not None and authorization is not None and authorization[: len(SCHEME)].lower() == SCHEME:
            principal, until_ns = authenticate_peer(authorization, fleet, wall_ns)
        else:
            principal = authenticate(authorization, keys, self._pepper, wall_ns, fleet)
            key = keys.get(principal.key_id) or (fleet.keys[principal.key_id] if fleet is not None else None)
            until_ns = None if key is None else key.expires_ns
        if len(self._proved) >= PROOFS_MAX:
            self._proved.clear()
        self._proved[name] = principal, wall_ns, until_ns
        return principal


def on_behalf(principal: Principal, *, origin: str | None, hops: str | None, behalf: str | None) -> Principal:
    """The principal as another site of ours describes it, from three request headers.

    `x-ondol-origin: <site>;<request id>;<attempt>`, `x-ondol-hops: <site>,<site>` and
    `x-ondol-on-behalf: tenant=<name>;team=<name>`, values percent-encoded.  Only a key of kind `peer` may
    say so: for all others, and without an origin, the headers mean nothing.

    Raises:
        InvalidRequest: a peer's header is malformed, too long, or names too many hops.
    """
    if principal.kind != "peer" or origin is None:
        return principal
    tenant, team = _tenant_and_team(behalf)
    named = _origin(origin, hops)
    if principal.key_id.startswith(SITE_KEY) and named.site != principal.key_id.removeprefix(SITE_KEY):
        raise Forbidden(
            f"x-ondol-origin says site {named.site!r}, and the credential is of "
            f"{principal.key_id.removeprefix(SITE_KEY)!r}: a site speaks in its own name only"
        )
    return msgspec.structs.replace(
        principal,
        tenant=principal.tenant if tenant is None else tenant,
        team=principal.team if team is None else team,
        origin=named,
    )


def _origin(origin: str, hops: str | None) -> Origin:
    parts = _split(origin, ";", "x-ondol-origin")
    if len(parts) != 3 or not (parts[2].isascii() and parts[2].isdecimal() and len(parts[2]) <= 6):
        _malformed("x-ondol-origin", "<site>;<request id>;<attempt>")
    sites = _split(hops, ",", "x-ondol-hops") if hops else ()
    if len(sites) > HOPS_MAX:
        _malformed("x-ondol-hops", f"at most {HOPS_MAX} sites: this request goes round in a loop")
    return Origin(site=parts[0], request_id=parts[1], attempt=int(parts[2]), hops=sites)


def _tenant_and_team(behalf: str | None) -> tuple[str | None, str | None]:
    found: dict[str, str] = {}
    if behalf is not None:
        for part in _split(behalf, ";", "x-ondol-on-behalf", decode=False):
            name, equals, value = part.partition("=")
            name = name.strip()
            if not equals or name not in ("tenant", "team") or name in found:
                _malformed("x-ondol-on-behalf", "tenant=<name>;team=<name>")
            found[name] = _name(value.strip(), "x-ondol-on-behalf")
    return found.get("tenant"), found.get("team")


def _split(text: str, separator: str, header: str, *, decode: bool = True) -> tuple[str, ...]:
    if len(text) > _HEADER_MAX:
        _malformed(header, f"at most {_HEADER_MAX} characters")
    parts = [part.strip() for part in text.split(separator)]
    return tuple([_name(part, header) for part in parts]) if decode else tuple(parts)


def _name(text: str, header: str) -> str:
    try:
        name = unquote(text, errors="strict")
    except UnicodeDecodeError:
        _malformed(header, "percent-encoded UTF-8")
    if not 0 < len(name) <= _NAME_MAX or not name.isprintable():
        _malformed(header, f"names of 1 to {_NAME_MAX} printable characters")
    return name


def _malformed(header: str, expected: str) -> NoReturn:
    message = f"The header {header} of a peer site is malformed; expected {expected}."
    raise InvalidRequest(message, param=header)
