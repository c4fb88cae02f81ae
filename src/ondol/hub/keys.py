"""API keys of the fleet: made at the hub, known at every site as HMACs.  Pure over a transaction.

The secret is shown once and kept nowhere.  Its HMAC is under the fleet's pepper, which the sites get with it, so
that a key works at every site that has a route for it, and also while the hub is away.  A revoked key is named in
the next epoch, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random
from typing import Final

import msgspec

from ondol.core import apikeys
from ondol.core.catalog import RouteDoc
from ondol.core.identity import ApiKey
from ondol.core.ports import Tx
from ondol.errors import InvalidRequest, NotFound

SCHEMA: Final[tuple[str, ...]] = (
    "CREATE TABLE fleet_keys(id TEXT NOT NULL PRIMARY KEY, body BLOB NOT NULL, created_ns BIGINT NOT NULL,"
    " revoked_ns BIGINT)",
)
KEYS_MAX: Final = 10_000


class NewFleetKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a new key shall be; `admin` keys are a site's own and are not made here."""

    name: str = ""
    tenant: str = "default"
    team: str = "default"
    routes: tuple[str, ...] = ()
    expires_ns: int | None = None
    requests_per_min: int | None = None
    tokens_per_min: int | None = None


def create(tx: Tx, wanted: NewFleetKey, pepper: bytes, *, rng: Random, now_ns: int) -> tuple[ApiKey, str]:
    """Make and store a key; the record, and the text that is shown once.

    Raises:
        InvalidRequest: the expiry is over already, or there are too many keys.
    """
    if wanted.expires_ns is not None and wanted.expires_ns <= now_ns:
        raise InvalidRequest("the key would have expired already", param="expires_ns")
    if int(tx.run("SELECT COUNT(*) FROM fleet_keys")[0][0]) >= KEYS_MAX:
        raise InvalidRequest(f"there are {KEYS_MAX} keys; revoke and prune some")
    key_id = apikeys.base62(rng.getrandbits(64), apikeys.ID_LENGTH)
    secret = apikeys.secret_text(rng.randbytes(32))
    key = ApiKey(
        id=key_id, mac=apikeys.mac(pepper, secret), tenant=wanted.tenant, team=wanted.team, name=wanted.name,
        routes=wanted.routes, created_ns=now_ns, expires_ns=wanted.expires_ns,
        requests_per_min=wanted.requests_per_min, tokens_per_min=wanted.tokens_per_min, fleet=True,
    )  # fmt: skip
    tx.run(
        "INSERT INTO fleet_keys(id, body, created_ns) VALUES(?,?,?)",
        (key_id, msgspec.json.encode(key), now_ns),
    )
    return key, apikeys.make_key(key_id, secret)


def revoke(tx: Tx, key_id: str, now_ns: int) -> None:
    """The key is out; issue a new epoch after it.

    Raises:
        NotFound: there is no such key.
    """
    rows = tx.run("SELECT body FROM fleet_keys WHERE id = ?", (key_id,))
    if not rows:
        raise NotFound(f"the fleet has no key {key_id[:64]!r}; a key that a site made is revoked there")
    key = msgspec.json.decode(bytes(rows[0][0]), type=ApiKey)
    if key.revoked_ns is None:
        key = msgspec.structs.replace(key, revoked_ns=now_ns)
        tx.run(
            "UPDATE fleet_keys SET body = ?, revoked_ns = ? WHERE id = ?",
            (msgspec.json.encode(key), now_ns, key_id),
        )


def everything(tx: Tx) -> list[ApiKey]:
    """All keys, revoked ones too, oldest first."""
    rows = tx.run("SELECT body FROM fleet_keys ORDER BY created_ns, id")
    return [msgspec.json.decode(bytes(row[0]), type=ApiKey) for row in rows]


def useful(keys: Iterable[ApiKey], routes: Sequence[RouteDoc]) -> tuple[ApiKey, ...]:
    """Those that may ask some route of a site: it is told of no other."""
    return tuple([key for key in keys if any(_may_ask(key, route) for route in routes)])


def _may_ask(key: ApiKey, route: RouteDoc) -> bool:
    return (not key.routes or route.name in key.routes) and (not route.teams or key.team in route.teams)


def good(tx: Tx, now_ns: int) -> tuple[ApiKey, ...]:
    """The keys that some site may know: neither revoked nor expired."""
    return tuple(
        [
            key
            for key in everything(tx)
            if key.revoked_ns is None and (key.expires_ns is None or key.expires_ns > now_ns)
        ]
    )
