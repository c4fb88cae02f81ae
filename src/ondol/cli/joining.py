"""The network part of joining: know the hub by its fingerprint first, then show it the token."""

from __future__ import annotations

import http.client
import ssl
import time
from contextlib import closing
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from ondol import __version__
from ondol.adapters.durable import replace_file
from ondol.adapters.hub_ca import fingerprint_of, first_second, new_csr, only_certificate
from ondol.adapters.site_identity import Membership, become_member, keep_certificate, key_to_join_with
from ondol.adapters.site_memory import FILE, SqliteSiteMemory
from ondol.cli.installation import CommandFailed
from ondol.core import dsse
from ondol.core.invites import Invite
from ondol.core.trust import Trust, read_credential, read_epoch
from ondol.errors import OndolError, StateError
from ondol.net.dial import NO_CHECK_TIME, Proxy, pinned
from ondol.wire import sync

TIMEOUT_S: Final = 20.0
CA_MAX: Final = 64 * 1024
REPLY_MAX: Final = 16 * 1024 * 1024
"""The list of who is out may name thousands."""


def join(
    data: Path, invite: Invite, *, site: str = "", address: str = "", proxy: str | None = None
) -> sync.JoinReply:
    """Join the fleet that a token invites to, with the data directory of a site; it is a member afterwards.

    Raises:
        CommandFailed: no hub of the token was reached, it is not the one that the token is from, or it says no.
    """
    try:
        via = None if proxy is None else Proxy.of(proxy)
    except ValueError as error:
        raise CommandFailed(f"hub.proxy: {error}") from error
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    private = key_to_join_with(data)
    csr = b""
    if address.startswith("https://"):
        key, csr = new_csr()
        replace_file(data / "tls.key.new", key)
    message = sync.Join(
        token=invite.proof, key=dsse.public_key(private), site=site, address=address, csr=csr,
        software=f"ondol {__version__}",
    )  # fmt: skip
    tried = []
    for url in invite.hub.urls:
        try:
            ca_pem = _known_ca(_Way(url, via), invite.hub.ca)
            reply = _ask(_Way(url, via), ca_pem, message)
        except (OSError, http.client.HTTPException) as error:
            tried.append(f"{url}: {str(error) or type(error).__name__}")
            continue
        _check(reply, private)
        with closing(SqliteSiteMemory(data / FILE)) as memory:
            memory.begin_anew(reply.epoch, hub_ns=reply.hub_ns)
        keep_certificate(data, reply.certificate)
        membership = Membership(
            fleet=reply.fleet, site=reply.site, hub_urls=invite.hub.urls, hub_keys=reply.hub_keys,
            ca_pem=ca_pem.decode("ascii"), credential=reply.credential, address=address,
        )  # fmt: skip
        become_member(data, membership)
        return reply
    raise CommandFailed("no hub of this invitation was reached: " + "; ".join(tried))


class _Way(NamedTuple):
    """How the hub is reached."""

    url: str
    proxy: Proxy | None


def _known_ca(way: _Way, fingerprint: str) -> bytes:
    """The hub's CA, if it is the one that the token names.  Nothing secret is sent before this holds."""
    blind = ssl.create_default_context()
    blind.minimum_version = ssl.TLSVersion.TLSv1_3
    blind.check_hostname = False
    blind.verify_mode = ssl.CERT_NONE
    status, ca_pem = _request(way, blind, "/v1/hub/ca", None, most=CA_MAX)
    try:
        found = fingerprint_of(ca_pem) if status == 200 else "none"
    except StateError:
        found = "none"
    if found != fingerprint:
        raise CommandFailed(
            f"{way.url} is not the hub that this invitation is from: its CA has the fingerprint {found[:16]}…, "
            f"expected {fingerprint[:16]}…. Something between (a proxy that opens TLS?) answers in its place; "
            "nothing was sent."
        )
    return only_certificate(ca_pem)


def _ask(way: _Way, ca_pem: bytes, message: sync.Join) -> sync.JoinReply:
    tls = pinned(ca_pem.decode("ascii"))
    if time.time() < first_second(ca_pem):
        # A machine without a battery starts in 1970.  The chain and the name are checked all the same.
        tls.verify_flags |= ssl.VerifyFlags(NO_CHECK_TIME)
    try:
        status, payload = _request(way, tls, "/v1/sync/join", sync.encode(message), most=REPLY_MAX)
    except ssl.SSLCertVerificationError as error:
        raise CommandFailed(
            f"{way.url}: its certificate is refused ({error.verify_message}). A proxy that opens TLS cannot be used. "
            f"This machine's clock says {time.strftime('%Y-%m-%d %H:%M')}; a hub renews its certificate when it is "
            "restarted"
        ) from error
    if status != 200:
        try:
            said = sync.decode(payload, sync.Error).message
        except OndolError:
            said = f"it answered {status}"
        raise CommandFailed(f"the hub at {way.url} says no: {said}")
    return sync.decode(payload, sync.JoinReply)


def _request(
    way: _Way, tls: ssl.SSLContext, path: str, body: bytes | None, *, most: int
) -> tuple[int, bytes]:
    """(status, body) of a GET, or of a POST where there is a body."""
    parts, proxy = urlsplit(way.url), way.proxy
    host, port = parts.hostname or "", parts.port or 443
    if proxy is None:
        connection = http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=tls)
    else:
        connection = http.client.HTTPSConnection(proxy.host, proxy.port, timeout=TIMEOUT_S, context=tls)
        known = {"Proxy-Authorization": proxy.authorization} if proxy.authorization else {}
        connection.set_tunnel(host, port, headers=known)
    try:
        connection.request(
            "GET" if body is None else "POST", path, body=body, headers={"content-type": sync.CONTENT_TYPE}
        )
        reply = connection.getresponse()
        return reply.status, reply.read(most)
    finally:
        connection.close()


def _check(reply: sync.JoinReply, private: bytes) -> None:
    trust = Trust(fleet=reply.fleet, keys=reply.hub_keys)
    credential = read_credential(reply.credential, trust)
    read_epoch(reply.epoch, trust)
    if (credential.site, credential.key) != (reply.site, dsse.public_key(private)):
        raise CommandFailed("the hub's credential is not for the key of this site; is it the right hub?")
