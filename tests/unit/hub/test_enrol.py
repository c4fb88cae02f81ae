"""Who is let into a fleet, and who is out of it: tokens, names, addresses, keys, and the signed list."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from tests.unit.hub.conftest import PLACE, START_NS, site_doc

from ondol.adapters.database_sqlite import InlineDatabase
from ondol.core import dsse
from ondol.core.invites import parse_token
from ondol.core.trust import Epoch, Trust, authenticate_site, authorization, read_credential, read_epoch
from ondol.errors import Conflict, InvalidRequest, NotFound, OndolError, Unauthenticated
from ondol.hub import audit, enrol, sites
from ondol.hub.enrol import Authority, Invitation
from ondol.hub.schema import MIGRATIONS
from ondol.units import NS_PER_S
from ondol.wire import sync

PRIVATE = bytes(range(32))
PUBLIC = dsse.public_key(PRIVATE)
AUTHORITY = Authority(
    fleet="test", private=PRIVATE, keys={dsse.key_id(PUBLIC): PUBLIC}, pepper=b"p" * 32, credential_s=72 * 3600,
    stale_s=7 * 86_400,
)  # fmt: skip
TRUST = Trust(fleet="test", keys=AUTHORITY.keys)
DAY = 86_400


class Hub:
    """The tables of a hub, and a clock."""

    def __init__(self) -> None:
        self.database = InlineDatabase(":memory:", migrations=MIGRATIONS, durable=False)
        self.now_ns = START_NS
        self.rng = Random(3)

    def invite(
        self, name: str, *, count: int = 1, names: str = "", minutes: int = 15, **fields: object
    ) -> str:
        """The part of a token that goes to the hub."""
        wanted = Invitation(doc=site_doc(name, **fields), count=count, minutes=minutes, names=names)
        made = self.database.write_now(
            lambda tx: enrol.invite(tx, [wanted], PLACE, AUTHORITY, rng=self.rng, now_ns=self.now_ns)
        )
        return parse_token(made[0][1]).proof

    def join(self, token: str, private: bytes, **fields: Any) -> sync.JoinReply:
        message = sync.Join(token=token, key=dsse.public_key(private), **fields)

        def work(tx: Any) -> sync.JoinReply | OndolError:
            try:
                return enrol.join(tx, message, AUTHORITY, now_ns=self.now_ns)
            except Unauthenticated as error:  # as hub/service.py does: what the audit says is kept
                return error

        answer = self.database.write_now(work)
        if isinstance(answer, OndolError):
            raise answer
        return answer

    def revoke(self, name: str) -> int:
        return self.database.write_now(lambda tx: enrol.revoke(tx, name, AUTHORITY, now_ns=self.now_ns))

    def epoch(self) -> Epoch:
        made = self.database.write_now(lambda tx: enrol.current_epoch(tx, AUTHORITY, now_ns=self.now_ns))
        return read_epoch(made, TRUST)

    def site(self, name: str) -> sites.SiteRow:
        return self.database.write_now(lambda tx: sites.get(tx, name))

    def audit(self) -> list[str]:
        lines = self.database.write_now(lambda tx: audit.newest(tx, 50))
        return [f"{line['kind']} {line['subject']}" for line in lines]


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub()
    yield made
    made.database.close_now()


def new() -> bytes:
    return dsse.new_private_key()


def test_whoever_joins_gets_the_hubs_word_on_his_own_key(hub: Hub) -> None:
    private = new()
    reply = hub.join(hub.invite("shop-1"), private)
    word = read_credential(reply.credential, TRUST)
    assert (word.site, word.key, word.fleet) == ("shop-1", dsse.public_key(private), "test")
    assert word.expires_ns - word.issued_ns == 72 * 3600 * NS_PER_S
    assert read_epoch(reply.epoch, TRUST).number > 0
    assert hub.audit()[0] == "joined shop-1"


def test_the_secret_of_a_token_is_kept_nowhere(hub: Hub) -> None:
    token = hub.invite("shop-1")
    secret = token.rpartition("_")[2][:43]
    rows = hub.database.write_now(lambda tx: tx.run("SELECT * FROM invites"))
    assert secret not in repr(rows) and secret.encode() not in rows[0][1]
    assert secret not in repr(hub.audit())


def test_an_answer_that_was_lost_is_given_again_to_the_same_key_only(hub: Hub) -> None:
    token, private = hub.invite("shop-1"), new()
    hub.join(token, private)
    again = hub.join(token, private)
    assert read_credential(again.credential, TRUST).key == dsse.public_key(private)
    assert hub.audit()[0] == "joined again shop-1"
    with pytest.raises(Unauthenticated, match="was used"):
        hub.join(token, new())
    hub.now_ns += 16 * 60 * NS_PER_S
    with pytest.raises(Unauthenticated, match="has ended"):
        hub.join(token, private)


def test_an_answer_is_not_given_again_after_a_revocation(hub: Hub) -> None:
    token, private = hub.invite("shop-1"), new()
    hub.join(token, private)
    hub.revoke("shop-1")
    with pytest.raises(OndolError):
        hub.join(token, private)
    assert hub.site("shop-1").revoked_ns is not None


def test_a_secret_that_is_wrong_looks_like_an_invitation_that_is_unknown(hub: Hub) -> None:
    from ondol.core.apikeys import secret_text
    from ondol.core.invites import make_token

    good = hub.invite("shop-1")
    invite_id = good.split("_")[1]
    said = set()
    for wrong in (
        make_token(invite_id, secret_text(b"x" * 32), PLACE),
        make_token("0000000000", secret_text(b"x" * 32), PLACE),
    ):
        with pytest.raises(Unauthenticated) as caught:
            hub.join(parse_token(wrong).proof, new())
        said.add(caught.value.message)
    assert len(said) == 1
    hub.join(good, new())


@pytest.mark.parametrize("key", [b"", b"k" * 31, b"k" * 33])
def test_a_key_has_32_bytes(hub: Hub, key: bytes) -> None:
    token = hub.invite("shop-1")
    with pytest.raises(InvalidRequest, match="32 bytes"):
        hub.database.write_now(
            lambda tx: enrol.join(tx, sync.Join(token=token, key=key), AUTHORITY, now_ns=hub.now_ns)
        )
    hub.join(token, new())


def test_a_token_for_one_site_makes_no_other(hub: Hub) -> None:
    with pytest.raises(Unauthenticated, match="is for shop-1, and the site calls itself 'shop-2'"):
        hub.join(hub.invite("shop-1"), new(), site="shop-2")


def test_a_factory_key_gives_names_of_its_pattern_and_no_others(hub: Hub) -> None:
    token = hub.invite("new-shops", count=3, names="shop-*", labels={"kind": "shop"})
    private = new()
    assert hub.join(token, private, site="shop-1").site == "shop-1"
    assert hub.join(token, private, site="shop-1").site == "shop-1", "its answer was lost: it may ask again"
    assert hub.site("shop-1").doc.labels == {"kind": "shop"}
    with pytest.raises(InvalidRequest, match=r"sites called shop-\*, found 'bank-1'"):
        hub.join(token, new(), site="bank-1")
    with pytest.raises(Conflict, match="is taken"):
        hub.join(token, new(), site="shop-1")
    hub.join(token, new(), site="shop-2")
    hub.join(token, new(), site="shop-3")
    with pytest.raises(Unauthenticated, match="was used"):
        hub.join(token, new(), site="shop-4")


def test_a_factory_key_is_withdrawn_by_its_name(hub: Hub) -> None:
    token = hub.invite("new-shops", count=3, names="shop-*")
    hub.join(token, new(), site="shop-1")
    hub.revoke("new-shops")
    with pytest.raises(Unauthenticated, match="was used"):
        hub.join(token, new(), site="shop-2")
    assert hub.site("shop-1").revoked_ns is None
    with pytest.raises(NotFound):
        hub.revoke("nobody")


def test_a_pattern_of_names_is_for_factory_keys(hub: Hub) -> None:
    with pytest.raises(InvalidRequest, match="factory keys"):
        hub.invite("shop-1", names="shop-*")


def test_revoking_a_site_ends_the_tokens_that_are_out_for_it(hub: Hub) -> None:
    token = hub.invite("shop-1")
    hub.revoke("shop-1")
    with pytest.raises(Unauthenticated, match="was used"):
        hub.join(token, new())


def test_the_old_machine_stays_out_when_the_site_joins_again(hub: Hub) -> None:
    """The list no longer names the site, so it must name the key: the old credential has days to go."""
    stolen, fresh = new(), new()
    old = hub.join(hub.invite("shop-1"), stolen)
    hub.revoke("shop-1")
    assert hub.epoch().sites == ("shop-1",)
    hub.join(hub.invite("shop-1"), fresh)
    epoch = hub.epoch()
    assert epoch.sites == ()
    assert epoch.site_keys == (dsse.key_id(dsse.public_key(stolen)),)
    header = authorization(stolen, old.credential, site="shop-1", audience="shop-2", now_ns=hub.now_ns)
    peer = Trust(fleet="test", keys=AUTHORITY.keys, epoch=epoch)
    with pytest.raises(Unauthenticated, match="revoked"):
        authenticate_site(header, peer, audience="shop-2", now_ns=hub.now_ns)


def test_a_revoked_key_is_named_as_long_as_a_credential_may_be_around(hub: Hub) -> None:
    hub.join(hub.invite("shop-1"), new())
    hub.revoke("shop-1")
    hub.now_ns += (72 * 3600 + 60) * NS_PER_S
    hub.database.write_now(lambda tx: enrol.new_epoch(tx, AUTHORITY, now_ns=hub.now_ns))
    assert len(hub.epoch().site_keys) == 1
    hub.now_ns += 600 * NS_PER_S
    hub.database.write_now(lambda tx: enrol.new_epoch(tx, AUTHORITY, now_ns=hub.now_ns))
    assert hub.epoch().site_keys == ()
    assert hub.epoch().sites == ("shop-1",)


def test_a_revoked_key_joins_no_more(hub: Hub) -> None:
    private = new()
    hub.join(hub.invite("shop-1"), private)
    hub.revoke("shop-1")
    with pytest.raises(Conflict, match="this key was revoked"):
        hub.join(hub.invite("shop-1"), private)


def test_a_site_says_where_it_is_and_takes_nobodys_host(hub: Hub) -> None:
    hub.join(hub.invite("shop-1"), new(), address="https://one.example:8443")
    assert hub.site("shop-1").doc.address == "https://one.example:8443"
    token = hub.invite("shop-2")
    for taken in ("https://one.example:8443", "https://ONE.example:9000", "http://one.example"):
        with pytest.raises(Conflict, match=r"shop-1 is at one\.example already"):
            hub.join(token, new(), address=taken)
    hub.join(token, new(), address="https://two.example")


def test_several_sites_may_be_on_this_machine(hub: Hub) -> None:
    hub.join(hub.invite("shop-1"), new(), address="http://127.0.0.1:8081")
    hub.join(hub.invite("shop-2"), new(), address="http://127.0.0.1:8082")
    with pytest.raises(Conflict):
        hub.join(hub.invite("shop-3"), new(), address="http://127.0.0.1:8082")


def test_the_operators_word_on_an_address_holds(hub: Hub) -> None:
    hub.invite("other", address="https://shared.example:1")
    token = hub.invite("shop-1", address="https://shared.example:2")
    with pytest.raises(InvalidRequest, match="was invited with the address https://shared"):
        hub.join(token, new(), address="https://else.example")
    hub.join(token, new(), address="https://shared.example:2")


@pytest.mark.parametrize(
    "address",
    [
        "shop-1.example", "ftp://shop-1.example", "https://", "https://user:secret@shop-1.example", "https://a b",
        "https://[::1", "https://a:99999", "https://läden.example", "https://" + "a" * 300,
        "https://shop-1.example/ondol", "https://shop-1.example?a=b",
    ],
)  # fmt: skip
def test_an_address_is_one(hub: Hub, address: str) -> None:
    token = hub.invite("shop-1")
    with pytest.raises(InvalidRequest, match="found the address"):
        hub.join(token, new(), address=address)
    with pytest.raises(InvalidRequest, match="found the address"):
        hub.invite("shop-2", address=address)
    hub.join(token, new())


def test_the_number_of_the_list_only_rises_also_when_the_hub_went_back(hub: Hub) -> None:
    numbers = [hub.epoch().number]
    for _ in range(3):
        numbers.append(hub.database.write_now(lambda tx: enrol.new_epoch(tx, AUTHORITY, now_ns=hub.now_ns)))
    assert numbers == sorted(set(numbers))
    restored = Hub()
    restored.now_ns = hub.now_ns + 60 * NS_PER_S
    assert restored.epoch().number > numbers[-1]
    hub.now_ns -= 365 * DAY * NS_PER_S
    assert hub.database.write_now(lambda tx: enrol.new_epoch(tx, AUTHORITY, now_ns=hub.now_ns)) > numbers[-1]


def test_the_list_is_renewed_long_before_it_is_stale(hub: Hub) -> None:
    first = hub.epoch()
    hub.now_ns += DAY * NS_PER_S
    assert not hub.database.write_now(lambda tx: enrol.refresh_epoch(tx, AUTHORITY, now_ns=hub.now_ns))
    hub.now_ns += DAY * NS_PER_S
    assert hub.database.write_now(lambda tx: enrol.refresh_epoch(tx, AUTHORITY, now_ns=hub.now_ns))
    assert hub.epoch().number > first.number


def test_a_list_by_another_key_than_the_hubs_is_issued_anew(hub: Hub) -> None:
    hub.epoch()
    other = new()
    public = dsse.public_key(other)
    changed = Authority(
        fleet="test",
        private=other,
        keys={dsse.key_id(public): public},
        pepper=b"p" * 32,
        credential_s=1,
        stale_s=60,
    )
    hub.database.write_now(lambda tx: enrol.ensure_epoch(tx, changed, now_ns=hub.now_ns))
    newest = hub.database.write_now(enrol.newest_epoch)
    assert read_epoch(newest, Trust(fleet="test", keys=changed.keys)).fleet == "test"


def test_invitations_that_are_long_over_are_forgotten(hub: Hub) -> None:
    hub.invite("shop-1")
    hub.now_ns += 100 * DAY * NS_PER_S
    hub.invite("shop-2")
    assert hub.database.write_now(lambda tx: tx.run("SELECT site FROM invites")) == [("shop-2",)]
