"""Limits hold under load: rates, budgets with a thousand requests at once, ceilings, a full ledger."""

from __future__ import annotations

import asyncio
import json
from decimal import Decimal
from pathlib import Path

import pytest
from pyreqwest.client import ClientBuilder
from tests.sites import FAKE, Site, running_site

from ondol.adapters.ledger_reader import records

pytestmark = pytest.mark.anyio

SLOW = FAKE.replace(
    "engine: fake\nprice: list\n",
    "engine: fake\nprice: list\nfake: {first_token_ms: 200, output_tokens: 8}\n",
    1,
)
BUDGET = """
---
kind: Budget
name: small
scope: {tenant: default}
amount: 0.005
currency: USD
period: day
timezone: Asia/Seoul
"""
FREE = """
---
kind: Deployment
name: unpriced-fake
site: {site}
model: helper
engine: fake
---
kind: Route
name: unpriced
deployments: [unpriced-fake]
"""


async def _ask_at_once(site: Site, count: int, *, max_tokens: int) -> list[int]:
    """The statuses of `count` requests that are all under way together."""
    body = json.dumps(
        {
            "model": "assistant",
            "messages": [{"role": "user", "content": "Hi"}],
            "max_completion_tokens": max_tokens,
        }
    ).encode()

    async with ClientBuilder().no_proxy().max_connections(None).build() as client:

        async def one() -> int:
            request = (
                client.post(site.url + "/v1/chat/completions").bearer_auth(site_key).body_bytes(body).build()
            )
            return (await request.send()).status

        site_key = site.admin_key
        return await asyncio.gather(*(one() for _ in range(count)))


async def test_a_thousand_requests_at_once_never_pass_a_budget(tmp_path: Path) -> None:
    with running_site(tmp_path, SLOW + BUDGET) as site:
        statuses = await _ask_at_once(site, 1000, max_tokens=8)
        assert set(statuses) == {200, 402}
        status = site.call("GET", "/v1/ondol/budgets").json()["data"][0]
        assert status["name"] == "small" and Decimal(status["spent"]) <= Decimal("0.005")
        refused = site.chat(max_completion_tokens=4000)
        assert refused.status == 402 and refused.code == "budget_exhausted"
        message = refused.json()["error"]["message"]
        assert " left" in message and "renews 20" in message
        site.stop()
    spent = sum(record.cost for record in records(tmp_path / "data" / "ledger.db"))
    assert 0 < spent <= 5_000_000
    assert len([s for s in statuses if s == 200]) == len(
        [r for r in records(tmp_path / "data" / "ledger.db") if r.outcome == "completed"]
    )


async def test_a_budget_survives_a_restart(tmp_path: Path) -> None:
    with running_site(tmp_path, SLOW + BUDGET) as site:
        await _ask_at_once(site, 1000, max_tokens=8)
        before = site.call("GET", "/v1/ondol/budgets").json()["data"][0]
    with running_site(tmp_path, SLOW + BUDGET) as site:
        after = site.call("GET", "/v1/ondol/budgets").json()["data"][0]
        assert after["spent"] == before["spent"]
        assert site.chat(max_completion_tokens=4000).status == 402


async def test_an_unpriced_endpoint_is_no_candidate_under_a_hard_budget(tmp_path: Path) -> None:
    with running_site(tmp_path, FAKE + FREE + BUDGET) as site:
        refused = site.chat(model="unpriced")
        assert refused.status == 402 and "no endpoint has a known price" in refused.json()["error"]["message"]


def test_a_budget_in_won_counts_prices_in_dollars(tmp_path: Path) -> None:
    won = (
        BUDGET.replace("amount: 0.005\ncurrency: USD", "amount: 1\ncurrency: KRW")
        + """
---
kind: Price
name: usd-krw
currency: KRW
exchange_from: USD
rate: 1400
source: made for a test
date: 2026-01-01
"""
    )
    with running_site(tmp_path, FAKE + won) as site:
        answer = site.chat(max_completion_tokens=10)
        cost = Decimal(answer.headers["x-ondol-cost"].split()[0])
        status = site.call("GET", "/v1/ondol/budgets").json()["data"][0]
        assert status["currency"] == "KRW" and Decimal(status["spent"]) == cost * 1400


def test_the_callers_own_ceiling_is_kept(tmp_path: Path) -> None:
    with running_site(tmp_path) as site:
        assert site.chat(headers={"x-ondol-max-cost": "1 USD"}).status == 200
        refused = site.chat(headers={"x-ondol-max-cost": "0.0000001 USD"})
        assert refused.status == 402 and "cost ceiling" in refused.json()["error"]["message"]


def test_requests_a_minute_are_limited_with_headers_that_say_when(tmp_path: Path) -> None:
    with running_site(tmp_path) as site:
        key = site.new_key(requests_per_min=3)
        left = [site.chat(key=key).headers["x-ratelimit-remaining-requests"] for _ in range(3)]
        assert left == ["2", "1", "0"]
        refused = site.chat(key=key)
        assert refused.status == 429 and refused.code == "rate_limit_exceeded"
        assert 1 <= int(refused.headers["retry-after"]) <= 21
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert site.chat().status == 200


def test_tokens_a_minute_are_limited_and_given_back(tmp_path: Path) -> None:
    with running_site(tmp_path) as site:
        key = site.new_key(tokens_per_min=3000)
        assert [site.chat(key=key, max_completion_tokens=900).status for _ in range(5)] == [200] * 5
        never = site.chat(key=key, max_completion_tokens=4000)
        assert never.status == 413 and "never pass" in never.json()["error"]["message"]


def test_a_full_ledger_refuses_new_billable_work(tmp_path: Path) -> None:
    with running_site(tmp_path, gateway="limits: {ledger_bytes: 400000}") as site:
        statuses = []
        for number in range(2000):
            answer = site.chat(
                f"question {number} " + "x" * 200, user="u", metadata={str(i): "y" * 400 for i in range(10)}
            )
            statuses.append(answer.status)
            if answer.status != 200:
                break
        assert statuses[-1] == 503 and answer.code == "ledger_full"
        assert site.call("GET", "/healthz", key=None).status == 200
        site.stop()
    kept = [record for record in records(tmp_path / "data" / "ledger.db") if record.outcome == "completed"]
    assert len(kept) == len(statuses) - 1
