"""Other sites and the fleet's keys at a site's door: let in without the hub, and out when it says so."""

from __future__ import annotations

import string
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol.core import dsse
from ondol.core.apikeys import mac, make_key, secret_text
from ondol.core.identity import ApiKey, Principal
from ondol.core.trust import (
    ASSERTION_S,
    LEEWAY_S,
    Credential,
    Epoch,
    Trust,
    authorization,
    issue_credential,
)
from ondol.errors import ExpiredApiKey, Forbidden, Unauthenticated
from ondol.gateway.identity import PROOFS_MAX, Authenticator, FleetTrust, authenticate_peer, on_behalf
from ondol.units import NS_PER_S

HUB, SITE = bytes(range(32)), bytes(range(1, 33))
HUB_PUBLIC, SITE_PUBLIC = dsse.public_key(HUB), dsse.public_key(SITE)
NOW = 1_800_000_000 * NS_PER_S
WORD = issue_credential(
    HUB, Credential(fleet="shops", site="shop-1", key=SITE_PUBLIC, issued_ns=NOW, expires_ns=NOW + 10**15)
)
PEPPER, FLEET_PEPPER = b"p" * 32, b"f" * 32
SECRET = secret_text(bytes(range(32)))
FLEET_KEY = ApiKey(id="fleetkey01", mac=mac(FLEET_PEPPER, SECRET), tenant="default", team="shop", fleet=True)
FLEET_TEXT = "Bearer " + make_key("fleetkey01", SECRET)
LOCAL_KEY = ApiKey(id="localkey01", mac=mac(PEPPER, SECRET), tenant="default", team="till")
LOCAL_TEXT = "Bearer " + make_key("localkey01", SECRET)
LOCAL = {LOCAL_KEY.id: LOCAL_KEY}


def epoch(**changes: Any) -> Epoch:
    return msgspec.structs.replace(Epoch(fleet="shops", number=7, issued_ns=NOW, stale_s=86_400), **changes)


def fleet(out: Epoch | None = None, **changes: Any) -> FleetTrust:
    trust = Trust(fleet="shops", keys={dsse.key_id(HUB_PUBLIC): HUB_PUBLIC}, epoch=out or epoch())
    known = FleetTrust(site="shop-2", trust=trust, keys={FLEET_KEY.id: FLEET_KEY}, pepper=FLEET_PEPPER)
    return msgspec.structs.replace(known, **changes)


FLEET = fleet()


def header(audience: str = "shop-2", now_ns: int = NOW) -> str:
    return authorization(SITE, WORD, site="shop-1", audience=audience, now_ns=now_ns)


HEADER = header()
PEER = Principal(key_id="site:shop-1", tenant="default", team="default", kind="peer")


def ask(
    text: str | None, of: Authenticator, trust: FleetTrust | None = FLEET, wall_ns: int = NOW
) -> Principal:
    return of.principal(text, LOCAL, wall_ns, trust)


def test_another_site_is_a_peer_and_is_remembered() -> None:
    of = Authenticator(PEPPER)
    first = ask(HEADER, of)
    assert first == PEER
    assert ask(HEADER, of, wall_ns=NOW + 1) is first


def test_a_site_that_has_not_joined_lets_no_other_in() -> None:
    with pytest.raises(Unauthenticated):
        ask(HEADER, Authenticator(PEPPER), None)


def test_a_remembered_proof_ends_with_its_assertion() -> None:
    of = Authenticator(PEPPER)
    ask(HEADER, of)
    end = NOW + (ASSERTION_S + LEEWAY_S) * NS_PER_S
    assert ask(HEADER, of, wall_ns=end - 1) == PEER
    with pytest.raises(Unauthenticated, match="s from now"):
        ask(HEADER, of, wall_ns=end + 1)


def test_a_clock_that_is_set_back_revives_no_proof() -> None:
    of = Authenticator(PEPPER)
    ask(HEADER, of)
    with pytest.raises(Unauthenticated):
        ask(HEADER, of, wall_ns=NOW - 3600 * NS_PER_S)
    with pytest.raises(Unauthenticated):
        ask(HEADER, of, wall_ns=NOW + 86_399 * NS_PER_S)


def test_a_clock_behind_the_list_lets_nobody_in() -> None:
    """A site whose clock starts in 1970 would take a list of last year for fresh."""
    early = NOW - 365 * 86_400 * NS_PER_S
    with pytest.raises(Unauthenticated, match="clock is behind"):
        authenticate_peer(header(now_ns=early), FLEET, early)


def test_an_offset_that_was_measured_is_added() -> None:
    off = 3600 * NS_PER_S
    of, behind = Authenticator(PEPPER), fleet(offset_ns=off)
    assert ask(HEADER, of, behind, NOW - off) == PEER
    with pytest.raises(Unauthenticated):
        ask(HEADER, of, behind, NOW - off + (ASSERTION_S + LEEWAY_S) * NS_PER_S + 1)


def test_a_revocation_takes_what_was_remembered() -> None:
    of = Authenticator(PEPPER)
    ask(HEADER, of)
    for out in (epoch(number=8, sites=("shop-1",)), epoch(number=8, site_keys=(dsse.key_id(SITE_PUBLIC),))):
        with pytest.raises(Unauthenticated, match="revoked"):
            ask(HEADER, of, fleet(out))


def test_a_list_that_is_stale_lets_no_other_site_in_but_every_key() -> None:
    of, late = Authenticator(PEPPER), NOW + 86_401 * NS_PER_S
    with pytest.raises(Unauthenticated, match="too old"):
        ask(header(now_ns=late), of, wall_ns=late)
    assert ask(FLEET_TEXT, of, wall_ns=late).team == "shop"
    assert ask(LOCAL_TEXT, of, wall_ns=late).team == "till"
    unknown = FleetTrust(site="shop-2", trust=Trust(fleet="shops", keys=FLEET.trust.keys))
    with pytest.raises(Unauthenticated, match="too old"):
        ask(HEADER, of, unknown)


def test_a_proof_is_not_remembered_past_the_end_of_the_list() -> None:
    of, brief = Authenticator(PEPPER), fleet(epoch(stale_s=30))
    assert ask(HEADER, of, brief) == PEER
    with pytest.raises(Unauthenticated, match="too old"):
        ask(HEADER, of, brief, NOW + 31 * NS_PER_S)


def test_what_is_meant_for_another_site_is_of_no_use_here() -> None:
    for audience in ("shop-3", "hub"):
        with pytest.raises(Unauthenticated, match="expected 'shop-1' for 'shop-2'"):
            ask(header(audience), Authenticator(PEPPER))


def test_keys_of_the_fleet_and_of_the_site_stand_beside_each_other() -> None:
    of = Authenticator(PEPPER)
    assert (ask(FLEET_TEXT, of).key_id, ask(LOCAL_TEXT, of).key_id) == ("fleetkey01", "localkey01")
    with pytest.raises(Unauthenticated):
        ask(FLEET_TEXT, of, None)
    # Under its own pepper each: a key of the site is none of the fleet.
    crossed = msgspec.structs.replace(LOCAL_KEY, id="crossed001")
    with pytest.raises(Unauthenticated):
        ask("Bearer " + make_key("crossed001", SECRET), of, fleet(keys={"crossed001": crossed}))


def test_a_key_that_the_list_names_is_out_before_the_keys_come() -> None:
    of = Authenticator(PEPPER)
    ask(FLEET_TEXT, of)
    with pytest.raises(Unauthenticated):
        ask(FLEET_TEXT, of, fleet(epoch(number=8, api_keys=("fleetkey01",))))


def test_a_key_of_the_fleet_ends_in_time() -> None:
    of, ending = Authenticator(PEPPER), msgspec.structs.replace(FLEET_KEY, expires_ns=NOW + 10)
    trust = fleet(keys={ending.id: ending})
    assert ask(FLEET_TEXT, of, trust, NOW + 9).key_id == "fleetkey01"
    with pytest.raises(ExpiredApiKey):
        ask(FLEET_TEXT, of, trust, NOW + 10)


def test_remembered_proofs_are_bounded_and_hold_no_header() -> None:
    of = Authenticator(PEPPER)
    for spaces in range(PROOFS_MAX + 3):
        ask("Bearer " + " " * spaces + make_key("localkey01", SECRET), of)
    ask(HEADER, of)
    assert len(of._proved) <= PROOFS_MAX
    assert HEADER not in repr(of._proved) and SECRET not in repr(of._proved)


def test_a_site_asks_in_its_own_name_only() -> None:
    asked = on_behalf(PEER, origin="shop-1;r;1", hops="shop-1", behalf="tenant=acme;team=x")
    assert asked.origin is not None
    assert (asked.origin.site, asked.tenant, asked.team, asked.kind) == ("shop-1", "acme", "x", "peer")
    for claimed in ("shop-9;r;1", "site%3Ashop-1;r;1", "shop-1%20;r;1"):
        with pytest.raises(Forbidden, match="its own name only"):
            on_behalf(PEER, origin=claimed, hops="shop-1", behalf=None)


def test_a_key_of_kind_peer_speaks_for_whom_it_says() -> None:
    by_key = msgspec.structs.replace(PEER, key_id="localkey01")
    asked = on_behalf(by_key, origin="anybody;r;1", hops=None, behalf=None)
    assert asked.origin is not None and asked.origin.site == "anybody"


@given(st.text(max_size=200) | st.text(string.printable, max_size=300).map("Ondol-Site ".__add__))
def test_other_text_makes_no_principal(text: str) -> None:
    with pytest.raises(Unauthenticated):
        ask(text, Authenticator(PEPPER))


@given(st.integers(0, len(HEADER) - 1), st.integers(1, 200))
def test_a_garbled_header_makes_no_principal(place: int, length: int) -> None:
    with pytest.raises(Unauthenticated):
        ask(HEADER[:place] + HEADER[place + length :] or None, Authenticator(PEPPER))


@given(st.integers(0, len(HEADER) - 2))
def test_two_letters_that_change_places_make_no_other_principal(place: int) -> None:
    swapped = HEADER[:place] + HEADER[place + 1] + HEADER[place] + HEADER[place + 2 :]
    if swapped == HEADER:
        assert ask(swapped, Authenticator(PEPPER)) == PEER
        return
    with pytest.raises(Unauthenticated):
        ask(swapped, Authenticator(PEPPER))
