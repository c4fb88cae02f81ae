"""`ondol rollouts`: how a generation comes to the sites, and every verdict on it with its numbers."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ondol.cli.hub_client import HubClient, HubUrl
from ondol.cli.installation import DEFAULT_DIR, AsJson, CommandFailed, Dir
from ondol.cli.output import console, print_json, significant, table
from ondol.units import NS_PER_S

STYLES: Final = {
    "running": "cyan", "done": "green", "aborted": "red", "held": "yellow", "paused": "yellow", "superseded": "dim",
    "continue": "green", "abort": "red", "inconclusive": "yellow",
}  # fmt: skip
_DOES: Final = {
    "wait": "wait", "widen": "go one step further", "finish": "finish", "hold": "hold", "abort": "go back",
}  # fmt: skip
BAR: Final = 30
Lang = Annotated[Literal["en", "ko"], Parameter(help="Sentences in English or in Korean.")]


def list_rollouts(*, directory: Dir = DEFAULT_DIR, hub: HubUrl = None, as_json: AsJson = False) -> int:
    """List the rollouts of the fleet, newest first."""
    found = HubClient.find(directory, hub).get("rollouts")["data"]
    if as_json:
        print_json(found)
        return 0
    show_list(console(), found)
    return 0


def show(
    rollout: int | None = None,
    /,
    *,
    lang: Lang = "en",
    directory: Dir = DEFAULT_DIR,
    hub: HubUrl = None,
    as_json: AsJson = False,
) -> int:
    """Show how far a rollout is, and every verdict with its numbers.

    Args:
        rollout: The rollout's number, which is its generation; without it, the newest.
    """
    client = HubClient.find(directory, hub)
    found = client.get(f"rollouts/{_number(client, rollout)}")
    if as_json:
        print_json(found)
        return 0
    show_one(console(), found, lang=lang, now_ns=time.time_ns())
    return 0


def pause(
    rollout: int | None = None,
    /,
    *,
    directory: Dir = DEFAULT_DIR,
    hub: HubUrl = None,
    as_json: AsJson = False,
) -> int:
    """Stop judging and widening for now; sites keep what they have.

    Args:
        rollout: The rollout's number, which is its generation; without it, the newest.
    """
    return _steer("pause", rollout, HubClient.find(directory, hub), as_json=as_json)


def resume(
    rollout: int | None = None,
    /,
    *,
    directory: Dir = DEFAULT_DIR,
    hub: HubUrl = None,
    as_json: AsJson = False,
) -> int:
    """Go on with a rollout that is paused; with one that is held, go on to its next step.

    Args:
        rollout: The rollout's number, which is its generation; without it, the newest.
    """
    return _steer("resume", rollout, HubClient.find(directory, hub), as_json=as_json)


def abort(
    rollout: int | None = None,
    /,
    *,
    directory: Dir = DEFAULT_DIR,
    hub: HubUrl = None,
    as_json: AsJson = False,
) -> int:
    """End a rollout and bring the old documents back, as a new generation.

    Args:
        rollout: The rollout's number, which is its generation; without it, the newest.
    """
    return _steer("abort", rollout, HubClient.find(directory, hub), as_json=as_json)


def _number(client: HubClient, rollout: int | None) -> int:
    if rollout is not None:
        return rollout
    found = client.get("rollouts")["data"]
    if not found:
        raise CommandFailed(
            "there was no rollout yet: with a Rollout document in the fleet's files, `ondol apply` begins one"
        )
    return int(found[0]["id"])


def _steer(action: str, rollout: int | None, client: HubClient, *, as_json: bool) -> int:
    found = client.post(f"rollouts/{_number(client, rollout)}/{action}", {})
    if as_json:
        print_json(found)
    else:
        line = f"rollout {found['id']} is {found['state']}, step {found['step']} of {len(found['sizes'])}"
        back = f"; generation {found['back']} brings back {found['previous']}" if found["back"] else ""
        console().print(line + back)
    return 0


def show_list(screen: Console, found: list[dict[str, Any]]) -> None:
    """The rollouts as a table."""
    if not found:
        screen.print("no rollouts yet: every generation went to all sites at once")
        return
    made = table(
        [("rollout", True), ("by", False), ("state", False), ("step", True), ("sites", True), ("began", False),
         ("", False)]
    )  # fmt: skip
    for one in found:
        steps = len(one["sizes"])
        reached = f"{_with_it(one)} of {one['total']}"
        made.add_row(
            str(one["id"]), one["name"], Text(one["state"], style=STYLES[one["state"]]), f"{one['step']}/{steps}",
            reached, _when(one["began_ns"]), one["ended"].partition(":")[0],
        )  # fmt: skip
    screen.print(made)


def show_one(screen: Console, one: dict[str, Any], *, lang: str, now_ns: int) -> None:
    """One rollout: its rules, how far each step is, and what happened, with all numbers."""
    state = Text(one["state"], style=STYLES[one["state"]])
    screen.print(Text(f"rollout {one['id']} of {one['name']}: ", style="bold") + state)
    back = f", brought back as generation {one['back']}" if one["back"] else ""
    screen.print(f"generation {one['id']} instead of {one['previous']}{back}; began {_when(one['began_ns'])}")
    screen.print(
        f"each step bakes {_span(one['bake_s'])}; {one['min_requests']} requests a side at least; after "
        f"{_span(one['max_wait_s'])} without a verdict: {one['inconclusive']}"
    )
    screen.print(
        f"worse is: p within alpha {one['alpha']:g} a step, and {one['min_effect']:.0%} likely to be slower, or "
        f"{one['error_rate_rise'] * 100:g} points more errors"
    )
    screen.print()
    for number, size in enumerate(one["sizes"], 1):
        screen.print(_bar(one, number, size))
    if one["next_look_ns"] is not None:
        screen.print(f"next look in {_span(max(0.0, (one['next_look_ns'] - now_ns) / NS_PER_S))}")
    for event in one["events"]:
        _show_event(screen, event, lang)


def _with_it(one: dict[str, Any]) -> int:
    """How many of its sites shall run the generation now."""
    if one["state"] == "aborted":
        return 0
    return int(one["total"] if one["state"] == "done" else one["sizes"][one["step"] - 1])


def _bar(one: dict[str, Any], number: int, size: int) -> Text:
    full = max(1, round(BAR * size / one["total"]))
    over = number < one["step"] or one["state"] == "done"
    here = number == one["step"] and not over
    said = "over" if over else one["state"] if here else "not yet"
    style = STYLES["done"] if over else STYLES[one["state"]] if here else "dim"
    mark = "█" if over else "▓" if here else "░"
    bar = Text(mark * full, style=style) + Text("·" * (BAR - full), style="dim")
    return (
        Text(f"  step {number}  ")
        + bar
        + Text(f"  {size:>4} of {one['total']} sites  ")
        + Text(said, style=style)
    )


def _show_event(screen: Console, event: dict[str, Any], lang: str) -> None:
    action = event["action"]
    text = event["what_ko"] if lang == "ko" else event["what"]
    stamp = Text(f"\n{_clock(event['time_ns'])}  step {event['step']}  ", style="dim")
    if action is None:
        screen.print(stamp + Text(text))
        return
    verdict = action["verdict"]
    outcome = Text(f"look {verdict['look']}: {verdict['outcome']}", style=STYLES[verdict["outcome"]])
    does = Text("" if action["do"] == verdict["outcome"] else f", so {_DOES[action['do']]}")
    here = f"{action['reached']} of its sites have it, {action['away']} away; alpha {verdict['alpha']:.2g} a test"
    screen.print(stamp + outcome + does + Text(f"  ({here})", style="dim"))
    screen.print(Padding(Text(text), (0, 0, 0, 4)))
    screen.print(Padding(_numbers(verdict), (0, 0, 0, 4)))


def _numbers(verdict: dict[str, Any]) -> Table:
    made = table(
        [("measure", False), ("new", True), ("old", True), ("effect", True), ("p", True), ("U", True), ("n new", True),
         ("n old", True)]
    )  # fmt: skip
    for one in verdict["comparisons"]:
        style = "red" if one["worse"] else "yellow" if one["looks_worse"] else ""
        made.add_row(
            Text(one["measure"], style=style), _typical(one, "new"), _typical(one, "old"), _effect(one), _p(one),
            "–" if one["u"] is None else f"{one['u']:.0f}", str(one["n_new"]), str(one["n_old"]),
        )  # fmt: skip
    return made


def _typical(one: dict[str, Any], side: str) -> str:
    if one["measure"] == "errors":
        return f"{one[side]:.2%}"
    ratio = one[f"ratio_{side}"]
    if ratio is None:
        return "–"
    if one["measure"] == "latency":
        return f"{significant(one[side])} ms ({ratio:.2f} ×)"
    return f"{one[side]:.3f}"


def _effect(one: dict[str, Any]) -> str:
    if one["measure"] == "errors":
        return f"{one['effect'] * 100:+.2f} pt"
    return "–" if one["u"] is None else f"{one['effect']:.2f}"


def _p(one: dict[str, Any]) -> str:
    before = one["p_before"]
    return f"{one['p']:.2g}" + ("" if before is None else f" / {before:.2g}")


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _when(wall_ns: int) -> str:
    return datetime.fromtimestamp(wall_ns / NS_PER_S, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _clock(wall_ns: int) -> str:
    return datetime.fromtimestamp(wall_ns / NS_PER_S, UTC).strftime("%H:%M:%S")
