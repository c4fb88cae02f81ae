"""`ondol client-proxy` before two real sites: one dies, falls silent, drains, breaks a stream, and comes back."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.hubs import FLEET, fleet_of, member, running_hub, until
from tests.sites import FAKE, Answer, Site, free_port, running_site, start

SLOW = FAKE.replace("engine: fake\nprice", "engine: fake\nfake: {output_tokens: 400, token_ms: 20}\nprice", 1)


class Proxy(Site):
    """The running proxy; `key` is what its callers send."""

    @property
    def says(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.splitlines() if line.startswith("{")]

    def states(self) -> dict[str, str]:
        found = self.call("GET", "/v1/ondol/proxy", key=None).json()["data"]
        return {one["url"]: one["state"] for one in found}


@contextlib.contextmanager
def proxy(folder: Path, urls: Sequence[str], *, key: str = "", learn: bool = False) -> Iterator[Proxy]:
    port = free_port()
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "admin.key").write_text(key)
    words = [word for url in urls for word in ("--site", url)]
    with (folder / "site.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ondol", "client-proxy", *words, "--listen", f"127.0.0.1:{port}", "--json"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            env=os.environ | ({"ONDOL_API_KEY": key} if learn else {}),
        )  # fmt: skip
    running = Proxy(folder, port, process)
    try:
        until(lambda: _answers(running), "the proxy answers")
        yield running
    finally:
        assert running.stop() == 0, running.log


def _answers(running: Proxy) -> bool:
    with contextlib.suppress(OSError):
        return bool(running.states())
    return False


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Site]:
    with running_site(tmp_path / "home", SLOW, site="home") as one:
        yield one
        if one.process.poll() is None:
            os.kill(one.process.pid, signal.SIGCONT)


@pytest.fixture
def other(tmp_path: Path, home: Site) -> Iterator[Site]:
    """A neighbour that knows home's keys: as a fleet's key would be, here by the same files."""
    (tmp_path / "other" / "data").mkdir(parents=True)
    for name in ("admin.key", "keys.db", "keys.db-wal"):
        source = home.folder / "data" / name
        if source.exists():
            (tmp_path / "other" / "data" / name).write_bytes(source.read_bytes())
    with running_site(tmp_path / "other", FAKE, site="other") as one:
        yield one


@pytest.fixture
def both(tmp_path: Path, home: Site, other: Site) -> Iterator[Proxy]:
    with proxy(tmp_path / "proxy", [home.url, other.url], key=home.admin_key) as one:
        yield one


def place(answer: Answer) -> str:
    return answer.headers["x-ondol-site"]


def test_the_preferred_site_answers_and_everything_passes_unchanged(both: Proxy, home: Site) -> None:
    through, straight = both.chat("same words", max_tokens=5), home.chat("same words", max_tokens=5)
    assert (through.status, place(through)) == (200, "home")
    kept = set(straight.headers) - {"date", "connection", "transfer-encoding"}
    assert kept <= set(through.headers)
    assert through.json()["choices"] == straight.json()["choices"]
    stream = both.chat("same words", max_tokens=5, stream=True)
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert stream.body.endswith(b"data: [DONE]\n\n")
    assert both.call("GET", "/v1/models").json() == home.call("GET", "/v1/models").json()
    refused = both.chat(key="ondol_no")
    assert (refused.status, refused.headers["www-authenticate"]) == (401, 'Bearer realm="ondol"')
    assert both.chat(temperature="hot").status == 400


def test_a_dead_site_is_left_without_a_failed_request_and_taken_up_again(
    both: Proxy, home: Site, tmp_path: Path
) -> None:
    home.process.kill()
    home.process.wait()
    answers = [both.chat(max_tokens=5) for _ in range(10)]
    assert {(one.status, place(one)) for one in answers} == {(200, "other")}
    until(lambda: both.states()[home.url] == "away", "the dead site is away")
    again = start(tmp_path / "home", SLOW, site="home", port=home.port)
    try:
        until(lambda: place(both.chat(max_tokens=5)) == "home", "home is preferred again")
    finally:
        again.stop()
    told = [(one["url"], one["state"]) for one in both.says if one["event"] == "site"]
    assert (home.url, "away") in told and told[-1] == (home.url, "ready")


def test_requests_that_wait_at_a_silent_site_go_on_to_the_next(both: Proxy, home: Site) -> None:
    """Its kernel still takes connections and bytes: nothing is refused, nothing reset, and nothing answers."""
    assert place(both.chat(max_tokens=5)) == "home"
    os.kill(home.process.pid, signal.SIGSTOP)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: both.chat(max_tokens=5, stream=n % 2 == 0), range(8)))
    assert {(one.status, place(one)) for one in answers} == {(200, "other")}
    assert both.states()[home.url] == "away"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_stream_once_begun_ends_with_an_error_event(both: Proxy, home: Site, how: signal.Signals) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", both.port, timeout=30)
    body = {"model": "assistant", "messages": [{"role": "user", "content": "count"}], "stream": True}
    connection.request(
        "POST", "/v1/chat/completions", json.dumps(body),
        {"authorization": f"Bearer {home.admin_key}", "content-type": "application/json"},
    )  # fmt: skip
    reply = connection.getresponse()
    got = reply.read1(65_536)
    assert reply.status == 200 and got.startswith(b"data: {")
    os.kill(home.process.pid, how)
    got += reply.read()
    connection.close()
    *events, last, end = got.decode().split("\n\n")
    assert end == "" and "[DONE]" not in got.decode()
    assert all("choices" in json.loads(one.removeprefix("data: ")) for one in events)
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error["code"] == "site_lost" and home.url in error["message"]
    if how is signal.SIGKILL:
        home.process.wait()


def test_what_changes_a_site_is_sent_once_and_a_refusal_is_passed_on(
    both: Proxy, home: Site, other: Site
) -> None:
    made = both.call("POST", "/v1/ondol/keys", {"name": "once"})
    assert made.status == 200
    home.process.kill()
    home.process.wait()
    lost = both.call("POST", "/v1/ondol/keys", {"name": "twice"})
    if lost.status == 503:  # before the first probe has seen it, the dead site was asked, and nobody else
        assert lost.code == "no_site"
    until(lambda: both.states()[home.url] == "away", "the dead site is away")
    assert both.call("POST", "/v1/ondol/keys", {"name": "other"}).status == 200
    names = {one["name"] for one in other.call("GET", "/v1/ondol/keys").json()["data"]}
    assert "other" in names and "once" not in names


def test_without_any_site_the_error_says_who_was_asked_and_why(tmp_path: Path) -> None:
    urls = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
    with proxy(tmp_path, urls) as alone:
        answer = alone.chat(key="ondol_x")
        assert (answer.status, answer.code, answer.headers["retry-after"]) == (503, "no_site", "1")
        assert all(url in answer.json()["error"]["message"] for url in urls)
        rebound = alone.call("GET", "/v1/models", host="evil.example")
        assert (rebound.status, rebound.code) == (421, "unknown_host")


def test_a_fleets_neighbours_are_learnt_and_take_over(tmp_path: Path) -> None:
    port = free_port()
    near = FLEET + NEAR.replace("{port}", str(port))
    with (
        running_hub(tmp_path / "hub") as hub,
        member(hub, tmp_path / "shop-1", "shop-1") as one,
        member(hub, tmp_path / "shop-2", "shop-2", port=port) as two,
    ):
        hub.apply(tmp_path / "fleet", near)
        key = hub.client.post("keys", {"name": "app"})["key"]
        until(lambda: fleet_of(one)["generation"] == 1 == fleet_of(two)["generation"], "generation 1")
        until(lambda: len(one.call("GET", "/v1/ondol/nearest", key=key).json()["data"]) == 2, "both are near")
        local = one.new_key(name="of shop-1")
        alone = one.call("GET", "/v1/ondol/nearest", key=local).json()
        assert [at["site"] for at in alone["data"]] == ["shop-1"]
        assert "known there alone" in alone["left_out"][0]["why"]
        assert one.call("GET", "/v1/ondol/nearest", key=None).status == 401
        with proxy(tmp_path / "proxy", [one.url], key=key, learn=True) as learning:
            until(lambda: two.url in learning.states(), "the neighbour is learnt")
            assert place(learning.chat(key=key)) == "shop-1"
            one.process.kill()
            one.process.wait()
            assert place(learning.chat(key=key)) == "shop-2"
            assert learning.chat(key=local).status == 401
            seen = two.call("GET", "/v1/ondol/nearest", key=key).json()
            assert [at["site"] for at in seen["data"]] == ["shop-2"]


NEAR = """
---
kind: Site
name: shop-1
tier: edge
region: kr-seoul
country: KR
grid_zone: KR
neighbours: [shop-2]
---
kind: Site
name: shop-2
tier: edge
region: kr-seoul
country: KR
grid_zone: KR
address: http://127.0.0.1:{port}
"""
