"""`ondol rollouts` on what a hub says: every verdict with its numbers, in any state of a rollout."""

from __future__ import annotations

import io
from typing import Any

import msgspec
import pytest
from rich.console import Console
from tests.unit.hub.test_rollout import World, begun, rules, world

from ondol.cli.hub_client import HubClient
from ondol.cli.installation import CommandFailed
from ondol.cli.rollouts import abort, list_rollouts, pause, resume, show, show_list, show_one
from ondol.hub import rollouts


def as_json(one: World) -> list[dict[str, Any]]:
    """As the hub's admin face sends them."""
    found: list[dict[str, Any]] = msgspec.json.decode(
        msgspec.json.encode(one.database.write_now(rollouts.everything))
    )
    return found


def shown(found: dict[str, Any], *, lang: str = "en", width: int = 110) -> str:
    out = io.StringIO()
    show_one(Console(file=out, width=width, highlight=False), found, lang=lang, now_ns=found["step_ns"])
    return out.getvalue()


def flat(text: str) -> str:
    return " ".join(text.split())


def test_a_running_rollout_shows_its_rules_its_steps_and_when_it_is_judged() -> None:
    with world() as one:
        begun(one)
        text = flat(shown(as_json(one)[0]))
        assert "rollout 2 of careful: running" in text
        assert "50 requests a side at least; after 5 min without a verdict: hold" in text
        assert "next look in 10 s" in text
        assert text.count("not yet") == 2
        assert "1 of 8 sites running" in text


@pytest.mark.parametrize("lang", ["en", "ko"])
def test_every_verdict_is_there_with_its_numbers(lang: str) -> None:
    with world() as one:
        second = begun(one)
        one.slow[second] = 1.6
        one.until(lambda: one.view().state in ("aborted", "held"))
        found = as_json(one)[0]
        text = flat(shown(found, lang=lang))
        actions = [event["action"] for event in found["events"] if event["action"]]
        assert actions
        for action in actions:
            for each in action["verdict"]["comparisons"]:
                assert f"{each['p']:.2g}" in text
                assert each["u"] is None or f"{each['u']:.0f}" in text
                assert f"{each['n_new']} {each['n_old']}" in text
        assert "brought back as generation 3" in text
        assert ("되돌립니다" in text) == (lang == "ko")


@pytest.mark.parametrize("chosen", ["hold", "abort", "continue"])
def test_rollouts_without_requests_are_shown_too(chosen: str) -> None:
    with world() as one:
        begun(one, rules(inconclusive=chosen))
        for _ in range(250):
            one.tick(requests=0)
        assert "inconclusive" in shown(as_json(one)[0], width=60)


def test_the_list_is_a_line_each_and_says_so_when_empty() -> None:
    out = io.StringIO()
    show_list(Console(file=out, width=120), [])
    assert "no rollouts yet" in out.getvalue()
    with world() as one:
        second = begun(one)
        one.failing[second] = 0.5
        one.until(lambda: one.view().state == "aborted")
        one.apply(rules(), "third")
        out = io.StringIO()
        show_list(Console(file=out, width=160, highlight=False), as_json(one))
        lines = out.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[1].split()[:3] == ["4", "careful", "running"]
    assert "aborted" in lines[2]
    assert "0 of 8" in lines[2]


class FakeHub:
    """A hub that says what it is told; the calls that it got."""

    def __init__(self, found: list[dict[str, Any]]) -> None:
        self.found, self.calls = found, []  # type: ignore[var-annotated]

    def get(self, path: str) -> Any:
        self.calls.append(path)
        return {"data": self.found} if path == "rollouts" else self.found[0]

    def post(self, path: str, body: Any) -> Any:
        self.calls.append(path)
        return self.found[0]


def test_the_commands_ask_for_the_newest_unless_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with world() as one:
        begun(one)
        hub = FakeHub(as_json(one))
    monkeypatch.setattr(HubClient, "find", classmethod(lambda cls, directory, where: hub))
    assert (
        pause() == resume(7) == abort(as_json=True) == show() == show(7, as_json=True) == list_rollouts() == 0
    )
    assert [call for call in hub.calls if call != "rollouts"] == [
        "rollouts/2/pause", "rollouts/7/resume", "rollouts/2/abort", "rollouts/2", "rollouts/7",
    ]  # fmt: skip
    assert "rollout 2 is running, step 1 of 3" in capsys.readouterr().out
    hub.found = []
    with pytest.raises(CommandFailed, match="there was no rollout yet"):
        show()
