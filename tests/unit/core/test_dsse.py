"""Signed statements: the form of DSSE, one algorithm, and types that never pass for another."""

from __future__ import annotations

import base64

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol.core import dsse
from ondol.core.dsse import Envelope
from ondol.errors import BadSignature

PRIVATE = bytes(range(32))
PUBLIC = dsse.public_key(PRIVATE)
KEYS = {dsse.key_id(PUBLIC): PUBLIC}
TYPE = dsse.TYPE_PREFIX + "test.v1"


def test_what_is_signed_is_as_the_protocol_says() -> None:
    # The example of the DSSE protocol, v1.0.2.
    expected = b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert dsse.pae("http://example.com/HelloWorld", b"hello world") == expected


def test_the_public_key_is_that_of_rfc_8032() -> None:
    # RFC 8032, section 7.1, test 1.
    private = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    public = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
    assert dsse.public_key(private) == public


@given(st.binary(max_size=300))
def test_a_statement_comes_back_as_it_was_signed(payload: bytes) -> None:
    envelope = dsse.sign(PRIVATE, TYPE, payload)
    assert dsse.verify(dsse.from_text(dsse.to_text(envelope)), TYPE, KEYS) == payload


def test_a_statement_of_one_type_is_none_of_another() -> None:
    envelope = dsse.sign(PRIVATE, TYPE, b"{}")
    with pytest.raises(BadSignature, match="expected 'other'"):
        dsse.verify(envelope, "other", KEYS)
    renamed = msgspec.structs.replace(envelope, payload_type="other")
    with pytest.raises(BadSignature, match="no good signature"):
        dsse.verify(renamed, "other", KEYS)


def test_the_name_of_a_key_proves_nothing() -> None:
    other = dsse.new_private_key()
    envelope = dsse.sign(other, TYPE, b"{}")
    claimed = msgspec.structs.replace(envelope.signatures[0], keyid=dsse.key_id(PUBLIC))
    with pytest.raises(BadSignature, match="no good signature"):
        dsse.verify(msgspec.structs.replace(envelope, signatures=(claimed,)), TYPE, KEYS)
    with pytest.raises(BadSignature, match=dsse.key_id(dsse.public_key(other))):
        dsse.verify(envelope, TYPE, KEYS)


def test_one_good_signature_of_several_is_enough() -> None:
    mine, theirs = dsse.sign(PRIVATE, TYPE, b"{}"), dsse.sign(dsse.new_private_key(), TYPE, b"{}")
    both = msgspec.structs.replace(mine, signatures=(*theirs.signatures, *mine.signatures))
    assert dsse.verify(both, TYPE, KEYS) == b"{}"
    with pytest.raises(BadSignature, match="none"):
        dsse.verify(msgspec.structs.replace(mine, signatures=()), TYPE, KEYS)


@given(st.data())
def test_any_changed_bit_is_seen(data: st.DataObject) -> None:
    envelope = dsse.sign(PRIVATE, TYPE, b'{"amount":1}')
    field = data.draw(st.sampled_from(["payload", "sig"]))
    text = envelope.payload if field == "payload" else envelope.signatures[0].sig
    raw = bytearray(base64.b64decode(text))
    place = data.draw(st.integers(0, len(raw) * 8 - 1))
    raw[place // 8] ^= 1 << place % 8
    changed = base64.b64encode(bytes(raw)).decode()
    if field == "payload":
        forged = msgspec.structs.replace(envelope, payload=changed)
    else:
        forged = msgspec.structs.replace(
            envelope, signatures=(dsse.Signature(sig=changed, keyid=envelope.signatures[0].keyid),)
        )
    with pytest.raises(BadSignature):
        dsse.verify(forged, TYPE, KEYS)


@given(st.text(max_size=400))
def test_other_text_is_no_statement(text: str) -> None:
    with pytest.raises(BadSignature):
        dsse.from_text(text)


def test_broken_base64_and_long_texts_are_refused() -> None:
    with pytest.raises(BadSignature, match="base64"):
        dsse.verify(Envelope(payload_type=TYPE, payload="*", signatures=()), TYPE, KEYS)
    with pytest.raises(BadSignature, match="at most 16384"):
        dsse.from_text("A" * (dsse.TEXT_MAX + 1))
