"""Who a site is: nothing but a whole, fresh proof for this audience, of this fleet, makes one."""

from __future__ import annotations

import string
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ondol.core import dsse
from ondol.core.trust import (
    ASSERTION_S,
    ASSERTION_TYPE,
    CREDENTIAL_TYPE,
    LEEWAY_S,
    Assertion,
    Credential,
    Epoch,
    Trust,
    authenticate_site,
    authorization,
    issue_credential,
    issue_epoch,
    prove_site,
    read_credential,
    read_epoch,
)
from ondol.errors import BadSignature, Unauthenticated
from ondol.units import NS_PER_S

HUB_KEY = bytes(range(32))
SITE_KEY = bytes(range(1, 33))
HUB_PUBLIC, SITE_PUBLIC = dsse.public_key(HUB_KEY), dsse.public_key(SITE_KEY)
TRUST = Trust(fleet="shops", keys={dsse.key_id(HUB_PUBLIC): HUB_PUBLIC})
NOW = 1_800_000_000 * NS_PER_S
DAY = 86_400 * NS_PER_S


def credential(**changes: Any) -> Credential:
    known = Credential(fleet="shops", site="shop-1", key=SITE_PUBLIC, issued_ns=NOW, expires_ns=NOW + 3 * DAY)
    return msgspec.structs.replace(known, **changes)


WORD = issue_credential(HUB_KEY, credential())
HEADER = authorization(SITE_KEY, WORD, site="shop-1", audience="shop-2", now_ns=NOW)


def who(
    header: str = HEADER, trust: Trust = TRUST, *, audience: str = "shop-2", now_ns: int = NOW
) -> Credential:
    return authenticate_site(header, trust, audience=audience, now_ns=now_ns)


def made(word: dsse.Envelope, assertion: Assertion, key: bytes = SITE_KEY, kind: str = ASSERTION_TYPE) -> str:
    proof = dsse.sign(key, kind, msgspec.json.encode(assertion))
    return f"Ondol-Site {dsse.to_text(word)}~{dsse.to_text(proof)}"


def says(**changes: Any) -> Assertion:
    known = Assertion(
        site="shop-1", audience="shop-2", issued_ns=NOW, expires_ns=NOW + ASSERTION_S * NS_PER_S
    )
    return msgspec.structs.replace(known, **changes)


def test_a_whole_proof_names_the_site() -> None:
    assert who() == credential()
    assert who(HEADER.replace("Ondol-Site", "ondol-site")) == credential()


def test_what_one_site_is_shown_is_of_no_use_at_another() -> None:
    for audience in ("shop-3", "hub", ""):
        with pytest.raises(Unauthenticated, match="for 'shop-2'; expected"):
            who(audience=audience)


def test_a_site_of_another_fleet_is_nobody() -> None:
    with pytest.raises(Unauthenticated, match="found fleet 'other'"):
        who(made(issue_credential(HUB_KEY, credential(fleet="other")), says()))
    stranger = dsse.new_private_key()
    with pytest.raises(Unauthenticated, match="no good signature"):
        who(made(issue_credential(stranger, credential()), says()))


def test_a_credential_is_of_no_use_without_its_key() -> None:
    with pytest.raises(Unauthenticated, match="no good signature"):
        who(made(WORD, says(), key=dsse.new_private_key()))
    # Signed by the hub's own key, even: it is not the site's.
    with pytest.raises(Unauthenticated, match="no good signature"):
        who(made(WORD, says(), key=HUB_KEY))


def test_a_site_speaks_in_its_own_name_only() -> None:
    with pytest.raises(Unauthenticated, match="of 'shop-9'"):
        who(made(WORD, says(site="shop-9")))


def test_a_statement_of_another_type_is_no_proof() -> None:
    with pytest.raises(Unauthenticated, match="found type"):
        who(made(WORD, says(), kind=CREDENTIAL_TYPE))
    as_assertion = dsse.sign(HUB_KEY, ASSERTION_TYPE, msgspec.json.encode(credential()))
    with pytest.raises(Unauthenticated, match="found type"):
        who(made(as_assertion, says()))
    with pytest.raises(Unauthenticated, match="not a assertion"):
        proof = dsse.sign(SITE_KEY, ASSERTION_TYPE, b'{"site":"shop-1"}')
        who(f"Ondol-Site {dsse.to_text(WORD)}~{dsse.to_text(proof)}")


@pytest.mark.parametrize("seconds", [-LEEWAY_S, 0, ASSERTION_S + LEEWAY_S])
def test_a_proof_holds_for_its_time_and_the_difference_of_two_clocks(seconds: int) -> None:
    assert who(now_ns=NOW + seconds * NS_PER_S).site == "shop-1"


@pytest.mark.parametrize("seconds", [-LEEWAY_S - 1, ASSERTION_S + LEEWAY_S + 1, 86_400, -86_400])
def test_a_proof_of_another_time_is_none_and_says_so(seconds: int) -> None:
    with pytest.raises(Unauthenticated, match=r"s from now.*Check both clocks"):
        who(now_ns=NOW + seconds * NS_PER_S)


def test_nobody_makes_proofs_for_next_year() -> None:
    with pytest.raises(Unauthenticated, match="too long"):
        who(made(WORD, says(expires_ns=NOW + 365 * DAY)), now_ns=NOW + DAY)
    with pytest.raises(Unauthenticated, match="too long"):
        who(made(WORD, says(expires_ns=NOW + (ASSERTION_S + 1) * NS_PER_S)))


def test_a_credential_ends_and_only_the_hub_looks_past_that() -> None:
    later = NOW + 3 * DAY + (LEEWAY_S + 1) * NS_PER_S
    header = authorization(SITE_KEY, WORD, site="shop-1", audience="shop-2", now_ns=later)
    with pytest.raises(Unauthenticated, match="has expired"):
        who(header, now_ns=later)
    assert authenticate_site(header, TRUST, audience="shop-2", now_ns=later, expired_ok=True).site == "shop-1"


def test_a_proof_says_until_when_it_is_good() -> None:
    whole = NOW + (ASSERTION_S + LEEWAY_S) * NS_PER_S
    assert prove_site(HEADER, TRUST, audience="shop-2", now_ns=NOW) == (credential(), whole)
    short = issue_credential(HUB_KEY, credential(expires_ns=NOW + 1))
    header = made(short, says())
    assert prove_site(header, TRUST, audience="shop-2", now_ns=NOW)[1] == NOW + 1 + LEEWAY_S * NS_PER_S


def epoch(**changes: Any) -> Epoch:
    return msgspec.structs.replace(Epoch(fleet="shops", number=7, issued_ns=NOW, stale_s=3600), **changes)


def test_who_is_revoked_is_out_by_name_and_by_key() -> None:
    for out in (epoch(sites=("shop-1",)), epoch(site_keys=(dsse.key_id(SITE_PUBLIC),))):
        with pytest.raises(Unauthenticated, match=r"revoked \(epoch 7\)"):
            who(trust=msgspec.structs.replace(TRUST, epoch=out))
    others = epoch(sites=("shop-10", "shop"), site_keys=(dsse.key_id(HUB_PUBLIC),))
    assert who(trust=msgspec.structs.replace(TRUST, epoch=others)).site == "shop-1"


def test_the_list_of_who_is_out_never_goes_back() -> None:
    known = msgspec.structs.replace(TRUST, epoch=epoch(number=7))
    assert read_epoch(issue_epoch(HUB_KEY, epoch(number=7)), known).number == 7
    assert read_epoch(issue_epoch(HUB_KEY, epoch(number=8)), known).number == 8
    with pytest.raises(BadSignature, match="found epoch 6, and 7 is known"):
        read_epoch(issue_epoch(HUB_KEY, epoch(number=6)), known)
    with pytest.raises(BadSignature, match="found fleet"):
        read_epoch(issue_epoch(HUB_KEY, epoch(fleet="other", number=9)), known)
    with pytest.raises(BadSignature, match="no good signature"):
        read_epoch(issue_epoch(SITE_KEY, epoch(number=9)), known)


def test_a_list_is_stale_after_its_time() -> None:
    assert not epoch().stale(NOW + 3600 * NS_PER_S)
    assert epoch().stale(NOW + 3600 * NS_PER_S + 1)


def test_a_list_of_an_older_hub_without_keys_of_sites_is_read() -> None:
    body = msgspec.to_builtins(epoch())
    del body["site_keys"]
    from ondol.core.trust import EPOCH_TYPE

    envelope = dsse.sign(HUB_KEY, EPOCH_TYPE, msgspec.json.encode(body))
    assert read_epoch(envelope, TRUST) == epoch()


def test_a_credential_with_a_key_that_is_none_is_refused() -> None:
    proof = dsse.sign(SITE_KEY, ASSERTION_TYPE, msgspec.json.encode(says()))
    claimed = msgspec.structs.replace(proof.signatures[0], keyid=dsse.key_id(b"short"))
    word = issue_credential(HUB_KEY, credential(key=b"short"))
    forged = msgspec.structs.replace(proof, signatures=(claimed,))
    with pytest.raises(Unauthenticated, match="no good signature"):
        who(f"Ondol-Site {dsse.to_text(word)}~{dsse.to_text(forged)}")
    assert read_credential(WORD, TRUST) == credential()


LETTERS = string.ascii_letters + string.digits + "-_~ =.\x00é"


@given(st.integers(0, len(HEADER) - 1), st.sampled_from(LETTERS))
def test_one_wrong_character_anywhere_is_no_proof(place: int, letter: str) -> None:
    wrong = HEADER[:place] + letter + HEADER[place + 1 :]
    if wrong.lower() == HEADER.lower():
        return
    try:
        found = who(wrong)
    except Unauthenticated:
        return
    # Base64 has spare bits in its last letter: the same bytes then, and the same proof.
    same = [dsse.from_text(part) for part in wrong[len("Ondol-Site ") :].strip().split("~")]
    assert same == [dsse.from_text(part) for part in HEADER[len("Ondol-Site ") :].split("~")]
    assert found == credential()


@given(st.integers(0, len(HEADER) - 1))
def test_a_truncated_header_is_no_proof(length: int) -> None:
    with pytest.raises(Unauthenticated):
        who(HEADER[:length])


@given(st.text(max_size=300) | st.text(LETTERS, max_size=300).map("Ondol-Site ".__add__))
@example("Ondol-Site ~")
@example("Ondol-Site " + "A" * 20_000 + "~" + "A" * 20_000)
def test_other_text_is_no_proof(text: str) -> None:
    with pytest.raises(Unauthenticated):
        who(text)
