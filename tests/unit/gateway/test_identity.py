"""Who asks: keys, remembered proofs, and the headers of peers."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol.core.apikeys import secret_text
from ondol.core.identity import ApiKey, Origin, Principal
from ondol.errors import ExpiredApiKey, InvalidRequest, RevokedApiKey, Unauthenticated
from ondol.gateway.identity import (
    PROOFS_MAX,
    Authenticator,
    authenticate,
    mac,
    make_key,
    on_behalf,
    parse_key,
)

PEPPER = b"p" * 32
SECRET = secret_text(bytes(range(32)))
TEXT = make_key("abc123XYZ0", SECRET)
HEADER = "Bearer " + TEXT
PEER = Principal(key_id="p1", tenant="default", team="sites", kind="peer")


def keys(**changes: Any) -> dict[str, ApiKey]:
    key = ApiKey(
        id="abc123XYZ0", mac=mac(PEPPER, SECRET), tenant="default", team="shop", routes=("assistant",),
        requests_per_min=5, tokens_per_min=6,
    )  # fmt: skip
    return {key.id: msgspec.structs.replace(key, **changes)}


def who(header: str | None, snapshot: dict[str, ApiKey] | None = None, wall_ns: int = 0) -> Principal:
    return authenticate(header, keys() if snapshot is None else snapshot, PEPPER, wall_ns)


def test_the_text_of_a_key_has_a_fixed_form() -> None:
    assert TEXT == "ondol_abc123XYZ0_003aUlTJC7tjlCTQj2uNU3MFagCXG9LRKRcwGkBIDlf1MspWc"
    assert parse_key(TEXT) == ("abc123XYZ0", SECRET)


@given(st.text("0123456789ABCxyz", min_size=1, max_size=32), st.binary(min_size=32, max_size=32))
def test_keys_survive_their_text_form(key_id: str, raw: bytes) -> None:
    assert parse_key(make_key(key_id, secret_text(raw))) == (key_id, secret_text(raw))


@given(st.integers(0, len(TEXT) - 1), st.characters(codec="latin-1"))
def test_any_one_wrong_character_is_seen_without_a_look_up(place: int, other: str) -> None:
    typed = TEXT[:place] + other + TEXT[place + 1 :]
    assert (parse_key(typed) is None) == (typed != TEXT)


@given(st.text(max_size=120) | st.text(max_size=110).map("ondol_".__add__))
def test_other_text_is_no_key(text: str) -> None:
    assert parse_key(text) is None


def test_a_good_key_makes_a_principal() -> None:
    expected = Principal(
        key_id="abc123XYZ0", tenant="default", team="shop", routes=("assistant",), requests_per_min=5,
        tokens_per_min=6,
    )  # fmt: skip
    assert who(HEADER) == expected
    assert who("bearer  " + TEXT + " ") == expected


STRANGER = make_key("unknown", SECRET)
FORGED = make_key("abc123XYZ0", secret_text(b"\1" * 32))


def test_every_failure_without_the_secret_looks_the_same() -> None:
    causes = [
        (None, keys()),
        ("", keys()),
        (TEXT, keys()),
        ("Basic " + TEXT, keys()),
        ("Bearer sk-something", keys()),
        (HEADER[:-1], keys()),
        ("Bearer " + STRANGER, keys()),
        ("Bearer " + FORGED, keys()),
        ("Bearer " + FORGED, keys(revoked_ns=1)),
        ("Bearer " + FORGED, keys(expires_ns=1)),
    ]
    seen = set()
    for header, snapshot in causes:
        with pytest.raises(Unauthenticated) as caught:
            who(header, snapshot, 10)
        seen.add((type(caught.value), caught.value.message))
    assert len(seen) == 1


def test_an_unknown_id_is_not_let_in_by_the_dummy() -> None:
    with pytest.raises(Unauthenticated):
        who("Bearer " + STRANGER, {})


def test_whoever_has_the_secret_is_told_that_the_key_is_over() -> None:
    assert who(HEADER, keys(expires_ns=100), 99).key_id == "abc123XYZ0"
    with pytest.raises(ExpiredApiKey, match="abc123XYZ0 has expired") as expired:
        who(HEADER, keys(expires_ns=100), 100)
    with pytest.raises(RevokedApiKey, match="abc123XYZ0 was revoked") as revoked:
        who(HEADER, keys(expires_ns=100, revoked_ns=5), 100)
    assert (expired.value.code, revoked.value.code) == ("expired_api_key", "revoked_api_key")
    assert SECRET not in str(expired.value) + str(revoked.value)


def test_a_good_proof_is_remembered_while_the_keys_stay() -> None:
    of, snapshot = Authenticator(PEPPER), keys()
    first = of.principal(HEADER, snapshot, 0)
    assert first == who(HEADER)
    assert of.principal(HEADER, snapshot, 1) is first


def test_a_new_mapping_forgets_every_proof() -> None:
    of, snapshot = Authenticator(PEPPER), keys()
    first = of.principal(HEADER, snapshot, 0)
    again = of.principal(HEADER, dict(snapshot), 0)
    assert again == first
    assert again is not first
    with pytest.raises(RevokedApiKey):
        of.principal(HEADER, keys(revoked_ns=1), 0)
    with pytest.raises(Unauthenticated):
        of.principal(HEADER, {}, 0)


def test_a_remembered_proof_expires_with_its_key() -> None:
    of, snapshot = Authenticator(PEPPER), keys(expires_ns=100)
    first = of.principal(HEADER, snapshot, 98)
    assert of.principal(HEADER, snapshot, 99) is first
    with pytest.raises(ExpiredApiKey):
        of.principal(HEADER, snapshot, 100)


@pytest.mark.parametrize(
    "header", [None, "", "Basic x", "Bearer " + FORGED, "Bearer " + STRANGER, HEADER[:-1]]
)
def test_a_wrong_key_is_refused_every_time_and_never_remembered(header: str | None) -> None:
    of, snapshot = Authenticator(PEPPER), keys()
    of.principal(HEADER, snapshot, 0)
    for _ in range(3):
        with pytest.raises(Unauthenticated):
            of.principal(header, snapshot, 0)
    assert len(of._proved) == 1


def test_remembered_proofs_are_bounded() -> None:
    of, snapshot = Authenticator(PEPPER), keys()
    for spaces in range(PROOFS_MAX + 10):
        assert of.principal("Bearer " + " " * spaces + TEXT, snapshot, 0).key_id == "abc123XYZ0"
        assert len(of._proved) <= PROOFS_MAX


def test_a_peer_says_on_whose_behalf_it_asks() -> None:
    asked = on_behalf(
        PEER, origin="store-1;req%3B7;2", hops="store-1, hub%2C1", behalf="tenant=acme;team=r%26d"
    )
    assert (asked.tenant, asked.team, asked.key_id, asked.kind) == ("acme", "r&d", "p1", "peer")
    assert asked.origin == Origin(site="store-1", request_id="req;7", attempt=2, hops=("store-1", "hub,1"))


def test_a_peer_may_leave_out_hops_and_names() -> None:
    asked = on_behalf(PEER, origin="store-1;r;0", hops=None, behalf=None)
    assert (asked.tenant, asked.team) == ("default", "sites")
    assert asked.origin == Origin(site="store-1", request_id="r", attempt=0)
    assert on_behalf(PEER, origin=None, hops="a", behalf="tenant=acme") is PEER


@pytest.mark.parametrize("kind", ["user", "admin"])
def test_the_headers_of_others_mean_nothing(kind: str) -> None:
    caller = msgspec.structs.replace(PEER, kind=kind)
    assert on_behalf(caller, origin="bad", hops="bad;;", behalf="tenant=acme") is caller


@pytest.mark.parametrize(
    ("origin", "hops", "behalf", "header"),
    [
        ("store-1;r", None, None, "x-ondol-origin"),
        ("store-1;r;x", None, None, "x-ondol-origin"),
        ("store-1;r;-1", None, None, "x-ondol-origin"),
        ("store-1;r;²", None, None, "x-ondol-origin"),
        (";r;1", None, None, "x-ondol-origin"),
        ("store-1;%ff;1", None, None, "x-ondol-origin"),
        ("store-1;a%0Ab;1", None, None, "x-ondol-origin"),
        ("s;r;1" + "x" * 1024, None, None, "x-ondol-origin"),
        ("s" * 129 + ";r;1", None, None, "x-ondol-origin"),
        ("s;r;1", "a,,b", None, "x-ondol-hops"),
        ("s;r;1", ",".join("abcdefghi"), None, "x-ondol-hops"),
        ("s;r;1", None, "tenant", "x-ondol-on-behalf"),
        ("s;r;1", None, "tenant=", "x-ondol-on-behalf"),
        ("s;r;1", None, "tenant=a;tenant=b", "x-ondol-on-behalf"),
        ("s;r;1", None, "tenant=a;role=admin", "x-ondol-on-behalf"),
        ("s;r;1", None, "tenant=a\x00", "x-ondol-on-behalf"),
    ],
)
def test_a_peers_malformed_header_is_named(
    origin: str, hops: str | None, behalf: str | None, header: str
) -> None:
    with pytest.raises(InvalidRequest, match=header) as caught:
        on_behalf(PEER, origin=origin, hops=hops, behalf=behalf)
    assert caught.value.param == header
