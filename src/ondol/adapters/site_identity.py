"""What makes a data directory a member of a fleet: its key, the hub's word on it, and how the hub is reached.

data/site.key     the private key (Ed25519), made here, never sent, mode 0600; while it joins, data/site.key.new
data/fleet.json   fleet, site, hub, hub keys, CA, credential; mode 0600
data/boot         how often this directory was started
data/tls.key      the key of the site's TLS certificate, data/tls.pem that certificate; where it has an address
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from ondol.adapters.durable import rename_file, replace_file
from ondol.adapters.hub_ca import new_csr
from ondol.adapters.secrets import secret_file
from ondol.core import dsse
from ondol.core.dsse import Envelope
from ondol.core.trust import Credential, Epoch, Trust, authorization, read_credential
from ondol.errors import BadSignature, StateError
from ondol.units import NS_PER_S

REUSE_NS: Final = 60 * NS_PER_S
"""A header is used again for half of its two minutes."""
AUDIENCES_MAX: Final = 256
KEY_BYTES: Final = 32


class Membership(msgspec.Struct, frozen=True, kw_only=True):
    """The content of `fleet.json`."""

    fleet: str
    site: str
    hub_urls: tuple[str, ...]
    hub_keys: dict[str, bytes]
    ca_pem: str
    credential: Envelope
    address: str = ""


class DiskIdentity:
    """Implements `core.ports.SiteIdentity`.  Opening it counts a start of the directory, durably."""

    def __init__(self, data: Path, gateway: str) -> None:
        """Read who this site is.

        Raises:
            StateError: the files are damaged, or the credential is not for this site's key.
        """
        self._data = data
        self.membership = read_membership(data)
        self._private = _own_key(data, self.membership)
        self._gateway = gateway
        self._trust = Trust(fleet=self.membership.fleet, keys=self.membership.hub_keys)
        self._credential = self._read(self.membership.credential)
        self._boot = _count_start(data / "boot")
        self._instance = secrets.token_hex(16)
        self._headers: dict[str, tuple[str, int]] = {}

    @property
    def site(self) -> str:
        """The site's name in the fleet."""
        return self.membership.site

    @property
    def fleet(self) -> str:
        """The fleet that it joined."""
        return self.membership.fleet

    @property
    def gateway(self) -> str:
        """The id of this gateway."""
        return self._gateway

    @property
    def instance(self) -> str:
        """Random, new at every start."""
        return self._instance

    @property
    def boot(self) -> int:
        """How often this data directory was started."""
        return self._boot

    @property
    def credential_ns(self) -> tuple[int, int]:
        """When the present credential was issued and when it expires, in the hub's wall-clock nanoseconds."""
        return self._credential.issued_ns, self._credential.expires_ns

    def trust(self) -> Trust:
        """What this site judges others by, now."""
        return self._trust

    def authorization(self, audience: str, now_ns: int) -> str:
        """The header's value for `audience`; the same one for a minute."""
        known = self._headers.get(audience)
        if known is not None and 0 <= now_ns - known[1] < REUSE_NS:
            return known[0]
        header = authorization(
            self._private, self.membership.credential, site=self.site, audience=audience, now_ns=now_ns
        )
        if len(self._headers) >= AUDIENCES_MAX:
            self._headers.clear()
        self._headers[audience] = header, now_ns
        return header

    def sign(self, payload_type: str, payload: bytes) -> Envelope:
        """The statement, signed with the site's key."""
        return dsse.sign(self._private, payload_type, payload)

    def csr(self) -> bytes:
        """A request for a new TLS certificate, with a new key that waits beside the old one."""
        if not self.membership.address.startswith("https://"):
            return b""
        key, request = new_csr()
        replace_file(self._data / "tls.key.new", key)
        return request

    def keep_credential(
        self, credential: Envelope, *, hub_keys: Mapping[str, bytes], certificate: bytes = b""
    ) -> None:
        """Check the hub's word and use it from now on, durably.

        Raises:
            BadSignature: it is not of this fleet's hub as it is trusted now, or for another site or key.
        """
        found = self._read(credential)
        membership = msgspec.structs.replace(
            self.membership, credential=credential, hub_keys={**self.membership.hub_keys, **hub_keys}
        )
        write_membership(self._data, membership)
        keep_certificate(self._data, certificate)
        self.membership, self._credential = membership, found
        self._trust = msgspec.structs.replace(self._trust, keys=membership.hub_keys)
        self._headers.clear()

    def take_epoch(self, epoch: Epoch) -> None:
        """Judge others by this list from now on."""
        self._trust = msgspec.structs.replace(self._trust, epoch=epoch)

    def _read(self, envelope: Envelope) -> Credential:
        credential = read_credential(envelope, self._trust)
        if (credential.site, credential.key) != (self.site, dsse.public_key(self._private)):
            raise BadSignature(
                f"credential: it is for site {credential.site!r} and another key; expected {self.site!r} and the key "
                f"in {self._data / 'site.key'}"
            )
        return credential


def is_member(data: Path) -> bool:
    """Whether the site with this data directory has joined a fleet."""
    return (data / "fleet.json").exists()


def read_membership(data: Path) -> Membership:
    """The content of `fleet.json`.

    Raises:
        StateError: it is missing or damaged.
    """
    path = data / "fleet.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=Membership)
    except (OSError, msgspec.MsgspecError) as error:
        raise StateError(
            f"{path}: {error}. Join again with a new invitation, or restore the file."
        ) from error


def write_membership(data: Path, membership: Membership) -> None:
    """Replace `fleet.json` at once, durably."""
    replace_file(data / "fleet.json", msgspec.json.format(msgspec.json.encode(membership), indent=1))


def keep_certificate(data: Path, certificate: bytes) -> None:
    """Use a TLS certificate with the key that was made for its request, from the next start of the server on."""
    waiting = data / "tls.key.new"
    if certificate and waiting.exists():
        replace_file(data / "tls.pem", certificate)
        rename_file(waiting, data / "tls.key")


def key_to_join_with(data: Path) -> bytes:
    """The private key of a site that joins: a new one, or that of a try before whose answer never came.

    The key that the site has now, if it is a member already, stays as it is until `become_member`.
    """
    path = data / "site.key.new"
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size != KEY_BYTES:  # a power cut while it was made: nobody has seen it
            path.unlink()
    return secret_file(path)


def become_member(data: Path, membership: Membership) -> None:
    """Use the key that `key_to_join_with` gave, and this membership, from now on: at once, durably.

    The step that counts is the new `fleet.json`; where a power cut comes right after it, the next start does the rest.
    """
    write_membership(data, membership)
    rename_file(data / "site.key.new", data / "site.key")


def _own_key(data: Path, membership: Membership) -> bytes:
    """The private key that the credential is for.

    Raises:
        StateError: it is not here.
    """
    trust = Trust(fleet=membership.fleet, keys=membership.hub_keys)
    try:
        wanted = read_credential(membership.credential, trust).key
    except BadSignature as error:
        raise StateError(
            f"{data / 'fleet.json'}: {error.message}; join again with a new invitation"
        ) from error
    for name in ("site.key", "site.key.new"):
        path = data / name
        with contextlib.suppress(FileNotFoundError):
            private = path.read_bytes()
            if len(private) == KEY_BYTES and dsse.public_key(private) == wanted:
                if name == "site.key.new":
                    rename_file(path, data / "site.key")
                return private
    raise StateError(
        f"{data / 'site.key'}: it is missing, or not the key that this site has joined with. Restore it from where "
        f"{data / 'fleet.json'} is from, or join again with a new invitation: ondol join TOKEN --again"
    )


def _count_start(path: Path) -> int:
    before = 0
    with contextlib.suppress(FileNotFoundError, ValueError):
        before = int(path.read_text())
    replace_file(path, f"{before + 1}\n".encode())
    return before + 1
