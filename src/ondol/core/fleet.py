"""A fleet as documents, and what it comes down to at one site.  Pure.

`resolve` turns the documents of all into the documents of one: selectors are answered, values per site are
filled in, and only what the site needs is left.  The result is what could stand in that site's own file, so it
passes the same checks there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from string import Template
from typing import Any, Final, TypeVar

import msgspec

from ondol.core.catalog import (
    AnyDocument,
    BudgetDoc,
    DeploymentDoc,
    Document,
    ModelDoc,
    PriceDoc,
    RolloutDoc,
    RouteDoc,
    Selector,
    SiteDoc,
    TeamDoc,
    TenantDoc,
)
from ondol.core.desired import plain
from ondol.errors import ConfigError

FLEET_KINDS: Final[dict[str, type[Document]]] = {
    "Tenant": TenantDoc,
    "Team": TeamDoc,
    "Site": SiteDoc,
    "Model": ModelDoc,
    "Price": PriceDoc,
    "Deployment": DeploymentDoc,
    "Route": RouteDoc,
    "Budget": BudgetDoc,
    "Rollout": RolloutDoc,
}
"""The kinds that a fleet's files may hold, in the order in which they are shown and sent."""

LOCAL_ENGINES: Final = ("llamacpp", "encoder", "fake")
_SHOWN_MAX: Final = 60
D = TypeVar("D", bound=Document)


class Fleet(msgspec.Struct, frozen=True, kw_only=True):
    """The documents of a fleet, by kind and name.  `sites` holds those of files and those that were invited."""

    tenants: Mapping[str, TenantDoc] = {}
    teams: Mapping[str, TeamDoc] = {}
    sites: Mapping[str, SiteDoc] = {}
    models: Mapping[str, ModelDoc] = {}
    prices: Mapping[str, PriceDoc] = {}
    deployments: Mapping[str, DeploymentDoc] = {}
    routes: Mapping[str, RouteDoc] = {}
    budgets: Mapping[str, BudgetDoc] = {}
    rollouts: Mapping[str, RolloutDoc] = {}

    def all(self) -> list[tuple[str, AnyDocument]]:
        """Every document with its kind, in the order of `FLEET_KINDS`."""
        found: list[tuple[str, AnyDocument]] = []
        for kind in FLEET_KINDS:
            documents: Mapping[str, AnyDocument] = getattr(self, kind.lower() + "s")
            found += [(kind, documents[name]) for name in sorted(documents)]
        return found


class Resolved(msgspec.Struct, frozen=True, kw_only=True):
    """The documents of one site, each with its kind, and sentences on what fell away."""

    documents: tuple[tuple[str, AnyDocument], ...]
    warnings: tuple[str, ...] = ()


class FieldChange(msgspec.Struct, frozen=True, kw_only=True):
    """One field of a changed document, old and new as short text."""

    field: str
    old: str
    new: str


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What would change in one document: `added`, `changed` or `removed`; `sites` of `of` get the document."""

    kind: str
    name: str
    change: str
    sites: int
    of: int
    fields: tuple[FieldChange, ...] = ()


def fleet_of(documents: Iterable[tuple[str, Document]]) -> Fleet:
    """The fleet of some documents with their kinds; they were checked before."""
    found: dict[str, dict[str, Document]] = {kind.lower() + "s": {} for kind in FLEET_KINDS}
    for kind, document in documents:
        found[kind.lower() + "s"][document.name] = document
    return Fleet(**found)  # type: ignore[arg-type]  # each document stands under its own kind


def selected(selector: Selector, site: SiteDoc) -> bool:
    """Whether a selector means this site."""
    if selector.names and not any(fnmatchcase(site.name, pattern) for pattern in selector.names):
        return False
    own = _labels(site)
    return all(name in own and fnmatchcase(own[name], pattern) for name, pattern in selector.labels.items())


def _labels(site: SiteDoc) -> dict[str, str]:
    return {
        **site.labels, "name": site.name, "region": site.region, "country": site.country, "tier": site.tier,
    }  # fmt: skip


def installed(deployment: DeploymentDoc, site: SiteDoc) -> bool:
    """Whether a site gets a deployment.

    Without a selector a local engine runs on its own `site` alone, and what is reached over the network is known
    to every site but the one that it stands for.
    """
    if deployment.engine == "peer" and deployment.site == site.name:
        return False
    if deployment.sites is not None:
        return selected(deployment.sites, site)
    if deployment.engine in LOCAL_ENGINES:
        return deployment.site == site.name
    return True


def concrete(deployment: DeploymentDoc, site: SiteDoc) -> DeploymentDoc:
    """The deployment as it stands at one site: values per site, `${…}`, and where it runs, filled in.

    Raises:
        ConfigError: a value does not fit its field, or a text names a label that the site has not got.
    """
    where = f"Deployment/{deployment.name} on {site.name}"
    fields: dict[str, Any] = plain("Deployment", deployment)
    del fields["kind"]
    fields.pop("sites", None)
    overrides = fields.pop("per_site", {})
    fields |= overrides.get(site.name, {})
    fields["site"] = fields.get("site") or site.name
    if deployment.engine in LOCAL_ENGINES and deployment.sites is not None:
        fields["site"] = site.name
    if "${" in str(fields):
        fields = _filled(fields, site, where)
    if not overrides and fields["site"] == deployment.site and deployment.sites is None:
        return deployment
    try:
        return msgspec.convert(fields, DeploymentDoc)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"{where}: {error}; check per_site.{site.name} and the labels that it uses"
        ) from error


def _filled(value: Any, site: SiteDoc, where: str) -> Any:
    if isinstance(value, dict):
        return {key: _filled(one, site, where) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_filled(one, site, where) for one in value]
    if not isinstance(value, str) or "${" not in value:
        return value
    values = {"site": site.name, "region": site.region}
    values |= {f"labels.{name}": text for name, text in site.labels.items()}
    try:
        return _Dotted(value).substitute(values)
    except KeyError as error:
        known = ", ".join(sorted(values))
        raise ConfigError(f"{where}: found ${{{error.args[0]}}}, and the site has: {known}") from error
    except ValueError as error:
        raise ConfigError(
            f"{where}: {value!r} holds a $ that names nothing; write $$ for a plain $"
        ) from error


class _Dotted(Template):
    """`${labels.gpu}`: names may have dots and dashes."""

    braceidpattern = r"[a-z][A-Za-z0-9_.-]*"


def resolve(fleet: Fleet, name: str) -> Resolved:
    """What the fleet comes down to at the site `name`; some 100 µs.

    Raises:
        ConfigError: there is no such site, or a value does not fit there.
    """
    site = fleet.sites.get(name)
    if site is None:
        raise ConfigError(f"there is no site {name!r} in the fleet; invite it, or write a Site document")
    deployments = {
        one.name: concrete(one, site) for one in fleet.deployments.values() if installed(one, site)
    }
    routes, warnings = _routes(fleet, site, deployments)
    needed = {one for route in routes for one in route.deployments}
    kept = [one for one in deployments.values() if one.name in needed]
    budgets = [
        msgspec.structs.replace(one, sites=Selector())
        for one in fleet.budgets.values()
        if selected(one.sites, site)
    ]
    near = {*site.neighbours, *(one.site for one in kept)} | ({site.parent} if site.parent else set())
    others = [fleet.sites[one] for one in sorted(near & fleet.sites.keys() - {name})]
    models = [fleet.models[one] for one in sorted({one.model for one in kept})]
    found: dict[str, Sequence[AnyDocument]] = {
        "Tenant": list(fleet.tenants.values()),
        "Team": list(fleet.teams.values()),
        "Site": [
            _with_known(site, fleet),
            *(msgspec.structs.replace(one, neighbours=(), parent=None) for one in others),
        ],
        "Model": models,
        "Price": _prices(fleet, kept),
        "Deployment": kept,
        "Route": routes,
        "Budget": budgets,
    }
    documents = [(kind, one) for kind, ones in found.items() for one in ones]
    return Resolved(documents=tuple(documents), warnings=tuple(warnings))


def _with_known(site: SiteDoc, fleet: Fleet) -> SiteDoc:
    """The site without neighbours and a parent that have not joined yet."""
    parent = site.parent if site.parent in fleet.sites else None
    neighbours = tuple([one for one in site.neighbours if one in fleet.sites])
    return msgspec.structs.replace(site, parent=parent, neighbours=neighbours)


def _routes(
    fleet: Fleet, site: SiteDoc, deployments: Mapping[str, DeploymentDoc]
) -> tuple[list[RouteDoc], list[str]]:
    routes, warnings = [], []
    for route in fleet.routes.values():
        if not selected(route.sites, site):
            continue
        here = tuple([one for one in route.deployments if one in deployments])
        if here:
            routes.append(msgspec.structs.replace(route, deployments=here, sites=Selector()))
        else:
            warnings.append(
                f"Route/{route.name} is left out on {site.name}: none of its deployments is there"
            )
    return routes, warnings


def _prices(fleet: Fleet, deployments: Sequence[DeploymentDoc]) -> list[PriceDoc]:
    """The prices that are used, and every exchange rate: a budget may be in another currency."""
    used = {one.price for one in deployments}
    return [one for one in fleet.prices.values() if one.name in used or one.exchange_from is not None]


def reach(fleet: Fleet, document: AnyDocument) -> int:
    """How many sites of the fleet get a document."""
    sites = fleet.sites.values()
    if isinstance(document, DeploymentDoc):
        return sum(installed(document, site) for site in sites)
    if isinstance(document, RouteDoc | BudgetDoc | RolloutDoc):
        return sum(selected(document.sites, site) for site in sites)
    if isinstance(document, SiteDoc):
        return 1
    return len(fleet.sites)


def diff(old: Fleet, new: Fleet) -> list[Change]:
    """What differs, document by document, in the order of kinds and names."""
    before = {(kind, one.name): one for kind, one in old.all()}
    after = {(kind, one.name): one for kind, one in new.all()}
    order = {kind: number for number, kind in enumerate(FLEET_KINDS)}
    changes = []
    for kind, name in sorted(before.keys() | after.keys(), key=lambda key: (order[key[0]], key[1])):
        was, is_now = before.get((kind, name)), after.get((kind, name))
        if was == is_now:
            continue
        change = "added" if was is None else "removed" if is_now is None else "changed"
        fleet, document = (old, was) if is_now is None else (new, is_now)
        assert document is not None
        changes.append(
            Change(
                kind=kind, name=name, change=change, sites=reach(fleet, document), of=len(fleet.sites),
                fields=() if was is None or is_now is None else tuple(_fields(was, is_now)),
            )
        )  # fmt: skip
    return changes


def _fields(old: AnyDocument, new: AnyDocument) -> Iterable[FieldChange]:
    for field in old.__struct_fields__:
        was, is_now = getattr(old, field), getattr(new, field)
        if was != is_now:
            yield FieldChange(field=field, old=_short(was), new=_short(is_now))


def _short(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= _SHOWN_MAX else text[: _SHOWN_MAX - 1] + "…"
