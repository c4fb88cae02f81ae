"""How the fleet is, site by site: what is wanted, what is, and why not yet.  Pure.

A site that was not heard for half a minute is `stale`: what it said last is shown with its age, never as current.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from ondol.hub.publish import Numbers
from ondol.hub.sites import SiteRow
from ondol.units import NS_PER_S
from ondol.wire.sync import STALE_S, DeploymentState, Report

State = Literal["current", "behind", "stale", "never", "revoked", "fenced"]


class SiteStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One site as the hub knows it.  `heard_s`: seconds since it was heard, None if never.

    `acknowledged` is the last record that the hub has of it, `behind` how many more it had when it reported.
    """

    name: str
    state: State
    tier: str
    region: str
    labels: dict[str, str]
    heard_s: float | None
    wanted: int
    actual: int
    why: str = ""
    epoch: int = 0
    acknowledged: int = 0
    behind: int = 0
    clock_offset_s: float | None = None
    address: str | None = None
    fenced: str | None = None
    deployments: tuple[DeploymentState, ...] = ()
    notes: tuple[str, ...] = ()


def status(
    row: SiteRow, report: Report | None, *, heard_ago_ns: int, numbers: Numbers, mark: int
) -> SiteStatus:
    """How one site is.  `mark` is the last of its records that the hub has, over all its gateways."""
    wanted, actual = numbers.of(row.name), 0 if report is None else report.generation
    never = row.key is None or row.heard_ns == 0
    offset_ns = None if report is None else report.offset_ns
    return SiteStatus(
        name=row.name,
        state=_state(row, report, heard_ago_ns, wanted),
        tier=row.doc.tier,
        region=row.doc.region,
        labels=row.doc.labels,
        heard_s=None if never else round(heard_ago_ns / NS_PER_S, 1),
        wanted=wanted,
        actual=actual,
        why=_why(report, wanted),
        epoch=0 if report is None else report.epoch,
        acknowledged=mark,
        behind=0 if report is None else max(0, report.last_seq - mark),
        clock_offset_s=None if offset_ns is None else round(offset_ns / NS_PER_S, 3),
        address=row.doc.address,
        fenced=row.fenced,
        deployments=() if report is None else report.deployments,
        notes=() if report is None else report.notes,
    )


def _state(row: SiteRow, report: Report | None, heard_ago_ns: int, wanted: int) -> State:
    if row.revoked_ns is not None:
        return "revoked"
    if row.key is None or row.heard_ns == 0:
        return "never"
    if heard_ago_ns > STALE_S * NS_PER_S:
        return "stale"
    if row.fenced is not None:
        return "fenced"
    done = report is not None and report.generation == wanted and all(one.ready for one in report.deployments)
    return "current" if done else "behind"


def _why(report: Report | None, wanted: int) -> str:
    """Why the site does not run what is wanted, in its own words."""
    if report is None:
        return "it has not reported yet" if wanted else ""
    if report.refused and report.refused_generation >= report.generation:
        return f"generation {report.refused_generation} was refused: {report.refused}"
    if report.generation < wanted:
        return f"it has not taken generation {wanted} yet"
    waiting = [f"{one.name}: {one.why}" for one in report.deployments if not one.ready]
    return "; ".join(waiting[:3])


def summary(sites: list[SiteStatus]) -> Mapping[str, int]:
    """How many sites are in each state."""
    counts: dict[str, int] = {}
    for one in sites:
        counts[one.state] = counts.get(one.state, 0) + 1
    return counts
