"""What comes in: bad input gets a clear answer, keys are what they are, and nothing leaks."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.sites import FAKE, Site, running_site

DOCUMENTS = (
    FAKE
    + """
---
kind: Team
name: lessons
---
kind: Route
name: lessons-only
deployments: [helper-fake]
teams: [lessons]
---
kind: Model
name: weak
task: chat
---
kind: Deployment
name: weak-fake
site: {site}
model: weak
engine: fake
capabilities: []
price: list
---
kind: Route
name: weak
deployments: [weak-fake]
"""
)
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running_site(tmp_path_factory.mktemp("requests"), DOCUMENTS) as one:
        yield one


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        (b'{"model":', None, "not valid JSON"),
        (b"\xff\xfe{}", None, "not valid JSON"),
        (b"[1,2]", None, "expected a JSON object"),
        (b"{}", "model", "name of a route"),
        (b'{"model":"assistant"}', "messages", "at least one message"),
        (b'{"model":"assistant","messages":[]}', "messages", "at least one message"),
        (b'{"model":"assistant","messages":["hi"]}', "messages[0]", "role"),
        (b'{"model":"assistant","messages":[{"role":"user","content":7}]}', "messages[0].content", "string or a list"),
        (b'{"model":"assistant","messages":[{"role":"user","content":"a"}],"temperature":9}', "temperature", "0 to 2"),
        (b'{"model":"assistant","messages":[{"role":"user","content":"a"}],"n":0}', "n", "1 to 128"),
        (b'{"model":"assistant","messages":[{"role":"user","content":"a"}],"stream":1}', "stream", "true or false"),
        (b'{"model":"assistant","messages":[{"role":"user","content":"a"}],"tools":{}}', "tools", "list"),
        (b'{"model":"assistant","messages":[{"role":"user","content":"a"}],"response_format":{"type":"x"}}',
         "response_format", "json_schema"),
        (b'{"model":"assistant","messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"file:///etc"}}]}]}',
         "messages[0].content[0].image_url.url", "data:image/"),
        (b'{"model":"assistant","messages":[{"role":"user","content":"a"}],"stream_options":{"include_usage":true}}',
         "stream_options", "'stream' is true"),
        (b'{"model":"embedding","messages":[{"role":"user","content":"a"}]}', None, "another task"),
    ],
)  # fmt: skip
def test_bad_input_names_the_field_and_what_is_allowed(
    site: Site, body: bytes, param: str | None, said: str
) -> None:
    answer = site.call("POST", "/v1/chat/completions", body)
    assert answer.status == 400, answer.body
    error = answer.json()["error"]
    assert error["param"] == param and said in error["message"]
    assert error["type"] == "invalid_request_error"


def test_deep_json_is_refused_before_it_is_parsed(site: Site) -> None:
    answer = site.call("POST", "/v1/chat/completions", b'{"model":' + b"[" * 100_000)
    assert answer.status == 400 and "nests deeper" in answer.json()["error"]["message"]


def test_a_body_beyond_the_bound_is_refused_by_its_length(site: Site) -> None:
    with socket.create_connection(("127.0.0.1", site.port), 5) as raw:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{site.port}\r\nAuthorization: Bearer {site.admin_key}\r\n"
        raw.sendall((head + "Content-Length: 99999999999\r\n\r\n").encode())
        assert b" 413 " in raw.recv(4096)


@pytest.mark.parametrize("key", [None, "nonsense", "ondol_abcdefghij_" + "a" * 49])
def test_whoever_has_no_key_learns_nothing(site: Site, key: str | None) -> None:
    answers = {site.chat(key=key).body, site.call("GET", "/v1/models", key=key).body}
    assert len(answers) == 1
    error = json.loads(answers.pop())["error"]
    assert error["code"] == "invalid_api_key"


def test_an_expired_and_a_revoked_key_say_so(site: Site) -> None:
    short = site.new_key(name="short", expires_in_s=1)
    gone = site.call("POST", "/v1/ondol/keys", {"name": "gone"}).json()
    assert site.call("DELETE", f"/v1/ondol/keys/{gone['id']}").json() == {"id": gone["id"], "revoked": True}
    time.sleep(1.1)
    assert site.chat(key=short).code == "expired_api_key"
    assert site.chat(key=gone["key"]).code == "revoked_api_key"


def test_the_secret_of_a_key_is_shown_once(site: Site) -> None:
    made = site.call("POST", "/v1/ondol/keys", {"name": "once", "routes": ["assistant"]}).json()
    listed = site.call("GET", "/v1/ondol/keys")
    secret = made["key"].split("_")[2]
    assert secret not in listed.body.decode() and made["id"] in listed.body.decode()
    assert secret not in site.log


def test_a_key_sees_and_uses_only_its_routes(site: Site) -> None:
    key = site.new_key(routes=["assistant"])
    assert [one["id"] for one in site.call("GET", "/v1/models", key=key).json()["data"]] == ["assistant"]
    assert site.chat(key=key).status == 200
    refused = site.chat(key=key, model="weak")
    assert refused.status == 403 and refused.code == "forbidden"


def test_a_route_of_a_team_is_closed_to_others(site: Site) -> None:
    ours, theirs = site.new_key(team="lessons"), site.new_key()
    assert site.chat(key=ours, model="lessons-only").status == 200
    assert site.chat(key=theirs, model="lessons-only").code == "forbidden"


def test_a_request_for_what_no_engine_can_do_is_refused_by_name(site: Site) -> None:
    answer = site.chat(model="weak", tools=[{"type": "function", "function": {"name": "f"}}], logprobs=True)
    assert answer.status == 400 and answer.code == "unsupported_by_model"
    assert "logprobs, tools" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "path", ["/v1/responses", "/v1/audio/speech", "/v1/files", "/v1/fine_tuning/jobs", "/v1/batches"]
)
def test_a_path_of_openai_that_is_not_served_answers_501_with_its_name(site: Site, path: str) -> None:
    answer = site.call("POST", path, {})
    assert answer.status == 501 and answer.code == "not_served"
    message = answer.json()["error"]["message"]
    assert path in message and "/v1/chat/completions" in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-ondol-data-class", "secret"), ("x-ondol-objective", "quick"), ("x-ondol-max-latency-ms", "-1"),
        ("x-ondol-max-cost", "much"), ("x-ondol-tags", "novalue"),
    ],
)  # fmt: skip
def test_a_wrong_hint_is_refused_never_guessed(site: Site, name: str, value: str) -> None:
    answer = site.chat(headers={name: value})
    assert answer.status == 400 and answer.json()["error"]["param"] == name


def test_a_request_explains_itself_to_its_team_alone(site: Site) -> None:
    ours, theirs = site.new_key(team="lessons"), site.new_key()
    answer = site.chat(
        "private words",
        key=ours,
        user="kim",
        metadata={"lesson": "7"},
        headers={"x-ondol-tags": "shop=a%20b"},
    )
    request_id = answer.headers["x-ondol-request-id"]
    seen = site.call("GET", f"/v1/ondol/requests/{request_id}", key=ours)
    record = seen.json()
    assert record["reason"]["code"] == "only_choice"
    assert "helper-fake on store-1 answered" in record["reason"]["en"] and "응답" in record["reason"]["ko"]
    assert record["tags"] == [["lesson", "7"], ["shop", "a b"]]
    assert record["user"].startswith("u_") and "kim" not in seen.body.decode()
    assert "private words" not in seen.body.decode()
    assert site.call("GET", f"/v1/ondol/requests/{request_id}", key=theirs).status == 404


def test_administration_takes_the_admin_key(site: Site) -> None:
    user = site.new_key()
    for method, path in [
        ("GET", "/metrics"),
        ("GET", "/v1/ondol/keys"),
        ("GET", "/v1/ondol/status"),
        ("POST", "/v1/ondol/reload"),
    ]:
        assert site.call(method, path, key=user).status == 403
        assert site.call(method, path, key=None).status == 401


def test_metrics_count_without_content(site: Site) -> None:
    site.chat("words that must not show")
    text = site.call("GET", "/metrics").body.decode()
    assert 'ondol_requests_total{cache="off",deployment="helper-fake"' in text
    assert "gen_ai_server_request_duration_seconds_bucket" in text
    assert "gen_ai_client_token_usage_tokens_count{" in text
    assert "must not show" not in text and "must not show" not in site.log


def test_status_tells_of_every_endpoint(site: Site) -> None:
    status = site.call("GET", "/v1/ondol/status").json()
    helper = next(one for one in status["endpoints"] if one["deployment"] == "helper-fake")
    assert helper["problem"] is None and helper["price"] and helper["breaker"] == "takes requests"


def test_cors_answers_only_configured_origins(site: Site, tmp_path: Path) -> None:
    assert "access-control-allow-origin" not in site.chat(headers={"origin": "https://a.example"}).headers
    with running_site(tmp_path, gateway='cors: {origins: ["https://a.example"]}') as open_site:
        good = open_site.chat(headers={"origin": "https://a.example"})
        assert good.headers["access-control-allow-origin"] == "https://a.example"
        assert (
            "access-control-allow-origin"
            not in open_site.chat(headers={"origin": "https://b.example"}).headers
        )
        before = open_site.call("OPTIONS", "/v1/chat/completions", key=None, origin="https://a.example")
        assert before.status == 204 and "authorization" in before.headers["access-control-allow-headers"]


def test_image_parts_pass_and_are_bounded(site: Site) -> None:
    def content(count: int) -> list[dict[str, Any]]:
        return [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}]
                * count,
            }
        ]

    assert (
        site.call("POST", "/v1/chat/completions", {"model": "assistant", "messages": content(2)}).status
        == 200
    )
    refused = site.call("POST", "/v1/chat/completions", {"model": "assistant", "messages": content(300)})
    assert refused.status == 413 and refused.code == "request_too_large"


def test_the_record_of_a_refused_request_has_the_status_that_its_client_got(site: Site) -> None:
    refused = site.chat(model="weak", seed=7)
    assert refused.status == 400
    record = site.record(refused.headers["x-ondol-request-id"])
    assert (record["status"], record["outcome"], record["error"]) == (400, "refused", "unsupported_by_model")


def test_the_ledger_is_its_owners_alone(site: Site) -> None:
    for name in ("ledger.db", "keys.db", "capture.db", "admin.key", "gateway.id", "subject.key"):
        assert (site.folder / "data" / name).stat().st_mode & 0o077 == 0, name
