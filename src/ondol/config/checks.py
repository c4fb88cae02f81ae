"""What no single field can say: names, references, and rules between documents.

Each check reads the documents and reports; none changes anything, and the order does not matter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, Final, Generic, TypeVar
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, available_timezones

import msgspec

from ondol.config import network
from ondol.config.report import Report, choices, quoted
from ondol.config.text import Node
from ondol.core.catalog import (
    BudgetDoc,
    DeploymentDoc,
    Document,
    GatewayDoc,
    KeySource,
    ModelDoc,
    RouteDoc,
    SiteDoc,
    TeamDoc,
    TenantDoc,
)
from ondol.core.inference import Task

D = TypeVar("D", bound=Document)

DEFAULT_TENANT: Final = "default"
_REMOTE: Final = ("upstream", "peer")
_CHILD: Final = ("llamacpp", "encoder")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Entry(msgspec.Struct, Generic[D], frozen=True):
    """A document with the node that it was made from, for the lines of its fields."""

    doc: D
    node: Node
    where: str


class Documents(msgspec.Struct, frozen=True):
    """All documents of a file that are well formed, by kind and name; prices are checked elsewhere.

    `names` holds the names of every document by kind, those with a wrong field too, so that one mistake
    is not reported again by all who refer to it.
    """

    names: dict[str, set[str]]
    tenants: dict[str, Entry[TenantDoc]]
    teams: dict[str, Entry[TeamDoc]]
    budgets: dict[str, Entry[BudgetDoc]]
    sites: dict[str, Entry[SiteDoc]]
    models: dict[str, Entry[ModelDoc]]
    deployments: dict[str, Entry[DeploymentDoc]]
    routes: dict[str, Entry[RouteDoc]]
    gateways: dict[str, Entry[GatewayDoc]]


def check_all(docs: Documents, report: Report, *, insecure: bool, file_exists: Callable[[str], bool]) -> None:
    """Run every check that needs no price; `file_exists` takes a path as the file writes it."""
    here = this_site(docs, report)
    _no_selectors(docs, report)
    _teams_and_budgets(docs, report)
    _near_sites(docs, report)
    for deployment in docs.deployments.values():
        _deployment(deployment, docs, here, report)
    for route in docs.routes.values():
        _route(route, docs, report)
    for gateway in docs.gateways.values():
        _gateway(gateway, report, insecure=insecure, file_exists=file_exists)


def _no_selectors(docs: Documents, report: Report) -> None:
    """Which sites a document is for can only be asked where there are several."""
    groups: tuple[dict[str, Entry[Any]], ...] = (docs.deployments, docs.routes, docs.budgets)
    for entry in (entry for group in groups for entry in group.values()):
        written = entry.node.value
        for field in ("sites", "per_site"):
            value = written.get(field) if isinstance(written, dict) else None
            if value is not None and not _is_empty(value.data()):
                report.add(
                    value.line,
                    f"{entry.where}.{field}: this selects sites of a fleet; allowed: in files for `ondol apply`, "
                    "not in the file of one site",
                )


def _near_sites(docs: Documents, report: Report) -> None:
    known = docs.names.get("Site", set())
    for entry in docs.sites.values():
        for number, name in enumerate(entry.doc.neighbours):
            node, where = entry.node.at("neighbours", number), f"{entry.where}.neighbours[{number}]"
            if name not in known:
                report.unknown(node, where, name, known)
            elif name == entry.doc.name:
                report.wrong(node, where, "another site")
        address = entry.doc.address
        if address is not None and (problem := network.address_problem(address)) is not None:
            report.wrong(entry.node.at("address"), f"{entry.where}.address", problem)
        if entry.doc.parent is not None:
            _reference(entry, "parent", entry.doc.parent, known, report)


def _is_empty(value: Any) -> bool:
    return not any(value.values()) if isinstance(value, dict) else value is None


def this_site(docs: Documents, report: Report) -> str | None:
    """The name of the site that this file is for: the Gateway document's, or the only one."""
    gateways = list(docs.gateways.values())
    for extra in gateways[1:]:
        report.add(extra.node.line, f"{extra.where}: a second Gateway document; one file is for one gateway")
    sites = docs.names.get("Site", set())
    named = gateways[0].doc.site if gateways else None
    if named is not None:
        _reference(gateways[0], "site", named, sites, report)
        return named
    if len(sites) == 1:
        return next(iter(sites))
    if not sites:
        report.add(1, "Site: missing; allowed: a document of kind Site, for the place of this file")
    elif "Gateway" not in docs.names or gateways:
        line = gateways[0].node.line if gateways else 1
        report.add(line, f"Gateway.site: missing; allowed: {choices('', sites)}, whichever this file is for")
    return None


def timezone(entry: Entry[BudgetDoc] | Entry[GatewayDoc], report: Report) -> None:
    """Check the time zone of a document."""
    name = entry.doc.timezone
    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        report.unknown(entry.node.at("timezone"), f"{entry.where}.timezone", name, available_timezones())


def _reference(entry: Entry[D], field: str, name: str, names: Iterable[str], report: Report) -> bool:
    """Report a name that nothing has; True when something has it."""
    if name in names:
        return True
    report.unknown(entry.node.at(field), f"{entry.where}.{field}", name, names)
    return False


def _teams_and_budgets(docs: Documents, report: Report) -> None:
    tenants = docs.names.get("Tenant", set()) | {DEFAULT_TENANT}
    teams = docs.names.get("Team", set()) | {"default"}
    for team in docs.teams.values():
        _reference(team, "tenant", team.doc.tenant, tenants, report)
    for budget in docs.budgets.values():
        scope, node = budget.doc.scope, budget.node.at("scope")
        given = [name for name in scope.__struct_fields__ if getattr(scope, name) is not None]
        if len(given) != 1:
            named = " and ".join(given) or "none"
            report.add(
                node.line, f"{budget.where}.scope: found {named}; allowed: one of tenant, team, key, tag"
            )
        if scope.tenant is not None and scope.tenant not in tenants:
            report.unknown(node.at("tenant"), f"{budget.where}.scope.tenant", scope.tenant, tenants)
        if scope.team is not None and scope.team not in teams:
            report.unknown(node.at("team"), f"{budget.where}.scope.team", scope.team, teams)
        if scope.tag is not None and "=" not in scope.tag:
            report.wrong(node.at("tag"), f"{budget.where}.scope.tag", "name=value")
        timezone(budget, report)


def _deployment(entry: Entry[DeploymentDoc], docs: Documents, here: str | None, report: Report) -> None:
    doc = entry.doc
    if not doc.site:
        report.add(
            entry.node.line,
            f"{entry.where}.site: missing; allowed: {choices('', docs.names.get('Site', set()))}",
        )
    else:
        _reference(entry, "site", doc.site, docs.names.get("Site", set()), report)
    _reference(entry, "model", doc.model, docs.names.get("Model", set()), report)
    if doc.price is not None:
        _reference(entry, "price", doc.price, docs.names.get("Price", set()), report)
    _only_for(entry, ("url", "upstream_model", "keys", "trusted"), _REMOTE, report)
    _only_for(entry, ("fake",), ("fake",), report)
    for number, key in enumerate(doc.keys):
        _key_source(key, entry.node.at("keys", number), f"{entry.where}.keys[{number}]", report)
    if doc.engine in _REMOTE:
        _remote(entry, docs, here, report)
    model = docs.models.get(doc.model)
    if doc.engine == "llamacpp" and model is not None:
        if model.doc.format != "gguf":
            report.wrong(model.node.at("format"), f"{model.where}.format", "gguf, which llamacpp runs")
        if model.doc.file is None and model.doc.digest is None:
            report.add(
                model.node.line,
                f"{model.where}: found neither file nor digest; allowed: file: PATH.gguf, or the digest of a "
                "model in the store (ondol models list)",
            )
    if doc.engine == "encoder" and model is not None and model.doc.task is not Task.EMBEDDING:
        report.wrong(model.node.at("task"), f"{model.where}.task", "embedding, which encoder computes")
    if doc.engine in _CHILD and here is not None and doc.site != here:
        report.wrong(
            entry.node.at("site"),
            f"{entry.where}.site",
            f"{here}, because a {doc.engine} engine is a child of this gateway; another site is engine: peer",
        )


def _only_for(
    entry: Entry[DeploymentDoc], names: Iterable[str], engines: tuple[str, ...], report: Report
) -> None:
    written = entry.node.value
    for name in names:
        if isinstance(written, dict) and name in written and entry.doc.engine not in engines:
            report.add(
                written[name].line,
                f"{entry.where}.{name}: found it with engine {entry.doc.engine}; "
                f"allowed: only with engine {' or '.join(engines)}",
            )


def _key_source(key: KeySource, node: Node, where: str, report: Report) -> None:
    if (key.env is None) == (key.file is None):
        report.add(node.line, f"{where}: allowed: exactly one of env and file")
    elif key.env is not None and not _ENV_NAME.fullmatch(key.env):
        report.add(
            node.at("env").line,
            f"{where}.env: found something else (not shown); allowed: the name of an environment variable",
        )


def _remote(entry: Entry[DeploymentDoc], docs: Documents, here: str | None, report: Report) -> None:
    doc, line = entry.doc, entry.node.at("url").line
    if doc.engine == "peer" and doc.site == here:
        report.wrong(entry.node.at("site"), f"{entry.where}.site", "another site; a peer is never this one")
    if doc.url is None:
        report.add(line, f"{entry.where}.url: missing; allowed: the address of the {doc.engine}")
        return
    if problem := network.url_problem(doc.url):
        shown = (
            "an address with a secret (not shown)" if "@" in doc.url or "?" in doc.url else quoted(doc.url)
        )
        report.add(line, f"{entry.where}.url: found {shown}; allowed: {problem}")
        return
    host = network.host_of(doc.url)
    site = docs.sites.get(doc.site)
    is_near_label = doc.site == here or (site is not None and site.doc.tier in ("device", "edge"))
    if is_near_label and not doc.trusted and not network.is_near(host):
        report.add(
            line,
            f"{entry.where}.url: found the host {host}, which is no address of this machine or of a private "
            f"network, with site {doc.site}; allowed: the site (of tier pop or cloud) where it really runs; "
            "or, if the host is your own, trusted: true",
        )


def _route(entry: Entry[RouteDoc], docs: Documents, report: Report) -> None:
    known = docs.names.get("Deployment", set())
    tasks: dict[Task, str] = {}
    for number, name in enumerate(entry.doc.deployments):
        node, where = entry.node.at("deployments", number), f"{entry.where}.deployments[{number}]"
        if name not in known:
            report.unknown(node, where, name, known)
        elif name in entry.doc.deployments[:number]:
            report.wrong(node, where, "each deployment once")
        deployment = docs.deployments.get(name)
        model = docs.models.get(deployment.doc.model) if deployment is not None else None
        if model is not None:
            tasks.setdefault(model.doc.task, name)
    if len(tasks) > 1:
        found = ", ".join(f"{task} ({name})" for task, name in tasks.items())
        report.add(
            entry.node.at("deployments").line,
            f"{entry.where}.deployments: found the tasks {found}; allowed: models of one task",
        )
    teams = docs.names.get("Team", set()) | {"default"}
    for number, team in enumerate(entry.doc.teams):
        if team not in teams:
            report.unknown(entry.node.at("teams", number), f"{entry.where}.teams[{number}]", team, teams)


def _gateway(
    entry: Entry[GatewayDoc], report: Report, *, insecure: bool, file_exists: Callable[[str], bool]
) -> None:
    doc, node = entry.doc, entry.node
    timezone(entry, report)
    listen = network.split_listen(doc.listen)
    if listen is None:
        report.wrong(node.at("listen"), f"{entry.where}.listen", "HOST:PORT, such as 127.0.0.1:8080")
    elif not network.is_loopback(listen[0]):
        if doc.tls is None and not (doc.insecure or insecure):
            report.wrong(
                node.at("listen"),
                f"{entry.where}.listen",
                "127.0.0.1, or tls: {cert: FILE, key: FILE}, or insecure: true (or --insecure) where "
                "something else encrypts",
            )
        if network.is_wildcard(listen[0]) and not doc.hosts:
            report.add(
                node.at("listen").line,
                f"{entry.where}.hosts: missing; allowed: with listen {doc.listen}, the names by which "
                "clients call, such as hosts: [store-1.example.com]",
            )
    for number, host in enumerate(doc.hosts):
        if not host or any(char in host for char in "/@?#* \t") or "://" in host:
            where = f"{entry.where}.hosts[{number}]"
            report.wrong(node.at("hosts", number), where, "HOST or HOST:PORT, no wildcard")
    for number, origin in enumerate(doc.cors.origins):
        if origin != "*" and not _is_origin(origin):
            report.wrong(
                node.at("cors", "origins", number),
                f"{entry.where}.cors.origins[{number}]",
                'an origin such as https://app.example.com, or "*"',
            )
    if doc.tls is not None:
        for name, path in (("cert", doc.tls.cert), ("key", doc.tls.key)):
            if not file_exists(path):
                report.wrong(node.at("tls", name), f"{entry.where}.tls.{name}", "a PEM file that exists")


def _is_origin(origin: str) -> bool:
    try:
        parts = urlsplit(origin)
        parts.port  # noqa: B018 - raises on a bad port
    except ValueError:
        return False
    is_whole = origin == f"{parts.scheme}://{parts.netloc}"
    return is_whole and parts.scheme in ("http", "https") and bool(parts.netloc)
