"""A request never visits a site twice."""

from __future__ import annotations

import pytest

from ondol.adapters.clock import SystemClock
from ondol.core.identity import Origin, Principal
from ondol.core.inference import InferenceRequest, Task
from ondol.core.ports import EngineCall
from ondol.engines.peer import PeerEngine
from ondol.errors import EngineUnavailable

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
