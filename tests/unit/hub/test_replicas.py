"""A database knows whose it is; a roster knows how old it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from ondol.adapters.database_sqlite import InlineDatabase
from ondol.core.trust import Credential
from ondol.errors import StateError
from ondol.hub import replicas
from ondol.hub.roster import GOOD_S, READ_EVERY_S, Roster
from ondol.hub.schema import MIGRATIONS
from ondol.hub.sites import Speaker
from ondol.units import NS_PER_S

MINE = {"fleet": "a", "hub.key": "11", "ca.pem": "22"}
KEY = b"k" * 32


def credential(key: bytes = KEY, site: str = "shop-1") -> Credential:
    return Credential(fleet="a", site=site, key=key, issued_ns=0, expires_ns=1)


def test_the_first_hub_owns_the_database_and_others_with_its_keys_share_it() -> None:
    database = InlineDatabase(Path(":memory:"), migrations=MIGRATIONS, durable=False)
    for _ in range(2):
        database.write_now(lambda tx: replicas.claim(tx, MINE))
    with pytest.raises(StateError, match=r"hub\.key is 33, expected 11\. Put hub\.key"):
        database.write_now(lambda tx: replicas.claim(tx, MINE | {"hub.key": "33"}))
    with pytest.raises(StateError, match="fleet is b, expected a"):
        database.write_now(lambda tx: replicas.claim(tx, MINE | {"fleet": "b"}))
    database.write_now(lambda tx: replicas.claim(tx, MINE | {"of a later release": "x"}))


def test_a_reading_that_is_older_than_the_watch_ends_nothing() -> None:
    roster = Roster()
    number = roster.begin()
    since = roster.begun  # let in while the reading goes on, which may have missed it
    roster.take({}, number, 0)
    assert not roster.has_ended(credential(), "a", since)
    roster.take({}, roster.begin(), 0)
    assert roster.has_ended(credential(), "a", since)


@pytest.mark.parametrize(
    ("speaker", "ended"),
    [
        (Speaker(KEY, "a", False), False),
        (Speaker(KEY, "b", False), True),
        (Speaker(b"x" * 32, "a", False), True),
        (Speaker(KEY, "a", True), True),
        (Speaker(None, "a", False), True),
    ],
)
def test_who_speaks_for_a_site_no_longer(speaker: Speaker, ended: bool) -> None:
    roster = Roster()
    roster.take({"shop-1": speaker}, roster.begin(), 0)
    assert roster.has_ended(credential(), "a", 0) is ended


def test_only_what_is_fresh_and_right_lets_in() -> None:
    roster = Roster()
    assert not roster.lets_in(credential(), 0)
    assert roster.due(0)
    roster.take(
        {"shop-1": Speaker(KEY, "a", False), "out": Speaker(KEY, "a", True)}, roster.begin(), NS_PER_S
    )
    assert roster.lets_in(credential(), NS_PER_S)
    assert not roster.lets_in(credential(b"x" * 32), NS_PER_S)
    assert not roster.lets_in(credential(site="out"), NS_PER_S)
    assert not roster.lets_in(credential(site="other"), NS_PER_S)
    assert not roster.due(NS_PER_S + 1)
    assert roster.due(int((1 + READ_EVERY_S) * NS_PER_S))
    assert not roster.lets_in(credential(), int((1.1 + GOOD_S) * NS_PER_S))
