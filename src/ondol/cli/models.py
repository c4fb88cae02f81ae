"""`ondol models`: what is in the store, and adding a GGUF file so that the edge answers with it."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import nullcontext
from datetime import date
from math import log10
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

import msgspec
import yaml
from cyclopts import Parameter
from cyclopts.validators import Number
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from ondol import config as configuration
from ondol.adapters.artifacts import ModelStore, StoredModel
from ondol.cli import editing
from ondol.cli.asking import Asker
from ondol.cli.hub_client import HubUrl
from ondol.cli.installation import (
    DEFAULT_DIR,
    AsJson,
    CommandFailed,
    Dir,
    Layout,
    Target,
    write_file,
)
from ondol.cli.output import console, print_json, significant, table
from ondol.cli.publish import offered
from ondol.errors import ConfigError
from ondol.wire.gguf import GgufHeader

CONTEXT_TOKENS_MAX: Final = 4096
"""A longer context is possible, and takes memory for every request that may run at once."""
LOAD_TIMEOUT_S: Final = 120.0
_POLL_S: Final = 0.3
_STARTER_PARAMETERS: Final = 135e6


class Added(msgspec.Struct, frozen=True, kw_only=True):
    """What `models add` did: the names it wrote, and whether the running edge answers with it."""

    name: str
    digest: str
    deployment: str
    routes: tuple[str, ...]
    state: str


def list_models(*, hub: HubUrl = None, directory: Dir = DEFAULT_DIR, as_json: AsJson = False) -> int:
    """List the models in the store, those that the hub offers, and the routes of the edge that may answer with them."""
    layout = Layout(directory)
    used = _routes_by_digest(layout)
    at_hub = offered(directory, hub)
    names = {one["digest"]: one["name"] for one in at_hub or []}
    store = ModelStore(layout.models)
    rows: list[dict[str, Any]] = []
    for one in store.models():
        header = store.header(one.digest)
        rows.append(
            {
                "name": one.name, "digest": one.digest, "bytes": one.size_bytes,
                "architecture": header.architecture, "parameters": header.parameters,
                "quantisation": header.quantisation, "context_tokens": header.context_tokens,
                "routes": used.get(one.digest, []), "here": True,
                "hub": None if at_hub is None else names.get(one.digest),
            }
        )  # fmt: skip
    here = {row["digest"] for row in rows}
    rows += [
        {
            "name": one["name"], "digest": one["digest"], "bytes": one["size"], "format": one["format"],
            "routes": used.get(one["digest"], []), "here": False, "hub": one["name"],
        }
        for one in at_hub or [] if one["digest"] not in here
    ]  # fmt: skip
    if as_json:
        print_json(rows)
        return 0
    if not rows:
        print(f"no models in {layout.models}; add one with: ondol models add FILE.gguf")
        return 0
    _show(rows, with_hub=at_hub is not None)
    return 0


def _show(rows: list[dict[str, Any]], *, with_hub: bool) -> None:
    columns = [("name", False), ("size MB", True), ("parameters", True), ("kind", False), ("routes", False)]
    made = table([*columns, *([("here", False), ("at the hub as", False)] if with_hub else [])])
    for row in rows:
        kind = f"{row['architecture']} {row['quantisation']}" if row["here"] else str(row["format"])
        more = ("yes" if row["here"] else "no", row["hub"] or "–") if with_hub else ()
        made.add_row(
            str(row["name"]),
            f"{one_mb(row['bytes'])}",
            _millions(row["parameters"]) if row["here"] else "–",
            kind,
            ", ".join(str(name) for name in row["routes"]) or "–",
            *more,
        )
    console().print(made)


def add(
    source: str,
    /,
    *,
    name: str | None = None,
    route: str = "assistant",
    quality: Annotated[float | None, Parameter(validator=Number(gte=0, lte=1))] = None,
    directory: Dir = DEFAULT_DIR,
    as_json: AsJson = False,
) -> int:
    """Check a GGUF file, put it into the store, and let the edge's routes answer with it.

    Args:
        source: A file, or an https:// address of one.
        name: What to call it; default the file's name.
        route: The route that may answer with it, beside one of the model's own name.
        quality: How good it is, from 0 to 1, for objective `best`; default a guess from its size.
    """
    layout = Layout(directory)
    path = layout.config("edge")
    if not path.exists():
        raise CommandFailed(
            f"there is no installation in {directory} (no {path}). Start `ondol up` once, or use --dir."
        )
    name = name if name is not None else default_name(source)
    old = _read(path)
    if name in editing.names(old, "Model"):
        raise CommandFailed(
            f"{path} has a Model named {name!r} already; choose another name with --name, or edit the file."
        )
    if route not in editing.names(old, "Route"):
        known = ", ".join(sorted(editing.names(old, "Route")))
        raise CommandFailed(f"{path} has no Route named {route!r}; it has: {known}.")
    stored = _store(layout, source, name, quiet=as_json)
    header = ModelStore(layout.models).header(stored.digest)
    site = configuration.load(path).site.name
    text, routes = edited(
        old, name=name, route=route, site=site, stored=stored, header=header, quality=quality,
        file=os.path.relpath(stored.path.resolve(), path.parent.resolve()), today=date.today().isoformat(),
    )  # fmt: skip
    try:
        configuration.parse(text, base=path.parent, name=str(path))
    except ConfigError as error:
        raise CommandFailed(
            f"{path} is left as it was, because the new text would be wrong: {error.message}"
        ) from error
    if _read(path) != old:
        raise CommandFailed(f"{path} was changed by somebody else in the meantime; try again.")
    write_file(path, text.encode())
    state = _wait_loaded(layout, name, quiet=as_json)
    added = Added(name=name, digest=stored.digest, deployment=name, routes=routes, state=state)
    if as_json:
        print_json(added)
    else:
        _tell(added, header, path, directory)
    return 1 if state.startswith("failed") else 0


def edited(
    text: str,
    *,
    name: str,
    route: str,
    site: str,
    stored: StoredModel,
    header: GgufHeader,
    quality: float | None,
    file: str,
    today: str,
) -> tuple[str, tuple[str, ...]]:
    """The site's file with the model, its deployment and its routes; and the routes' names.

    Raises:
        CommandFailed: the file is laid out in a way that cannot be edited.
    """
    context = min(header.context_tokens or CONTEXT_TOKENS_MAX, CONTEXT_TOKENS_MAX)
    guessed = quality is None
    documents: list[dict[str, Any]] = [
        {
            "kind": "Model", "name": name, "task": "chat", "family": header.architecture, "format": "gguf",
            "file": file, "digest": stored.digest, "context_tokens": context,
            "parameters_b": round(header.parameters / 1e9, 3) or None,
            "licence": header.licence or None, "languages": list(header.languages) or None,
            "quality": guess_quality(header.parameters) if quality is None else quality,
            "quality_source": "a guess from its number of parameters" if guessed else "stated by hand",
        },
        {
            "kind": "Deployment", "name": name, "site": site, "model": name, "engine": "llamacpp",
            "parallel": 2, "context_tokens": context,
            "price": f"{name}-own",
        },
        _price(f"{name}-own", header.parameters, today),
    ]  # fmt: skip
    routes = [route]
    if name not in editing.names(text, "Route"):
        documents.append({"kind": "Route", "name": name, "deployments": [name]})
        routes.append(name)
    kept = [{key: value for key, value in one.items() if value is not None} for one in documents]
    added = yaml.safe_dump_all(kept, sort_keys=False, allow_unicode=True, width=100)
    text = editing.append_to_list(text, kind="Route", name=route, key="deployments", item=name)
    return editing.append_documents(text, added), tuple(routes)


def _price(name: str, parameters: int, today: str) -> dict[str, str]:
    """What a token costs on own hardware, in proportion to the starter model's price in the edge's file."""
    ratio = max(1, parameters) / _STARTER_PARAMETERS
    return {
        "kind": "Price", "name": name, "currency": "USD",
        "input_per_mtok": f"{0.008 * ratio:.6f}", "output_per_mtok": f"{0.027 * ratio:.6f}",
        "source": "own hardware, assumed: the starter model's 0.008 and 0.027 USD, "
        f"times {ratio:.2f} for the number of parameters",
        "date": today,
    }  # fmt: skip


def guess_quality(parameters: int) -> float:
    """A prior from the number of parameters: 0.3 for the starter model's 135 M, 0.2 more for ten times that.

    It only orders models among themselves; `--quality` states a better figure.
    """
    return round(min(0.95, max(0.05, 0.3 + 0.2 * log10(max(parameters, 1) / _STARTER_PARAMETERS))), 2)


def default_name(source: str) -> str:
    """A name from a file's name: lower case, and what a name may not hold becomes a dash."""
    stem = Path(urlsplit(source).path if "://" in source else source).name
    if stem.lower().endswith(".gguf"):
        stem = stem[: -len(".gguf")]
    kept = "".join(one if one.isascii() and (one.isalnum() or one in "._") else "-" for one in stem.lower())
    name = kept.strip("._-")[:128].strip("._-")
    if not name:
        raise CommandFailed(f"no name can be made from {source!r}; give one with --name.")
    return name


def _store(layout: Layout, source: str, name: str, *, quiet: bool) -> StoredModel:
    """Put the file into the store, with a bar on a terminal."""
    store = ModelStore(layout.models)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    screen = console(stderr=True)
    with Progress(*columns, console=screen, disable=quiet or not screen.is_terminal, transient=True) as bar:
        task = bar.add_task(f"adding {name}", total=None)

        def progress(done: int, total: int | None) -> None:
            bar.update(task, completed=done, total=total)

        if "://" in source:
            return store.add_url(source, name, progress)
        return store.add_file(Path(source), name, progress)


def _read(path: Path) -> str:
    """The text with its line ends as they are."""
    return path.read_bytes().decode("utf-8-sig")


def _wait_loaded(layout: Layout, deployment: str, *, quiet: bool) -> str:
    """What became of it: `ready`, `loads at the next start`, or `failed: …`."""
    try:
        running = layout.running()
    except CommandFailed:
        return "loads at the next start"
    where = Target(url=running.edge.url, key=running.admin_key)
    with console(stderr=True).status("the running edge loads it …") if not quiet else nullcontext():
        return asyncio.run(_loaded(where, deployment, layout))


async def _loaded(where: Target, deployment: str, layout: Layout) -> str:
    limit_s = time.monotonic() + LOAD_TIMEOUT_S
    problem = "the edge has not read its file again"
    async with Asker(where) as asker:
        await asker.post("/v1/ondol/reload", {})
        while time.monotonic() < limit_s:
            status = await asker.get("/v1/ondol/status")
            ours = [one for one in status["endpoints"] if one["deployment"] == deployment]
            if ours and ours[0]["problem"] is None:
                return "ready"
            if ours:
                problem = ours[0]["problem"]
            await asyncio.sleep(_POLL_S)
    return f"failed: {problem} (after {LOAD_TIMEOUT_S:.0f} s; see {layout.log('edge')})"


def _tell(added: Added, header: GgufHeader, path: Path, directory: Path) -> None:
    where = "" if directory == DEFAULT_DIR else f" --dir {directory}"
    print(
        f"{added.name}: {header.architecture}, {_millions(header.parameters)} parameters, "
        f"{header.quantisation}; stored as {added.digest[:19]}…"
    )
    print(f"{path}: added Model and Deployment {added.name!r}; routes: {', '.join(added.routes)}")
    match added.state:
        case "ready":
            print("the running edge has loaded it")
        case "loads at the next start":
            print("nothing runs here now; it is loaded when `ondol up` starts")
        case _:
            print(added.state)
    if added.name in added.routes:
        print(f'ask it by name:  ondol chat{where} --model {added.name} "…"')
    by_quality = f'ondol chat{where} --model {added.routes[0]} --objective best "…"'
    print(f"or let the route choose, by quality:  {by_quality}")


def one_mb(size_bytes: Any) -> str:
    """Bytes as megabytes."""
    return significant(int(size_bytes) / 1e6, 3)


def _millions(parameters: Any) -> str:
    count = int(parameters)
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.0f} M"


def _routes_by_digest(layout: Layout) -> dict[str, list[str]]:
    """The edge's routes by the digest of the models behind them."""
    path = layout.config("edge")
    if not path.exists():
        return {}
    catalog = configuration.load(path)
    found: dict[str, list[str]] = {}
    for route in catalog.routes.values():
        for name in route.deployments:
            deployment = catalog.deployments[name]
            digest = catalog.models[deployment.model].digest
            routes = found.setdefault(digest, []) if digest is not None else []
            if deployment.engine == "llamacpp" and route.name not in routes:
                routes.append(route.name)
    return found
