"""`ondol sites`: invite, list, revoke, admit."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from cyclopts import Parameter
from rich.progress import track

from ondol.cli.fleet import show_sites
from ondol.cli.hub_client import HubClient, HubUrl
from ondol.cli.installation import DEFAULT_DIR, AsJson, CommandFailed, Dir
from ondol.cli.output import console, print_json
from ondol.core.catalog import SiteDoc

BATCH: Final = 200
CSV_MAX: Final = 100_000
COLUMNS: Final = ("name", "region", "country", "grid_zone", "tier", "address", "parent", "label:NAME")


def invite(
    name: str = "",
    /,
    *,
    csv_file: Annotated[Path | None, Parameter(name="--csv", help="Many sites, one a line.")] = None,
    factory: Annotated[int, Parameter(help="One key for so many new sites, which name themselves.")] = 0,
    names: Annotated[str, Parameter(help="How these may call themselves, such as shop-*.")] = "",
    minutes: Annotated[int | None, Parameter(help="How long it is good: 15, a factory key 7 days.")] = None,
    region: str = "unknown",
    country: str = "KR",
    grid_zone: str = "",
    tier: str = "edge",
    address: Annotated[str, Parameter(help="Where it is reached; else the site says so when it joins.")] = "",
    label: Annotated[tuple[str, ...], Parameter(help="NAME=VALUE; may be given again.", negative="")] = (),
    directory: Dir = DEFAULT_DIR,
    hub: HubUrl = None,
    as_json: AsJson = False,
) -> int:
    """Print a token with which a site joins the fleet; it is shown once.

    Args:
        name: The site's name; for a factory key, what to call the key.
    """
    if factory == 1 or factory < 0:
        raise CommandFailed(f"--factory is {factory}; expected how many sites, from 2 on")
    if csv_file is not None and (name or factory):
        raise CommandFailed("--csv names the sites itself; leave out NAME and --factory")
    if csv_file is not None:
        docs = read_csv(csv_file)
    elif name:
        fields = {
            "name": name, "region": region, "country": country, "grid_zone": grid_zone or country, "tier": tier,
            "labels": _labels(label), "address": address or None,
        }  # fmt: skip
        docs = [_doc(fields, f"site {name}")]
    else:
        raise CommandFailed("whom? ondol sites invite NAME, or --csv FILE")
    for_minutes = (7 * 24 * 60 if factory else 15) if minutes is None else minutes
    wanted = [
        {"doc": msgspec.to_builtins(doc), "count": factory or 1, "minutes": for_minutes, "names": names}
        for doc in docs
    ]
    _invite(HubClient.find(directory, hub), wanted, as_json=as_json)
    if as_json:
        return 0
    goes = f"good for {for_minutes} minutes, " + (f"for {factory} sites" if factory else "once")
    print(f"ondol: {goes}; at the site: ondol join TOKEN --config site.yaml", file=sys.stderr)
    return 0


def _invite(client: HubClient, wanted: Sequence[dict[str, Any]], *, as_json: bool) -> None:
    """Ask for tokens in batches.  What was made is printed also when a later batch fails: it is shown only now."""
    made: list[dict[str, str]] = []
    batches = [wanted[at : at + BATCH] for at in range(0, len(wanted), BATCH)]
    quiet = as_json or len(batches) < 2 or not sys.stderr.isatty()
    try:
        for batch in track(batches, "inviting", console=console(stderr=True), disable=quiet):
            made += client.post("invites", {"invitations": batch})["data"]
    except CommandFailed as error:
        if not made:
            raise
        raise CommandFailed(
            f"the first {len(made)} of {len(wanted)} sites are invited, the others are not: {error.message}"
        ) from error
    finally:
        if as_json and made:
            print_json(made)
        for one in () if as_json else made:
            print(f"{one['site']}\t{one['token']}" if len(wanted) > 1 else one["token"])


def list_sites(*, directory: Dir = DEFAULT_DIR, hub: HubUrl = None, as_json: AsJson = False) -> int:
    """List the sites: what they run, and why not what is wanted."""
    found = HubClient.find(directory, hub).get("sites")["data"]
    if as_json:
        print_json(found)
        return 0
    show_sites(console(), found)
    return 0


def revoke(name: str, /, *, directory: Dir = DEFAULT_DIR, hub: HubUrl = None, as_json: AsJson = False) -> int:
    """Put a site out of the fleet: the hub refuses it at once, other sites within a minute.

    Tokens that were made for it are good no longer.  With the name of a factory key it is the key that ends.

    Args:
        name: The site's name, or a factory key's.
    """
    answer = HubClient.find(directory, hub).post(f"sites/{name}/revoke", {})
    if as_json:
        print_json(answer)
        return 0
    print(f"{name} is out (epoch {answer['epoch']}); sites that are cut off learn it when they reach the hub")
    return 0


def admit(name: str, /, *, directory: Dir = DEFAULT_DIR, hub: HubUrl = None, as_json: AsJson = False) -> int:
    """Lift the fence of a site of which two machines were seen, after you have looked."""
    answer = HubClient.find(directory, hub).post(f"sites/{name}/admit", {})
    if as_json:
        print_json(answer)
        return 0
    print(f"whichever machine of {name} says hello next is taken")
    return 0


def read_csv(path: Path) -> list[SiteDoc]:
    """The sites of a CSV file: a header with the columns, one site a line.

    Raises:
        CommandFailed: the file cannot be read, or a line is wrong: with its number.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            _check_header(path, reader.fieldnames or ())
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CommandFailed(f"{path}: cannot be read as CSV in UTF-8 ({error})") from error
    if not rows or len(rows) > CSV_MAX:
        raise CommandFailed(
            f"{path}: found {len(rows)} sites; expected a header line and 1 to {CSV_MAX} sites"
        )
    problems, docs = [], []
    seen: dict[str, int] = {}
    for line, row in rows:
        try:
            doc = _from_row(row, f"{path}:{line}")
        except CommandFailed as error:
            problems.append(error.message)
            continue
        if seen.setdefault(doc.name, line) != line:
            problems.append(f"{path}:{line}: the name {doc.name} stands in line {seen[doc.name]} already")
        docs.append(doc)
    if problems:
        more = f"\n… and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CommandFailed("\n".join(problems[:20]) + more)
    return docs


def _check_header(path: Path, columns: Sequence[str]) -> None:
    unknown = [one for one in columns if one not in COLUMNS[:-1] and not re.fullmatch(r"label:.+", one)]
    twice = [one for one in dict.fromkeys(columns) if columns.count(one) > 1]
    if "name" not in columns or unknown or twice:
        what = f"unknown: {', '.join(map(repr, unknown))}" if unknown else f"twice: {', '.join(twice)}"
        what = what if unknown or twice else "the column name is missing"
        raise CommandFailed(f"{path}:1: {what}; allowed columns: {', '.join(COLUMNS)}, separated by commas")


def _from_row(row: dict[str | Any, Any], where: str) -> SiteDoc:
    fields: dict[str, Any] = {"tier": "edge", "country": "KR", "region": "unknown", "labels": {}}
    for column, value in row.items():
        if column is None or not isinstance(value, str):
            raise CommandFailed(f"{where}: found {'more' if column is None else 'fewer'} cells than columns")
        if not value.strip():
            continue
        if column.startswith("label:"):
            fields["labels"][column.removeprefix("label:")] = value.strip()
        else:
            fields[column] = value.strip()
    fields.setdefault("grid_zone", fields["country"])
    return _doc(fields, where)


def _doc(fields: dict[str, Any], where: str) -> SiteDoc:
    try:
        return msgspec.convert(fields, SiteDoc)
    except msgspec.ValidationError as error:
        raise CommandFailed(f"{where}: {error}") from error


def _labels(texts: tuple[str, ...]) -> dict[str, str]:
    labels = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise CommandFailed(f"--label {text!r}: expected NAME=VALUE")
        labels[name] = value
    return labels
