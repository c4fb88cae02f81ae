"""A real site with a semantic cache: a hit, a refused near-miss, feedback, and a memory that is killed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.hubs import until
from tests.sites import FAKE, Answer, Site, running_site

from ondol.cli.tour_similar import labelled

FAQ = (
    FAKE.replace(
        "engine: fake\nprice", 'engine: fake\nfake: {text: "Open your orders and press Cancel."}\nprice', 1
    )
    + """---
kind: Route
name: faq
deployments: [helper-fake]
cache:
  semantic: {max_error: 0.05, checked: 0.01}
---
kind: Route
name: plain
deployments: [helper-fake]
cache: {ttl_s: 60}
"""
)
FIRST = "How do I cancel my order for a blue scarf?"
ALIKE = "How can I cancel my order for a blue scarf?"
CONTRARY = "How do I not cancel my order for a blue scarf?"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running_site(tmp_path_factory.mktemp("site"), FAQ) as one:
        taught = one.call("POST", "/v1/ondol/semantic/faq", {"pairs": labelled()})
        assert taught.status == 200, taught.body
        assert taught.json()["learnt"] == len(labelled())
        yield one


def ask(site: Site, text: str, *, model: str = "faq", **fields: Any) -> Answer:
    answer = site.chat(text, model=model, temperature=0, **fields)
    assert answer.status == 200, answer.body
    return answer


def entries(site: Site) -> int:
    found: int = site.call("GET", "/v1/ondol/status").json()["semantic"]["entries"]
    return found


def remembered(site: Site, text: str, **fields: Any) -> Answer:
    """Ask, and wait until the answer is kept, which is after the reply."""
    before = entries(site)
    answer = ask(site, text, **fields)
    until(lambda: entries(site) > before, "the answer is remembered")
    return answer


def served(site: Site, text: str, **fields: Any) -> Answer:
    """Ask; one hit in a hundred is a check, and is asked again in the same words by the exact cache's leave."""
    for suffix in ("", "?", "!", " please"):
        answer = ask(site, text.rstrip("?") + suffix, **fields)
        if answer.headers["x-ondol-cache"] == "semantic":
            return answer
    raise AssertionError(site.record(answer.headers["x-ondol-request-id"])["reason"]["en"])


def test_a_similar_question_is_answered_and_a_contrary_one_is_not(site: Site) -> None:
    first = remembered(site, FIRST)
    assert first.headers["x-ondol-cache"] == "miss"
    hit = served(site, ALIKE)
    assert hit.json()["choices"] == first.json()["choices"]
    assert hit.headers["x-ondol-cost"] == "0 USD"
    record = site.record(hit.headers["x-ondol-request-id"])
    assert record["decision"]["code"] == "cache_semantic"
    assert "A similar question was answered before" in record["reason"]["en"]
    assert "비슷한 질문" in record["reason"]["ko"]
    refused = site.record(ask(site, CONTRARY).headers["x-ondol-request-id"])
    assert refused["decision"]["recall"] == "semantic_guard_negation"
    assert (
        "no cached answer was used, because the similar question that is cached has another negation"
        in (refused["reason"]["en"])
    )


def test_streams_are_served_from_streams(site: Site) -> None:
    text = "How do I cancel my order for a green hat?"
    remembered(site, text, stream=True)
    hit = served(site, text.replace("do", "can"), stream=True)
    assert hit.body.endswith(b"data: [DONE]\n\n")
    last = json.loads(hit.body.decode().split("\n\n")[-3].removeprefix("data: "))
    assert last["ondol"]["cache"] == "semantic"


def test_a_complaint_drops_the_answer_and_is_only_for_the_own_team(site: Site) -> None:
    text = "How do I cancel my order for a red glove?"
    remembered(site, text)
    hit = served(site, text.replace("do", "can"))
    path = f"/v1/ondol/requests/{hit.headers['x-ondol-request-id']}/feedback"
    assert site.call("POST", path, {"right": False}, key=None).status == 401
    assert site.call("POST", path, {"good": 1}).code == "invalid_request"
    praise = site.call("POST", path, {"right": True}).json()
    assert praise["learnt"] == "nothing"
    before = entries(site)
    assert (
        site.call("POST", path, {"right": False}).json()["learnt"].startswith("the cached answer was dropped")
    )
    assert entries(site) == before - 1
    assert site.call("POST", path, {"right": False}).json()["learnt"] == "nothing"


def test_what_is_asked_badly_is_said(site: Site) -> None:
    assert site.call("POST", "/v1/ondol/semantic/plain", {"pairs": labelled()}).status == 404
    assert site.call("POST", "/v1/ondol/semantic/faq", {"pairs": []}).status == 400
    user = site.new_key(kind="user")
    assert site.call("POST", "/v1/ondol/semantic/faq", {"pairs": labelled()}, key=user).status == 403


def test_routes_without_it_do_not_use_it(site: Site) -> None:
    assert ask(site, FIRST, model="plain").headers["x-ondol-cache"] == "miss"
    assert (
        "recall" not in site.record(ask(site, ALIKE, model="plain").headers["x-ondol-request-id"])["decision"]
    )


def test_a_memory_that_dies_costs_hits_and_no_answer(site: Site) -> None:
    [memory] = [pid for pid in _children(site.process.pid) if "memory_child" in _command(pid)]
    os.kill(memory, signal.SIGKILL)
    until(lambda: _command(memory) == "", "it is gone")
    answers = [ask(site, f"Where is branch {chr(97 + n)} of the shop?") for n in range(5)]
    assert {one.headers["x-ondol-cache"] for one in answers} == {"miss"}
    until(lambda: site.call("GET", "/v1/ondol/status").json()["semantic"]["problem"] is None, "it is back")
    ask(site, "How do I cancel my order for a white sock?")
    until(lambda: entries(site) == 1, "what led into the old memory is forgotten, and this is remembered")
    assert served(site, "How can I cancel my order for a white sock?").status == 200


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *_children(child)]
    return found


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
