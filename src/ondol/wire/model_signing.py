"""Model signatures of the OpenSSF (model-signing, v1.0): who vouches for a folder of files, checked by ourselves.

A signature is a Sigstore bundle, JSON with a DSSE envelope around an in-toto statement that lists every file with
its SHA-256.  Only key mode is taken: the certificate modes need a trust root that is refreshed over the Internet.
The keys are ours to choose; what the bundle says of its key is never believed.

Stricter than the reference tool: the form before v1.0 (whose signed text was ambiguous), shards, symbolic links
and paths that the signer wishes ignored beyond the four of git are refused.

Sources: https://github.com/ossf/model-signing-spec, https://github.com/sigstore/protobuf-specs (bundle v0.3),
https://github.com/secure-systems-lab/dsse, https://github.com/in-toto/attestation (statement v1).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping
from typing import Final, TypeVar

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from ondol.core.dsse import pae
from ondol.errors import BadSignature, DigestMismatch, InvalidRequest

BUNDLE_BYTES_MAX: Final = 16 * 1024 * 1024
FILES_MAX: Final = 65_536
PATH_MAX: Final = 1024
MEDIA_TYPES: Final = frozenset(
    {"application/vnd.dev.sigstore.bundle.v0.3+json", "application/vnd.dev.sigstore.bundle+json;version=0.3"}
)
PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "https://model_signing/signature/v1.0"
IGNORED: Final = frozenset({".git", ".gitignore", ".gitattributes", ".github"})
"""What the reference tool leaves out by itself; nothing of it is ever loaded as a model."""
_KEY_BYTES_MAX: Final = 16 * 1024
_HEX: Final = frozenset("0123456789abcdef")

_T = TypeVar("_T")

ModelKey = ec.EllipticCurvePublicKey | Ed25519PublicKey


class _PublicKey(msgspec.Struct):
    hint: str = ""


class _Material(msgspec.Struct, rename="camel"):
    public_key: _PublicKey | None = None


class _Signature(msgspec.Struct):
    sig: str


class _Envelope(msgspec.Struct, rename="camel"):
    payload: str
    payload_type: str
    signatures: list[_Signature]


class _Bundle(msgspec.Struct, rename="camel"):
    media_type: str
    verification_material: _Material
    dsse_envelope: _Envelope


class _Subject(msgspec.Struct):
    name: str
    digest: dict[str, str]


class _Resource(msgspec.Struct):
    name: str
    algorithm: str
    digest: str


class _Serialization(msgspec.Struct):
    method: str
    hash_type: str
    allow_symlinks: bool = False
    ignore_paths: list[str] = []


class _Predicate(msgspec.Struct):
    serialization: _Serialization
    resources: list[_Resource]


class _Statement(msgspec.Struct, rename={"kind": "_type", "predicate_type": "predicateType"}):
    kind: str
    subject: list[_Subject]
    predicate_type: str
    predicate: _Predicate


class SignedFiles(msgspec.Struct, frozen=True, kw_only=True):
    """What the signer vouches for: SHA-256 in hex of every file, by its path in the folder, with `/`."""

    name: str
    files: Mapping[str, str]
    key: str


def load_key(pem: bytes) -> ModelKey:
    """A public key that model signatures are checked with: P-256, P-384 or Ed25519.

    Raises:
        InvalidRequest: the text is no such key.
    """
    try:
        key = load_pem_public_key(pem[:_KEY_BYTES_MAX])
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InvalidRequest("found no public key in PEM form, expected one of P-256 or Ed25519") from error
    if isinstance(key, Ed25519PublicKey):
        return key
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in ("secp256r1", "secp384r1"):
        return key
    raise InvalidRequest(f"found a {type(key).__name__}, expected a key of P-256, P-384 or Ed25519")


def read_bundle(bundle: bytes, keys: Mapping[str, ModelKey]) -> SignedFiles:
    """What is signed, if one of `keys` (by our own name for each) signed it.  `key` says which.

    Raises:
        BadSignature: no such key did, the bundle is of another kind or broken, or it signs what we do not take.
    """
    if len(bundle) > BUNDLE_BYTES_MAX:
        raise BadSignature(f"model signature: {len(bundle)} bytes; at most {BUNDLE_BYTES_MAX}")
    found = _decoded(bundle, _Bundle, "a Sigstore bundle")
    if found.media_type not in MEDIA_TYPES:
        raise BadSignature(
            f"model signature: found {found.media_type[:80]!r}, expected a bundle of version 0.3"
        )
    if found.verification_material.public_key is None:
        raise BadSignature("model signature: found one without a public key's id; sign with `sign key`")
    envelope = found.dsse_envelope
    if envelope.payload_type != PAYLOAD_TYPE or len(envelope.signatures) != 1:
        raise BadSignature(
            f"model signature: found {len(envelope.signatures)} signatures of {envelope.payload_type[:60]!r}, "
            f"expected one of {PAYLOAD_TYPE}"
        )
    try:
        payload = base64.b64decode(envelope.payload, validate=True)
        signature = base64.b64decode(envelope.signatures[0].sig, validate=True)
    except ValueError as error:
        raise BadSignature("model signature: its base64 is broken") from error
    signer = next((name for name, key in keys.items() if _holds(key, signature, payload)), None)
    if signer is None:
        raise BadSignature(
            f"model signature: none of the keys that are trusted here made it ({', '.join(keys) or 'there is none'})"
        )
    return _read_statement(payload, signer)


def _holds(key: ModelKey, signature: bytes, payload: bytes) -> bool:
    signed = pae(PAYLOAD_TYPE, payload)
    try:
        if isinstance(key, Ed25519PublicKey):
            key.verify(signature, signed)
        else:
            # The hash belongs to the curve; a bundle has no say in it.
            key.verify(
                signature, signed, ec.ECDSA(hashes.SHA256() if key.key_size == 256 else hashes.SHA384())
            )
    except InvalidSignature:
        return False
    return True


def _read_statement(payload: bytes, signer: str) -> SignedFiles:
    statement = _decoded(payload, _Statement, "a statement about files")
    if (statement.kind, statement.predicate_type) != (STATEMENT_TYPE, PREDICATE_TYPE):
        raise BadSignature(
            f"model signature: found a statement of {statement.predicate_type[:80]!r}, expected {PREDICATE_TYPE}"
        )
    how = statement.predicate.serialization
    if how.method != "files" or how.hash_type != "sha256" or how.allow_symlinks:
        raise BadSignature(
            f"model signature: made over {how.method[:20]} with {how.hash_type[:20]}, symbolic links "
            f"{'allowed' if how.allow_symlinks else 'refused'}; expected files with sha256, links refused"
        )
    unknown = [path for path in how.ignore_paths if path not in IGNORED and not path.endswith(".sig")]
    if unknown:
        raise BadSignature(f"model signature: it leaves out {unknown[0][:80]!r}; sign without --ignore-paths")
    resources = statement.predicate.resources
    if not 1 <= len(resources) <= FILES_MAX or len(statement.subject) != 1:
        raise BadSignature(f"model signature: found {len(resources)} files, expected 1 to {FILES_MAX}")
    root = hashlib.sha256()
    files: dict[str, str] = {}
    for one in resources:
        _check_resource(one, files)
        root.update(bytes.fromhex(one.digest))
        files[one.name] = one.digest
    if len({name.casefold() for name in files}) != len(files):
        raise BadSignature("model signature: two of its files have names that differ by case alone")
    subject = statement.subject[0]
    if subject.digest.get("sha256") != root.hexdigest():
        raise BadSignature("model signature: the digest of the whole is not that of its files")
    return SignedFiles(name=subject.name[:PATH_MAX], files=files, key=signer)


def _check_resource(one: _Resource, before: Mapping[str, str]) -> None:
    parts = one.name.split("/")
    plain = 0 < len(one.name) <= PATH_MAX and one.name.isprintable() and "\\" not in one.name
    if not plain or any(part in ("", ".", "..") for part in parts) or ":" in parts[0]:
        raise BadSignature(
            f"model signature: found the path {one.name[:80]!r}, expected one inside the folder"
        )
    if one.name in before:
        raise BadSignature(f"model signature: found {one.name[:80]!r} twice")
    if one.algorithm != "sha256" or len(one.digest) != 64 or not _HEX.issuperset(one.digest):
        raise BadSignature(f"model signature: found no SHA-256 of {one.name[:80]!r}")


def compare(signed: SignedFiles, found: Mapping[str, str], *, odd: Iterable[str] = ()) -> None:
    """Hold a folder against its signature.  `found` is the digest of each regular file by its path.

    `odd` are the paths that are no regular files: symbolic links, pipes and devices.  The signature's own file, and
    what git keeps, stand in neither.

    Raises:
        DigestMismatch: a file is missing, changed, not signed, or no file at all.
    """
    for path in odd:
        raise DigestMismatch(
            f"found {path[:200]!r}, which is no regular file (a link?), expected files alone"
        )
    for path, digest in signed.files.items():
        if path not in found:
            raise DigestMismatch(f"the file {path!r} is signed and missing")
        if found[path] != digest:
            raise DigestMismatch(
                f"the file {path!r} is not the one that was signed: it has sha256 {found[path]}"
            )
    extra = sorted(set(found) - set(signed.files))
    if extra:
        raise DigestMismatch(f"found {extra[0][:200]!r}, which nobody signed ({len(extra)} such files)")


def _decoded(raw: bytes, kind: type[_T], what: str) -> _T:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadSignature(f"model signature: not {what} ({str(error)[:200]})") from error
