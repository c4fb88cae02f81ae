"""`ondol costs`: cost, energy and carbon, from all ledgers of an installation."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Annotated
from zoneinfo import ZoneInfo

from cyclopts import Parameter

from ondol import config as configuration
from ondol.adapters.ledger_reader import records
from ondol.cli.installation import DEFAULT_DIR, AsJson, Dir, Layout
from ondol.cli.output import console, print_json, significant, table
from ondol.core.costs import CostRow, fold
from ondol.core.usage import UsageRecord
from ondol.errors import ConfigError
from ondol.units import NS_PER_S

_UNITS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}


def _check_by(_: object, value: str) -> None:
    # Nothing to fold: what is wrong with the word comes out before a ledger is looked for.
    fold((), by=value)


def _check_since(_: object, value: str | None) -> None:
    if value is not None:
        since_time(value, datetime.now(UTC))


def costs(
    *,
    by: Annotated[
        str, Parameter(help="team, route, site, tag, tag:NAME, day, model or key.", validator=_check_by)
    ] = "route",
    since: Annotated[
        str | None,
        Parameter(help="A day such as 2026-11-24, or a time ago: 12h, 7d, 2w.", validator=_check_since),
    ] = None,
    directory: Dir = DEFAULT_DIR,
    as_json: AsJson = False,
) -> int:
    """Show cost, energy and carbon by team, route, site, tag or day, from the ledgers."""
    layout = Layout(directory)
    zone = _zone(layout)
    since_ns = None if since is None else since_time(since, datetime.now(zone))
    ledgers = [path for _, path in layout.ledgers()]
    rows = fold(_all(ledgers, since_ns), by=by, zone=zone)
    if as_json:
        print_json(rows)
        return 0
    if not rows:
        print("the ledgers have no record" + ("" if since is None else f" since {since}"))
        return 0
    _show(rows, by)
    return 0


def since_time(text: str, now: datetime) -> int:
    """Wall-clock nanoseconds of a day's start in `now`'s zone, or of a time ago (`12h`, `7d`, `2w`).

    Raises:
        ValueError: it is neither.
    """
    unit = _UNITS.get(text[-1:])
    if unit is not None and text[:-1].isascii() and text[:-1].isdigit() and len(text) <= 6:
        moment = now - int(text[:-1]) * unit
    else:
        try:
            day = date.fromisoformat(text)
        except ValueError:
            raise ValueError(
                f"expected a day such as 2026-11-24, or a time ago such as 12h, 7d, 2w; found {text!r}."
            ) from None
        moment = datetime(day.year, day.month, day.day, tzinfo=now.tzinfo)
    return int(moment.timestamp()) * NS_PER_S


def _all(ledgers: list[Path], since_ns: int | None) -> Iterator[UsageRecord]:
    for path in ledgers:
        yield from records(path, since_ns=since_ns)


def _zone(layout: Layout) -> tzinfo:
    """The time zone of the edge's days, UTC where its file cannot be read."""
    try:
        return ZoneInfo(configuration.load(layout.config("edge")).gateway.timezone)
    except (ConfigError, OSError):
        return UTC


def _show(rows: list[CostRow], by: str) -> None:
    made = table(
        [
            (by, False), ("requests", True), ("in", True), ("out", True), ("cost", True), ("joules", True),
            ("g CO2e", True), ("cached", True), ("for peers", True),
        ],
        gap=2 if console().width >= 100 else 1,
    )  # fmt: skip
    for row in rows:
        made.add_row(
            row.key or "–", str(row.requests), str(row.input_tokens), str(row.output_tokens),
            f"{row.cost} {row.currency}", significant(row.energy_j), significant(row.carbon_g),
            str(row.cache_hits), str(row.for_peers),
        )  # fmt: skip
    screen = console()
    screen.print(made)
    unpriced = sum(row.unpriced for row in rows)
    unmeasured = sum(row.unmeasured for row in rows)
    if unpriced:
        screen.print(f"{unpriced} records have tokens without a price, which the sums leave out", style="dim")
    if unmeasured:
        screen.print(f"{unmeasured} records have unknown energy, which the sums leave out", style="dim")
