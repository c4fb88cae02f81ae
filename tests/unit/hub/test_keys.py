"""API keys of the fleet: made once, told to the sites that have a use for them, out when revoked."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest
from tests.unit.hub.conftest import START_NS

from ondol.adapters.database_sqlite import InlineDatabase
from ondol.core.catalog import RouteDoc
from ondol.core.identity import ApiKey
from ondol.errors import InvalidRequest, NotFound
from ondol.gateway.identity import authenticate
from ondol.hub import keys
from ondol.hub.keys import NewFleetKey
from ondol.hub.schema import MIGRATIONS

PEPPER = b"p" * 32


@pytest.fixture
def database() -> Iterator[InlineDatabase]:
    made = InlineDatabase(":memory:", migrations=MIGRATIONS, durable=False)
    yield made
    made.close_now()


def create(database: InlineDatabase, wanted: NewFleetKey, seed: int = 1) -> tuple[ApiKey, str]:
    return database.write_now(lambda tx: keys.create(tx, wanted, PEPPER, rng=Random(seed), now_ns=START_NS))


def test_a_key_of_the_fleet_is_good_at_a_site_and_its_secret_is_nowhere(database: InlineDatabase) -> None:
    key, text = create(database, NewFleetKey(name="app", team="shop", routes=("assistant",)))
    assert key.fleet and key.kind == "user"
    found = authenticate(f"Bearer {text}", {key.id: key}, PEPPER, START_NS)
    assert (found.key_id, found.team, found.routes) == (key.id, "shop", ("assistant",))
    secret = text.rpartition("_")[2][:43]
    assert secret not in repr(database.write_now(lambda tx: tx.run("SELECT * FROM fleet_keys")))


def test_a_key_that_is_over_is_told_to_nobody(database: InlineDatabase) -> None:
    kept, _ = create(database, NewFleetKey(name="kept"), 1)
    gone, _ = create(database, NewFleetKey(name="gone"), 2)
    brief, _ = create(database, NewFleetKey(name="brief", expires_ns=START_NS + 5), 3)
    database.write_now(lambda tx: keys.revoke(tx, gone.id, START_NS + 1))
    good = database.write_now(lambda tx: keys.good(tx, START_NS + 2))
    assert {key.id for key in good} == {kept.id, brief.id}
    assert [key.id for key in database.write_now(lambda tx: keys.good(tx, START_NS + 5))] == [kept.id]
    assert {key.id for key in database.write_now(keys.everything)} == {kept.id, gone.id, brief.id}


def test_the_time_of_a_first_revocation_stays(database: InlineDatabase) -> None:
    key, _ = create(database, NewFleetKey())
    for now_ns in (START_NS + 1, START_NS + 2):
        database.write_now(lambda tx, at=now_ns: keys.revoke(tx, key.id, at))  # type: ignore[misc]
    assert database.write_now(keys.everything)[0].revoked_ns == START_NS + 1
    with pytest.raises(NotFound, match="a key that a site made is revoked there"):
        database.write_now(lambda tx: keys.revoke(tx, "unknown", START_NS))


def test_a_key_that_would_be_over_already_is_refused(database: InlineDatabase) -> None:
    with pytest.raises(InvalidRequest, match="expired already"):
        create(database, NewFleetKey(expires_ns=START_NS))


def test_a_site_is_told_of_keys_that_may_ask_a_route_of_its(database: InlineDatabase) -> None:
    def key(name: str, team: str, *routes: str) -> ApiKey:
        return ApiKey(id=name, mac=b"", tenant="default", team=team, routes=routes)

    everybody, shop, bank = key("any", "shop"), key("shop", "shop", "assistant"), key("bank", "bank", "loans")
    assistant = RouteDoc(name="assistant", deployments=("d",))
    loans = RouteDoc(name="loans", deployments=("d",), teams=("bank",))
    assert keys.useful([everybody, shop, bank], []) == ()
    assert keys.useful([everybody, shop, bank], [assistant]) == (everybody, shop)
    assert keys.useful([everybody, shop, bank], [loans]) == (bank,)
    assert keys.useful([everybody, shop, bank], [assistant, loans]) == (everybody, shop, bank)
