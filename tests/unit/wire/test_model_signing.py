"""Model signatures: the reference tool's own is accepted, and nothing that differs from it in a bit that matters."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from ondol.adapters.signed_folder import verify_folder, vouched
from ondol.core.dsse import pae
from ondol.errors import BadSignature, DigestMismatch, InvalidRequest, NotFound
from ondol.wire.model_signing import ModelKey, compare, load_key, read_bundle

DATA = Path(__file__).parent.parent.parent / "data" / "model_signing"
RECORDED = (DATA / "model.sig").read_bytes()
RECORDED_KEYS: dict[str, ModelKey] = {"maker": load_key((DATA / "key.pub").read_bytes())}
P256 = ec.generate_private_key(ec.SECP256R1())
P384 = ec.generate_private_key(ec.SECP384R1())
EDWARDS = Ed25519PrivateKey.generate()
FILES = {"a/b.json": b"{}", "w.gguf": b"weights"}


def pem(key: Any) -> bytes:
    return bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


KEYS: dict[str, ModelKey] = {
    "p256": load_key(pem(P256)),
    "p384": load_key(pem(P384)),
    "ed": load_key(pem(EDWARDS)),
}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def statement(files: dict[str, bytes] | None = None) -> dict[str, Any]:
    found = FILES if files is None else files
    resources = [{"name": n, "algorithm": "sha256", "digest": digest(d)} for n, d in sorted(found.items())]
    root = hashlib.sha256(b"".join(bytes.fromhex(one["digest"]) for one in resources)).hexdigest()
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "m", "digest": {"sha256": root}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {
            "resources": resources,
            "serialization": {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": [".git"]},
        },
    }  # fmt: skip


def sign(payload: bytes, key: Any = P256) -> bytes:
    if isinstance(key, Ed25519PrivateKey):
        return key.sign(pae("application/vnd.in-toto+json", payload))
    hashed = hashes.SHA256() if key.curve.key_size == 256 else hashes.SHA384()
    return bytes(key.sign(pae("application/vnd.in-toto+json", payload), ec.ECDSA(hashed)))


def bundle(
    said: Any = None, key: Any = P256, change: Callable[[dict[str, Any]], None] | None = None
) -> bytes:
    payload = said if isinstance(said, bytes) else json.dumps(statement() if said is None else said).encode()
    made = {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": {"publicKey": {"hint": digest(pem(key))}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(), "payloadType": "application/vnd.in-toto+json",
            "signatures": [{"sig": base64.b64encode(sign(payload, key)).decode(), "keyid": ""}],
        },
    }  # fmt: skip
    if change is not None:
        change(made)
    return json.dumps(made).encode()


def test_the_reference_tools_own_signature_is_accepted() -> None:
    signed = verify_folder(DATA / "model", DATA / "model.sig", RECORDED_KEYS)
    assert (signed.name, signed.key, sorted(signed.files)) == (
        "model",
        "maker",
        ["tokenizer/vocab.json", "weights.gguf"],
    )
    weights = DATA / "model" / "weights.gguf"
    assert vouched(signed, DATA / "model", weights) == f"sha256:{digest(weights.read_bytes())}"
    with pytest.raises(BadSignature, match="does not cover"):
        vouched(signed, DATA / "model", DATA / "key.pub")


@pytest.mark.parametrize(("key", "name"), [(P256, "p256"), (P384, "p384"), (EDWARDS, "ed")])
def test_each_kind_of_key_is_taken_and_its_name_is_ours(key: Any, name: str) -> None:
    signed = read_bundle(bundle(key=key), KEYS)
    assert signed.key == name
    assert signed.files == {path: digest(data) for path, data in FILES.items()}


def test_a_key_that_is_not_trusted_signs_nothing() -> None:
    with pytest.raises(BadSignature, match="none of the keys"):
        read_bundle(bundle(), {"maker": RECORDED_KEYS["maker"]})
    with pytest.raises(BadSignature, match="there is none"):
        read_bundle(bundle(), {})


def test_what_is_no_key_of_ours_is_refused() -> None:
    for raw in (
        b"",
        b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
        pem(rsa.generate_private_key(65537, 2048)),
    ):
        with pytest.raises(InvalidRequest):
            load_key(raw)


def changed(path: str, value: Any) -> dict[str, Any]:
    """The statement with one field replaced."""
    made = statement()
    at: Any = made
    *before, last = path.split(".")
    for one in before:
        at = at[int(one) if one.isdigit() else one]
    at[int(last) if last.isdigit() else last] = value
    return made


def one_file(name: str, **fields: Any) -> dict[str, Any]:
    made = statement({name: b"x"})
    made["predicate"]["resources"][0].update(fields)
    return made


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (changed("_type", "x"), "statement of"),
        (changed("predicateType", "https://model_signing/Digests/v0.1"), "Digests"),
        (changed("predicate.serialization.method", "shards"), "shards"),
        (changed("predicate.serialization.hash_type", "blake2b"), "blake2b"),
        (changed("predicate.serialization.allow_symlinks", True), "links"),
        (changed("predicate.serialization.ignore_paths", ["tokenizer.py"]), "leaves out"),
        (changed("predicate.resources", []), "0 files"),
        (changed("subject", []), "files"),
        (changed("subject.0.digest.sha256", "0" * 64), "whole"),
        (changed("subject.0.digest", {}), "whole"),
        (changed("predicate.resources.0.digest", digest(b"other")), "whole"),
        (changed("predicate.resources.0.digest", "zz"), "no SHA-256"),
        (changed("predicate.resources.1.name", "a/b.json"), "twice"),
        (changed("predicate.resources.1.name", "A/B.json"), "case"),
        (changed("predicate.resources.0.name", 1), "not a statement"),
        (one_file("../x"), "inside the folder"), (one_file("/x"), "inside the folder"),
        (one_file("a/./x"), "inside the folder"), (one_file("a//x"), "inside the folder"),
        (one_file("a\\x"), "inside the folder"), (one_file("C:/x"), "inside the folder"),
        (one_file("a\nb"), "inside the folder"), (one_file("x" * 2000), "inside the folder"),
        (one_file("x", algorithm="md5"), "no SHA-256"),
        (b"[]", "not a statement"), (b"{" * 5000, "not a statement"), (b"", "not a statement"),
    ],
)  # fmt: skip
def test_what_is_well_signed_and_says_something_else_is_refused(said: Any, words: str) -> None:
    with pytest.raises(BadSignature, match=words):
        read_bundle(bundle(said), KEYS)


def _envelope(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda made: made["dsseEnvelope"].update(fields)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda made: made.update(mediaType="application/vnd.dev.sigstore.bundle+json;version=0.1"), "version 0.3"),
        (lambda made: made.update(verificationMaterial={"certificate": {"rawBytes": ""}}), "public key"),
        (lambda made: made.pop("dsseEnvelope"), "not a Sigstore bundle"),
        (_envelope(payloadType="text/plain"), "text/plain"),
        (_envelope(signatures=[]), "0 signatures"),
        (_envelope(payload="@@"), "base64"),
        (_envelope(payload=base64.b64encode(json.dumps(statement({"w.gguf": b"evil"})).encode()).decode()), "none of the keys"),
        (lambda made: made["dsseEnvelope"]["signatures"][0].update(sig=""), "none of the keys"),
    ],
)  # fmt: skip
def test_a_bundle_that_was_changed_is_refused(change: Callable[[dict[str, Any]], None], words: str) -> None:
    with pytest.raises(BadSignature, match=words):
        read_bundle(bundle(change=change), KEYS)


def test_the_old_text_that_was_signed_ambiguously_is_refused() -> None:
    payload = json.dumps(statement()).encode()
    old = f"DSSEV1 28 b'application/vnd.in-toto+json' {len(payload)} {payload!r}".encode()
    signature = base64.b64encode(P256.sign(old, ec.ECDSA(hashes.SHA256()))).decode()
    with pytest.raises(BadSignature, match="none of the keys"):
        read_bundle(
            bundle(change=lambda made: made["dsseEnvelope"]["signatures"][0].update(sig=signature)), KEYS
        )


def test_size_is_bounded_before_anything_is_parsed() -> None:
    with pytest.raises(BadSignature, match="at most"):
        read_bundle(b" " * (17 * 1024 * 1024), KEYS)


@settings(max_examples=300)
@given(st.data())
def test_a_changed_bundle_says_the_same_or_nothing(data: st.DataObject) -> None:
    raw = bytearray(RECORDED)
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        signed = read_bundle(bytes(raw), RECORDED_KEYS)
    except BadSignature:
        return
    assert signed == read_bundle(RECORDED, RECORDED_KEYS)


def test_a_folder_is_held_against_its_signature() -> None:
    signed = read_bundle(bundle(), KEYS)
    good = {path: digest(data) for path, data in FILES.items()}
    compare(signed, good)
    for found, odd, words in (
        ({**good, "w.gguf": digest(b"x")}, [], "not the one"), ({"w.gguf": good["w.gguf"]}, [], "missing"),
        ({**good, "tokenizer.py": digest(b"")}, [], "nobody signed"), (good, ["link"], "no regular file"),
    ):  # fmt: skip
        with pytest.raises(DigestMismatch, match=words):
            compare(signed, found, odd=odd)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "m"
    for path, data in FILES.items():
        (made / path).parent.mkdir(parents=True, exist_ok=True)
        (made / path).write_bytes(data)
    (made / "model.sig").write_bytes(bundle())
    (made / ".git").mkdir()
    (made / ".git" / "HEAD").write_text("x")
    return made


def test_a_folder_with_its_signature_inside_holds(folder: Path) -> None:
    assert verify_folder(folder, folder / "model.sig", KEYS).key == "p256"


@pytest.mark.parametrize(
    "what", ["extra", "deep extra", "link", "linked folder", "pipe", "missing", "changed", "renamed"]
)
def test_a_folder_that_differs_is_refused(folder: Path, what: str) -> None:
    match what:
        case "extra":
            (folder / "tokenizer.py").write_text("import os")
        case "deep extra":
            (folder / "a" / ".git").mkdir()
            (folder / "a" / ".git" / "config").write_text("x")
        case "link":
            (folder / "w.gguf").rename(folder.parent / "w.gguf")
            (folder / "w.gguf").symlink_to(folder.parent / "w.gguf")
        case "linked folder":
            (folder / "a").rename(folder.parent / "a")
            (folder / "a").symlink_to(folder.parent / "a")
        case "pipe":
            os.mkfifo(folder / "pipe")
        case "missing":
            (folder / "w.gguf").unlink()
        case "changed":
            (folder / "w.gguf").write_bytes(b"Weights")
        case "renamed":
            (folder / "w.gguf").rename(folder / "v.gguf")
    with pytest.raises(DigestMismatch):
        verify_folder(folder, folder / "model.sig", KEYS)


def test_what_is_not_there_is_said(folder: Path) -> None:
    with pytest.raises(NotFound, match="none.sig"):
        verify_folder(folder, folder / "none.sig", KEYS)
    with pytest.raises(NotFound, match="nowhere"):
        verify_folder(folder / "nowhere", folder / "model.sig", KEYS)
