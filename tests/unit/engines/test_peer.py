"""A request never visits a site twice, and a site proves to the next one who it is."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from tests.faults.server import FaultServer, Reply

from ondol.adapters.clock import SystemClock
from ondol.core.catalog import KeySource
from ondol.core.identity import Origin, Principal
from ondol.core.inference import InferenceRequest, Task
from ondol.core.ports import EngineCall
from ondol.engines.peer import PeerEngine
from ondol.errors import EngineUnavailable, OndolError

pytestmark = pytest.mark.anyio

CLOCK = SystemClock()


@pytest.mark.parametrize(
    ("site", "hops"),
    [("cloud-1", ("edge-1",)), ("cloud-1", ("device-1", "cloud-1")), ("edge-1", ())],
    ids=["this site was there", "the peer was there", "the peer is this site"],
)
async def test_a_loop_is_refused_before_anything_is_sent(site: str, hops: tuple[str, ...]) -> None:
    # Given a peer at an address where nothing listens: a connection would fail with another message
    engine = PeerEngine(url="http://127.0.0.1:9/v1", site=site, own_site="edge-1", route="r", clock=CLOCK)
    call = EngineCall(
        request=InferenceRequest(task=Task.CHAT, route="r", body={}),
        request_id="r",
        attempt=1,
        deadline_ns=CLOCK.now_ns() + 10**9,
        max_output_tokens=1,
        principal=Principal(key_id="k", tenant="default", team="t"),
        origin=Origin(site="x", request_id="q", attempt=1, hops=hops),
    )
    with pytest.raises(EngineUnavailable, match="loop"):
        await engine.complete(call)
    with pytest.raises(EngineUnavailable, match="loop"):
        await anext(engine.stream(call))


CALL = EngineCall(
    request=InferenceRequest(task=Task.CHAT, route="r", body={"messages": [{"role": "user", "content": "Hi"}]}),
    request_id="r", attempt=1, deadline_ns=CLOCK.now_ns() + 7200 * 10**9, max_output_tokens=8,
    principal=Principal(key_id="k", tenant="acme", team="till"),
)  # fmt: skip
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def peer(server: FaultServer, **fields: Any) -> PeerEngine:
    return PeerEngine(url=server.url, site="shop-b", own_site="shop-a", route="r", clock=CLOCK, **fields)


async def refused(reply: Reply, line: str) -> None:
    await reply.whole(b'{"error":{"message":"no","code":"x"}}', line)


async def test_a_site_proves_itself_anew_to_each_peer_and_passes_the_trace_on() -> None:
    audiences: list[str] = []

    def authorization(audience: str) -> str:
        audiences.append(audience)
        return f"Ondol-Site proof{len(audiences)}"

    async with FaultServer(site="shop-b") as server:
        engine = peer(server, authorization=authorization)
        await engine.complete(CALL)
        await engine.complete(msgspec.structs.replace(CALL, trace=TRACE))
        await engine.close()
    first, second = [asked.headers for asked in server.asked]
    assert (first["authorization"], second["authorization"]) == ("Ondol-Site proof1", "Ondol-Site proof2")
    assert audiences == ["shop-b", "shop-b"]
    assert "traceparent" not in first
    assert second["traceparent"] == TRACE
    assert first["x-ondol-on-behalf"] == "tenant=acme;team=till"


async def test_a_key_that_was_made_for_it_wins() -> None:
    async with FaultServer(site="shop-b") as server:
        engine = peer(
            server, keys=[KeySource(env="PEER_KEY")], environ={"PEER_KEY": "ondol_key"},
            authorization=lambda _: "Ondol-Site x",
        )  # fmt: skip
        await engine.complete(CALL)
        await engine.close()
    assert server.asked[0].headers["authorization"] == "Bearer ondol_key"


async def test_a_peer_that_lets_one_team_not_in_is_asked_for_others() -> None:
    async with FaultServer(site="shop-b") as server:
        engine = peer(server, authorization=lambda _: "Ondol-Site x")
        server.say(lambda reply: refused(reply, "403 Forbidden"))
        with pytest.raises(OndolError):
            await engine.complete(CALL)
        assert engine.problem() is None
        server.say(lambda reply: refused(reply, "401 Unauthorized"))
        with pytest.raises(OndolError):
            await engine.complete(CALL)
        assert "refuses us" in (engine.problem() or "")
        await engine.close()
