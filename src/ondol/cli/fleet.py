"""`ondol diff`, `apply`, `get` and `rollback`: the fleet as files."""

from __future__ import annotations

import contextlib
import getpass
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final

from cyclopts import Parameter
from rich.console import Console
from rich.text import Text

from ondol.cli.hub_client import HubClient, HubUrl
from ondol.cli.installation import DEFAULT_DIR, AsJson, CommandFailed, Dir
from ondol.cli.output import console, print_json, table
from ondol.config.fleet import Written, as_data, load_fleet

MARKS: Final = {"added": ("+", "green"), "changed": ("~", "yellow"), "removed": ("-", "red")}
_OF_DOCUMENT: Final = re.compile(r"(fleet|at site [^:]+):\d+: (.*)")
STATE_STYLES: Final = {
    "current": "green",
    "behind": "yellow",
    "stale": "red",
    "fenced": "red",
    "revoked": "dim",
}
Files = Annotated[Path, Parameter(name=("-f", "--files"), help="The directory with the fleet's YAML files.")]


def diff(*, files: Files, directory: Dir = DEFAULT_DIR, hub: HubUrl = None, as_json: AsJson = False) -> int:
    """What would change, document by document, and at how many sites."""
    client, written = HubClient.find(directory, hub), load_fleet(files)
    with _places(written):
        answer = client.post("diff", {"documents": as_data(written)})
    if as_json:
        print_json(answer)
        return 0
    _show(console(), answer)
    return 0


def apply(
    *,
    files: Files,
    message: Annotated[str, Parameter(help="Why, for those who look later.")] = "",
    yes: Annotated[bool, Parameter(help="Do not ask.", negative="")] = False,
    directory: Dir = DEFAULT_DIR,
    hub: HubUrl = None,
    as_json: AsJson = False,
) -> int:
    """Make these files what the fleet shall be: a new generation, at once or by the fleet's Rollout."""
    client, screen = HubClient.find(directory, hub), console()
    written = load_fleet(files)
    documents = as_data(written)
    if not yes and not as_json and sys.stdin.isatty():
        with _places(written):
            found = client.post("diff", {"documents": documents})
        _show(screen, found)
        if not found["changes"] and found["generation"]:
            return 0
        if input("Apply? [y/N] ").strip().lower() not in ("y", "yes"):
            raise CommandFailed("nothing was changed")
    with _places(written):
        answer = client.post("apply", {"documents": documents, "message": message, "author": _author()})
    if as_json:
        print_json(answer)
        return 0
    if not answer["changes"]:
        screen.print(f"nothing to change: generation {answer['generation']} is the same")
    else:
        how = f"by rollout {answer['rollout']}: ondol rollouts show" if answer["rollout"] else "for all sites"
        screen.print(f"generation {answer['generation']}: {len(answer['changes'])} documents changed, {how}")
    _warn(screen, answer["warnings"])
    return 0


def rollback(
    generation: int | None = None,
    /,
    *,
    directory: Dir = DEFAULT_DIR,
    hub: HubUrl = None,
    as_json: AsJson = False,
) -> int:
    """Bring back the documents of an earlier generation, as a new one.

    Args:
        generation: Whose documents; without it, those before the present ones.
    """
    client = HubClient.find(directory, hub)
    answer = client.post("rollback", {"generation": generation, "author": _author()})
    if as_json:
        print_json(answer)
        return 0
    console().print(f"generation {answer['generation']} has the documents of {answer['of']}, for all sites")
    return 0


def get(
    kind: str = "",
    name: str = "",
    /,
    *,
    directory: Dir = DEFAULT_DIR,
    hub: HubUrl = None,
    as_json: AsJson = False,
) -> int:
    """What the fleet is: sites and why they differ from what is wanted; or its documents of a kind.

    Args:
        kind: `generations`, or a kind of document such as Route; without it, the sites.
        name: One document, or one site.
    """
    client = HubClient.find(directory, hub)
    if kind.lower() in ("", "site", "sites"):
        found = [client.get(f"sites/{name}")] if name else client.get("sites")["data"]
        frozen = () if as_json or name else client.get("status").get("frozen", ())

        def show(screen: Console) -> None:
            show_sites(screen, found, whole=bool(name))
            for sentence in frozen:
                screen.print(sentence, style="yellow")

        return _print(found, as_json, show)
    if kind.lower() == "generations":
        generations = client.get("generations")["data"]
        return _print(generations, as_json, lambda screen: _show_generations(screen, generations))
    answer = client.get("documents")
    wanted = [one for one in answer["documents"] if one["kind"].lower() == kind.lower().removesuffix("s")]
    wanted = [one for one in wanted if not name or one["name"] == name]
    if not wanted:
        kinds = ", ".join(sorted({one["kind"] for one in answer["documents"]})) or "none yet"
        what = f"{kind} {name}".strip()
        raise CommandFailed(f"generation {answer['generation']} has no {what}; it has the kinds: {kinds}")
    return _print(wanted, as_json, lambda screen: _show_documents(screen, wanted))


@contextlib.contextmanager
def _places(written: list[Written]) -> Iterator[None]:
    """What the hub says of a document is said of the line where it is written."""
    places = {f"{one.kind}/{one.doc.name}": one.where for one in written}
    try:
        yield
    except CommandFailed as error:
        lines = [_at_its_line(line, places) for line in error.message.splitlines()]
        raise CommandFailed("\n".join(lines)) from error


def _at_its_line(line: str, places: dict[str, str]) -> str:
    found = _OF_DOCUMENT.match(line)
    if found is None:
        return line
    said = found[2]
    # The longest name counts: names may hold dots, as fields are parted by them.
    of = max(
        (name for name in places if said.startswith((f"{name}.", f"{name}:", f"{name} "))),
        key=len,
        default=None,
    )
    return line if of is None else f"{places[of]}: {said}"


def show_sites(screen: Console, sites: list[dict[str, Any]], *, whole: bool = False) -> None:
    """The sites as a table; a stale one is shown with how long it was not heard, never as current."""
    if not sites:
        screen.print("no sites yet; invite one: ondol sites invite NAME")
        return
    made = table(
        [
            ("site", False),
            ("state", False),
            ("heard", True),
            ("wanted", True),
            ("runs", True),
            ("not sent", True),
            ("", False),
        ],
    )
    for one in sites:
        state = Text(one["state"], style=STATE_STYLES.get(one["state"], ""))
        why = one["why"] or "; ".join(one["notes"])
        made.add_row(
            one["name"],
            state,
            _ago(one["heard_s"]),
            str(one["wanted"]),
            str(one["actual"]),
            str(one["behind"]),
            why,
        )
    screen.print(made)
    for one in sites if whole else ():
        screen.print()
        states = table([("deployment", False), ("ready", False), ("why not yet", False)])
        for each in one["deployments"]:
            states.add_row(each["name"], "yes" if each["ready"] else "no", each.get("why", ""))
        screen.print(states)
        offset = one["clock_offset_s"]
        said = "not measured" if offset is None else f"{offset:+.3f} s to the hub's"
        screen.print(
            f"clock {said}; epoch {one['epoch']}; the hub has its records up to {one['acknowledged']}"
        )


def _ago(seconds: float | None) -> str:
    if seconds is None:
        return "never"
    if seconds < 120:
        return f"{seconds:.0f} s ago"
    return f"{seconds / 60:.0f} min ago" if seconds < 7200 else f"{seconds / 3600:.0f} h ago"


def _show(screen: Console, answer: dict[str, Any]) -> None:
    if not answer["changes"]:
        screen.print(f"no difference to generation {answer['generation']}")
    for one in answer["changes"]:
        mark, style = MARKS[one["change"]]
        where = "" if one["kind"] in ("Site", "Rollout") else f"   at {one['sites']} of {one['of']} sites"
        screen.print(Text(f"{mark} {one['kind']}/{one['name']}", style=style) + Text(where, style="dim"))
        for field in one["fields"]:
            screen.print(f"    {field['field']}: {field['old']} → {field['new']}", markup=False)
    _warn(screen, answer["warnings"])


def _warn(screen: Console, warnings: list[str]) -> None:
    for one in warnings:
        screen.print(f"note: {one}", style="yellow", markup=False)


def _show_generations(screen: Console, generations: list[dict[str, Any]]) -> None:
    made = table([("generation", True), ("by", False), ("message", False)])
    for one in generations:
        made.add_row(str(one["number"]), one["author"], one["message"])
    screen.print(made)


def _show_documents(screen: Console, documents: list[dict[str, Any]]) -> None:
    made = table([("kind", False), ("name", False), ("says", False)])
    for one in documents:
        said = ", ".join(f"{key}: {value}" for key, value in one.items() if key not in ("kind", "name"))
        made.add_row(one["kind"], one["name"], said)
    screen.print(made)


def _print(found: Any, as_json: bool, show: Any) -> int:
    if as_json:
        print_json(found)
    else:
        show(console())
    return 0


def _author() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # no such user in a container
        return "unknown"
