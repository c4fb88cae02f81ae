"""The token that a person carries: damaged ones are told from good ones without asking the hub."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol.core.apikeys import secret_text
from ondol.core.invites import PREFIX, TEXT_MAX, HubPlace, make_token, parse_proof, parse_token
from ondol.errors import InvalidRequest

SECRET = secret_text(bytes(range(32)))
PLACE = HubPlace(urls=("https://hub.example:8443", "https://10.0.0.1"), ca="ab" * 32)
TOKEN = make_token("abc123XYZ0", SECRET, PLACE)
HEAD = TOKEN.partition(".")[0]


@given(st.text("0123456789ABCxyz", min_size=1, max_size=32), st.binary(min_size=32, max_size=32))
def test_tokens_survive_their_text_form(invite_id: str, raw: bytes) -> None:
    found = parse_token("  " + make_token(invite_id, secret_text(raw), PLACE) + "\n")
    assert (found.id, found.secret, found.hub) == (invite_id, secret_text(raw), PLACE)
    assert parse_proof(found.proof) == (invite_id, secret_text(raw))


def test_what_goes_to_the_hub_has_no_address() -> None:
    assert parse_token(TOKEN).proof == HEAD
    assert HEAD.startswith(PREFIX) and "." not in HEAD


@given(st.integers(0, len(HEAD) - 1), st.characters(codec="latin-1", exclude_characters="."))
def test_any_one_wrong_character_of_the_secret_part_is_seen(place: int, other: str) -> None:
    typed = HEAD[:place] + other + HEAD[place + 1 :]
    if typed == HEAD:
        assert parse_proof(typed) == ("abc123XYZ0", SECRET)
        return
    with pytest.raises(InvalidRequest, match="copy the whole line again"):
        parse_proof(typed)


@given(st.integers(0, len(TOKEN) - 2))
def test_a_token_that_was_not_copied_whole_is_refused(length: int) -> None:
    with pytest.raises(InvalidRequest, match="copy the whole line again"):
        parse_token(TOKEN[:length])


@given(st.text(max_size=200) | st.text(max_size=200).map(PREFIX.__add__))
def test_other_text_is_no_token(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_token(text)


def test_an_error_never_repeats_the_secret() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_token(TOKEN[:-30])
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "place",
    [
        b'{"urls":[],"ca":"00"}',
        b'{"urls":["http://hub.example"],"ca":"00"}',
        b'{"urls":["https://hub.example","ftp://x"],"ca":"00"}',
    ],
)
def test_a_token_must_say_where_the_hub_is(place: bytes) -> None:
    text = base64.urlsafe_b64encode(place).decode().rstrip("=")
    with pytest.raises(InvalidRequest, match="no https address"):
        parse_token(f"{HEAD}.{text}")


def test_a_very_long_text_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        parse_token(PREFIX + "a" * TEXT_MAX * 100)
