"""The token that a person carries to a new site: `ondoljoin_<id>_<secret><crc>.<address>`.

The first part has the form of an API key (`core/apikeys.py`): an id, 256 random bits and a checksum, so that a
typing error is seen at once.  The address part is base64url JSON: where the hub is, and the SHA-256 of its CA
certificate, so that a site knows the hub before it sends the secret.  The hub keeps an HMAC of the secret only.
"""

from __future__ import annotations

import base64
from typing import Final
from zlib import crc32

import msgspec

from ondol.core.apikeys import CRC_LENGTH, SECRET_LENGTH, base62
from ondol.errors import InvalidRequest

PREFIX: Final = "ondoljoin_"
TEXT_MAX: Final = 4096
MINUTES: Final = 15
"""How long a single-use token is good."""


class HubPlace(msgspec.Struct, frozen=True, kw_only=True):
    """Where the hub is: its addresses, tried in turn, and the SHA-256 of its CA certificate (DER), in hex."""

    urls: tuple[str, ...]
    ca: str


class Invite(msgspec.Struct, frozen=True, kw_only=True):
    """A token, taken apart."""

    id: str
    secret: str
    hub: HubPlace

    @property
    def proof(self) -> str:
        """The part that goes to the hub."""
        return _head(self.id, self.secret)


def make_token(invite_id: str, secret: str, hub: HubPlace) -> str:
    """The token as its carrier gets it; `secret` as `core.apikeys.secret_text` makes it."""
    place = base64.urlsafe_b64encode(msgspec.json.encode(hub)).decode().rstrip("=")
    return f"{_head(invite_id, secret)}.{place}"


def parse_token(text: str) -> Invite:
    """The token, taken apart.

    Raises:
        InvalidRequest: it is none, or was not copied whole.
    """
    head, _, place = text.strip().partition(".")
    invite_id, secret = parse_proof(head)
    try:
        raw = base64.b64decode(place + "=" * (-len(place) % 4), altchars=b"-_", validate=True)
        hub = msgspec.json.decode(raw, type=HubPlace)
    except (ValueError, msgspec.MsgspecError) as error:
        raise InvalidRequest("the token's address part is damaged: copy the whole line again") from error
    if not hub.urls or not all(url.startswith("https://") for url in hub.urls):
        raise InvalidRequest("the token names no https address of a hub: ask for a new one")
    return Invite(id=invite_id, secret=secret, hub=hub)


def parse_proof(head: str) -> tuple[str, str]:
    """(id, secret) of the part that goes to the hub.

    Raises:
        InvalidRequest: it is none.
    """
    invite_id, _, rest = head[len(PREFIX) : TEXT_MAX].partition("_")
    secret, crc = rest[:SECRET_LENGTH], rest[SECRET_LENGTH:]
    whole = (invite_id + rest).isascii() and invite_id.isalnum() and rest.isalnum()
    if (
        not head.startswith(PREFIX)
        or not whole
        or len(secret) != SECRET_LENGTH
        or _crc(invite_id, secret) != crc
    ):
        raise InvalidRequest(
            f"this is no invitation: expected a text that begins with {PREFIX}, as `ondol sites invite` prints it; "
            "copy the whole line again"
        )
    return invite_id, secret


def _head(invite_id: str, secret: str) -> str:
    return f"{PREFIX}{invite_id}_{secret}{_crc(invite_id, secret)}"


def _crc(invite_id: str, secret: str) -> str:
    return base62(crc32(f"{PREFIX}{invite_id}_{secret}".encode()), CRC_LENGTH)
