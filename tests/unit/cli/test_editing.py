"""Edits of a site's file: what was meant changes, and every comment stays."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from ondol.cli.editing import append_documents, append_to_list, names, set_value
from ondol.cli.installation import CommandFailed

SITE = """\
# our shop
kind: Gateway
name: gateway
listen: 127.0.0.1:8080   # loopback only
---
kind: Route
name: assistant
deployments:
  - near   # the small one
  - far
objective: fast   # people wait
---
kind: Route
name: flow
deployments: [near, far]   # both
"""


def appended(text: str, route: str, item: str = "new") -> str:
    return append_to_list(text, kind="Route", name=route, key="deployments", item=item)


def route(text: str, name: str) -> Any:
    return next(one for one in yaml.safe_load_all(text) if one["name"] == name)


def test_an_item_joins_a_block_list_and_all_else_stays() -> None:
    edited = appended(SITE, "assistant")

    assert edited == SITE.replace("  - far\n", "  - far\n  - new\n")


def test_an_item_joins_a_flow_list_before_its_comment() -> None:
    edited = appended(SITE, "flow")

    assert edited == SITE.replace("[near, far]   # both", "[near, far, new]   # both")


@pytest.mark.parametrize(
    "listed",
    [
        "deployments: []",
        "deployments: [a,]",
        "deployments: [\n  a, # one\n  b  # two\n]",
        "deployments:\n- a\n- b",
        "deployments:\n- a\n- b   # no line end after this",
        "deployments:\n    - a\n\n    - 'quoted # no comment'\n# a comment at the end\n",
        'deployments:\n  - "a"\n  # - b is off for now\nobjective: fast\n',
    ],
)
def test_an_item_joins_any_usual_layout(listed: str) -> None:
    text = f"kind: Route\nname: assistant\n{listed}"
    before = route(text, "assistant")["deployments"]

    edited = appended(text, "assistant")

    assert route(edited, "assistant")["deployments"] == [*before, "new"]
    kept = [line.split("#", 1)[1] for line in edited.splitlines() if "#" in line]
    assert kept == [line.split("#", 1)[1] for line in text.splitlines() if "#" in line]


def test_an_item_that_is_there_already_changes_nothing() -> None:
    assert appended(SITE, "flow", "near") == SITE


def test_windows_line_ends_stay() -> None:
    edited = appended(SITE.replace("\n", "\r\n"), "assistant")

    assert edited == appended(SITE, "assistant").replace("\n", "\r\n")


def test_a_list_behind_an_anchor_is_not_edited_where_it_would_change_two() -> None:
    text = "kind: Route\nname: one\ndeployments: &all [a, b]\nx: *all\n"

    with pytest.raises(CommandFailed, match="by hand"):
        appended(text, "one")


def test_an_unknown_document_is_answered_with_the_known_ones() -> None:
    with pytest.raises(CommandFailed, match="no Route named 'chat'; it has: assistant, flow"):
        appended(SITE, "chat")


def test_a_value_is_replaced_and_its_comment_stays() -> None:
    edited = set_value(SITE, kind="Gateway", name="gateway", key="listen", value="127.0.0.1:9000")

    assert edited == SITE.replace("127.0.0.1:8080", "127.0.0.1:9000")


def test_a_value_that_yaml_would_read_as_something_else_is_refused() -> None:
    with pytest.raises(CommandFailed, match="cannot be edited safely"):
        set_value(SITE, kind="Gateway", name="gateway", key="listen", value="8080")


def test_documents_join_at_the_end() -> None:
    added = "kind: Model\nname: m\n"

    assert append_documents(SITE, added) == f"{SITE}---\n{added}"
    assert append_documents(SITE.rstrip("\n"), added) == f"{SITE}---\n{added}"
    assert names(append_documents(SITE, added), "Model") == {"m"}


def test_documents_after_an_end_mark_are_still_read() -> None:
    edited = append_documents(SITE + "...\n", "kind: Model\nname: m\n")

    assert names(edited, "Model") == {"m"}
    assert names(edited, "Route") == {"assistant", "flow"}
