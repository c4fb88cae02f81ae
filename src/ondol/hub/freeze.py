"""No new grants after the hub went back: a restored hub has forgotten what it granted since its backup.

What it granted lies at the sites, durably, so they tell it.  A freeze begins when an operator says that the hub was
restored, or when a site says more than this hub knows.  It has an **era**: the hub's time when it began, which
sites are told and say again with every lease call.  A call with the present era was made after the freeze began, when
no answer from before it could be taken any more: what it says that the site holds is the truth, for good.

    forgotten grants are at the sites that have not said so yet, and all sites together held no more than the amount:
    what may be granted meanwhile is what came back from those that have

A budget's period is frozen until every site of `lease_waits` that the budget is for has said what it holds of it.
Periods that had not begun anywhere when the freeze did cannot have forgotten grants.  docs/adr/0015-fleet-leases.md
says what this guarantees and what not.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

import msgspec

from ondol.core.catalog import BudgetDoc, Selector, SiteDoc
from ondol.core.fleet import selected
from ondol.core.ports import Tx
from ondol.core.trust import Credential
from ondol.hub import audit, sites
from ondol.hub.decide.leases import plausible
from ondol.units import NS_PER_S
from ondol.wire import sync

SCHEMA: Final[tuple[str, ...]] = (
    "CREATE TABLE lease_freeze(id BIGINT NOT NULL PRIMARY KEY, era BIGINT NOT NULL, why TEXT NOT NULL)",
    "CREATE TABLE lease_waits(site TEXT NOT NULL PRIMARY KEY, claimed BIGINT NOT NULL)",
)
"""`claimed`: up to which record a site was acknowledged by the hub that was; said again, it is no news."""

SETTLE_S: Final = 30.0
"""For so long a hub that has just started waits for the sites that it knows, before it grants anything: one of them
may know that it went back.  Longer than a site takes to notice a dead line and to connect again (12 s and a few)."""
_ERA_AHEAD_NS: Final = 36 * 3600 * NS_PER_S
_KEPT_NS: Final = 40 * 86_400 * NS_PER_S
"""Longer than any period that went on when a freeze began."""
_NAMED: Final = 5
_SITES_MAX: Final = 1 << 31


def era(tx: Tx) -> int:
    """When the newest freeze began, by the hub's clock; 0 before the first.  Also one that is over has its era."""
    rows = tx.run("SELECT era FROM lease_freeze")
    return int(rows[0][0]) if rows else 0


def begin(tx: Tx, why: str, *, now_ns: int, after: int = 0) -> int:
    """Freeze until every site that has joined and is not revoked has said what it holds; the new era.

    The era is above all before it, and above `after`.
    """
    number = max(now_ns, era(tx) + 1, after + 1)
    tx.run(
        "INSERT INTO lease_freeze(id, era, why) VALUES(0,?,?) ON CONFLICT(id) DO UPDATE SET"
        " era = excluded.era, why = excluded.why",
        (number, why),
    )
    tx.run(
        "INSERT INTO lease_waits(site, claimed) SELECT name, 0 FROM sites WHERE key IS NOT NULL"
        " AND revoked_ns IS NULL ON CONFLICT(site) DO NOTHING"
    )
    audit.note(tx, now_ns, "grants frozen", "hub", why)
    return number


def greeted(tx: Tx, site: sites.SiteRow, hello: sync.Hello, *, newest: int, mark: int, now_ns: int) -> str:
    """Look for news in a site's hello; why a freeze began, empty where none did.

    `site` is the row from before the hello, `newest` the newest generation, `mark` the site's last record here.
    """
    now = era(tx)
    waits = tx.run("SELECT claimed FROM lease_waits WHERE site = ?", (site.name,))
    claimed = max(mark, int(waits[0][0])) if waits else mark
    said = 0 if hello.era is None else hello.era
    if waits and said < now:
        why = ""  # it speaks for the first time since the freeze, which its news explain
    else:
        why = _news(tx, site, hello, now, newest=newest, claimed=claimed, now_ns=now_ns)
    if why:
        begin(tx, f"{site.name} {why}", now_ns=now_ns, after=said if said <= now_ns + _ERA_AHEAD_NS else 0)
    if hello.acknowledged > claimed:
        tx.run(
            "INSERT INTO lease_waits(site, claimed) VALUES(?,?) ON CONFLICT(site) DO UPDATE SET"
            " claimed = excluded.claimed",
            (site.name, hello.acknowledged),
        )
    return why


def _news(
    tx: Tx, site: sites.SiteRow, hello: sync.Hello, now: int, *, newest: int, claimed: int, now_ns: int
) -> str:
    if hello.era is not None and now < hello.era <= now_ns + _ERA_AHEAD_NS:
        return "has heard of a freeze that this hub does not know"
    if hello.generation > max(newest, site.generation):
        return f"runs generation {hello.generation}, and the newest here is {newest}"
    if hello.acknowledged > claimed:
        return f"was told that its records up to {hello.acknowledged} are here, and they end at {claimed}"
    rows = tx.run("SELECT COALESCE(MAX(heard_ns), 0) FROM lease_grants WHERE site = ?", (site.name,))
    if hello.lease_ns > max(now, int(rows[0][0])):
        return "has an answer on a budget that this hub does not know"
    return ""


def stranger(tx: Tx, credential: Credential, *, now_ns: int) -> bool:
    """Freeze where a hub that was has signed this credential, and this one does not know it; whether it did.

    A site that joined after the backup.  It is waited for until it has joined again, or is revoked.
    """
    row = sites.find(tx, credential.site)
    old = row is not None and row.key is not None
    if (
        row is not None
        and old
        and (row.key == credential.key or credential.issued_ns <= (row.joined_ns or 0))
    ):
        return False
    if tx.run("SELECT 1 FROM lease_waits WHERE site = ?", (credential.site,)):
        return False
    begin(tx, f"{credential.site} has joined, and this hub does not know it", now_ns=now_ns)
    tx.run(
        "INSERT INTO lease_waits(site, claimed) VALUES(?,0) ON CONFLICT(site) DO NOTHING", (credential.site,)
    )
    return True


def is_awaited(tx: Tx, site: str) -> bool:
    """Whether the site was known when the newest freeze began."""
    return bool(tx.run("SELECT 1 FROM lease_waits WHERE site = ?", (site,)))


def covers(number: int, budget: BudgetDoc, period: str) -> bool:
    """Whether anything of this period may have been granted before the freeze of this era began."""
    return number > 0 and plausible(period, budget.period, number)


def silent(tx: Tx, number: int, budget: BudgetDoc, period: str) -> list[str]:
    """The sites that have not said yet what they hold of a budget, by name; O(those), empty when the freeze is over.

    Where there are many, it is enough to know that there are some: a budget for all sites names the first few.
    """
    everywhere = budget.sites == Selector()
    rows = tx.run(
        "SELECT w.site, s.doc FROM lease_waits w LEFT JOIN sites s ON s.name = w.site WHERE s.revoked_ns IS NULL"
        " AND NOT EXISTS (SELECT 1 FROM lease_grants g WHERE g.site = w.site AND g.budget = ?"
        " AND g.currency = ? AND g.period = ? AND g.era = ?) ORDER BY w.site LIMIT ?",
        (budget.name, budget.currency, period, number, _NAMED + 1 if everywhere else _SITES_MAX),
    )
    if everywhere:
        return [site for site, _ in rows]
    return [
        site
        for site, doc in rows
        if doc is None or selected(budget.sites, msgspec.json.decode(doc, type=SiteDoc))
    ]


def sentence(number: int, waiting: Sequence[str]) -> str:
    """Why nothing new is granted, for a person."""
    since = datetime.fromtimestamp(number // NS_PER_S, UTC).strftime("%Y-%m-%d %H:%M UTC")
    names = ", ".join(waiting[:_NAMED]) + (" and others" if len(waiting) > _NAMED else "")
    return (
        f"frozen since {since}: the hub went back to an older state, and only what comes back is granted until all "
        f"sites have said what they hold. Silent: {names}. One that never comes back: ondol sites revoke NAME"
    )


def forget(tx: Tx, *, now_ns: int) -> None:
    """Wait for nobody where every period is over that went on when the freeze began."""
    if 0 < era(tx) < now_ns - _KEPT_NS:
        tx.run("DELETE FROM lease_waits")
