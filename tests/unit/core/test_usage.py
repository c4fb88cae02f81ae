"""The record's bytes and the hash chain over them."""

from __future__ import annotations

import hashlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol.core.identity import Origin
from ondol.core.inference import Usage
from ondol.core.usage import (
    GENESIS,
    Attempt,
    Decision,
    Dropped,
    UsageRecord,
    decode_record,
    encode_record,
    link,
)

MINIMAL = UsageRecord(
    request_id="r1",
    time_ns=1,
    site="store-1",
    gateway="g1",
    tenant="default",
    team="a",
    key_id="k",
    route="assistant",
    task="chat",
    outcome="completed",
    status=200,
)


def test_a_record_comes_back_as_it_was() -> None:
    record = msgspec.structs.replace(
        MINIMAL,
        usage=Usage(10, 20, 3, 4, True),
        cost=2**70,
        currency="KRW",
        decision=Decision(code="fastest", dropped=(Dropped("d", "full", "9/8"),)),
        attempts=(Attempt(deployment="d", engine="peer", site="s", outcome="ok", peer_cost=7),),
        tags=(("수업", "수학"),),
        origin=Origin(site="edge", request_id="r0", attempt=1, hops=("edge",)),
    )

    assert decode_record(encode_record(record)) == record


def test_equal_records_have_equal_bytes_and_defaults_take_no_room() -> None:
    payload = encode_record(MINIMAL)

    assert payload == encode_record(decode_record(payload))
    assert set(msgspec.json.decode(payload)) == {
        "request_id", "time_ns", "site", "gateway", "tenant", "team", "key_id", "route", "task",
        "outcome", "status",
    }  # fmt: skip


@pytest.mark.parametrize("payload", [b"", b"{}", b"[]", b'{"request_id": 1}', encode_record(MINIMAL)[:-1]])
def test_other_bytes_are_refused(payload: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_record(payload)


def test_the_link_is_the_published_formula() -> None:
    assert hashlib.sha256(b"ondol ledger, version 1").digest() == GENESIS
    assert link(GENESIS, 1, b"x") == hashlib.sha256(GENESIS + bytes([0] * 7 + [1]) + b"x").digest()


@given(
    payloads=st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=12),
    data=st.data(),
)
def test_any_change_of_a_payload_changes_every_hash_from_there_on(
    payloads: list[bytes], data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(payloads) - 1))
    byte = data.draw(st.integers(0, len(payloads[at]) - 1))
    changed = bytearray(payloads[at])
    changed[byte] ^= data.draw(st.integers(1, 255))

    before = _chain(payloads)
    after = _chain([*payloads[:at], bytes(changed), *payloads[at + 1 :]])

    assert before[:at] == after[:at]
    assert all(one != other for one, other in zip(before[at:], after[at:], strict=True))


def _chain(payloads: list[bytes]) -> list[bytes]:
    hashes, previous = [], GENESIS
    for seq, payload in enumerate(payloads, 1):
        previous = link(previous, seq, payload)
        hashes.append(previous)
    return hashes
