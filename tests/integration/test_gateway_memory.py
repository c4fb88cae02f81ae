"""What a site remembers of answers: the exact cache, idempotency keys, opt-in captures."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.sites import FAKE, Site, running_site

from ondol.adapters.ledger_reader import records

TEXT = (
    FAKE.replace(
        "name: assistant\ndeployments: [helper-fake]\n",
        "name: assistant\ndeployments: [helper-fake]\ncache: {ttl_s: 2}\n",
    )
    + """
---
kind: Tenant
name: other
---
kind: Team
name: others
tenant: other
---
kind: Deployment
name: slow-fake
site: {site}
model: helper
engine: fake
price: list
fake: {first_token_ms: 300}
---
kind: Route
name: slow
deployments: [slow-fake]
---
kind: Route
name: seen
deployments: [helper-fake]
capture: {retention_s: 2}
"""
)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with running_site(tmp_path, TEXT) as one:
        yield one


@pytest.mark.parametrize("stream", [False, True])
def test_the_same_question_is_answered_from_the_cache_at_no_cost(site: Site, stream: bool) -> None:
    first, second = (site.chat("What is warm?", stream=stream, user=user) for user in ("a", "b"))
    assert [first.headers["x-ondol-cache"], second.headers["x-ondol-cache"]] == ["miss", "exact"]
    if stream:
        content = [
            [json.loads(e[6:])["choices"] for e in a.body.decode().split("\n\n")[:-2]]
            for a in (first, second)
        ]
        assert content[0] == content[1] and second.body.endswith(b"data: [DONE]\n\n")
        ends = [json.loads(a.body.decode().split("\n\n")[-3][6:])["ondol"] for a in (first, second)]
        assert ends[1]["cost"] == "0 USD" and ends[1]["request_id"] != ends[0]["request_id"]
    else:
        assert first.body == second.body and second.headers["x-ondol-cost"] == "0 USD"
    record = site.record(second.headers["x-ondol-request-id"])
    assert record["cache"] == "exact" and "cost" not in record and record["reason"]["code"] == "cache_exact"
    assert record["usage"]["output_tokens"] > 0


def test_what_differs_is_not_a_hit(site: Site) -> None:
    site.chat("What is warm?")
    assert site.chat("What is warm?", temperature=0.1).headers["x-ondol-cache"] == "miss"
    assert site.chat("What is  warm?").headers["x-ondol-cache"] == "miss"
    assert site.chat("What is warm?", headers={"cache-control": "no-store"}).headers["x-ondol-cache"] == "off"
    restricted = {"x-ondol-data-class": "restricted"}
    assert [site.chat("secret", headers=restricted).headers["x-ondol-cache"] for _ in range(2)] == [
        "off",
        "off",
    ]
    time.sleep(2.1)
    assert site.chat("What is warm?").headers["x-ondol-cache"] == "miss"


def test_another_tenant_never_gets_the_answer(site: Site) -> None:
    key = site.new_key(team="others", tenant="other")
    assert site.chat("What is warm?").headers["x-ondol-cache"] == "miss"
    assert site.chat("What is warm?", key=key).headers["x-ondol-cache"] == "miss"
    assert site.chat("What is warm?", key=key).headers["x-ondol-cache"] == "exact"


def test_an_idempotency_key_makes_a_retry_free(site: Site) -> None:
    headers = {"idempotency-key": "order-7"}
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: site.chat("go", model="slow", headers=headers), range(4)))
    assert len({answer.headers["x-ondol-request-id"] for answer in answers}) == 1
    assert sum("x-ondol-idempotent" in answer.headers for answer in answers) == 3
    other = site.chat("stop", model="slow", headers=headers)
    assert other.status == 422 and other.code == "idempotency_conflict"
    site.stop()
    assert len(list(records(site.folder / "data" / "ledger.db"))) == 1


def test_an_idempotent_stream_is_replayed(site: Site) -> None:
    headers = {"idempotency-key": "stream-1"}
    first, second = (site.chat("go", model="slow", stream=True, headers=headers) for _ in range(2))
    assert first.body == second.body and second.headers["x-ondol-idempotent"] == "replayed"


def test_a_failed_request_frees_its_idempotency_key(site: Site) -> None:
    headers = {"idempotency-key": "again"}
    assert site.chat(model="nobody", headers=headers).status == 404
    assert site.chat(headers=headers).status == 200


def test_prompts_are_kept_only_where_a_route_says_so_and_for_its_time(site: Site) -> None:
    asked = site.chat("words to debug", model="seen")
    path = f"/v1/ondol/requests/{asked.headers['x-ondol-request-id']}/capture"
    user = site.new_key()
    deadline = time.monotonic() + 5
    while (found := site.call("GET", path)).status == 404 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert "words to debug" in found.json()["prompt"] and found.json()["answer"]
    assert site.call("GET", path, key=user).status == 403
    time.sleep(2.1)
    assert site.call("GET", path).status == 404
    plain = site.chat("not kept")
    assert site.call("GET", f"/v1/ondol/requests/{plain.headers['x-ondol-request-id']}/capture").status == 404


def test_concurrent_misses_each_get_an_answer(site: Site) -> None:
    async def all_at_once() -> list[int]:
        return [
            a.status
            for a in await asyncio.gather(*(asyncio.to_thread(site.chat, f"q{i % 3}") for i in range(30)))
        ]

    assert set(asyncio.run(all_at_once())) == {200}
