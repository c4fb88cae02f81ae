"""The files of a fleet, and what one joined site makes of the documents that its hub sends.

The rules on documents are those of one site's file (`config.checks`): a fleet is right when what it comes down to
is right at every kind of site that it has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from ondol.adapters.power import grids
from ondol.adapters.pricebook import prices_of as book_prices
from ondol.config import KINDS, catalog_of
from ondol.config.fields import build
from ondol.config.files import read_text
from ondol.config.network import address_problem
from ondol.config.report import Report, choices, quoted
from ondol.config.text import Node, TextError, documents
from ondol.core.catalog import Catalog, Document, GatewayDoc, PriceDoc, SiteDoc
from ondol.core.desired import body_of, plain
from ondol.core.fleet import FLEET_KINDS, Fleet, fleet_of, resolve
from ondol.core.money import Price
from ondol.errors import ConfigError

DOCUMENTS_MAX: Final = 20_000
SHAPES_MAX: Final = 200
"""Sites whose documents differ in kind are checked one by one, up to so many; each site checks its own again."""


class Written(msgspec.Struct, frozen=True):
    """A document with the place where it was written."""

    kind: str
    doc: Document
    where: str


def load_fleet(directory: Path) -> list[Written]:
    """Every document of the YAML files below a directory, in the order of their paths.

    Raises:
        ConfigError: there are none, or some say something wrong: all of it, with file and line.
    """
    paths = sorted(path for path in directory.rglob("*.y*ml") if path.suffix in (".yaml", ".yml"))
    if not paths:
        raise ConfigError(f"{directory}: found no .yaml file; expected the documents of a fleet")
    found: list[Written] = []
    problems = []
    first: dict[tuple[str, str], str] = {}
    for path in paths:
        report = Report(str(path))
        for node in _nodes_of(path):
            one = _written(node, path, report)
            if one is None:
                continue
            place = first.setdefault((one.kind, one.doc.name), one.where)
            if place != one.where:
                report.add(
                    node.line, f"{one.kind}/{one.doc.name}: the name is taken at {place}; allowed: once"
                )
            found.append(one)
        try:
            report.raise_any()
        except ConfigError as error:
            problems.append(error.message)
    if problems:
        raise ConfigError("\n".join(problems))
    return found


def as_data(written: Iterable[Written]) -> list[dict[str, Any]]:
    """The documents as the hub takes them."""
    return [plain(one.kind, one.doc) for one in written]


def check_fleet(documents: Sequence[Mapping[str, Any]], invited: Mapping[str, SiteDoc]) -> Fleet:
    """The fleet of some documents, checked as a whole; `invited` are sites that have no document among them.

    Seconds for a thousand sites of many kinds: keep it off an event loop.

    Raises:
        ConfigError: everything that is wrong, with the document's kind and name.
    """
    if len(documents) > DOCUMENTS_MAX:
        raise ConfigError(f"found {len(documents)} documents; allowed: at most {DOCUMENTS_MAX}")
    report = Report("fleet")
    built: list[tuple[str, Document]] = []
    for number, data in enumerate(documents, 1):
        one = _built(number, data, report)
        if one is not None:
            built.append(one)
    seen: set[tuple[str, str]] = set()
    for kind, doc in built:
        if (kind, doc.name) in seen:
            report.add(0, f"{kind}/{doc.name}: found it twice; allowed: one {kind} of a name")
        seen.add((kind, doc.name))
    report.raise_any()
    fleet = fleet_of(built)
    _references(fleet, invited, report)
    report.raise_any()
    whole = msgspec.structs.replace(fleet, sites={**invited, **fleet.sites})
    _each_kind_of_site(whole)
    return fleet


def gateway_of(path: Path) -> GatewayDoc:
    """The Gateway document of a site's file, whatever else stands there; its defaults where it has none.

    Raises:
        ConfigError: it is wrong, or the file cannot be read.
    """
    report = Report(str(path))
    for node in _nodes_of(path):
        if isinstance(node.value, dict) and node.at("kind").value == "Gateway":
            found = build(node, GatewayDoc, "Gateway", report, ignore="kind")
            report.raise_any()
            assert found is not None, "what could not be built was reported"
            return found
    return GatewayDoc(name="gateway")


def load_joined(path: Path, site: str, bodies: Sequence[bytes], *, insecure: bool = False) -> Catalog:
    """The catalogue of a site that has joined: the Gateway document of its own file, all else from the hub.

    Raises:
        ConfigError: either is wrong, or the file's Gateway is for another site.
    """
    text, local = read_text(path), _nodes_of(path)
    gateway = next((node for node in local if node.at("kind").value == "Gateway"), None)
    fields = dict(gateway.value) if gateway is not None and isinstance(gateway.value, dict) else {}
    named = fields.get("site")
    if named is not None and named.value != site:
        raise ConfigError(
            f"{path}:{named.line}: Gateway.site: found {quoted(str(named.value))}, and this site has joined its fleet "
            f"as {quoted(site)}; allowed: that, or no site at all"
        )
    line = 1 if gateway is None else gateway.line
    fields |= {"kind": _node("Gateway", line), "site": _node(site, line)}
    fields.setdefault("name", _node("gateway", line))
    nodes = [Node(line, fields), *(_node(msgspec.json.decode(body), line) for body in bodies)]
    digest = hashlib.sha256(b"\0".join([text.encode(), *bodies])).hexdigest()
    report = Report(f"{path} with the documents of the fleet")
    return catalog_of(nodes, base=path.parent, report=report, digest=digest, insecure=insecure)


def _nodes_of(path: Path) -> list[Node]:
    try:
        return documents(read_text(path))
    except TextError as error:
        raise ConfigError(f"{path}:{error.line}: {error}") from error


def _written(node: Node, path: Path, report: Report) -> Written | None:
    kind = _kind(node, report)
    if kind is None:
        return None
    name = node.at("name").value if isinstance(node.value, dict) and "name" in node.value else ""
    doc = build(node, FLEET_KINDS[kind], f"{kind}/{name}" if name else kind, report, ignore="kind")
    return None if doc is None else Written(kind, doc, f"{path}:{node.line}")


def _kind(node: Node, report: Report) -> str | None:
    kind = node.at("kind").value if isinstance(node.value, dict) and "kind" in node.value else None
    if isinstance(kind, str) and kind in FLEET_KINDS:
        return kind
    if kind == "Gateway":
        report.add(node.line, "kind: found Gateway, which is a machine's own; allowed in a site's file only")
    elif kind is None or not isinstance(kind, str):
        report.add(node.line, f"kind: missing; allowed: {', '.join(FLEET_KINDS)}")
    else:
        report.add(node.at("kind").line, f"kind: found {quoted(kind)}; allowed: {choices(kind, FLEET_KINDS)}")
    return None


def _built(number: int, data: Mapping[str, Any], report: Report) -> tuple[str, Document] | None:
    node = _node(data, number)
    kind = _kind(node, report)
    if kind is None:
        return None
    name = str(data.get("name", ""))
    doc = build(node, FLEET_KINDS[kind], f"{kind}/{name}" if name else kind, report, ignore="kind")
    return None if doc is None else (kind, doc)


def _references(fleet: Fleet, invited: Mapping[str, SiteDoc], report: Report) -> None:
    """What can be said without looking at single sites: every name that is referred to is that of something."""
    sites = {**invited, **fleet.sites}
    known: dict[str, Iterable[str]] = {
        "site": sites, "model": fleet.models, "price": fleet.prices, "tenant": {**fleet.tenants, "default": None},
    }  # fmt: skip
    for one in fleet.deployments.values():
        where = f"Deployment/{one.name}"
        _refer(report, f"{where}.model", one.model, known["model"])
        if one.price is not None:
            _refer(report, f"{where}.price", one.price, known["price"])
        if one.site and "$" not in one.site:
            _refer(report, f"{where}.site", one.site, known["site"])
        if not one.site and one.sites is None:
            report.add(
                0, f"{where}: found neither site nor sites; allowed: site: NAME, or sites: {{labels: …}}"
            )
    for route in fleet.routes.values():
        for name in route.deployments:
            _refer(report, f"Route/{route.name}.deployments", name, fleet.deployments)
    for team in fleet.teams.values():
        _refer(report, f"Team/{team.name}.tenant", team.tenant, known["tenant"])
    for site in fleet.sites.values():
        if site.address is not None and (problem := address_problem(site.address)) is not None:
            report.add(0, f"Site/{site.name}.address: found {quoted(site.address)}; allowed: {problem}")
        for name in (*site.neighbours, *([site.parent] if site.parent else [])):
            _refer(report, f"Site/{site.name}: neighbours and parent", name, sites)
    if len(fleet.rollouts) > 1:
        report.add(
            0, f"Rollout: found {', '.join(fleet.rollouts)}; allowed: one, which is how every generation goes"
        )


def _refer(report: Report, where: str, name: str, names: Iterable[str]) -> None:
    if name not in names:
        report.add(0, f"{where}: found {quoted(name)}; allowed: {choices(name, names)}")


def _each_kind_of_site(fleet: Fleet) -> None:
    """What the fleet comes down to is checked at one site of each shape."""
    shapes: dict[tuple[object, ...], str] = {}
    priced: dict[str, dict[str, Price]] = {}

    def prices(docs: Iterable[PriceDoc]) -> dict[str, Price]:
        wanted = list(docs)
        key = msgspec.json.encode(wanted).decode()
        if key not in priced:
            priced[key] = book_prices(wanted)
        return priced[key]

    for name, site in sorted(fleet.sites.items()):
        resolved = resolve(fleet, name).documents
        shape = (site.tier, *((kind, one.name) for kind, one in resolved if kind != "Site"))
        if shape in shapes or len(shapes) >= SHAPES_MAX:
            continue
        shapes[shape] = name
        if not any(kind == "Route" for kind, _ in resolved):
            continue
        bodies = [_node(msgspec.json.decode(body_of(kind, one)), 0) for kind, one in resolved]
        gateway = _node({"kind": "Gateway", "name": "gateway", "site": name}, 0)
        catalog_of(
            [gateway, *bodies],
            base=Path(),
            report=Report(f"at site {name}"),
            digest="",
            prices_of=prices,
            grids=grids,
        )


def _node(value: Any, line: int) -> Node:
    """Plain data as nodes that all stand in one line."""
    if isinstance(value, Mapping):
        return Node(line, {str(key): _node(one, line) for key, one in value.items()})
    if isinstance(value, list | tuple):
        return Node(line, [_node(one, line) for one in value])
    return Node(line, value, "" if value is None else str(value))


assert FLEET_KINDS.keys() - KINDS.keys() == {"Rollout"}, (
    "a fleet holds what a site's file holds, less its Gateway"
)
