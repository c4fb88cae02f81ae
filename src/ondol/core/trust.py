"""Who a site is, and who is one no longer: what the hub signs, and what a site signs for itself.

A site makes its own Ed25519 key, which never leaves it.  The hub's **credential** says which site the key
belongs to, for some days.  With it the site signs an **assertion** for one audience (the hub, or one other
site), good for two minutes: so what one site is shown is of no use to it at another.  Both go in one header:

    authorization: Ondol-Site <credential>~<assertion>

A **revocation epoch** is the hub's whole list of who is out.  Its number only rises; the highest one seen
counts, and one that is older than its staleness limit lets no other site in.

All times are wall-clock nanoseconds, as the hub sees them: a site adds its measured offset before it asks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeVar

import msgspec

from ondol.core import dsse
from ondol.core.dsse import Envelope
from ondol.errors import BadSignature, Unauthenticated
from ondol.units import NS_PER_S

_T = TypeVar("_T")

CREDENTIAL_TYPE: Final = dsse.TYPE_PREFIX + "credential.v1"
ASSERTION_TYPE: Final = dsse.TYPE_PREFIX + "assertion.v1"
EPOCH_TYPE: Final = dsse.TYPE_PREFIX + "revocations.v1"
SCHEME: Final = "ondol-site "
HUB: Final = "hub"
"""The audience of what a site says to its hub; no site may have this name."""

ASSERTION_S: Final = 120
LEEWAY_S: Final = 60
"""How far the clocks of two sites may be apart, after both have added their offsets."""


class Credential(msgspec.Struct, frozen=True, kw_only=True):
    """The hub's word on whose a key is.  `key` is the raw Ed25519 public key."""

    fleet: str
    site: str
    key: bytes
    issued_ns: int
    expires_ns: int


class Assertion(msgspec.Struct, frozen=True, kw_only=True):
    """A site's own word: it is I who speak to `audience`, until `expires_ns`."""

    site: str
    audience: str
    issued_ns: int
    expires_ns: int


class Epoch(msgspec.Struct, frozen=True, kw_only=True):
    """Who is out: names of sites and ids of API keys.  `stale_s`: how long after `issued_ns` it counts.

    `site_keys` are the ids (`dsse.key_id`) of sites' keys that are out while a credential for them may still be
    around: a site that was revoked and joined again is not out by its name any more, but its old machine is.
    """

    fleet: str
    number: int
    issued_ns: int
    stale_s: int
    sites: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    site_keys: tuple[str, ...] = ()

    def stale(self, now_ns: int) -> bool:
        """Whether it is too old to let anybody in."""
        return now_ns > self.issued_ns + self.stale_s * NS_PER_S

    def names(self, credential: Credential) -> bool:
        """Whether the site, or the key that it shows, is out."""
        return credential.site in self.sites or dsse.key_id(credential.key) in self.site_keys


class Trust(msgspec.Struct, frozen=True, kw_only=True):
    """What a site or a hub needs in order to judge another site: the fleet, the hub's keys, who is out."""

    fleet: str
    keys: Mapping[str, bytes]
    epoch: Epoch | None = None


def issue_credential(private: bytes, credential: Credential) -> Envelope:
    """The hub signs whose a key is."""
    return dsse.sign(private, CREDENTIAL_TYPE, msgspec.json.encode(credential))


def issue_epoch(private: bytes, epoch: Epoch) -> Envelope:
    """The hub signs who is out."""
    return dsse.sign(private, EPOCH_TYPE, msgspec.json.encode(epoch))


def read_credential(envelope: Envelope, trust: Trust) -> Credential:
    """The hub's word, checked; its expiry is not looked at.

    Raises:
        BadSignature: not signed by this fleet's hub, or of another fleet.
    """
    credential = _decode(dsse.verify(envelope, CREDENTIAL_TYPE, trust.keys), Credential)
    if credential.fleet != trust.fleet:
        raise BadSignature(f"credential: found fleet {credential.fleet[:64]!r}, expected {trust.fleet!r}")
    return credential


def read_epoch(envelope: Envelope, trust: Trust) -> Epoch:
    """The hub's list of who is out, checked: it must be of this fleet, and never older than the one known.

    Raises:
        BadSignature: not this hub's, of another fleet, or a lower number than the one that is known.
    """
    epoch = _decode(dsse.verify(envelope, EPOCH_TYPE, trust.keys), Epoch)
    if epoch.fleet != trust.fleet:
        raise BadSignature(f"revocations: found fleet {epoch.fleet[:64]!r}, expected {trust.fleet!r}")
    if trust.epoch is not None and epoch.number < trust.epoch.number:
        raise BadSignature(
            f"revocations: found epoch {epoch.number}, and {trust.epoch.number} is known already"
        )
    return epoch


def authorization(private: bytes, credential: Envelope, *, site: str, audience: str, now_ns: int) -> str:
    """The header's value with which `site` speaks to `audience`; good for two minutes, 70 µs to make."""
    assertion = Assertion(
        site=site, audience=audience, issued_ns=now_ns, expires_ns=now_ns + ASSERTION_S * NS_PER_S
    )
    proof = dsse.sign(private, ASSERTION_TYPE, msgspec.json.encode(assertion))
    return f"Ondol-Site {dsse.to_text(credential)}~{dsse.to_text(proof)}"


def authenticate_site(
    header: str, trust: Trust, *, audience: str, now_ns: int, expired_ok: bool = False
) -> Credential:
    """Which site speaks, from its `authorization` header; 250 µs, so remember the answer for its time.

    `expired_ok` is for the hub, which looks the key up in its own table: a site that was away for longer than its
    credential lives must be able to come back.

    Raises:
        Unauthenticated: the header proves nothing; the message says which part of it.
    """
    return prove_site(header, trust, audience=audience, now_ns=now_ns, expired_ok=expired_ok)[0]


def prove_site(
    header: str, trust: Trust, *, audience: str, now_ns: int, expired_ok: bool = False
) -> tuple[Credential, int]:
    """`authenticate_site`, and until when this header is good, in the hub's wall-clock nanoseconds.

    Raises:
        Unauthenticated: as `authenticate_site` does.
    """
    words = header[len(SCHEME) :].strip().partition("~")
    if not header.lower().startswith(SCHEME) or not words[1]:
        raise Unauthenticated("expected `authorization: Ondol-Site <credential>~<assertion>`")
    try:
        credential = read_credential(dsse.from_text(words[0]), trust)
        signer = {dsse.key_id(credential.key): credential.key}
        assertion = _decode(dsse.verify(dsse.from_text(words[2]), ASSERTION_TYPE, signer), Assertion)
    except BadSignature as error:
        raise Unauthenticated(error.message) from error
    if assertion.site != credential.site or assertion.audience != audience:
        raise Unauthenticated(
            f"the assertion is of {assertion.site[:64]!r} for {assertion.audience[:64]!r}; expected "
            f"{credential.site!r} for {audience!r}"
        )
    leeway = LEEWAY_S * NS_PER_S
    if assertion.expires_ns - assertion.issued_ns > ASSERTION_S * NS_PER_S:
        # A key that was stolen for a moment must not have made proofs for next year.
        raise Unauthenticated(f"the assertion is good for too long; allowed: at most {ASSERTION_S} s")
    if not assertion.issued_ns - leeway <= now_ns <= assertion.expires_ns + leeway:
        off_s = (now_ns - assertion.issued_ns) / NS_PER_S
        raise Unauthenticated(
            f"the assertion was made {off_s:+.0f} s from now; allowed: {ASSERTION_S} s. Check both clocks."
        )
    if not expired_ok and now_ns > credential.expires_ns + leeway:
        raise Unauthenticated(
            f"the credential of {credential.site} has expired; the hub renews it when reached"
        )
    if trust.epoch is not None and trust.epoch.names(credential):
        raise Unauthenticated(f"site {credential.site} was revoked (epoch {trust.epoch.number})")
    good_until_ns = assertion.expires_ns + leeway
    return credential, good_until_ns if expired_ok else min(good_until_ns, credential.expires_ns + leeway)


def _decode(payload: bytes, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(payload, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadSignature(f"signed statement: not a {kind.__name__.lower()} ({error})") from error
