"""Signed statements: one envelope for everything that a site must believe without asking the hub.

The form is DSSE (Dead Simple Signing Envelope, v1.0.2, secure-systems-lab): the signature covers the
type of the statement as well as its bytes, so that a statement of one kind never passes for another.
Signatures are Ed25519 (RFC 8032).  There is no choice of algorithm, so none can be confused.

    PAE(type, body) = "DSSEv1" SP LEN(type) SP type SP LEN(body) SP body
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from typing import Final

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from ondol.errors import BadSignature

TYPE_PREFIX: Final = "application/vnd.ondol."
"""Every statement of ours has a type that begins so and ends in its version, `…manifest.v1`."""
TEXT_MAX: Final = 16 * 1024


class Signature(msgspec.Struct, frozen=True, kw_only=True):
    """One signature, base64; `keyid` says which key to try, and proves nothing."""

    sig: str
    keyid: str = ""


class Envelope(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A signed statement in DSSE's JSON form; `payload` is base64."""

    payload_type: str
    payload: str
    signatures: tuple[Signature, ...]


def pae(payload_type: str, payload: bytes) -> bytes:
    """What is signed: DSSE's pre-authentication encoding."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def key_id(public: bytes) -> str:
    """The name of a public key: the first 16 hex digits of the SHA-256 of its 32 bytes."""
    return hashlib.sha256(public).hexdigest()[:16]


def new_private_key() -> bytes:
    """32 random bytes, which are an Ed25519 private key."""
    return Ed25519PrivateKey.generate().private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())


def public_key(private: bytes) -> bytes:
    """The 32 bytes of the public key that belongs to a private one."""
    key = Ed25519PrivateKey.from_private_bytes(private)
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def sign(private: bytes, payload_type: str, payload: bytes) -> Envelope:
    """The statement, signed; about 60 µs."""
    key = Ed25519PrivateKey.from_private_bytes(private)
    signature = key.sign(pae(payload_type, payload))
    keyid = key_id(key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw))
    return Envelope(
        payload_type=payload_type,
        payload=base64.b64encode(payload).decode(),
        signatures=(Signature(sig=base64.b64encode(signature).decode(), keyid=keyid),),
    )


def verify(envelope: Envelope, payload_type: str, keys: Mapping[str, bytes]) -> bytes:
    """The bytes of a statement of this type that one of `keys` (id to public key) has signed; 100 µs.

    Raises:
        BadSignature: another type, a key that we do not trust, or a signature that does not hold.
    """
    if envelope.payload_type != payload_type:
        raise BadSignature(
            f"signed statement: found type {envelope.payload_type[:80]!r}, expected {payload_type!r}"
        )
    try:
        payload = base64.b64decode(envelope.payload, validate=True)
        signatures = [
            (one.keyid, base64.b64decode(one.sig, validate=True)) for one in envelope.signatures[:4]
        ]
    except ValueError as error:
        raise BadSignature("signed statement: its base64 is broken") from error
    for keyid, signature in signatures:
        public = keys.get(keyid)
        if public is None:
            continue
        try:
            Ed25519PublicKey.from_public_bytes(public).verify(signature, pae(payload_type, payload))
        except (InvalidSignature, ValueError):  # ValueError: what is said to be a key is none
            continue
        return payload
    found = ", ".join(keyid[:32] for keyid, _ in signatures) or "none"
    raise BadSignature(
        f"{payload_type}: no good signature by a key that is trusted here (signed by: {found})"
    )


def payload_of(envelope: Envelope) -> bytes:
    """What the envelope says, whoever signed it: for what was checked before.

    Raises:
        BadSignature: its base64 is broken.
    """
    try:
        return base64.b64decode(envelope.payload, validate=True)
    except ValueError as error:
        raise BadSignature("signed statement: its base64 is broken") from error


def to_text(envelope: Envelope) -> str:
    """The envelope as one word of base64url, for a header or to paste."""
    return base64.urlsafe_b64encode(msgspec.json.encode(envelope)).decode().rstrip("=")


def from_text(text: str) -> Envelope:
    """The envelope of such a word.

    Raises:
        BadSignature: the text is no envelope, or longer than 16 KiB.
    """
    if len(text) > TEXT_MAX:
        raise BadSignature(f"signed statement: {len(text)} characters; allowed: at most {TEXT_MAX}")
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        return msgspec.json.decode(raw, type=Envelope)
    except (ValueError, msgspec.MsgspecError) as error:
        raise BadSignature("signed statement: the text is not one") from error
