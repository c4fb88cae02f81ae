"""One YAML file to one checked catalogue.

Owns the form of the file and every rule on it; knows nothing of what runs.  Either all of a file is
right and there is a catalogue, or a ConfigError says all that is wrong, each with file and line, what
was found and what is allowed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from os import stat_result
from pathlib import Path
from typing import Any, Final, TypeVar

from ondol.adapters.power import grids as known_grids
from ondol.adapters.pricebook import prices_of as book_prices
from ondol.config import checks
from ondol.config.checks import DEFAULT_TENANT, Documents, Entry
from ondol.config.fields import build
from ondol.config.files import read_text
from ondol.config.prices import PricesOf, check_currencies, prices_and_exchange
from ondol.config.report import Report, choices, is_secret, quoted
from ondol.config.text import Node, TextError, documents
from ondol.core.catalog import (
    BudgetDoc,
    Catalog,
    DeploymentDoc,
    Document,
    GatewayDoc,
    Grid,
    ModelDoc,
    PriceDoc,
    RouteDoc,
    SiteDoc,
    TeamDoc,
    TenantDoc,
)
from ondol.errors import ConfigError

__all__ = ["KINDS", "Fingerprint", "fingerprint", "load", "parse"]

KINDS: Final[dict[str, type[Document]]] = {
    "Gateway": GatewayDoc,
    "Site": SiteDoc,
    "Model": ModelDoc,
    "Deployment": DeploymentDoc,
    "Route": RouteDoc,
    "Tenant": TenantDoc,
    "Team": TeamDoc,
    "Budget": BudgetDoc,
    "Price": PriceDoc,
}
_LATER: Final = ("Policy", "Slo")
_OF_FLEETS: Final = ("Rollout",)

D = TypeVar("D", bound=Document)
GridsOf = Callable[[Collection[str]], dict[str, Grid]]
Fingerprint = tuple[int, int, int, int]


def load(
    path: Path, *, insecure: bool = False, prices_of: PricesOf = book_prices, grids: GridsOf = known_grids
) -> Catalog:
    """The catalogue of a file; relative paths in it are relative to its folder.

    Blocks: it reads files, and prices with `book` cost a child process of half a second.  `insecure`
    allows a bind to a non-loopback address without TLS, as `insecure: true` in the file does.

    Raises:
        ConfigError: the file cannot be read, or says something wrong.
    """
    text = read_text(path)
    return parse(text, base=path.parent, name=str(path), insecure=insecure, prices_of=prices_of, grids=grids)


def parse(
    text: str,
    *,
    base: Path,
    name: str,
    insecure: bool = False,
    prices_of: PricesOf = book_prices,
    grids: GridsOf = known_grids,
) -> Catalog:
    """The catalogue of a text that stands in a file called `name` in the folder `base`.

    Raises:
        ConfigError: with one line for each problem, at most 20.
    """
    try:
        nodes = documents(text)
    except TextError as error:
        raise ConfigError(f"{name}:{error.line}: {error}") from error
    digest = hashlib.sha256(text.encode()).hexdigest()
    return catalog_of(
        nodes,
        base=base,
        report=Report(name),
        digest=digest,
        insecure=insecure,
        prices_of=prices_of,
        grids=grids,
    )


def catalog_of(
    nodes: list[Node], *, base: Path, report: Report, digest: str, insecure: bool = False,
    prices_of: PricesOf = book_prices, grids: GridsOf = known_grids,
) -> Catalog:  # fmt: skip
    """The catalogue of one site's documents, wherever they stood.

    Raises:
        ConfigError: with one line for each problem.
    """
    found = _by_kind(nodes, report)
    docs = Documents(
        names=_names(nodes),
        tenants=_entries(found, TenantDoc),
        teams=_entries(found, TeamDoc),
        budgets=_entries(found, BudgetDoc),
        sites=_entries(found, SiteDoc),
        models=_entries(found, ModelDoc),
        deployments=_entries(found, DeploymentDoc),
        routes=_entries(found, RouteDoc),
        gateways=_entries(found, GatewayDoc),
    )
    checks.check_all(docs, report, insecure=insecure, file_exists=lambda path: (base / path).is_file())
    prices, exchange = prices_and_exchange(_entries(found, PriceDoc), prices_of, report)
    check_currencies(docs, prices, exchange, report)
    report.raise_any()
    site = _only_site(docs)
    return Catalog(
        site=site,
        gateway=next((entry.doc for entry in docs.gateways.values()), GatewayDoc(name=site.name)),
        tenants={DEFAULT_TENANT: TenantDoc(name=DEFAULT_TENANT)} | _plain(docs.tenants),
        teams=_plain(docs.teams),
        budgets=_plain(docs.budgets),
        sites=_plain(docs.sites),
        models=_plain(docs.models),
        deployments=_plain(docs.deployments),
        routes=_plain(docs.routes),
        prices=prices,
        exchange=exchange,
        grids=grids(sorted({entry.doc.grid_zone for entry in docs.sites.values()})),
        digest=digest,
    )


def fingerprint(status: stat_result) -> Fingerprint:
    """What changes whenever a file is written, or replaced by another one; compare two of them."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _by_kind(nodes: list[Node], report: Report) -> dict[type[Document], dict[str, Entry[Any]]]:
    found: dict[type[Document], dict[str, Entry[Any]]] = {kind: {} for kind in KINDS.values()}
    if not nodes:
        report.add(1, f"an empty file; allowed: documents of the kinds {', '.join(KINDS)}")
    first: dict[tuple[str, str], int] = {}
    for node in nodes:
        kind = _kind(node, report)
        if kind is None:
            continue
        name = str(node.at("name").value)
        where = kind if node.at("name") is node or is_secret(name) else f"{kind}/{name}"
        entry = build(node, KINDS[kind], where, report, ignore="kind")
        if (line := first.setdefault((kind, name), node.line)) != node.line:
            report.add(node.line, f"{where}: the name is taken in line {line}; allowed: one {kind} of a name")
        if entry is not None:
            found[KINDS[kind]].setdefault(name, Entry(entry, node, where))
    return found


def _kind(node: Node, report: Report) -> str | None:
    if not isinstance(node.value, dict):
        report.add(node.line, "found no mapping; allowed: documents with kind and name, parted by ---")
        return None
    kind = node.value.get("kind")
    if kind is None or not isinstance(kind.value, str):
        report.add(node.line, f"kind: missing; allowed: {', '.join(KINDS)}")
        return None
    if kind.value in KINDS:
        return kind.value
    if kind.value in _OF_FLEETS:
        report.add(
            kind.line,
            f"kind: found {kind.value}, which belongs in the files of a fleet (`ondol apply -f DIR`); allowed in a "
            f"site's own file: {', '.join(KINDS)}",
        )
    elif kind.value in _LATER:
        report.add(
            kind.line,
            f"kind: found {kind.value}, which comes in a later version; allowed: {', '.join(KINDS)}",
        )
    else:
        report.add(kind.line, f"kind: found {quoted(kind.value)}; allowed: {choices(kind.value, KINDS)}")
    return None


def _names(nodes: list[Node]) -> dict[str, set[str]]:
    names: dict[str, set[str]] = {}
    for node in nodes:
        if isinstance(node.value, dict) and "kind" in node.value and "name" in node.value:
            kind, name = str(node.value["kind"].value), str(node.value["name"].value)
            if not is_secret(name):
                names.setdefault(kind, set()).add(name)
    return names


def _entries(found: dict[type[Document], dict[str, Entry[Any]]], kind: type[D]) -> dict[str, Entry[D]]:
    return found[kind]


def _plain(entries: dict[str, Entry[D]]) -> dict[str, D]:
    return {name: entry.doc for name, entry in entries.items()}


def _only_site(docs: Documents) -> SiteDoc:
    """This file's site; the checks have made sure that there is exactly one."""
    named = next((entry.doc.site for entry in docs.gateways.values()), None)
    return docs.sites[named if named is not None else next(iter(docs.sites))].doc
