"""Sites and their hub: joining, sessions, desired state, usage, revocation; without a network."""

from __future__ import annotations

import msgspec
import pytest
from tests.unit.hub.conftest import Fleet, Speaker

from ondol.core.catalog import DeploymentDoc, ModelDoc, RouteDoc
from ondol.core.desired import assemble
from ondol.core.dsse import to_text
from ondol.core.trust import Trust, authorization, read_epoch
from ondol.errors import (
    BadSignature,
    Conflict,
    Fenced,
    Forbidden,
    GenerationRefused,
    HelloAgain,
    InvalidRequest,
    NotFound,
    OndolError,
    RangeRefused,
    Unauthenticated,
)
from ondol.hub import audit, enrol, publish, sessions, sites
from ondol.wire import sync

pytestmark = pytest.mark.anyio

DOCUMENTS = (
    ("Model", ModelDoc(name="helper")),
    ("Deployment", DeploymentDoc(name="local", model="helper", engine="fake", site="shop-1")),
    ("Route", RouteDoc(name="assistant", deployments=("local",))),
)


async def test_a_token_is_good_once_and_for_its_time(fleet: Fleet) -> None:
    token = await fleet.token("shop-1")
    await Speaker(fleet.hub, fleet.clock, "shop-1").join(token)
    with pytest.raises(Unauthenticated, match="was used"):
        await Speaker(fleet.hub, fleet.clock, "shop-1").join(token)
    late = await fleet.token("shop-2")
    fleet.clock.move(16 * 60)
    with pytest.raises(Unauthenticated, match="has ended"):
        await Speaker(fleet.hub, fleet.clock, "shop-2").join(late)


async def test_a_refused_token_is_in_the_audit(fleet: Fleet) -> None:
    token = await fleet.token("shop-1")
    fleet.clock.move(3600)
    with pytest.raises(Unauthenticated):
        await Speaker(fleet.hub, fleet.clock, "shop-1").join(token)
    lines = await fleet.hub.database.read(lambda tx: audit.newest(tx, 10))
    assert [line["kind"] for line in lines][:2] == ["join_refused", "invited"]


async def test_a_mistyped_token_is_told_from_a_bad_one(fleet: Fleet) -> None:
    token = await fleet.token("shop-1")
    with pytest.raises(InvalidRequest, match="copy the whole line"):
        await Speaker(fleet.hub, fleet.clock, "shop-1").join("X" + token[1:])


async def test_a_factory_key_enrols_so_many_new_sites(fleet: Fleet) -> None:
    token = await fleet.token("factory", count=2)
    for name in ("shop-1", "shop-2"):
        site = Speaker(fleet.hub, fleet.clock, name)
        message = sync.Join(token=token.partition(".")[0], key=b"k" * 32, site=name)
        reply = sync.decode(await fleet.hub.handle("join", None, sync.encode(message)), sync.JoinReply)
        assert reply.site == site.name
    with pytest.raises(Unauthenticated, match="was used"):
        message = sync.Join(token=token.partition(".")[0], key=b"k" * 32, site="shop-3")
        await fleet.hub.handle("join", None, sync.encode(message))


async def test_a_factory_key_gives_no_name_that_is_taken(fleet: Fleet) -> None:
    await fleet.joined("shop-1")
    token = await fleet.token("factory", count=5)
    for name, error in (
        ("shop-1", Conflict),
        ("hub", Conflict),
        ("", InvalidRequest),
        ("A b", InvalidRequest),
    ):
        message = sync.Join(token=token.partition(".")[0], key=b"k" * 32, site=name)
        with pytest.raises(error):
            await fleet.hub.handle("join", None, sync.encode(message))


async def test_nobody_joins_in_the_place_of_a_site(fleet: Fleet) -> None:
    await fleet.joined("shop-1")
    with pytest.raises(Conflict, match="has joined already"):
        await fleet.token("shop-1")


async def test_who_has_no_credential_is_nobody(fleet: Fleet) -> None:
    site = await fleet.joined("shop-1")
    body = sync.encode(sync.Fetch(instance=site.instance))
    for header in (None, "", "Bearer x", "Ondol-Site x~y", site.header[:-8] + "AAAAAAAA"):
        with pytest.raises(Unauthenticated):
            await fleet.hub.handle("desired", header, body)
    with pytest.raises(NotFound):
        await fleet.hub.handle("nothing", site.header, b"")
    with pytest.raises(InvalidRequest):
        await site.hub.handle("desired", site.header, b"\xc1")


async def test_what_a_site_says_is_for_its_hub_alone(fleet: Fleet) -> None:
    site = await fleet.joined("shop-1")
    assert site.joined is not None
    other = authorization(
        site.private, site.joined.credential, site="shop-1", audience="shop-2", now_ns=fleet.clock.wall_ns()
    )
    with pytest.raises(Unauthenticated, match="expected 'shop-1' for 'hub'"):
        await fleet.hub.handle("desired", other, sync.encode(sync.Fetch(instance=site.instance)))


async def test_desired_state_comes_as_a_delta_and_only_goes_up(fleet: Fleet) -> None:
    site = await fleet.joined("shop-1")
    assert (await site.fetch()).manifest is None
    first = await fleet.apply(*DOCUMENTS)
    reply = await site.fetch()
    assert reply.manifest is not None and site.joined is not None
    trust = Trust(fleet="test", keys=site.joined.hub_keys)
    state = assemble(reply.manifest, trust, site="shop-1", known={}, sent=reply.bodies, least=0)
    assert state.manifest.generation == first
    changed = ("Route", RouteDoc(name="assistant", deployments=("local",), max_output_tokens=99))
    await fleet.apply(*DOCUMENTS[:2], changed)
    delta = await site.fetch(have=tuple(state.bodies))
    assert len(delta.bodies) == 1 and b"99" in delta.bodies[0]
    with pytest.raises(GenerationRefused):
        assemble(reply.manifest, trust, site="shop-1", known=state.bodies, sent=(), least=first + 1)
    with pytest.raises(BadSignature, match="for site"):
        assemble(reply.manifest, trust, site="shop-2", known=state.bodies, sent=(), least=0)
    with pytest.raises(BadSignature, match="missing"):
        assert delta.manifest is not None
        tampered = delta.bodies[0].replace(b"99", b"98")
        assemble(delta.manifest, trust, site="shop-1", known=state.bodies, sent=[tampered], least=0)


async def test_a_rollback_is_a_new_generation(fleet: Fleet) -> None:
    await fleet.joined("shop-1")
    await fleet.apply(*DOCUMENTS)
    await fleet.apply(*DOCUMENTS[:1])
    number, of = await fleet.hub.database.write(
        lambda tx: publish.rollback(tx, None, author="a", now_ns=fleet.clock.wall_ns())
    )
    assert (number, of) == (3, 1)
    found = await fleet.hub.database.read(lambda tx: publish.documents(tx, number))
    assert tuple(found) == DOCUMENTS


async def test_a_restored_hub_numbers_above_what_its_sites_have_seen(fleet: Fleet) -> None:
    site = await fleet.joined("shop-1")
    await site.report(generation=40)
    assert await fleet.apply(*DOCUMENTS) == 41


async def test_usage_is_taken_once_and_gaps_are_asked_for(fleet: Fleet) -> None:
    site = await fleet.joined("shop-1")
    first, second, third = site.rows(3), site.rows(2), site.rows(1)
    assert (await site.send(first)).mark == 3
    assert (await site.send(first)).mark == 3
    assert (await site.send(third)).mark == 3
    assert (await site.send(second)).mark == 5
    assert (await site.send(third)).mark == 6
    rows = await fleet.hub.database.read(lambda tx: tx.run("SELECT COUNT(*) FROM usage"))
    assert rows[0][0] == 6


async def test_a_changed_range_is_refused_and_nothing_of_it_is_kept(fleet: Fleet) -> None:
    site = await fleet.joined("shop-1")
    sent = site.rows(3)
    rows = (sent.rows[0].replace(b'"cost":1', b'"cost":9'), *sent.rows[1:])
    with pytest.raises(RangeRefused):
        await site.send(msgspec.structs.replace(sent, rows=rows))
    assert (await site.send(sent)).mark == 3


async def test_a_site_sends_for_itself_only(fleet: Fleet) -> None:
    one, two = await fleet.joined("shop-1"), await fleet.joined("shop-2")
    await one.send(one.rows(2))
    stolen = msgspec.structs.replace(one.rows(1), instance=two.instance)
    with pytest.raises(Forbidden):
        await two.send(stolen)


async def test_a_quick_restart_waits_only_while_the_old_process_may_live(fleet: Fleet) -> None:
    site = await fleet.joined("shop-1")
    again = site.copy("bbbbbbbb")
    assert (await again.hello()).wait_s > 0
    fleet.hub.liveness.hung_up("shop-1", site.instance)
    assert (await again.hello()).wait_s == 0
    await again.report()
    third = site.copy("cccccccc")
    fleet.clock.move(16)
    assert (await third.hello()).wait_s == 0


async def test_the_second_machine_of_one_disk_is_fenced(fleet: Fleet) -> None:
    site = await fleet.joined("shop-1")
    twin = site.copy("bbbbbbbb")
    for _ in range(6):
        await site.report()
        try:
            assert (await twin.hello()).wait_s > 0
        except Fenced:
            break
        fleet.clock.move(5)
    with pytest.raises(Fenced, match="came second"):
        await twin.hello()
    with pytest.raises(Fenced):
        await twin.send(twin.rows(1))
    await site.send(site.rows(1))


async def test_the_first_machine_that_comes_back_fences_the_second(fleet: Fleet) -> None:
    site = await fleet.joined("shop-1")
    fleet.clock.move(60)
    twin = site.copy("bbbbbbbb")
    assert (await twin.hello()).wait_s == 0
    with pytest.raises(HelloAgain):
        await site.report()
    challenge = (await site.hello()).challenge
    assert challenge
    await twin.report()
    reply = await site.hello(challenge)
    assert (reply.challenge, reply.wait_s) == ("", 0)
    await site.report()
    with pytest.raises(Fenced):
        await twin.report()
    await fleet.hub.database.write(lambda tx: sessions.admit(tx, "shop-1"))
    with pytest.raises(HelloAgain):
        await twin.report()


async def test_a_late_message_of_the_old_process_fences_nobody(fleet: Fleet) -> None:
    site = await fleet.joined("shop-1")
    fleet.clock.move(60)
    again = site.copy("bbbbbbbb")
    await again.hello()
    assert (await site.hello()).challenge
    assert (await site.hello("guessed")).challenge
    await again.report()


async def test_who_is_revoked_is_out_at_once_and_named_to_others(fleet: Fleet) -> None:
    site, other = await fleet.joined("shop-1"), await fleet.joined("shop-2")
    number = await fleet.hub.database.write(
        lambda tx: enrol.revoke(tx, "shop-1", fleet.hub.authority, now_ns=fleet.clock.wall_ns())
    )
    with pytest.raises(Forbidden, match="revoked"):
        await site.report()
    assert other.joined is not None
    trust = Trust(fleet="test", keys=other.joined.hub_keys)
    epoch = read_epoch((await other.fetch()).epoch, trust)
    assert (epoch.number, epoch.sites) == (number, ("shop-1",))
    newer = msgspec.structs.replace(trust, epoch=msgspec.structs.replace(epoch, number=number + 1))
    with pytest.raises(BadSignature, match="known already"):
        read_epoch((await other.fetch()).epoch, newer)


async def test_a_revoked_site_may_join_anew_with_a_new_key(fleet: Fleet) -> None:
    site = await fleet.joined("shop-1")
    await fleet.hub.database.write(
        lambda tx: enrol.revoke(tx, "shop-1", fleet.hub.authority, now_ns=fleet.clock.wall_ns())
    )
    again = Speaker(fleet.hub, fleet.clock, "shop-1", "dddddddd")
    await again.join(await fleet.token("shop-1"))
    await again.hello()
    with pytest.raises(Unauthenticated, match="another key"):
        await site.report()


async def test_a_watch_tells_what_is_new_and_ends_with_its_site(fleet: Fleet) -> None:
    site = await fleet.joined("shop-1")
    lines = fleet.hub.watch(site.header, sync.encode(sync.Watch(instance=site.instance)))
    said = msgspec.json.decode(await anext(lines), type=sync.Announcement)
    assert said.generation == 0
    await fleet.apply(*DOCUMENTS)
    said = msgspec.json.decode(await anext(lines), type=sync.Announcement)
    assert said.generation == 1
    await fleet.hub.database.write(lambda tx: sites.revoke(tx, "shop-1", fleet.clock.wall_ns()))
    await fleet.apply(*DOCUMENTS[:1])
    assert await anext(lines, None) is None


async def test_a_site_that_was_away_for_long_comes_back_without_an_invitation(fleet: Fleet) -> None:
    site = await fleet.joined("shop-1")
    fleet.clock.move(30 * 86_400)
    assert (await site.hello()).wait_s == 0
    reply = await site.call("renew", sync.Renew(), sync.RenewReply)
    assert to_text(reply.credential)


async def test_errors_have_codes(fleet: Fleet) -> None:
    with pytest.raises(OndolError) as caught:
        await fleet.hub.handle("hello", None, b"")
    assert caught.value.code == "invalid_api_key"
